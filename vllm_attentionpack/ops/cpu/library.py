"""Finds and loads the library of compiled kernels; `calls` makes ops of them.

It is plain C++ behind a C interface (csrc/api.h) and loaded with ctypes, so that neither
building nor loading it depends on PyTorch's headers. Its one unresolved symbol is OpenMP's way into
a parallel region, which it finds in the runtime that PyTorch has loaded: `torch.set_num_threads`,
thread binding and nesting then hold for both, as they would with `at::parallel_for`.
"""

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

#: For tests only: the name of an instruction set (csrc/dispatch.cpp) instead of the fastest.
ISA_VARIABLE = "ATTENTIONPACK_CPU_ISA"

#: For tests only: another build of the library.
LIBRARY_VARIABLE = "ATTENTIONPACK_CPU_LIBRARY"

_MODULE = "vllm_attentionpack.ops.cpu._kernels"
_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Sizes(ctypes.Structure):
    _fields_ = tuple((name, _INT) for name in ("lanes", "panel", "segment", "largest"))


@dataclass(frozen=True)
class Kernels:
    """The kernels of one instruction set.

    Attributes:
        library: the loaded library.
        handle: what its functions take as their first argument.
        name: of the instruction set.
        lanes: 32-bit lanes of its vectors, on which the order of attended latents depends.
        panel: columns of a packed matrix that lie together.
        segment: most rows of it that share the scales of their columns.
        largest: integer of it; the sum of so many products of two such integers fits 32 bits.
    """

    library: ctypes.CDLL
    handle: int
    name: str
    lanes: int
    panel: int
    segment: int
    largest: int


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    spec = find_spec(_MODULE)
    path = os.environ.get(LIBRARY_VARIABLE) or (spec and spec.origin)
    if not path:
        return (
            "the compiled kernels are not installed. They are built with the package where there "
            "is a C++ compiler (g++ or clang++): install one and reinstall the package."
        )
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        return f"the compiled kernels cannot be loaded: {error}."
    library.ap_kernels.restype = _POINTER
    library.ap_kernels.argtypes = (ctypes.c_char_p,)
    library.ap_name.restype = ctypes.c_char_p
    library.ap_name.argtypes = (_POINTER,)
    for name in ("sizes", "attend", "store", "unpack", "exact", "join"):
        run = getattr(library, f"ap_{name}")
        run.restype = None
        run.argtypes = (_POINTER, _POINTER)
    library.ap_project.restype = None
    library.ap_project.argtypes = (_POINTER, _POINTER, _INT)
    return library


@cache
def find_kernels(name: str = "") -> Kernels | str:
    """The kernels of the instruction set `name`, by default the fastest; or why there are none."""
    library = _load()
    if isinstance(library, str):
        return library
    handle = library.ap_kernels(name.encode())
    if not handle:
        return f"this machine does not have the instruction set '{name}'."
    sizes = _Sizes()
    library.ap_sizes(handle, ctypes.addressof(sizes))
    name = library.ap_name(handle).decode()
    return Kernels(library, handle, name, sizes.lanes, sizes.panel, sizes.segment, sizes.largest)


def kernels() -> Kernels:
    """The kernels in use; they must exist (see `find_kernels`)."""
    found = find_kernels(os.environ.get(ISA_VARIABLE, ""))
    if isinstance(found, str):
        raise RuntimeError(f"AttentionPack: {found}")
    return found
