"""The CPU benchmarks: their shapes are what they say, and rows come out whole."""

import json

import pytest
import torch
from typer.testing import CliRunner

from vllm_attentionpack.bench import cpu_engine, cpu_ops
from vllm_attentionpack.bench.cpu_engine import Setup
from vllm_attentionpack.bench.synthetic import (
    synthetic_codec,
    synthetic_heads,
    synthetic_layout,
    synthetic_pack,
)
from vllm_attentionpack.bench.timing import alternate
from vllm_attentionpack.cli import app
from vllm_attentionpack.errors import BudgetError, ConfigError
from vllm_attentionpack.packfile import Fingerprint, load_pack, save_pack


@pytest.mark.parametrize(("ratio", "group"), [(8, 8), (4, 8), (8, 2)])
def test_layouts_reach_the_ratio(ratio, group):
    layout = synthetic_layout(8, group, 128, ratio)
    assert ratio <= layout.compression_ratio < 1.02 * ratio
    assert layout.num_kv_heads == 8


def test_the_codec_suits_the_data():
    codec = synthetic_codec(4, 2, 32, 4)
    heads = synthetic_heads(256, 4, 2, 32).float()
    assert abs(heads.square().mean().item() - 1) < 0.2
    part = codec.groups[0].key
    x = heads[:, :2].flatten(1)
    error = part.reconstruct(*part.encode(x, None), torch.zeros(256, dtype=torch.bool)) - x
    assert error.square().mean().item() < 0.05


def test_packs_can_be_saved_and_loaded(tmp_path):
    fingerprint = Fingerprint(
        architecture="LlamaForCausalLM",
        num_layers=2,
        num_query_heads=8,
        num_kv_heads=4,
        head_size=32,
        rope="{}",
    )
    pack = synthetic_pack(fingerprint, ["a", "b"], 4, 8, 1024)
    save_pack(pack, tmp_path / "p.safetensors")
    loaded = load_pack(tmp_path / "p.safetensors")
    assert loaded.header == pack.header
    assert loaded.header.compression_ratio >= 8


def test_medians_of_alternating_runs():
    calls = []
    pair = alternate(lambda: calls.append("dense"), lambda: calls.append("ours"), 3)
    assert calls == ["dense", "dense", "ours", "ours"] * 3
    assert pair.speedup == pair.dense_ms / pair.ours_ms


def test_ours_computes_attention():
    """What is timed is right: on one token, attention is its value."""
    case = cpu_ops.Case("tiny", 2, 2048, 8, 4, 4, 4, 1)
    run, cache_bytes, macs = cpu_ops._our_decode(case)
    out = run()
    assert out.shape == (2, 8, cpu_ops.HEAD_SIZE)
    assert torch.isfinite(out).all() and out.abs().max() > 0
    layout = synthetic_layout(4, 4, cpu_ops.HEAD_SIZE, 4)
    assert cache_bytes == 2 * 2048 * layout.bytes_per_token
    assert macs == 2 * 2048 * 8 * (
        layout.groups[0].key.num_columns + layout.groups[0].value.num_columns
    )


def test_the_engine_setup_holds_its_batch_densely():
    setup = Setup(layers=2, context=1000, batch=3, new_tokens=8)
    dense = setup.layers * setup.kv_heads * setup.head_size * 4
    assert setup.kv_bytes >= setup.batch * (setup.context + setup.new_tokens) * dense


def test_rows_are_json():
    row = cpu_ops.Row("a", 2.0, 1.0, 2.0, 3.0, 0.1, 0.2, 0.3, 0.4)
    fields = json.loads(json.dumps(row.to_dict()))
    assert {"name", "dense_ms", "ours_ms", "speedup", "goal"} <= set(fields)


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("ops", "--repeats", 0),
        ("ops", "--threads", 0),
        ("engine", "--layers", 0),
        ("engine", "--context", -5),
        ("engine", "--batch", 0),
        ("engine", "--new-tokens", 1),
        ("engine", "--window", -1),
    ],
)
def test_numbers_out_of_range_are_refused(command, option, value):
    result = CliRunner().invoke(app, ["bench", command, option, str(value)])
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.output


@pytest.mark.parametrize(
    ("setup", "error", "said"),
    [
        (Setup(group=3), ConfigError, "the group size is 3, but the model has 8 KV heads"),
        (Setup(ratio=1000), BudgetError, "ratio of 1000 cannot be met"),
    ],
)
def test_packs_that_cannot_be_made_are_refused_before_the_dense_run(
    monkeypatch, setup, error, said
):
    monkeypatch.setattr(cpu_engine, "_run", lambda *_: pytest.fail("an engine was started"))
    with pytest.raises(error, match=said):
        cpu_engine.compare(setup)


@pytest.mark.parametrize("command", ["ops", "engine"])
def test_other_devices_are_refused(command):
    result = CliRunner().invoke(app, ["bench", command, "--device", "abacus"])
    assert isinstance(result.exception, ConfigError)
    assert "abacus" in str(result.exception)
