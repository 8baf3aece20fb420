"""Rotary positions of a request's tokens, while a step's attention metadata is built.

Symptom: a metadata builder sees token indices; under M-RoPE (Qwen2-VL and its kin) a token's rotary
    position is another number, and that of tokens computed in earlier steps is nowhere to be seen.
Cause: only the model runners know them. The older one keeps them per request, the newer one in a
    table on the device; neither hands them to `CommonAttentionMetadata`.
Remove when: the common metadata carries them for whole requests.

The methods in which the runners build metadata are wrapped, and what knows the positions can be
asked until they return: by every KV-cache group's builder, and never in another step or by another
engine. The newer runner computes the positions of the step's own tokens only after that
(`RopeState.prepare_positions`), but the table they come from is complete by then.

Dummy steps (profiling, warm-up, graph capture, idle data-parallel ranks) build metadata in the same
methods, for requests that are not there: they find nothing.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vllm_attentionpack.compat.wrap import wrap_method

#: Attribute of the older runner's tensors of prompt positions: `(stride, length), every stride-th`.
_KEPT = "_attentionpack_every"


class _Source(Protocol):
    """What knows the positions of one step's requests."""

    def __len__(self) -> int:
        """The step's requests, without padding."""

    def fill(self, index: np.ndarray, stride: int, rows: int, device: torch.device) -> Tensor:
        """int64 `[rows, len(index)]`: positions of the tokens `index`, `stride` apart from 0 on.

        Rows beyond the requests hold `index`.
        """


class _Step(threading.local):
    """The step whose metadata this thread builds."""

    source: _Source | None = None
    ready: dict[Any, Tensor] | None = None


_step = _Step()


def install() -> None:
    """Makes the positions known to metadata builders. Idempotent.

    Looks for the runners that are loaded: call it where a model is about to be built.
    """
    # Importing either runner for the sake of a wrapper would slow down the other one's start.
    if runner := sys.modules.get("vllm.v1.worker.gpu_model_runner"):
        wrap_method(runner.GPUModelRunner, "_build_attention_metadata", _make_build)
    if "vllm.v1.worker.gpu.model_runner" in sys.modules:
        # The only model state with a `RopeState`; the runner imports it after the model is built.
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        wrap_method(DefaultModelState, "prepare_attn", _make_prepare)


def unsupported(vllm_config: Any) -> str | None:
    """Why `positions_every` cannot be relied on with this configuration; None where it can."""
    model = vllm_config.model_config
    if not model.uses_mrope:
        return None
    multimodal = model.multimodal_config
    if multimodal is not None and multimodal.is_multimodal_pruning_enabled():
        return (
            "video pruning (--video-pruning-rate) is on, which changes the rotary positions of a "
            "step after its attention metadata is built"
        )
    if vllm_config.parallel_config.use_ubatching and not vllm_config.use_v2_model_runner:
        return (
            "micro-batching (--enable-dbo, --ubatch-size) is on, and this model runner does not "
            "say which requests of the step a micro-batch holds"
        )
    return None


def positions_every(
    stride: int, count: int, num_requests: int, device: torch.device
) -> Tensor | None:
    """Rotary positions of tokens 0, `stride`, `2 * stride`, ... of the requests of this step.

    Under M-RoPE the temporal ones. Tokens that a request does not have yet get the positions that
    generated tokens would have there. Made once per step and shared: not to be written to.

    Args:
        stride: between tokens.
        count: tokens per request; may reach beyond the longest possible one.
        num_requests: rows of the metadata, padding included.
        device: of the result.

    Returns:
        int64 `[num_requests, count]` on `device`, rows as those of the metadata, token indices
        where padded; None when positions are token indices anyway (no M-RoPE), in dummy steps, and
        when no metadata is being built.
    """
    source, ready = _step.source, _step.ready
    if source is None or ready is None:
        return None
    key = (stride, count, num_requests, device)
    if key not in ready:
        assert len(source) <= num_requests, (
            f"positions of {len(source)} requests were asked for as {num_requests}"
        )
        index = np.arange(0, stride * count, stride)
        ready[key] = source.fill(index, stride, num_requests, device)
    return ready[key]


@contextmanager
def _building(source: _Source | None) -> Iterator[None]:
    """While it is open, builders on this thread find `source`, and no other."""
    before = _step.source, _step.ready
    _step.source, _step.ready = source, {}
    try:
        yield
    finally:
        _step.source, _step.ready = before


# The older runner


class _Requests:
    """Positions that the requests keep: of the prompt as a tensor, of later tokens as an offset."""

    def __init__(self, requests: Sequence[Any]) -> None:
        self._requests = requests

    def __len__(self) -> int:
        return len(self._requests)

    def fill(self, index: np.ndarray, stride: int, rows: int, device: torch.device) -> Tensor:
        from vllm.utils.torch_utils import async_tensor_h2d

        delta = np.zeros((rows, 1), np.int64)
        delta[: len(self), 0] = [request.mrope_position_delta for request in self._requests]
        found = index + delta
        for row, request in zip(found, self._requests, strict=False):
            prompt = _every(request.mrope_positions, stride, request.num_prompt_tokens)
            prompt = prompt[: len(index)]
            row[: len(prompt)] = prompt
        # Through pinned memory: a copy from elsewhere would wait for the device.
        return async_tensor_h2d(found, device=device, dtype=torch.int64)


def _every(positions: Tensor, stride: int, length: int) -> np.ndarray:
    """Row 0 of `positions` `[axes, length]` at every `stride`-th token.

    Kept with the tensor, which the runner replaces when a prompt changes: picking them anew from
    hundreds of long prompts takes half a millisecond in each step.
    """
    key = (stride, length)
    kept = getattr(positions, _KEPT, None)
    if kept is None or kept[0] != key:
        kept = key, positions.numpy()[0, :length:stride].copy()
        setattr(positions, _KEPT, kept)
    return kept[1]


def _make_build(original: Callable[..., Any]) -> Callable[..., Any]:
    def _build_attention_metadata(
        self: Any, *args: Any, num_scheduled_tokens: dict[str, int] | None = None, **kwargs: Any
    ) -> Any:
        source = None
        # Dummy steps do not say what is scheduled.
        if self.uses_mrope and num_scheduled_tokens is not None:
            source = _Requests([self.requests[name] for name in self.input_batch.req_ids])
        with _building(source):
            return original(self, *args, num_scheduled_tokens=num_scheduled_tokens, **kwargs)

    return _build_attention_metadata


# The newer runner


class _Table:
    """The device's table of positions, `[slots * axes, max_model_len]`, and the slots in use."""

    def __init__(self, rope_state: Any, input_batch: Any) -> None:
        self._rope_state = rope_state
        self._slots = input_batch.idx_mapping
        # A resumed request's table covers the tokens that it had generated, as this number does.
        self._lengths = input_batch.prefill_len_np

    def __len__(self) -> int:
        return len(self._slots)

    def fill(self, index: np.ndarray, stride: int, rows: int, device: torch.device) -> Tensor:
        from vllm.utils.torch_utils import async_tensor_h2d

        state, slots = self._rope_state, self._slots
        token = torch.arange(0, stride * len(index), stride, device=device)
        length = async_tensor_h2d(self._lengths, device=device, dtype=torch.int64)
        # Indexed, not sliced: the table may lie in the host's memory, and only these are fetched.
        prefill = state.prefill_positions.gpu[
            (slots * state.num_dims)[:, None], token.clamp(max=state.max_model_len - 1)
        ]
        later = token + state.prefill_delta.gpu[slots][:, None]
        found = token.repeat(rows, 1)
        found[: len(self)] = torch.where(token < length[:, None], prefill, later)
        return found


def _make_prepare(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_attn(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        source = None
        # Every request has a token to begin with; those of dummy steps have none.
        if self.rope_state is not None and input_batch.prefill_len_np.any():
            source = _Table(self.rope_state, input_batch)
        with _building(source):
            return original(self, input_batch, *args, **kwargs)

    return prepare_attn
