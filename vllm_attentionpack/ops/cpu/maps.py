"""The maps in and out, `x @ matrix`: by BLAS in float32, or by a kernel on matrices of integers.

The kernel keeps 13 bits of every number, which is exact enough for models in bfloat16 (8 bits),
and is several times as fast as the BLAS of a float32 product.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_attentionpack.ops.cpu import calls
from vllm_attentionpack.ops.cpu.library import Kernels
from vllm_attentionpack.ops.turns import Turns


class Map(ABC):
    """`depth` to `width` numbers, one matrix for each of `B` batches.

    Attributes:
        depth: of what it takes.
        width: of the results.
    """

    depth: int
    width: int

    @abstractmethod
    def into(
        self, out: Tensor, x: Tensor, factor: float = 1.0, shift: Tensor | None = None
    ) -> None:
        """Writes `factor * (x - shift) @ matrix`.

        Args:
            out: float32 `[B, T, repeats, width]`, contiguous along a row; mutated.
            x: `[B, T, repeats, depth or more]`, contiguous along a row.
            factor: of the result.
            shift: float32 `[depth]`; None for zero.
        """


class FloatMap(Map):
    """By BLAS. `matrix`: float32 `[B, depth, width]`."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix.contiguous()
        self.depth, self.width = matrix.shape[1:]

    def into(
        self, out: Tensor, x: Tensor, factor: float = 1.0, shift: Tensor | None = None
    ) -> None:
        x = x[..., : self.depth]
        rows = x.float() if shift is None else torch.sub(x, shift)
        rows = (rows if factor == 1 else rows * factor).flatten(1, 2)
        out.copy_(torch.bmm(rows, self.matrix).unflatten(1, x.shape[1:3]))


class PackedMap(Map):
    """Matrices of 16-bit integers in the order of the kernel.

    Attributes:
        matrix: int16 `[B, panels, steps, columns of a panel, 2]`: a step is two rows, a panel what
            register block holds; zero where there is no row or column.
        scale: float32 `[B, segments, columns of all panels]`, of the columns of each segment.
        bounds: int64 `[segments + 1]`, the first row of each segment and the end.
    """

    def __init__(self, matrix: Tensor, kernels: Kernels, runs: Sequence[int]) -> None:
        """From float32 `[B, depth, width]`.

        `runs`: numbers of rows that are multiplied with numbers of one magnitude, even but for the
        last. Rounding is to the largest of a segment, and a segment is part of one run.
        """
        panel, segment = kernels.panel, kernels.segment
        self.depth, self.width = matrix.shape[1:]
        panels = -(-self.width // panel)
        matrix = pad(matrix, (0, panels * panel - self.width, 0, self.depth % 2))
        lengths = [min(segment, run - at) for run in runs for at in range(0, run, segment)]
        parts = matrix.split([n + n % 2 for n in lengths], 1)
        most = [part.abs().amax(1, keepdim=True).clamp_min(1e-30) for part in parts]
        scales = [each / kernels.largest for each in most]
        steps = torch.cat([part / scale for part, scale in zip(parts, scales, strict=True)], 1)
        steps = steps.round().to(torch.int16).unflatten(1, (-1, 2)).unflatten(3, (panels, panel))
        self.matrix = steps.permute(0, 3, 1, 4, 2).contiguous()
        self.scale = torch.cat(scales, 1)
        self.bounds = torch.tensor([0, *accumulate(lengths)])

    def into(
        self, out: Tensor, x: Tensor, factor: float = 1.0, shift: Tensor | None = None
    ) -> None:
        maps = [self.matrix], [self.scale], [self.bounds]
        calls.project([x], shift, *maps, factor, None, None, None, False, [out])


class MapList:
    """Several maps, which go in one call if all are packed; each as `Map.into`."""

    def __init__(self, maps: Sequence[Map]) -> None:
        self.maps = maps
        packed = [each for each in maps if isinstance(each, PackedMap)]
        self._matrix = [each.matrix for each in packed]
        self._scale = [each.scale for each in packed]
        self._bounds = [each.bounds for each in packed]

    @property
    def packed(self) -> bool:
        return len(self._matrix) == len(self.maps)

    def into(
        self,
        out: Sequence[Tensor],
        x: Sequence[Tensor],
        factor: float = 1.0,
        turns: Turns | None = None,
    ) -> None:
        """With `turns`, which packed maps alone take, rows are its own."""
        if self.packed:
            angles: tuple[object, ...] = (None, None, None, False)
            if turns is not None:
                angles = (turns.rows.tokens, turns.cos, turns.sin, turns.rotary.interleaved)
            calls.project(x, None, self._matrix, self._scale, self._bounds, factor, *angles, out)
            return
        assert turns is None
        for each, to, rows in zip(self.maps, out, x, strict=True):
            each.into(to, rows, factor)
