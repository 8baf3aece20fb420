"""Which implementation of the ops an engine uses: chosen once at start, by name or by device."""

from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.errors import ConfigError
from vllm_attentionpack.ops.batch import QueryBatch
from vllm_attentionpack.ops.exact import ExactTokens
from vllm_attentionpack.ops.reference import AbsorbedQuery, AttendedLatent
from vllm_attentionpack.ops.turns import Turns

#: Implementations by name, the fastest first; each module has the functions of `Ops`.
IMPLEMENTATIONS = {
    "triton": "vllm_attentionpack.ops.triton",
    "cpu": "vllm_attentionpack.ops.cpu",
    "reference": "vllm_attentionpack.ops.reference",
}
AUTO = "auto"


class Ops(Protocol):
    """Compute on pages; `ops.reference`, `.exact`, `.fresh` document shapes, dtypes, meaning."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why this implementation cannot run on `device` here; None if it can."""

    def reserve(self, tokens: int, turned: int, query_heads: int, codec: LayerCodec) -> None: ...

    def warm_up(
        self,
        query_heads: int,
        dtype: torch.dtype,
        codec: LayerCodec,
        block_size: int,
        max_seq_len: int,
        exact: tuple[int, int, int] | None,
    ) -> None: ...

    def store_kv(
        self,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        visual: Tensor | None,
        codec: LayerCodec,
        block_size: int,
    ) -> None: ...

    def decompress(
        self,
        kv_cache: Tensor,
        blocks: Tensor,
        tokens: int,
        codec: LayerCodec,
        block_size: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]: ...

    def absorb_query(
        self, query: Tensor, codec: LayerCodec, scale: float, turns: Turns | None = None
    ) -> AbsorbedQuery: ...

    def paged_attention(
        self,
        query: AbsorbedQuery,
        kv_cache: Tensor,
        block_table: Tensor,
        starts: Tensor | None,
        stops: Tensor,
        batch: QueryBatch,
        codec: LayerCodec,
        block_size: int,
        causal: bool,
    ) -> AttendedLatent: ...

    def up_project(self, attended: AttendedLatent, codec: LayerCodec) -> Tensor: ...

    def exact_attention(
        self, query: Tensor, pages: Tensor, tokens: ExactTokens, batch: QueryBatch, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def merge_attention(self, *parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]: ...


def select_ops(wanted: str, device: torch.device) -> tuple[str, Ops, dict[str, str]]:
    """Chooses the implementation for an engine.

    Args:
        wanted: a name of `IMPLEMENTATIONS`, or `auto` for the first that can run.
        device: where the cache lies.

    Returns:
        The name, the implementation, and why each faster one was passed over.

    Raises:
        ConfigError: no such implementation, or it cannot run here.
    """
    if wanted != AUTO and wanted not in IMPLEMENTATIONS:
        raise ConfigError(
            f"additional-config 'attentionpack' asks for ops = '{wanted}'; "
            f"allowed: {', '.join([AUTO, *IMPLEMENTATIONS])}."
        )
    passed_over: dict[str, str] = {}
    for name, path in IMPLEMENTATIONS.items():
        if wanted not in (AUTO, name):
            continue
        module: Any = import_module(path)
        reason = module.unavailable(device)
        if reason is None:
            return name, module, passed_over
        passed_over[name] = reason
    raise ConfigError(
        f"the ops '{wanted}' cannot run on {device}: {passed_over[wanted]} "
        f"Leave the option out to take the fastest that can."
    )
