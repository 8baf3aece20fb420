"""Analytic floor of every GPU kernel: bytes, operations, and the time that they cost at least.

What a kernel must move and multiply follows from the layout alone; a data sheet turns it into
seconds. The floor is the larger of the two times, as if memory and tensor cores worked side by side
at their peak, which no kernel reaches. Padding is not counted: it is the kernel's own loss.
"""

from dataclasses import dataclass

from vllm_attentionpack.bench.shapes import LayerShape
from vllm_attentionpack.codec.layout import DENSE_BYTES


@dataclass(frozen=True)
class Gpu:
    """Peak rates from a data sheet.

    Attributes:
        name: as the vendor calls it.
        bytes_per_second: of device memory.
        flops: dense (not sparse) bfloat16 tensor-core operations per second.
        source: the data sheet.
    """

    name: str
    bytes_per_second: float
    flops: float
    source: str


GPUS = (
    Gpu("A100 80GB SXM", 2.039e12, 312e12, "NVIDIA A100 Tensor Core GPU datasheet, 2022"),
    Gpu("H100 SXM", 3.35e12, 989.5e12, "NVIDIA H100 Tensor Core GPU datasheet, 2024"),
    Gpu("H200 SXM", 4.8e12, 989.5e12, "NVIDIA H200 Tensor Core GPU datasheet, 2024"),
    Gpu("B200 SXM", 8.0e12, 2250e12, "NVIDIA Blackwell architecture technical brief, 2024"),
)


@dataclass(frozen=True)
class Work:
    """What one launch must do, whoever does it.

    Attributes:
        name: of the op.
        bytes: read and written, each byte once.
        flops: multiplications and additions, two per product.
    """

    name: str
    bytes: float
    flops: float

    def floor(self, gpu: Gpu) -> float:
        """Seconds at least."""
        return max(self.bytes / gpu.bytes_per_second, self.flops / gpu.flops)

    def bound(self, gpu: Gpu) -> str:
        memory = self.bytes / gpu.bytes_per_second
        return "memory" if memory >= self.flops / gpu.flops else "compute"


def dense_decode(layer: LayerShape, requests: int, context: int, kv_bytes: int = 2) -> Work:
    """Decode attention on a dense cache of `kv_bytes` per element (2: bfloat16, 1: fp8)."""
    elements = 2 * layer.kv_heads * layer.head_size
    query = 2 * layer.query_heads * layer.head_size * DENSE_BYTES
    return Work(
        f"dense decode, {8 * kv_bytes} bits",
        requests * (context * elements * kv_bytes + query),
        requests * context * 4.0 * layer.query_heads * layer.head_size,
    )


def decode(layer: LayerShape, requests: int, context: int, query_len: int = 1) -> list[Work]:
    """One decode step from codes: `query_len` new tokens per request (more to verify drafts)."""
    layout = layer.layout()
    tokens = requests * query_len
    key_columns, value_columns = (
        sum(getattr(group, kind).num_columns for group in layout.groups)
        for kind in ("key", "value")
    )
    # Every query head meets the columns of its own head group only.
    heads = layer.query_heads / len(layout.groups)
    latent = 2 * heads * layer.modalities  # bytes per dim of float16 query latents of a token
    dims = layer.heads_per_group * layer.head_size
    per_head_dims = 2 * heads * dims / layer.heads_per_group * layer.modalities
    query_bytes = tokens * layer.query_heads * layer.head_size * DENSE_BYTES
    bases = 2 * dims * layer.modalities
    return [
        Work(
            "absorb_query",
            query_bytes + key_columns * (bases + tokens * latent),
            tokens * key_columns * per_head_dims,
        ),
        Work(
            "paged_attention",
            requests * context * layout.bytes_per_token
            + tokens * latent * (key_columns + value_columns),
            tokens * context * 2.0 * heads * (key_columns + value_columns),
        ),
        Work(
            "up_project",
            value_columns * (bases + tokens * latent) + 2 * query_bytes,
            tokens * value_columns * per_head_dims,
        ),
    ]


def store(layer: LayerShape, tokens: int) -> Work:
    """Encoding of new tokens, K and V."""
    layout = layer.layout()
    dims = layer.heads_per_group * layer.head_size
    columns = sum(group.key.num_columns + group.value.num_columns for group in layout.groups)
    return Work(
        "store_kv",
        tokens * (layout.dense_bytes_per_token + layout.bytes_per_token)
        + columns * dims * 2 * layer.modalities,
        tokens * columns * 2.0 * dims,
    )


def dense_prefill(layer: LayerShape, tokens: int) -> Work:
    """Causal attention of one prompt to itself."""
    moved = (2 * layer.query_heads + 2 * layer.kv_heads) * layer.head_size * DENSE_BYTES
    return Work(
        "dense prefill", tokens * moved, tokens * tokens * 2.0 * layer.query_heads * layer.head_size
    )


def table(gpu: Gpu) -> str:
    """Markdown: floors of the shapes that the goals name."""
    lines = [
        f"**{gpu.name}** ({gpu.bytes_per_second / 1e12:g} TB/s, {gpu.flops / 1e12:g} TFLOP/s dense"
        f" bfloat16; {gpu.source})",
        "",
        "| layer | requests x context | dense | ours | bound by | ceiling of the speed-up |",
        "|---|---|---|---|---|---|",
    ]
    for layer, requests, context in GOAL_SHAPES:
        dense = dense_decode(layer, requests, context).floor(gpu)
        works = decode(layer, requests, context)
        ours = sum(work.floor(gpu) for work in works)
        lines.append(
            f"| {layer.name} | {requests} x {context} | {dense * 1e6:.1f} us | {ours * 1e6:.1f} us "
            f"| {works[1].bound(gpu)} | {dense / ours:.1f} |"
        )
    return "\n".join(lines)


def work_table() -> str:
    """Markdown: bytes, operations and floors of every kernel, for the shapes of the goals."""
    lines = [
        "| layer | requests x context | kernel | MB | GFLOP | "
        + " | ".join(f"{gpu.name}, us" for gpu in GPUS)
        + " |",
        "|---" * (5 + len(GPUS)) + "|",
    ]
    rows: list[tuple[str, str, Work]] = []
    for layer, requests, context in GOAL_SHAPES:
        works = [dense_decode(layer, requests, context), *decode(layer, requests, context)]
        rows += [(layer.name, f"{requests} x {context}", work) for work in works]
    layer = GOAL_SHAPES[0][0]
    works = [dense_prefill(layer, PROMPT), store(layer, PROMPT)]
    rows += [(layer.name, f"1 x {PROMPT} new", work) for work in works]
    for name, size, work in rows:
        floors = " | ".join(f"{work.floor(gpu) * 1e6:.1f}" for gpu in GPUS)
        lines.append(
            f"| {name} | {size} | {work.name} | {work.bytes / 1e6:.1f} | {work.flops / 1e9:.2f} "
            f"| {floors} |"
        )
    return "\n".join(lines)


#: New tokens of the goal for encoding.
PROMPT = 8192
_GQA = (32, 8, 128, 8)
#: (layer, requests, context) of the goals for decode.
GOAL_SHAPES = (
    (LayerShape(*_GQA, 8), 32, 8192),
    (LayerShape(*_GQA, 8), 32, 32768),
    (LayerShape(*_GQA, 8), 32, 131072),
    (LayerShape(*_GQA, 4), 32, 8192),
    (LayerShape(*_GQA, 4), 32, 131072),
    (LayerShape(32, 32, 128, 8, 8), 32, 8192),
    (LayerShape(*_GQA, 8), 1, 32768),
    (LayerShape(*_GQA, 8), 64, 512),
)


if __name__ == "__main__":
    print("# Floors of the GPU kernels\n")
    print("Written by `python -m vllm_attentionpack.bench.roofline`: nothing here is measured.\n")
    print("\n\n".join([*(table(gpu) for gpu in GPUS), work_table()]))
