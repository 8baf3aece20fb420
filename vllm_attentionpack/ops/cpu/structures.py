"""The structures and constants of csrc/api.h, for ctypes; keep both alike."""

import ctypes

import torch

INT, POINTER = ctypes.c_int64, ctypes.c_void_p
#: int64 numbers of `Side` in csrc/api.h: six, then three planes of four.
SIDE_FIELDS = 18


class PreRope(ctypes.Structure):
    _fields_ = (
        *((name, INT) for name in ("planes", "positions_stride")),
        *((name, POINTER) for name in ("basis", "mean", "query", "cos", "sin", "positions")),
    )


class Attend(ctypes.Structure):
    _fields_ = (
        *((name, INT) for name in ("threads", "num_requests", "num_groups", "modalities")),
        *((name, INT) for name in ("heads_per_group", "repeats", "tokens", "rows")),
        *((name, INT) for name in ("span", "first_span", "stop_span")),
        *((name, INT) for name in ("block_size", "block_bytes", "table_stride")),
        *((name, INT) for name in ("causal", "bits")),
        *((name, POINTER) for name in ("groups", "cache", "table", "starts", "stops")),
        *((name, POINTER) for name in ("query_start_loc", "row_starts")),
        ("own", PreRope),
        *((name, POINTER) for name in ("queries", "outputs", "lse")),
    )


class Store(ctypes.Structure):
    _fields_ = (
        *((name, INT) for name in ("threads", "tokens", "rank", "block_size", "block_bytes")),
        ("modalities", INT),
        ("side", INT * SIDE_FIELDS),
        *((name, POINTER) for name in ("latent", "step", "weight", "slots", "visual")),
        ("cache", POINTER),
    )


class Project(ctypes.Structure):
    _fields_ = (
        *((name, INT) for name in ("threads", "batch", "tokens", "repeats", "width", "segments")),
        *((name, INT) for name in ("x_batch", "x_token", "x_repeat")),
        *((name, INT) for name in ("out_batch", "out_token", "out_repeat", "bfloat16")),
        ("factor", ctypes.c_double),
        *((name, POINTER) for name in ("sources", "cos", "sin")),
        *((name, INT) for name in ("planes", "interleaved")),
        *((name, POINTER) for name in ("shift", "bounds", "x", "matrix", "scale", "out")),
    )


class Unpack(ctypes.Structure):
    _fields_ = (
        *((name, INT) for name in ("threads", "tokens", "block_size", "block_bytes", "bfloat16")),
        ("side", INT * SIDE_FIELDS),
        *((name, POINTER) for name in ("cache", "blocks", "latent", "visual")),
    )


class Exact(ctypes.Structure):
    _fields_ = (
        *((name, INT) for name in ("threads", "num_requests", "most")),
        *((name, INT) for name in ("kv_heads", "repeats", "head_size", "type")),
        *((name, INT) for name in ("block_size", "block_stride", "token_stride", "side_stride")),
        *((name, INT) for name in ("head_stride", "query_token", "query_head")),
        ("scale", ctypes.c_double),
        *((name, POINTER) for name in ("query", "pages", "slots", "present")),
        *((name, POINTER) for name in ("query_start_loc", "out", "lse")),
    )


class Part(ctypes.Structure):
    _fields_ = (
        ("out", POINTER),
        *((name, INT) for name in ("type", "token", "head")),
        ("lse", POINTER),
    )


class Join(ctypes.Structure):
    _fields_ = (
        *((name, INT) for name in ("threads", "tokens", "heads", "head_size", "num_parts")),
        *((name, POINTER) for name in ("parts", "out", "lse")),
    )


#: `kMaxParts` of csrc/api.h.
MAX_PARTS = 8

#: `Number::Type` of csrc/api.h.
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
