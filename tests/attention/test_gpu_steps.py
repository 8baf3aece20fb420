"""Steps of a layer on tensors without data: nothing waits for a device, graphs find what changes.

See `tests/ops/test_gpu_host.py` for what the meta device shows.
"""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

pytest.importorskip("triton")

from vllm_attentionpack.attention import impl as impl_module
from vllm_attentionpack.attention import metadata as metadata_module
from vllm_attentionpack.attention import state as state_module
from vllm_attentionpack.attention.impl import AttentionPackImpl
from vllm_attentionpack.attention.metadata import AttentionPackMetadataBuilder
from vllm_attentionpack.attention.state import EngineState
from vllm_attentionpack.bench import compile_table
from vllm_attentionpack.bench.compile_table import recording, variant_key
from vllm_attentionpack.bench.shapes import LayerShape
from vllm_attentionpack.codec.positions import Anchors, Rotary
from vllm_attentionpack.ops import fresh_gpu
from vllm_attentionpack.ops import spans as spans_module
from vllm_attentionpack.ops import triton as kernels
from vllm_attentionpack.ops.exact import ExactTokens
from vllm_attentionpack.ops.triton.chip import Chip

META, CPU = torch.device("meta"), torch.device("cpu")
LAYER = LayerShape(8, 4, 64, 2, 4)
LONGEST, MOST_REQUESTS, BLOCK_SIZE = 4096, 8, 32
BLOCKS = LONGEST // BLOCK_SIZE


def builder(device, span=0, pre_rope=0):
    made = object.__new__(AttentionPackMetadataBuilder)
    made.device = device
    made.ops, made.block_size, made.span = kernels, BLOCK_SIZE, span
    most = -(-LONGEST // span) if span else 0
    made.anchors = torch.zeros(MOST_REQUESTS + 1, most, dtype=torch.int64, device=device)
    made.dense_prefill = None
    made.pre_rope, made.positions = bool(pre_rope), None
    made.context_lens = torch.zeros(MOST_REQUESTS + 1, dtype=torch.int32, device=device)
    made.vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=LONGEST))
    return made


def common(device, query_lens, seq_lens):
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0).int()
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    requests, tokens = len(query_lens), sum(query_lens)
    return CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=lens.to(device),
        num_reqs=requests,
        num_actual_tokens=tokens,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.zeros(requests, BLOCKS, dtype=torch.int32, device=device),
        slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=device),
        seq_lens_cpu_upper_bound=lens,
    )


def test_metadata_is_built_from_what_the_host_knows():
    for query_lens, seq_lens in (([1, 1, 1], [9, 40, 1]), ([4, 4], [70, 4]), ([1, 30], [5, 30])):
        made = builder(META).build(0, common(META, query_lens, seq_lens))
        assert made.batch.max_query_len == max(query_lens)
        assert made.batch.max_seq_lens == tuple(seq_lens)
    assert not builder(META).build(0, common(META, [30, 4], [30, 4])).has_context


def test_a_captured_graph_finds_what_changes_where_it_was():
    made = builder(CPU)
    captured = made.build_for_cudagraph_capture(common(CPU, [1, 1, 1, 1], [1, 1, 1, 1]))
    assert captured.has_context and captured.batch.max_seq_lens == (LONGEST,) * 4
    replayed = made.build(0, common(CPU, [1, 1], [40, 7]))
    assert replayed.context_lens.data_ptr() == captured.context_lens.data_ptr()
    assert captured.context_lens[:2].tolist() == [39, 6]


def test_a_captured_graph_finds_anchors_where_they_were(monkeypatch):
    made = builder(CPU, span=256)
    captured = made.build_for_cudagraph_capture(common(CPU, [1, 1, 1, 1], [1, 1, 1, 1]))
    assert captured.spans.anchors.shape == (4, LONGEST // 256)
    (rows,) = captured.spans._rows
    assert len(rows.requests) == 4 * LONGEST // 256
    told = torch.tensor([[0, 200, 300], [0, 256, 512]])
    monkeypatch.setattr(metadata_module, "positions_every", lambda *args: told)
    made.build(0, common(CPU, [1, 1], [700, 513]))
    assert torch.equal(captured.spans.anchors[:2, :3], told)


def test_what_was_made_before_a_capture_is_not_used_in_it(monkeypatch):
    """vLLM runs a step before it captures the same one."""
    spans = builder(CPU, span=256).build(0, common(CPU, [1, 1], [700, 513])).spans
    rotary = Rotary(torch.tensor([0.5, 0.25], dtype=torch.float64))
    key = torch.ones(2, 1, 4)
    anchors = Anchors(rotary, 256)
    before = spans.turn_new_keys(key, anchors)
    spans.anchors[:] += 1
    assert torch.equal(spans.turn_new_keys(key, anchors), before)
    monkeypatch.setattr(spans_module, "_capturing", lambda device: True)
    assert not torch.equal(spans.turn_new_keys(key, anchors), before)


def capturing(tokens):
    return SimpleNamespace(compilation_config=SimpleNamespace(max_cudagraph_capture_size=tokens))


def layer_impl(codec, provider):
    impl = object.__new__(AttentionPackImpl)
    impl.num_heads, impl.num_kv_heads, impl.head_size = LAYER.query_heads, LAYER.kv_heads, 64
    impl.scale, impl.codec = 0.125, codec
    impl.state = SimpleNamespace(
        ops=kernels,
        has_exact_cache=False,
        fresh_attention=provider,
        config=SimpleNamespace(exact_prefill=True),
    )
    return impl


def single(query, key, value, batch, scale):
    return fresh_gpu.single_tokens(query, key, value, scale)


class ExactLayer:
    """The companion of one layer: pages without data."""

    name = "exact"

    def pages(self, owner):
        return torch.empty(20, 8, 2, LAYER.kv_heads, 64, dtype=torch.bfloat16, device=META)


def anchored(codec, span, pre_rope):
    if span:
        rotary = Rotary(torch.ones(32, dtype=torch.float64)).to(META)
        codec.anchors = Anchors(rotary, span, pre_rope)
    return codec


KEYS = pytest.mark.parametrize(("span", "pre_rope"), [(0, 0), (1024, 0), (256, 5)])


@KEYS
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("query_len", [1, 3])
def test_a_layer_waits_for_nothing_and_launches_alike_for_every_context(
    query_len, exact, span, pre_rope, monkeypatch
):
    """Decoding and verification of drafts, in a batch that is padded as a graph pads it."""
    codec = anchored(LAYER.codec(META), span, pre_rope)
    impl = layer_impl(codec, single if query_len == 1 else fresh_gpu.sdpa)
    layer = SimpleNamespace(layer_name="layer")
    impl.state.has_exact_cache, impl.state.exact_layers = exact, {"layer": ExactLayer()}
    tokens = 4 * query_len
    query, key, value = (
        torch.empty(tokens + 2, heads, 64, dtype=torch.bfloat16, device=META) for heads in (8, 4, 4)
    )
    output = torch.empty(tokens + 2, 8 * 64, dtype=torch.bfloat16, device=META)
    width = codec.layout.bytes_per_token
    cache = torch.empty(40, 1, BLOCK_SIZE, width, dtype=torch.uint8, device=META)
    seen = []
    made = builder(META, span, pre_rope)
    for lens in ([9, 40, 3, 900], [LONGEST] * 4):
        step = common(META, [query_len] * 4, lens)
        metadata = made.build_for_cudagraph_capture(step)
        context = SimpleNamespace(
            slot_mapping={"exact": step.slot_mapping},
            attn_metadata={
                "layer": metadata,
                "exact": SimpleNamespace(tokens=ExactTokens.empty(4, 4, 64, META)),
            },
        )
        monkeypatch.setattr(impl_module, "get_forward_context", lambda found=context: found)
        with recording(Chip(132, 227 * 1024, 9)) as launched:
            impl.do_kv_cache_update(layer, key, value, cache, metadata.slot_mapping)
            assert impl.forward(layer, query, key, value, cache, metadata, output) is output
        seen.append([(launch.kernel, launch.grid, launch.options) for launch in launched])
    # encoding, absorb, attend, merge of splits, up-project, exact tokens, merge of parts
    assert seen[0] == seen[1] and len(seen[0]) == 6 + exact


@KEYS
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tokens", [1, 40, 3000])
def test_what_a_step_launches_is_compiled_before(tokens, exact, span, pre_rope, monkeypatch):
    """A chunk that finds a context would wait for the compiler, which takes seconds a kernel."""
    codec = anchored(LAYER.codec(META), span, pre_rope)
    kept = (4, 64, 8) if exact else None
    with recording(Chip(132, 227 * 1024, 9)) as early:
        kernels.warm_up(LAYER.query_heads, torch.bfloat16, codec, BLOCK_SIZE, LONGEST, kept)
    impl = layer_impl(codec, single if tokens == 1 else fresh_gpu.sdpa)
    layer = SimpleNamespace(layer_name="layer")
    impl.state.has_exact_cache, impl.state.exact_layers = exact, {"layer": ExactLayer()}
    query, key, value = (
        torch.empty(tokens, heads, 64, dtype=torch.bfloat16, device=META) for heads in (8, 4, 4)
    )
    width = codec.layout.bytes_per_token
    cache = torch.empty(40, 1, BLOCK_SIZE, width, dtype=torch.uint8, device=META)
    step = common(META, [tokens], [LONGEST])
    metadata = builder(META, span, pre_rope).build(0, step)
    context = SimpleNamespace(
        slot_mapping={"exact": step.slot_mapping},
        attn_metadata={
            "layer": metadata,
            "exact": SimpleNamespace(tokens=ExactTokens.empty(1, 4, 64, META)),
        },
    )
    monkeypatch.setattr(impl_module, "get_forward_context", lambda: context)
    with recording(Chip(132, 227 * 1024, 9)) as launched:
        impl.do_kv_cache_update(layer, key, value, cache, metadata.slot_mapping)
        impl.forward(layer, query, key, value, cache, metadata, torch.empty_like(query))
    compiled = {variant_key(launch, 90) for launch in early}
    late = [x.kernel.__name__ for x in launched if variant_key(x, 90) not in compiled]
    assert not late


def test_a_profiling_run_takes_the_memory_of_a_step():
    """vLLM takes what it measures then from what it gives to the caches."""
    codec = LAYER.codec(CPU)
    taken = []
    impl = layer_impl(codec, None)
    impl.state.ops = SimpleNamespace(reserve=lambda *args: taken.append(args))
    output = torch.ones(50, 8 * 64)
    query = torch.empty(50, 8, 64)
    assert impl.forward(None, query, query, query, torch.empty(0), None, output) is output
    assert taken == [(50, 50, 8, codec)] and not output.any()


@pytest.mark.parametrize(
    ("ops", "prefill", "exact", "wanted"),
    [
        ("triton", "flash_attn", True, AttentionCGSupport.UNIFORM_BATCH),
        ("triton", "sdpa", True, AttentionCGSupport.UNIFORM_BATCH),
        ("triton", "xformers", True, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
        ("triton", "flash_attn", False, AttentionCGSupport.NEVER),
        ("reference", "sdpa", True, AttentionCGSupport.NEVER),
    ],
)
def test_which_batches_are_captured(ops, prefill, exact, wanted):
    state = SimpleNamespace(
        ops_name=ops,
        prefill=prefill,
        config=SimpleNamespace(exact_prefill=exact),
        span=0,
    )
    assert EngineState.cudagraph_support(state, capturing(512)) == wanted


@pytest.mark.parametrize(("longest", "captured"), [(1 << 15, True), (1 << 17, False)])
def test_graphs_that_would_do_the_work_of_too_many_spans_are_not_captured(longest, captured):
    state = object.__new__(EngineState)
    state.ops_name, state.prefill, state.max_model_len = "triton", "flash_attn", longest
    state.config = SimpleNamespace(exact_prefill=True)
    state.pack = SimpleNamespace(header=SimpleNamespace(anchor_span=1024))
    wanted = AttentionCGSupport.UNIFORM_BATCH if captured else AttentionCGSupport.NEVER
    assert state.cudagraph_support(capturing(256)) == wanted
    state.pack = SimpleNamespace(header=SimpleNamespace(anchor_span=4))  # keys are rebuilt
    assert state.cudagraph_support(capturing(1)) == AttentionCGSupport.NEVER


def test_the_cache_that_vllm_measures_graphs_with_is_not_the_one_reported(monkeypatch):
    """It is made before the number of blocks is known, and given back."""
    logged = []
    monkeypatch.setattr(state_module.logger, "info", lambda text, *args: logged.append(text % args))
    codec = LAYER.codec(META)
    state = SimpleNamespace(
        reported=False,
        pack=SimpleNamespace(header=SimpleNamespace(layers=())),
        num_stages=1,
        codecs={"layer": codec},
        shares_pool=False,
        geometry=None,
    )
    spec = SimpleNamespace(block_size=BLOCK_SIZE)
    for blocks in (None, 700, 700):
        config = SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=blocks))
        EngineState.report(state, spec, config)
    (line,) = logged
    assert f"{700 * BLOCK_SIZE} tokens fit (700 blocks of {BLOCK_SIZE})" in line


def test_a_profiling_run_takes_the_memory_of_turned_queries(monkeypatch):
    codec = LAYER.codec(CPU)
    codec.anchors = Anchors(Rotary(torch.ones(32, dtype=torch.float64)), 512)
    monkeypatch.setattr(impl_module, "MAX_TURNED", 300)
    taken = []
    impl = layer_impl(codec, None)
    impl.state.ops = SimpleNamespace(reserve=lambda *args: taken.append(args))
    impl.state.most_spans = 4
    query = torch.empty(50, 8, 64, dtype=torch.bfloat16)
    impl.forward(None, query, query, query, torch.empty(0), None, torch.ones(50, 512))
    assert taken == [(50, 300, 8, codec)]


def most_bytes(step):
    """How much memory of the CPU `step` holds at a time, beyond what it leaves behind."""
    with torch.profiler.profile(profile_memory=True) as seen:
        step()
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most - held


@pytest.mark.parametrize("ratio", [4, 16])
def test_what_is_reserved_covers_a_step(ratio, monkeypatch):
    """A long chunk beside codes and exact tokens, by a library that returns new tensors."""
    shape = LayerShape(16, 4, 64, 2, ratio)
    codec, tokens = shape.codec(CPU), 2048
    query, key, value = (
        torch.empty(tokens, heads, 64, dtype=torch.bfloat16) for heads in (16, 4, 4)
    )

    def library(query, key, value, batch, scale):
        return torch.empty_like(query), torch.empty(query.shape[:2])

    pages = torch.empty(20, 8, 2, 4, 64, dtype=torch.bfloat16)
    companion = SimpleNamespace(name="exact", pages=lambda owner: pages)
    impl = layer_impl(codec, library)
    impl.num_heads = 16
    impl.state.has_exact_cache, impl.state.exact_layers = True, {"layer": companion}
    cache = torch.empty(40, 1, BLOCK_SIZE, codec.layout.bytes_per_token, dtype=torch.uint8)
    metadata = builder(CPU).build(0, common(CPU, [tokens], [tokens + 900]))
    exact = SimpleNamespace(tokens=ExactTokens.empty(1, 4, 64, CPU))
    context = SimpleNamespace(attn_metadata={"layer": metadata, "exact": exact})
    monkeypatch.setattr(impl_module, "get_forward_context", lambda: context)
    output = torch.empty(tokens, 16 * 64, dtype=torch.bfloat16)
    layer = SimpleNamespace(layer_name="layer")
    # A launch that is kept keeps its tensors.
    monkeypatch.setattr(compile_table, "Launch", lambda *launch: None)
    with recording(Chip(132, 227 * 1024, 9)):

        def step():
            impl.forward(layer, query, key, value, cache, metadata, output)

        step()
        taken = most_bytes(step)
        reserved = most_bytes(lambda: kernels.reserve(tokens, tokens, 16, codec))
    assert taken <= 1.05 * reserved  # sums of weights and the like
    assert reserved <= 1.2 * taken, (reserved, taken)
