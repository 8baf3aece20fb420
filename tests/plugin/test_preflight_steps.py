"""Start-up checks: what differs from step to step, and where vLLM cannot tell a layer of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.config.compilation import CompilationConfig, CUDAGraphMode

from tests.support.configurations import NAMES, PRINT, engine, model, refusal
from tests.support.packs import identity_pack
from vllm_attentionpack.attention.preflight import check
from vllm_attentionpack.codec.codec import Basis
from vllm_attentionpack.codec.positions import Anchors, Rotary
from vllm_attentionpack.errors import ConfigError
from vllm_attentionpack.packfile import LayerPack, Pack, save_pack


@pytest.fixture
def pack_of_two_modalities(tmp_path) -> Path:
    pack = identity_pack(PRINT, NAMES, heads_per_group=2)
    layers = [
        LayerPack(
            bases=[
                {k: Basis(**{n: torch.cat([t, t]) for n, t in b.tensors().items()}) for k, b in g}
                for g in map(dict.items, layer.bases)
            ],
            variance=[{k: torch.cat([v, v]) for k, v in g.items()} for g in layer.variance],
        )
        for layer in pack.layers
    ]
    path = tmp_path / "two.pack.safetensors"
    save_pack(Pack(pack.header.model_copy(update={"num_modalities": 2}), layers), path)
    return path


@pytest.fixture
def anchored_pack(tmp_path) -> Path:
    anchors = Anchors(Rotary(torch.ones(16, dtype=torch.float64)), 512)
    path = tmp_path / "anchored.pack.safetensors"
    save_pack(identity_pack(PRINT, NAMES, heads_per_group=2, anchors=anchors), path)
    return path


def test_pipeline_stages_do_not_know_the_modality(pack_of_two_modalities):
    parallel = {"pipeline_parallel_size": 2}
    message = refusal(ConfigError, engine(pack_of_two_modalities, parallel_config=parallel))
    assert "--pipeline-parallel-size is 2" in message and "only the first stage" in message
    assert "modalities: 1" in message
    check(engine(pack_of_two_modalities))


def test_micro_batches_do_not_know_the_modality(pack_of_two_modalities, pack):
    parallel = {"use_ubatching": True}
    message = refusal(ConfigError, engine(pack_of_two_modalities, parallel_config=parallel))
    assert "--enable-dbo" in message and "modalities: 1" in message
    check(engine(pack, parallel_config=parallel))


@pytest.mark.parametrize("how", ["partition", "breakable"])
def test_graphs_do_not_know_the_modality(how, pack_of_two_modalities, pack, monkeypatch):
    """What a graph captures of a step is the same in all: it may not hold the cache update."""

    def asked(mode):
        changes = {"cudagraph_mode": mode}
        if how == "partition":
            changes["splitting_ops"] = list(CompilationConfig._attention_ops)
        return {"compilation_config": changes}

    if how == "breakable":
        monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    piecewise = asked(CUDAGraphMode.FULL_AND_PIECEWISE)
    message = refusal(ConfigError, engine(pack_of_two_modalities, **piecewise))
    assert "FULL_DECODE_ONLY" in message and "modalities: 1" in message
    check(engine(pack, **piecewise))
    for mode in (CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.NONE):
        check(engine(pack_of_two_modalities, **asked(mode)))


def test_micro_batches_do_not_know_their_anchors(anchored_pack, pack):
    parallel = {"use_ubatching": True}
    message = refusal(ConfigError, engine(anchored_pack, parallel_config=parallel))
    assert "--enable-dbo" in message and "--anchor-span 0" in message
    check(engine(pack, parallel_config=parallel))
    # Nothing is turned where every request lies within the first span.
    check(engine(anchored_pack, parallel_config=parallel, model=model(max_model_len=512)))


def test_graphs_do_not_know_their_anchors(anchored_pack, pack):
    splitting = {"splitting_ops": list(CompilationConfig._attention_ops)}
    message = refusal(ConfigError, engine(anchored_pack, compilation_config=splitting))
    assert "piecewise CUDA graphs" in message and "--anchor-span 0" in message
    check(engine(pack, compilation_config=splitting))
    check(engine(anchored_pack))


def test_pruned_videos_move_what_was_anchored(anchored_pack):
    pruned = SimpleNamespace(is_multimodal_pruning_enabled=lambda: True)
    asked = model(uses_mrope=True, multimodal_config=pruned)
    message = refusal(ConfigError, engine(anchored_pack, model=asked))
    assert "--video-pruning-rate" in message and "--anchor-span 0" in message
