"""Instruction sets of the CPU kernels, forced one at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from vllm_attentionpack.ops.cpu import library

INSTRUCTION_SETS = ("scalar", "avx2", "avx512", "avx512_vnni")


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
