"""The two caches of pipeline stages whose layers have different bytes, in vLLM's own grouping."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from tests.support.cases import random_codec
from tests.support.packs import pack_of
from vllm_attentionpack.attention.state import EngineState
from vllm_attentionpack.attention.window import ExactWindowLayer
from vllm_attentionpack.codec.layout import PlaneCounts
from vllm_attentionpack.config import ServeConfig
from vllm_attentionpack.kv_cache.spec import compacted_spec
from vllm_attentionpack.packfile import Fingerprint

HEADS, HEAD_SIZE, LAYERS, STAGES = 2, 64, 4, 2
NAMES = [f"model.layers.{i}.attn" for i in range(LAYERS)]
#: As calibration gives them: more to the first layers.
DIMS_OF_4_BITS = (64, 56, 48, 48)


@pytest.fixture
def pack():
    planes = [PlaneCounts(n4=n) for n in DIMS_OF_4_BITS]
    return pack_of(
        lambda i: random_codec(HEADS, HEADS, HEAD_SIZE, key=planes[i], value=planes[i], seed=i),
        Fingerprint(
            architecture="TestForCausalLM",
            num_layers=LAYERS,
            num_query_heads=4,
            num_kv_heads=HEADS,
            head_size=HEAD_SIZE,
            rope="{}",
        ),
        NAMES,
    )


def stage(pack, names, monkeypatch):
    """The specs that a worker with the layers `names` gives to vLLM."""
    config = SimpleNamespace(
        cache_config=SimpleNamespace(user_specified_block_size=False),
        max_concurrent_batches=1,
        num_speculative_tokens=0,
        num_lookahead_tokens=0,
    )
    unused = dict.fromkeys(("ops", "ops_name", "fresh_attention", "prefill"))
    state = EngineState(
        config=ServeConfig(pack="unused", sinks=4, window=64),
        pack=pack,
        tp_size=1,
        tp_rank=0,
        num_stages=STAGES,
        device=torch.device("cpu"),
        layers={},
        max_model_len=1024,
        **unused,
    )
    attention = SimpleNamespace(
        num_heads=4,
        num_kv_heads=HEADS,
        head_size=HEAD_SIZE,
        kv_cache_torch_dtype=torch.bfloat16,
    )
    owners = dict.fromkeys(names, attention)
    monkeypatch.setattr(EngineState, "compacted_layers", owners)
    monkeypatch.setattr(EngineState, "shares_pool", False)
    dense = FullAttentionSpec(
        block_size=128, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.bfloat16
    )
    pages = state.pages(dense, config)
    specs = {n: compacted_spec(dense, state.codec(n).layout, pages.block_size) for n in names}
    exact = ExactWindowLayer(names[0] + ".exact", owners, state)
    specs[exact.name] = exact.get_kv_cache_spec(config)
    assert sum(specs[n].page_size_bytes for n in names) <= pages.page_bytes
    assert specs[exact.name].page_size_bytes <= pages.page_bytes
    return specs


def test_stages_share_their_groups(pack, monkeypatch):
    """A group of which a stage has no layer makes vLLM fail, and takes blocks from all of them."""
    half = LAYERS // STAGES
    first, second = (stage(pack, NAMES[i : i + half], monkeypatch) for i in (0, half))
    assert sum(s.page_size_bytes for s in first.values()) != sum(
        s.page_size_bytes for s in second.values()
    )
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        kv_transfer_config=None,
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: KVCacheLayout.BLHNC),
    )
    groups = get_kv_cache_groups(config, {**first, **second})
    names = {frozenset(group.layer_names) for group in groups}
    exact = frozenset(n for n in (*first, *second) if n.endswith(".exact"))
    assert names == {frozenset(NAMES), exact}
