"""Shapes of launches: from host-known numbers only, so that a captured graph fits every replay."""

from dataclasses import dataclass
from functools import cache

import torch

from vllm_attentionpack.codec.layout import LayerLayout
from vllm_attentionpack.ops.batch import QueryBatch
from vllm_attentionpack.ops.triton.prepared import MAX_ACCUMULATORS, SMALLEST_ROWS

#: A split below this many tokens costs more in the merge than it gains.
_FEWEST_SPLIT_TOKENS = 128
#: Queries of one program: beyond this the operands no longer fit the registers.
_MOST_ROWS = 64
#: Tokens of one step: two groups of four warps times the 64 rows of `wgmma`.
_TILE = 128
#: Up to this many value columns, four warps hold the sums of a program; one multiprocessor then
#: has room for two programs.
_NARROW_COLUMNS = 256
#: Stands for the multiprocessors of a GPU where Triton's interpreter runs on a CPU.
_INTERPRETER_PROCESSORS = 4


@dataclass(frozen=True)
class AttendShape:
    """One launch of the attention kernel.

    Attributes:
        rows: (query token, query head) pairs of one program.
        query_tiles: programs that share the queries of one request.
        splits: programs that share the context of one request.
        tile: tokens of one step of a program.
        warps: warps of a program.
        stages: tiles in flight.
    """

    rows: int
    query_tiles: int
    splits: int
    tile: int
    warps: int
    stages: int


def attend_shape(
    layout: LayerLayout,
    modalities: int,
    query_heads: int,
    value_columns: int,
    batch: QueryBatch,
    device: torch.device,
) -> AttendShape:
    """Chooses the launch for a batch.

    Args:
        layout: of the layer.
        modalities: `M`.
        query_heads: of one head group.
        value_columns: padded value dims of a head group.
        batch: only its sizes are read, nothing that lies on the device.
        device: where the cache lies.
    """
    wanted = batch.max_query_len * query_heads
    most = min(_MOST_ROWS, _floor_power_of_two(MAX_ACCUMULATORS // value_columns))
    rows = max(SMALLEST_ROWS, min(most, _power_of_two(wanted)))
    query_tiles = -(-wanted // rows)
    requests = batch.query_start_loc.shape[0] - 1
    programs = max(1, requests * query_tiles * len(layout.groups) * modalities)
    narrow = value_columns <= _NARROW_COLUMNS
    slots = multiprocessors(device) * (2 if narrow else 1)
    useful = -(-batch.max_seq_len // _FEWEST_SPLIT_TOKENS)
    splits = max(1, min(slots // programs, useful))
    return AttendShape(rows, query_tiles, splits, _TILE, warps=4 if narrow else 8, stages=2)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs really run at a time, in units of one per multiprocessor."""
    if device.type != "cuda":
        return _INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _floor_power_of_two(n: int) -> int:
    return 1 << (n.bit_length() - 1)
