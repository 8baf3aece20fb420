"""Which library computes exact attention among the new tokens of a step: chosen once at start."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from vllm_attentionpack.attention import dense_prefill
from vllm_attentionpack.errors import ConfigError
from vllm_attentionpack.ops import fresh_gpu
from vllm_attentionpack.ops.batch import QueryBatch
from vllm_attentionpack.ops.fresh import fresh_attention

FreshAttention = Callable[[Tensor, Tensor, Tensor, QueryBatch, float], tuple[Tensor, Tensor]]
AUTO = "auto"
#: Reads lengths of requests on the host, which a CUDA graph would keep from its capture.
UNCAPTURED = "xformers"
#: On a CPU: long chunks go to `dense_prefill`, all else to PyTorch.
DENSE = "dense"


def _flash_attn(
    query: Tensor, key: Tensor, value: Tensor, batch: QueryBatch, scale: float
) -> tuple[Tensor, Tensor]:
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    out, lse, *_ = flash_attn_varlen_func(
        query,
        key,
        value,
        max_seqlen_q=batch.max_query_len,
        cu_seqlens_q=batch.query_start_loc,
        max_seqlen_k=batch.max_query_len,
        cu_seqlens_k=batch.query_start_loc,
        softmax_scale=scale,
        causal=True,
        return_softmax_lse=True,
        fa_version=get_flash_attn_version(head_size=query.shape[2]),
    )
    return out, lse[:, : query.shape[0]].T.contiguous()


def _flash_attn_missing() -> str | None:
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError as error:
        return f"this vLLM has no flash-attention ({error})"
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    # The import succeeds without the compiled libraries, too.
    return None if get_flash_attn_version() else "no version of it runs on this device"


def _xformers_missing() -> str | None:
    return None if find_spec("xformers") else "xformers is not installed"


#: On a GPU: the function and why it cannot be used, by name, the first choice first.
PROVIDERS: dict[str, tuple[FreshAttention, Callable[[], str | None]]] = {
    "flash_attn": (_flash_attn, _flash_attn_missing),
    "xformers": (fresh_gpu.xformers, _xformers_missing),
    "sdpa": (fresh_gpu.sdpa, lambda: None),
}


def select_prefill(
    wanted: str, device: torch.device, dtype: torch.dtype, head_size: int
) -> tuple[str, FreshAttention]:
    """Chooses the provider for an engine.

    Args:
        wanted: a name of `PROVIDERS`, or `auto` for the first that can run.
        device: where the tokens lie.
        dtype: of the model; float32 is PyTorch's alone.
        head_size: `D`.

    Returns:
        The name of the provider and the function, with the contract of `ops.fresh_attention`.

    Raises:
        ConfigError: no such provider, or it cannot run here.
    """
    if wanted not in (AUTO, DENSE, *PROVIDERS):
        raise ConfigError(
            f"additional-config 'attentionpack' asks for prefill = '{wanted}'; "
            f"allowed: {', '.join([AUTO, *PROVIDERS, DENSE])}."
        )
    if device.type != "cuda":
        if wanted not in (AUTO, DENSE, "sdpa"):
            raise ConfigError(
                f"prefill = '{wanted}' needs a CUDA device, not {device.type}; leave it out."
            )
        if wanted == "sdpa":
            return "sdpa", fresh_attention
        reason = dense_prefill.unavailable(head_size, dtype)
        if reason is None:
            return DENSE, fresh_attention
        if wanted == DENSE:
            raise ConfigError(f"prefill = '{DENSE}' cannot be used: {reason}; leave it out.")
        return "sdpa", fresh_attention
    if wanted == DENSE:
        raise ConfigError(f"prefill = '{DENSE}' is for CPUs, not {device.type}; leave it out.")
    reasons = []
    for name, (function, missing) in PROVIDERS.items():
        if wanted not in (AUTO, name):
            continue
        reason = missing()
        if reason is None and dtype == torch.float32 and name != "sdpa":
            reason = "it does not take float32"
        if reason is None:
            return name, _with_single_tokens(function)
        reasons.append(f"{name}: {reason}")
    raise ConfigError(f"prefill = '{wanted}' cannot be used: {'; '.join(reasons)}.")


def _with_single_tokens(function: FreshAttention) -> FreshAttention:
    def attend(
        query: Tensor, key: Tensor, value: Tensor, batch: QueryBatch, scale: float
    ) -> tuple[Tensor, Tensor]:
        if batch.max_query_len <= 1:
            return fresh_gpu.single_tokens(query, key, value, scale)
        return function(query, key, value, batch, scale)

    return attend
