"""Instruction sets of the CPU kernels, forced one at a time, and the layouts that they meet."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from vllm_attentionpack.codec.layout import PlaneCounts
from vllm_attentionpack.ops.cpu import library

INSTRUCTION_SETS = ("scalar", "avx2", "avx512", "avx512_vnni")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Plane counts of K and of V; every mix that the allocator can emit, and odd sizes.
LAYOUTS = {
    "mixed": (PlaneCounts(n8=8, n4=8, n2=16), PlaneCounts(n8=4, n4=16, n2=16)),
    "no 8": (PlaneCounts(n4=24, n2=16), PlaneCounts(n4=8, n2=48)),
    "8 alone": (PlaneCounts(n8=36), PlaneCounts(n8=4)),
    "4 alone": (PlaneCounts(n4=8), PlaneCounts(n4=40)),
    "2 alone": (PlaneCounts(n2=64), PlaneCounts(n2=16)),
    "all dims": (PlaneCounts(n8=32, n4=16, n2=16), PlaneCounts(n8=4, n4=8, n2=48)),
    "pairs": (
        PlaneCounts(n8=28, n4=16, n2=32, n12=8, n10=16),
        PlaneCounts(n8=16, n4=8, n2=16, n12=5),
    ),
    "pairs alone": (PlaneCounts(n8=8, n4=8, n12=8), PlaneCounts(n8=16, n2=16, n10=16)),
}


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
