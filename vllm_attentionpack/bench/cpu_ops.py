"""`attentionpack bench ops --device cpu`: our ops against vLLM's dense CPU attention."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from vllm_attentionpack.bench.synthetic import synthetic_codec, synthetic_heads
from vllm_attentionpack.bench.timing import alternate
from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.ops import QueryBatch, cpu

HEAD_SIZE = 128
BLOCK_SIZE = 128
#: Different tokens of a cache: encoding all of them would take longer than the measurement.
_DISTINCT_TOKENS = 2048


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: decoding one token per request."""

    name: str
    batch: int
    context: int
    heads: int
    kv_heads: int
    ratio: float
    group: int
    goal: float


@dataclass(frozen=True)
class Row:
    """Medians of alternating runs; `speedup` is dense time over ours, `goal` what it should be."""

    name: str
    dense_ms: float
    ours_ms: float
    speedup: float
    goal: float
    dense_gb_s: float
    ours_gb_s: float
    dense_gmac_s: float
    ours_gmac_s: float

    def to_dict(self) -> dict[str, object]:
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}


CASES = (
    Case("decode batch 4, 16k, 32/8 heads, ratio 8, G=8", 4, 16384, 32, 8, 8, 8, 3),
    Case("decode batch 4, 16k, 32/8 heads, ratio 4, G=8", 4, 16384, 32, 8, 4, 8, 2),
    Case("decode batch 4, 16k, 32/8 heads, ratio 8, G=2", 4, 16384, 32, 8, 8, 2, 5),
    Case("decode batch 4, 16k, 32/32 heads, ratio 8, G=8", 4, 16384, 32, 32, 8, 8, 4),
    Case("decode batch 1, 16k, 32/8 heads, ratio 8, G=8", 1, 16384, 32, 8, 8, 8, 3),
    Case("decode batch 16, 512, 32/8 heads, ratio 8, G=8", 16, 512, 32, 8, 8, 8, 1),
)
STORE = Case("store 2048 tokens, 8 heads, ratio 8, G=8", 1, 2048, 32, 8, 8, 8, 10)


def rows(repeats: int) -> Iterator[Row]:
    """All rows, the shapes of the decode table first and the store last."""
    for case in CASES:
        yield _decode_row(case, repeats)
    yield _store_row(STORE, max(1, repeats // 3))


def _decode_row(case: Case, repeats: int) -> Row:
    ours, cache_bytes, macs = _our_decode(case)
    dense, dense_bytes = _dense_attention(case, queries=1)
    pair = alternate(dense, ours, repeats)
    dense_macs = 2 * case.batch * case.context * case.heads * HEAD_SIZE
    return Row(
        case.name,
        pair.dense_ms,
        pair.ours_ms,
        pair.speedup,
        case.goal,
        dense_bytes / pair.dense_ms / 1e6,
        cache_bytes / pair.ours_ms / 1e6,
        dense_macs / pair.dense_ms / 1e6,
        macs / pair.ours_ms / 1e6,
    )


def _our_decode(case: Case) -> tuple[Callable[[], Tensor], int, int]:
    """Absorb, attend, up-project; the bytes of the cache and the multiply-adds on codes."""
    codec = synthetic_codec(case.kv_heads, case.group, HEAD_SIZE, case.ratio)
    cache, table = _filled_cache(codec, case)
    query = torch.randn(case.batch, case.heads, HEAD_SIZE).bfloat16()
    stops = torch.full((case.batch,), case.context, dtype=torch.int32)
    lengths = [case.context] * case.batch
    batch = QueryBatch.build(list(range(case.batch + 1)), lengths, torch.device("cpu"))

    def run() -> Tensor:
        absorbed = cpu.absorb_query(query, codec, HEAD_SIZE**-0.5)
        attended = cpu.paged_attention(
            absorbed, cache, table, None, stops, batch, codec, BLOCK_SIZE, False
        )
        return cpu.up_project(attended, codec)

    groups = codec.layout.groups
    heads_per_group = case.heads // len(groups)
    per_token = sum(heads_per_group * (g.key.num_columns + g.value.num_columns) for g in groups)
    return run, cache.numel(), case.batch * case.context * per_token


def _filled_cache(codec: LayerCodec, case: Case) -> tuple[Tensor, Tensor]:
    """Pages of `batch` requests in shuffled blocks; contents repeat, memory does not."""
    blocks = case.context // BLOCK_SIZE
    distinct = _DISTINCT_TOKENS // BLOCK_SIZE
    sample = torch.empty(distinct, codec.layout.block_bytes(BLOCK_SIZE), dtype=torch.uint8)
    key, value = (
        synthetic_heads(_DISTINCT_TOKENS, case.kv_heads, case.group, HEAD_SIZE) for _ in range(2)
    )
    cpu.store_kv(key, value, sample, torch.arange(_DISTINCT_TOKENS), None, codec, BLOCK_SIZE)
    cache = sample.repeat(-(-case.batch * blocks // distinct), 1)[: case.batch * blocks]
    return cache, torch.randperm(case.batch * blocks).int().view(case.batch, blocks)


def _dense_attention(case: Case, queries: int) -> tuple[Callable[[], object], int]:
    """vLLM's own op on bfloat16 pages, and the bytes of the pages."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    blocks = case.context // BLOCK_SIZE
    isa = _get_attn_isa(torch.bfloat16, BLOCK_SIZE, HEAD_SIZE, "auto")
    shape = (case.batch * blocks, case.kv_heads, 2 * BLOCK_SIZE, HEAD_SIZE)
    pages = torch.empty(shape, dtype=torch.bfloat16).normal_()
    key_cache, value_cache = pages.chunk(2, dim=2)
    tokens = case.batch * queries
    query = torch.randn(tokens, case.heads, HEAD_SIZE).bfloat16()
    out = torch.empty_like(query)
    starts = torch.arange(0, tokens + 1, queries, dtype=torch.int32)
    lengths = torch.full((case.batch,), case.context, dtype=torch.int32)
    table = torch.randperm(case.batch * blocks).int().view(case.batch, blocks)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=case.batch,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=HEAD_SIZE,
        seq_lens=lengths,
        dtype=torch.bfloat16,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
        dynamic_causal=None,
        kv_cache_dtype="auto",
    )

    def run() -> None:
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=out,
            query_start_loc=starts,
            seq_lens=lengths,
            scale=HEAD_SIZE**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0,
            scheduler_metadata=schedule,
            s_aux=None,
            dynamic_causal=None,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="auto",
        )

    return run, pages.numel() * pages.element_size()


def _store_row(case: Case, repeats: int) -> Row:
    """Encoding against the dense attention of a prefill of the same tokens."""
    codec = synthetic_codec(case.kv_heads, case.group, HEAD_SIZE, case.ratio)
    key, value = (
        synthetic_heads(case.context, case.kv_heads, case.group, HEAD_SIZE) for _ in range(2)
    )
    blocks = case.context // BLOCK_SIZE
    cache = torch.empty(blocks, codec.layout.block_bytes(BLOCK_SIZE), dtype=torch.uint8)
    slots = torch.arange(case.context)
    dense, _ = _dense_attention(case, queries=case.context)
    pair = alternate(
        dense,
        lambda: cpu.store_kv(key, value, cache, slots, None, codec, BLOCK_SIZE),
        repeats,
    )
    macs = case.context * sum(
        case.group * HEAD_SIZE * (g.key.num_columns + g.value.num_columns)
        for g in codec.layout.groups
    )
    dense_macs = case.context**2 * case.heads * HEAD_SIZE  # half of the square, keys and values
    moved = (key.numel() + value.numel()) * 2
    return Row(
        case.name,
        pair.dense_ms,
        pair.ours_ms,
        pair.speedup,
        case.goal,
        moved / pair.dense_ms / 1e6,
        moved / pair.ours_ms / 1e6,
        dense_macs / pair.dense_ms / 1e6,
        macs / pair.ours_ms / 1e6,
    )
