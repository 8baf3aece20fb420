"""Which tokens of a step are visual.

Symptom: an attention backend cannot tell the placeholders of an image from text.
Cause: both model runners compute the mask before each forward, merge the embeddings by it, and
    drop it.
Remove when: the forward context carries it (`multimodal-mask-in-forward-context.patch` under
    `patches/`); `modality_mask` reads that field where it exists.

The mask gathered last waits until the next forward with attention metadata takes it; a forward
without a gather of its own (text-only models, dummy and profiling runs, later draft steps) finds
nothing. Contexts without attention metadata (vision encoders that open one) leave it in place.
"""

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_attentionpack.compat.wrap import wrap_method

#: `ForwardContext` field of a patched vLLM.
FIELD = "is_multimodal"
_MASK = "attentionpack.is_multimodal"
_READY = "attentionpack.modality_mask"


class _Handover(threading.local):
    """From the gather to the forward that follows it on the same thread."""

    mask: Tensor | None = None

    def take(self) -> Tensor | None:
        mask, self.mask = self.mask, None
        return mask


_handover = _Handover()


def install() -> None:
    """Makes the forward context carry the mask. Idempotent.

    Looks for the runners that are loaded: call it where a model is about to be built.
    """
    from vllm.forward_context import ForwardContext
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu.mm.encoder_runner import EncoderRunner

    if FIELD in ForwardContext.__dataclass_fields__:
        return
    wrap_method(EncoderRunner, "gather_mm_embeddings", _make_gather)
    # Importing the older runner for the sake of a wrapper would slow down the newer one's start.
    if runner := sys.modules.get("vllm.v1.worker.gpu_model_runner"):
        wrap_method(runner.GPUModelRunner, "_gather_mm_embeddings", _make_gather)
    wrap_method(type(current_platform), "set_additional_forward_context", _make_context)


def _make_gather(original: Callable[..., Any]) -> Callable[..., Any]:
    def gather(self: Any, *args: Any, **kwargs: Any) -> Any:
        embeddings, mask = original(self, *args, **kwargs)
        _handover.mask = mask if len(embeddings) else None
        return embeddings, mask

    return gather


def _make_context(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def set_additional_forward_context(
        cls: type, *args: Any, attn_metadata: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        extra = original(cls, *args, attn_metadata=attn_metadata, **kwargs)
        if attn_metadata is None:
            return extra
        mask = _handover.take()
        return extra if mask is None else {**extra, _MASK: mask}

    return set_additional_forward_context


def modality_mask(num_tokens: int, device: torch.device) -> Tensor | None:
    """The visual tokens among the `num_tokens` of the running forward.

    Every embedding that a multimodal encoder put in the place of a token counts as visual, audio
    included. The mask is moved once per forward and shared by all layers.

    Returns:
        bool `[num_tokens]` on `device`, False where padded; None when all tokens are text
        or when no forward is running.
    """
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available():
        return None
    context = get_forward_context()
    kept = context.additional_kwargs
    key = (num_tokens, device)
    if _READY in kept and kept[_READY][0] == key:
        return kept[_READY][1]
    mask = getattr(context, FIELD, None)
    if mask is None:
        mask = kept.get(_MASK)
    ready = None if mask is None else _on_device(mask, num_tokens, device)
    kept[_READY] = (key, ready)
    return ready


def _on_device(mask: Tensor, num_tokens: int, device: torch.device) -> Tensor | None:
    if mask.device.type == "cpu" and not mask.any():
        return None
    assert mask.numel() <= num_tokens, (
        f"a multimodal mask of {mask.numel()} tokens met a forward of {num_tokens}"
    )
    ready = mask.new_zeros(num_tokens, device=device)
    ready[: mask.numel()].copy_(mask, non_blocking=True)
    return ready
