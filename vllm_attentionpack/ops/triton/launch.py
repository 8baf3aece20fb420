"""Shapes of launches: from host-known numbers only, so that a captured graph fits every replay."""

from dataclasses import dataclass, replace

from vllm_attentionpack.ops.batch import QueryBatch
from vllm_attentionpack.ops.triton.prepared import SMALLEST_ROWS, Prepared, power_of_two
from vllm_attentionpack.ops.triton.tiles import NARROW_COLUMNS

#: A split below this many tokens costs more in the merge than it gains.
_FEWEST_SPLIT_TOKENS = 128
#: Queries of one program: beyond this the operands no longer fit the registers.
_MOST_ROWS = 64
_SMALLEST_TILE = 32


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


@dataclass(frozen=True)
class EncodeShape:
    """One launch of the encoding kernel.

    Attributes:
        tokens: of one program.
        dims: dims of keys or values in one step of a program, at most.
        warps: warps of a program.
    """

    tokens: int
    dims: int
    warps: int


@dataclass(frozen=True)
class ExactShape:
    """One launch of attention to exact tokens.

    Attributes:
        rows: (new token, query head) pairs of one program.
        tile: exact tokens of one step.
        dims: of a head, rounded up to a power of two.
    """

    rows: int
    tile: int
    dims: int


def attend_shape(
    prepared: Prepared, query_heads: int, batch: QueryBatch, rebuilds: bool = False
) -> AttendShape:
    """Chooses the launch for a batch.

    Args:
        prepared: the layer.
        query_heads: of one head group.
        batch: only its sizes are read, nothing that lies on the device.
        rebuilds: whether planes that are coded pre-RoPE are read.
    """
    value_columns = prepared.tiles["value"].columns
    on, fit = prepared.chip, prepared.chip.fit
    narrow = value_columns <= NARROW_COLUMNS
    # A third tile in flight makes up for the smaller ones of four warps.
    tile, warps, stages = (fit.narrow_tile, 4, 3) if narrow else (fit.wide_tile, 8, 2)
    wanted = batch.max_query_len * query_heads
    sums = 32 * warps * (fit.narrow_sums if narrow else fit.wide_sums)
    most = min(_MOST_ROWS, _floor_power_of_two(sums // value_columns))
    rows = max(SMALLEST_ROWS, min(most, power_of_two(wanted)))
    if not narrow:
        tile = min(tile, fit.scores // rows)
    if rebuilds:  # registers hold parts of the tile's keys as well
        tile = max(_SMALLEST_TILE, tile // 2)
    query_tiles = -(-wanted // rows)
    requests = batch.query_start_loc.shape[0] - 1
    kinds = len(prepared.codec.layout.groups) * prepared.codec.num_modalities
    programs = max(1, requests * query_tiles * kinds)
    slots = on.multiprocessors * (2 if narrow else 1)
    useful = -(-batch.max_seq_len // _FEWEST_SPLIT_TOKENS)
    splits = max(1, min(slots // programs, useful))
    shape = AttendShape(rows, query_tiles, splits, tile, warps, stages)
    while shape.tile > _SMALLEST_TILE and _shared_bytes(shape, prepared) > on.shared_bytes:
        shape = replace(shape, tile=shape.tile // 2)
    return shape


def encode_shape(prepared: Prepared, tokens: int) -> EncodeShape:
    """Chooses the launch that encodes `tokens` new tokens.

    Few tokens at a time read the bases more often, from the second-level cache.
    """
    columns = max(kind.columns for kind in prepared.encoding_tiles.values())
    warps = 8 if columns > 384 else 4
    # Two modalities have a loop each, and addresses in flight for both.
    dims = 32 if warps == 8 and prepared.codec.num_modalities == 2 else 64
    if tokens <= 64 or columns > 256:
        shape = EncodeShape(16, dims, warps)
        # Of a step: its rows of the basis, and of keys or values.
        while 2 * shape.dims * (columns + shape.tokens) + 512 > prepared.chip.shared_bytes:
            shape = replace(shape, dims=shape.dims // 2)
        return shape
    if prepared.chip.fit.encodes_64:
        # So have joint keys and values, of whose loops there are two.
        dims = dims // 2 if prepared.codec.layout.joint_kv else dims
        return EncodeShape(64, dims, 4 if columns <= 128 else 8)
    return EncodeShape(32 if columns <= 128 else 16, dims, warps)


def exact_shape(head_size: int, item_bytes: int, wanted: int) -> ExactShape:
    """Chooses the launch of attention to exact tokens for `wanted` rows of a request and head.

    Tiles of queries, keys and values are 16 KiB each, where that are 16 tokens or more: less than
    the smallest shared memory holds, and few sums for each thread.
    """
    dims = max(16, power_of_two(head_size))
    tile = max(SMALLEST_ROWS, min(_MOST_ROWS, (1 << 14) // (dims * item_bytes)))
    return ExactShape(max(SMALLEST_ROWS, min(tile, power_of_two(wanted))), tile, dims)


def _shared_bytes(shape: AttendShape, prepared: Prepared) -> int:
    """About what Triton takes: queries, codes in flight, an operand of values and the weights."""
    keys, values = prepared.tiles["key"], prepared.tiles["value"]
    codes = sum(piece.size for piece in (*keys.pieces, *values.pieces))
    operand = 2 * max(piece.size * piece.joined for piece in values.pieces)
    token = (shape.stages - 1) * codes + operand + 64
    return 2 * shape.rows * keys.columns + shape.tile * token


def _floor_power_of_two(n: int) -> int:
    return 1 << (n.bit_length() - 1)
