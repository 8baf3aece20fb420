"""Instruction sets of the CPU kernels, forced one at a time, and the layouts that they meet."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from vllm_attentionpack.codec.layout import PlaneCounts
from vllm_attentionpack.ops.cpu import library

INSTRUCTION_SETS = ("scalar", "avx2", "avx512", "avx512_vnni")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Plane counts (8, 4, 2 bits) of K and of V; every mix that the allocator can emit, and odd sizes.
LAYOUTS = {
    "mixed": ((8, 8, 16), (4, 16, 16)),
    "no 8": ((0, 24, 16), (0, 8, 48)),
    "8 alone": ((36, 0, 0), (4, 0, 0)),
    "4 alone": ((0, 8, 0), (0, 40, 0)),
    "2 alone": ((0, 0, 64), (0, 0, 16)),
    "all dims": ((32, 16, 16), (4, 8, 48)),
}


def planes_of(name: str) -> tuple[PlaneCounts, PlaneCounts]:
    key, value = (PlaneCounts(n8=n8, n4=n4, n2=n2) for n8, n4, n2 in LAYOUTS[name])
    return key, value


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Runs the kernels of one instruction set; skips the test where the machine lacks it."""
    if isinstance(library.find_kernels(name), str) and not isinstance(library.find_kernels(), str):
        pytest.skip(f"this machine does not have {name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.ISA_VARIABLE, name)
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs with that many threads of PyTorch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
