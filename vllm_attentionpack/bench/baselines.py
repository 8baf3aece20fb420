"""Dense attention by whatever is installed, to be measured against.

Each function returns seconds by name, or the error as text: what could not be measured is reported.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_attentionpack.bench.shapes import LayerShape

Timer = Callable[[Callable[[], Any]], float]
PAGE = 16


def decode(
    layer: LayerShape,
    requests: int,
    context: int,
    device: torch.device,
    dtype: torch.dtype,
    seconds: Timer,
) -> dict[str, dict[str, float | str]]:
    """One new token per request over `context` cached ones, by every library that is there.

    Returns seconds by library, by what the cache holds: "dense" in `dtype`, "fp8", and the 4 bits
    of "turboquant".
    """
    query = torch.randn(requests, layer.query_heads, layer.head_size, device=device, dtype=dtype)
    shape = (requests, layer.kv_heads, context, layer.head_size)

    def torch_sdpa() -> float:
        key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        attend = torch.nn.functional.scaled_dot_product_attention
        return seconds(lambda: attend(query[:, :, None], key, value, enable_gqa=True))

    def packed_sdpa() -> float:
        """The query heads of a KV head as if they were queries, which saves reading it again."""
        key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        attend = torch.nn.functional.scaled_dot_product_attention
        grouped = query.unflatten(1, (layer.kv_heads, -1))
        return seconds(lambda: attend(grouped, key, value))

    def xformers_split() -> float:
        from xformers.ops import fmha

        repeats = layer.query_heads // layer.kv_heads
        tokens = (1, requests * context, layer.kv_heads, 1, layer.head_size)
        key, value = (
            torch.randn(tokens, device=device, dtype=dtype).expand(-1, -1, -1, repeats, -1)
            for _ in range(2)
        )
        mask = fmha.attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            q_seqlen=[1] * requests,
            kv_padding=context,
            kv_seqlen=[context] * requests,
            device=device,
        )
        grouped = query.unflatten(1, (layer.kv_heads, repeats))[None]
        return seconds(
            lambda: fmha.memory_efficient_attention_forward(
                grouped, key, value, mask, op=fmha.triton_splitk.FwOp
            )
        )

    def paged() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pages = -(-context // PAGE)
        cache = [
            torch.randn(
                requests * pages, PAGE, layer.kv_heads, layer.head_size, device=device, dtype=dtype
            )
            for _ in range(2)
        ]
        table = torch.randperm(requests * pages, device=device).int().view(requests, pages)
        lens = torch.full((requests,), context, dtype=torch.int32, device=device)
        return cache[0], cache[1], table, lens

    def vllm_flash(version: int, cache_dtype: torch.dtype) -> float:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        key, value, table, lens = paged()
        starts = torch.arange(requests + 1, dtype=torch.int32, device=device)
        extra: dict[str, Any] = {}
        q = query
        if cache_dtype != dtype:
            key, value, q = key.to(cache_dtype), value.to(cache_dtype), query.to(cache_dtype)
            one = torch.ones(requests, layer.kv_heads, device=device)
            extra = {"q_descale": one, "k_descale": one, "v_descale": one}
        return seconds(
            lambda: flash_attn_varlen_func(
                q,
                key,
                value,
                max_seqlen_q=1,
                cu_seqlens_q=starts,
                max_seqlen_k=context,
                seqused_k=lens,
                causal=True,
                block_table=table,
                fa_version=version,
                **extra,
            )
        )

    def vllm_triton(splits: int) -> float:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention

        key, value, table, lens = paged()
        starts = torch.arange(requests + 1, dtype=torch.int32, device=device)
        out = torch.empty_like(query)
        split: dict[str, Any] = {}
        if splits > 1:
            parts = (requests, layer.query_heads, splits)
            width = 1 << (layer.head_size - 1).bit_length()
            split = {
                "seq_threshold_3D": requests,
                "num_par_softmax_segments": splits,
                "softmax_segm_output": torch.empty(*parts, width, device=device),
                "softmax_segm_max": torch.empty(parts, device=device),
                "softmax_segm_expsum": torch.empty(parts, device=device),
            }
        return seconds(
            lambda: unified_attention(
                q=query,
                k=key,
                v=value,
                out=out,
                cu_seqlens_q=starts,
                max_seqlen_q=1,
                seqused_k=lens,
                max_seqlen_k=context,
                softmax_scale=layer.head_size**-0.5,
                causal=True,
                window_size=(-1, -1),
                block_table=table,
                softcap=0.0,
                q_descale=None,
                k_descale=None,
                v_descale=None,
                **split,
            )
        )

    def turboquant() -> float:
        from vllm.model_executor.layers.quantization.turboquant import centroids, config
        from vllm.v1.attention.ops import triton_turboquant_decode

        form = config.TurboQuantConfig.from_cache_dtype("turboquant_4bit_nc", layer.head_size)
        pages = -(-context // PAGE)
        # Bytes below 64 keep the norms finite.
        cache_shape = (requests * pages, PAGE, layer.kv_heads, form.slot_size_aligned)
        cache = torch.randint(0, 64, cache_shape, dtype=torch.uint8, device=device)
        table = torch.randperm(requests * pages, device=device).int().view(requests, pages)
        lens = torch.full((requests,), context, dtype=torch.int32, device=device)
        turn = torch.eye(layer.head_size, device=device)
        levels = centroids.get_centroids(layer.head_size, form.centroid_bits).to(device).float()
        return seconds(
            lambda: triton_turboquant_decode.triton_turboquant_decode_attention(
                query=query,
                kv_cache=cache,
                block_table=table,
                seq_lens=lens,
                Pi=turn,
                centroids=levels,
                scale=layer.head_size**-0.5,
                mse_bits=form.key_mse_bits,
                key_packed_size=form.key_packed_size,
                value_quant_bits=form.effective_value_quant_bits,
                norm_correction=form.norm_correction,
                PiT=turn,
            )
        )

    def flashinfer(cache_dtype: torch.dtype) -> float:
        import flashinfer

        key, value, table, lens = paged()
        work = torch.empty(1 << 28, dtype=torch.uint8, device=device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(work, use_tensor_cores=True)
        pages = table.shape[1]
        wrapper.plan(
            torch.arange(0, requests * pages + 1, pages, dtype=torch.int32, device=device),
            table.flatten(),
            (lens - 1) % PAGE + 1,
            layer.query_heads,
            layer.kv_heads,
            layer.head_size,
            PAGE,
            q_data_type=dtype,
            kv_data_type=cache_dtype,
        )
        cache = (key.to(cache_dtype), value.to(cache_dtype))
        return seconds(lambda: wrapper.run(query, cache))

    ways: dict[str, Callable[[], float]] = {
        "torch sdpa": torch_sdpa,
        "torch sdpa, heads packed": packed_sdpa,
    }
    eight_bits: dict[str, Callable[[], float]] = {}
    four_bits: dict[str, Callable[[], float]] = {}
    if device.type != "cpu":
        fp8 = torch.float8_e4m3fn
        ways |= {
            "vllm flash-attention 3": lambda: vllm_flash(3, dtype),
            "vllm flash-attention 2": lambda: vllm_flash(2, dtype),
            "vllm triton": lambda: vllm_triton(1),
            "vllm triton, 16 splits": lambda: vllm_triton(16),
            "xformers split-k": xformers_split,
            "flashinfer": lambda: flashinfer(dtype),
        }
        eight_bits = {
            "vllm flash-attention 3": lambda: vllm_flash(3, fp8),
            "flashinfer": lambda: flashinfer(fp8),
        }
        four_bits = {"vllm turboquant": turboquant}
    return {
        "dense": _measure(ways),
        "fp8": _measure(eight_bits),
        "turboquant": _measure(four_bits),
    }


def prefill(
    layer: LayerShape,
    context: int,
    chunk: int,
    device: torch.device,
    dtype: torch.dtype,
    seconds: Timer,
) -> dict[str, float | str]:
    """`chunk` new tokens of one request over `context` cached ones; causal if there are none."""
    query = torch.randn(1, layer.query_heads, chunk, layer.head_size, device=device, dtype=dtype)
    key, value = (
        torch.randn(
            1, layer.kv_heads, context or chunk, layer.head_size, device=device, dtype=dtype
        )
        for _ in range(2)
    )
    attend = torch.nn.functional.scaled_dot_product_attention

    def flash() -> float:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        starts = torch.tensor([0, chunk], dtype=torch.int32, device=device)
        key_starts = torch.tensor([0, k.shape[0]], dtype=torch.int32, device=device)
        return seconds(
            lambda: flash_attn_varlen_func(
                q,
                k,
                v,
                max_seqlen_q=chunk,
                cu_seqlens_q=starts,
                max_seqlen_k=k.shape[0],
                cu_seqlens_k=key_starts,
                causal=not context,
            )
        )

    ways: dict[str, Callable[[], float]] = {
        "torch sdpa": lambda: seconds(
            lambda: attend(query, key, value, is_causal=not context, enable_gqa=True)
        )
    }
    if device.type != "cpu":
        ways["vllm flash-attention"] = flash
    return _measure(ways)


def _measure(ways: dict[str, Callable[[], float]]) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for name, way in ways.items():
        try:
            found[name] = way()
        except Exception as error:  # an absent or unfitting library is part of the report
            found[name] = f"{type(error).__name__}: {error}"[:200]
    return found
