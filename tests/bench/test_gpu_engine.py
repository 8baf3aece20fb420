"""The engine part of the GPU check, as far as a CPU goes."""

import os
from importlib.metadata import distributions

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_attentionpack import plugin
from vllm_attentionpack.bench import gpu_engine
from vllm_attentionpack.bench.gpu_engine import (
    ENGINES,
    MODELS,
    TINY,
    engine_arguments,
    environment,
    run_engine,
)


@pytest.mark.parametrize("engine", ENGINES)
def test_arguments_are_those_of_this_vllm(engine, tmp_path):
    wanted = ENGINES[engine]
    arguments = EngineArgs(**engine_arguments(TINY, wanted, tmp_path))
    config = arguments.create_model_config()
    assert config.dtype == torch.bfloat16 and config.max_model_len == 64 + 4 + 16
    backend = wanted.get("attention_backend")
    assert backend is None or backend in AttentionBackendEnum.__members__
    assert (tmp_path / "random.pack.safetensors").exists() == (backend == "ATTENTIONPACK")


@pytest.mark.parametrize("model", MODELS.values())
def test_models_are_of_the_size_that_they_are_called_by(model):
    layer = model.layer
    attention = model.hidden * layer.head_size * 2 * (layer.query_heads + layer.kv_heads)
    per_layer = attention + 3 * model.hidden * model.intermediate
    billions = (model.layers * per_layer + 2 * 32000 * model.hidden) / 1e9
    assert 6.5 < billions < 8.1
    assert layer.layout().compression_ratio >= 8


def test_a_checkout_that_is_not_installed_is_found_as_a_plugin(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_engine, "entry_points", lambda group: [])
    settings = environment(tmp_path)
    assert settings["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)
    (found,) = (
        point
        for path in distributions(path=[str(tmp_path)])
        for point in path.entry_points
        if point.group == "vllm.general_plugins"
    )
    assert (found.name, found.load()) == ("attentionpack", plugin.register)
    monkeypatch.undo()
    other = tmp_path / "other"
    other.mkdir()
    environment(other)
    assert list(other.iterdir()) == []  # it is installed here


@pytest.mark.engine
@pytest.mark.usefixtures("no_engine")
def test_a_tiny_engine_is_measured_from_start_to_end():
    found = run_engine(TINY, ENGINES["ATTENTIONPACK"])
    assert found["ttft_seconds"] > 0 and found["decode_tokens_per_second"] > 0
    # 64 MiB hold 2 layers x 2 heads x 64 dims x 4 bytes of dense tokens, four times compressed;
    # of a block of 128 a request of the longest, 84 tokens, leaves the rest
    dense = (64 << 20) / (2 * 2 * 64 * 4)
    assert 3.5 * dense < found["cached_tokens"] * 128 / 84 < 4.5 * dense


@pytest.mark.engine
@pytest.mark.usefixtures("no_engine")
def test_what_exact_tokens_take_is_not_capacity():
    """Requests of 84 tokens, most of them exact: they take more than they would densely."""
    (engine,) = (name for name in ENGINES if name.endswith("exact"))
    found = run_engine(TINY, ENGINES[engine])
    assert 0 < found["cached_tokens"] < (64 << 20) / (2 * 2 * 64 * 4)
    assert found["largest_batch"] == found["cached_tokens"] // (64 + 4)
