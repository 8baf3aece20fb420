"""Shapes of launches: from host-known numbers only, so that a captured graph fits every replay."""

from dataclasses import dataclass, replace
from functools import cache

import torch

from vllm_attentionpack.ops.batch import QueryBatch
from vllm_attentionpack.ops.triton.prepared import MAX_ACCUMULATORS, SMALLEST_ROWS, Prepared
from vllm_attentionpack.ops.triton.tiles import KindTiles

#: A split below this many tokens costs more in the merge than it gains.
_FEWEST_SPLIT_TOKENS = 128
#: Queries of one program: beyond this the operands no longer fit the registers.
_MOST_ROWS = 64
#: Up to this many value columns, four warps hold the sums of a program; one multiprocessor then
#: has room for two programs.
_NARROW_COLUMNS = 256
#: Tokens of one step: 64 rows of `wgmma` for every four warps. Four warps that take 128 tokens run
#: out of registers; a third tile in flight makes up for the smaller ones.
_NARROW = {"tile": 64, "warps": 4, "stages": 3}
_WIDE = {"tile": 128, "warps": 8, "stages": 2}
_SMALLEST_TILE = 32


@dataclass(frozen=True)
class Chip:
    """What of a GPU the launches depend on.

    Attributes:
        multiprocessors: how many programs really run at a time, in units of one for each.
        shared_bytes: shared memory of one program at most.
    """

    multiprocessors: int
    shared_bytes: int


#: Stands for a GPU where Triton's interpreter runs on a CPU.
_INTERPRETER = Chip(multiprocessors=4, shared_bytes=1 << 18)


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
    prepared: Prepared, query_heads: int, batch: QueryBatch, device: torch.device
) -> AttendShape:
    """Chooses the launch for a batch.

    Args:
        prepared: the layer.
        query_heads: of one head group.
        batch: only its sizes are read, nothing that lies on the device.
        device: where the cache lies.
    """
    keys, value_columns = prepared.tiles["key"], prepared.tiles["value"].columns
    wanted = batch.max_query_len * query_heads
    most = min(_MOST_ROWS, _floor_power_of_two(MAX_ACCUMULATORS // value_columns))
    rows = max(SMALLEST_ROWS, min(most, _power_of_two(wanted)))
    query_tiles = -(-wanted // rows)
    requests = batch.query_start_loc.shape[0] - 1
    kinds = len(prepared.codec.layout.groups) * prepared.codec.num_modalities
    programs = max(1, requests * query_tiles * kinds)
    narrow = value_columns <= _NARROW_COLUMNS
    on = chip(device)
    slots = on.multiprocessors * (2 if narrow else 1)
    useful = -(-batch.max_seq_len // _FEWEST_SPLIT_TOKENS)
    splits = max(1, min(slots // programs, useful))
    shape = AttendShape(rows, query_tiles, splits, **(_NARROW if narrow else _WIDE))
    while shape.tile > _SMALLEST_TILE and _shared_bytes(shape, keys) > on.shared_bytes:
        shape = replace(shape, tile=shape.tile // 2)
    return shape


def _shared_bytes(shape: AttendShape, keys: KindTiles) -> int:
    """About the most that Triton takes: queries, keys in flight, and operands on their way."""
    in_flight = (shape.stages - 1) * sum(piece.size for piece in keys.pieces)
    return 2 * shape.rows * keys.columns + shape.tile * (in_flight + 256)


@cache
def chip(device: torch.device) -> Chip:
    """The GPU that `device` is."""
    if device.type != "cuda":
        return _INTERPRETER
    found = torch.cuda.get_device_properties(device)
    # What a program has without asking for more, if this PyTorch does not know the most.
    most = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
    return Chip(found.multi_processor_count, most)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _floor_power_of_two(n: int) -> int:
    return 1 << (n.bit_length() - 1)
