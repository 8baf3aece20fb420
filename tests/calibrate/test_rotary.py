"""Frequencies read from rotary modules: from vLLM's own tables, and from made-up hostile ones."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from vllm_attentionpack.calibrate.rotary import rotary_of
from vllm_attentionpack.errors import UnsupportedModelError

PLANES = 8
FREQUENCIES = 10000.0 ** (-torch.arange(PLANES, dtype=torch.float64) / PLANES)


class Module(nn.Module):
    """A rotary module with the table that `angles(position)` makes."""

    def __init__(
        self,
        angles: Callable[[torch.Tensor], torch.Tensor],
        amplitude: float = 1.0,
        is_neox_style: bool = True,
    ) -> None:
        super().__init__()
        turned = angles(torch.arange(512, dtype=torch.float64)[:, None])
        self._table = amplitude * torch.cat([turned.cos(), turned.sin()], dim=-1).float()
        self.is_neox_style = is_neox_style
        # what the module itself holds is rounded, and must not be what frequencies are read from
        self.register_buffer("cos_sin_cache", self._table.bfloat16())

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        return self._table


@pytest.mark.parametrize("amplitude", [1.0, 1.3])
@pytest.mark.parametrize("neox", [True, False])
def test_frequencies_are_recovered(amplitude: float, neox: bool) -> None:
    rotary = rotary_of(Module(lambda n: n * FREQUENCIES, amplitude, neox), "layer")
    torch.testing.assert_close(rotary.frequencies, FREQUENCIES, rtol=1e-6, atol=1e-7)
    assert rotary.interleaved is not neox


def test_turning_back_undoes_the_table() -> None:
    rotary = rotary_of(Module(lambda n: n * FREQUENCIES), "layer")
    x = torch.randn(5, 2, 2 * PLANES, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 17, 100, 511])
    angle = (positions[:, None] * FREQUENCIES).float()[:, None]
    a, b = x.chunk(2, dim=-1)
    turned = torch.cat(
        [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1
    )
    torch.testing.assert_close(rotary.turn(turned, -positions), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("angles", "reason"),
    [
        (lambda n: n * FREQUENCIES * (1 + n / 4096), "do not grow with the position"),
        (lambda n: torch.where(n < 40, n, 3 * n) * FREQUENCIES, "do not grow with the position"),
    ],
)
def test_frequencies_that_change_are_refused(
    angles: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"'model.layers.3.attn' .*{reason}"):
        rotary_of(Module(angles), "model.layers.3.attn")


def test_tables_that_hold_no_rotations_are_refused() -> None:
    module = Module(lambda n: n * FREQUENCIES)
    module._table = module._table * torch.linspace(1, 2, 512)[:, None]
    with pytest.raises(UnsupportedModelError, match="does not hold rotations"):
        rotary_of(module, "layer")


def test_modules_without_one_table_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no single table"):
        rotary_of(nn.Linear(2, 2), "layer")
    module = Module(lambda n: n * FREQUENCIES)
    module._compute_cos_sin_cache = lambda length, factors: module._table  # type: ignore
    with pytest.raises(UnsupportedModelError, match="depends on the prompt"):
        rotary_of(module, "layer")
