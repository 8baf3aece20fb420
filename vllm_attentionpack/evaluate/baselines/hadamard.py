"""The random-sign Hadamard rotation of several baselines."""

from functools import cache

import torch
from torch import Tensor


@cache
def hadamard(size: int) -> Tensor:
    """Sylvester's orthonormal Hadamard matrix, float32 `[size, size]`; a power of two."""
    if size & (size - 1):
        raise ValueError(f"{size} is not a power of two")
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


@cache
def random_rotation(size: int, seed: int = 0) -> Tensor:
    """`diag(random signs) H`, float32 `[size, size]`, orthonormal; block-diagonal where `size` is
    no power of two. `x @ rotation` turns rows, the transpose turns them back."""
    block = size & -size
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0
    return signs[:, None] * torch.block_diag(*[hadamard(block)] * (size // block))
