"""The host side of the GPU ops on tensors of the meta device, which hold no data.

They cannot be read and meet none of another device: whatever would wait for a GPU, or mix devices,
raises. What kernels compute is tested in `tests/ops/triton`.
"""

import gc
from dataclasses import replace
from weakref import ref

import pytest
import torch

pytest.importorskip("triton")

from vllm_attentionpack import ops
from vllm_attentionpack.bench.compile_table import recording
from vllm_attentionpack.bench.shapes import LayerShape
from vllm_attentionpack.codec.positions import Anchors, Rotary
from vllm_attentionpack.errors import ConfigError
from vllm_attentionpack.ops import QueryBatch, fresh_gpu
from vllm_attentionpack.ops import triton as kernels
from vllm_attentionpack.ops.triton import prepared
from vllm_attentionpack.ops.triton.chip import Chip

H200 = Chip(132, 227 * 1024, 9)
BLOCK_SIZE, SINKS, WINDOW = 32, 4, 16


META = torch.device("meta")


def step(layer, query_len, requests=3):
    tokens = query_len * requests
    starts = list(range(0, tokens + 1, query_len))
    loc = torch.empty(requests + 1, dtype=torch.int32, device=META)
    batch = QueryBatch.build(starts, [900] * requests, META, loc)
    query, key, value = (
        torch.empty(tokens, heads, layer.head_size, dtype=torch.bfloat16, device=META)
        for heads in (layer.query_heads, layer.kv_heads, layer.kv_heads)
    )
    return batch, query, key, value


def test_such_a_tensor_cannot_be_waited_for():
    with pytest.raises(RuntimeError, match="meta"):
        torch.zeros(2, device=META).sum().item()
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(2, device=META) + torch.zeros(2)


@pytest.mark.parametrize("modalities", [1, 2])
@pytest.mark.parametrize("query_len", [1, 3])
def test_a_step_beside_an_exact_window_waits_for_nothing(modalities, query_len):
    """Decoding and verification: the whole of what `AttentionPackImpl` computes in a step."""
    layer = LayerShape(8, 4, 64, 2, 4, modalities)
    codec = layer.codec(META)
    batch, query, key, value = step(layer, query_len)
    tokens, requests = len(query), len(batch.host_starts) - 1
    cache = torch.empty(40, codec.layout.block_bytes(BLOCK_SIZE), dtype=torch.uint8, device=META)
    pages = torch.empty(50, 16, 2, 4, 64, dtype=torch.bfloat16, device=META)
    slots = torch.empty(tokens, dtype=torch.int64, device=META)
    visual = torch.empty(tokens, dtype=torch.bool, device=META) if modalities == 2 else None
    table = torch.empty(requests, 64, dtype=torch.int32, device=META)
    context = torch.empty(requests, dtype=torch.int32, device=META)
    room = ops.ExactTokens.empty(requests + 1, SINKS, WINDOW, META)
    with recording(H200) as launched:
        kernels.reserve(tokens, tokens, layer.query_heads, codec)
        kernels.store_kv(key, value, cache, slots, visual, codec, BLOCK_SIZE)
        ops.store_exact(key, value, pages, slots)
        exact = ops.locate_exact(table, context, 16, SINKS, WINDOW).kept_in(room)
        attended = kernels.paged_attention(
            kernels.absorb_query(query, codec, 0.1),
            cache,
            table,
            exact.starts,
            exact.stops,
            batch,
            codec,
            BLOCK_SIZE,
            False,
        )
        provider = fresh_gpu.single_tokens if query_len == 1 else fresh_gpu.sdpa
        more = () if query_len == 1 else (batch,)
        parts = [
            provider(query, key, value, *more, 0.1),
            ops.exact_attention(query, pages, exact, batch, 0.1),
            (kernels.up_project(attended, codec), attended.lse),
        ]
        out = ops.merge_attention(*parts)[0]
    assert out.shape == query.shape and out.device == META
    names = [launch.kernel.__name__ for launch in launched]
    assert names == [
        "store_kernel",
        "absorb_kernel",
        "attend_kernel",
        "merge_kernel",
        "up_project_kernel",
    ]


def test_keys_and_values_go_in_one_launch_that_covers_every_token():
    layer = LayerShape(8, 4, 64, 2, 4)
    codec = layer.codec(META)
    _, _, key, value = step(layer, 1, requests=37)
    cache = torch.empty(9, codec.layout.block_bytes(16), dtype=torch.uint8, device=META)
    slots = torch.empty(37, dtype=torch.int64, device=META)
    with recording(H200) as launched:
        kernels.store_kv(key, value, cache, slots, None, codec, 16)
    (launch,) = launched
    programs, groups, kinds = launch.grid
    assert (groups, kinds) == (2, 2)
    assert (programs - 1) * launch.arguments["TOKENS"] < 37
    assert programs * launch.arguments["TOKENS"] >= 37


@pytest.mark.parametrize("layer", [LayerShape(64, 8, 128, 1, 8, 2), LayerShape(32, 32, 128, 1, 8)])
def test_grids_stay_within_what_cuda_allows(layer):
    """The second and third number of a grid end at 65,535: whatever grows must be the first."""
    codec = layer.codec(META)
    tokens = 1 << 18
    batch, query, key, value = step(layer, tokens, requests=1)
    cache = torch.empty(9, codec.layout.block_bytes(16), dtype=torch.uint8, device=META)
    slots = torch.empty(tokens, dtype=torch.int64, device=META)
    table = torch.empty(1, 1 << 14, dtype=torch.int32, device=META)
    lens = torch.empty(1, dtype=torch.int32, device=META)
    with recording(H200) as launched:
        kernels.store_kv(key, value, cache, slots, None, codec, 16)
        absorbed = kernels.absorb_query(query, codec, 1.0)
        attended = kernels.paged_attention(
            absorbed, cache, table, None, lens, batch, codec, 16, True
        )
        kernels.up_project(attended, codec)
    for launch in launched:
        first, *others = launch.grid
        assert first < 1 << 31
        assert max(others) <= 65535, launch.kernel.__name__
    assert len(launched) == 5


def test_memory_of_splits_is_bounded_by_the_chip():
    """Where requests are few the splits are many: latents of all programs at a time, no more."""
    layer = LayerShape(32, 8, 128, 8, 8)
    codec = layer.codec(META)
    columns = 32 * 576  # of 32 query heads
    for requests in (1, 4, 100, 1000):
        batch, query, _, _ = step(layer, 1, requests)
        batch = replace(batch, max_seq_lens=(1 << 17,) * requests)
        cache = torch.empty(9, codec.layout.block_bytes(16), dtype=torch.uint8, device=META)
        table = torch.empty(requests, 1 << 14, dtype=torch.int32, device=META)
        lens = torch.empty(requests, dtype=torch.int32, device=META)
        with recording(H200) as launched:
            absorbed = kernels.absorb_query(query, codec, 1.0)
            kernels.paged_attention(absorbed, cache, table, None, lens, batch, codec, 16, False)
        parts = launched[1].arguments["latent"]
        assert parts.numel() <= max(requests, 132) * columns


def test_what_is_prepared_for_a_codec_goes_with_it():
    """Bases on the device: a second engine of the process would find no room beside the first's."""
    codec = LayerShape(8, 4, 64, 2, 4).codec(META)
    with recording(H200):
        kernels.reserve(1, 1, 8, codec)
    made = ref(prepared.prepare(codec))
    assert made() is not None
    del codec
    gc.collect()
    assert made() is None


def test_pre_rope_planes_in_wide_groups_are_refused():
    """What is rebuilt of them fits neither registers nor, on most chips, shared memory."""
    codec = LayerShape(8, 4, 128, 4, 8).codec(META)
    codec.anchors = Anchors(Rotary(torch.ones(64, dtype=torch.float64)), 64, 10)
    with recording(H200), pytest.raises(ConfigError, match=r"512 dims(.|\n)*smaller --group-size"):
        prepared.prepare(codec)
