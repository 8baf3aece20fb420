"""Bases refined by gradient on the error of each layer's output, against the closed form.

The loss is what the closed form approximates: the squared error of attention's output after the
output projection, over whole prompts, with codes in place of keys and values; rounding passes
gradients straight through.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vllm_attentionpack.codec.codec import Basis, GroupCodec, LayerCodec, PlaneCodec
from vllm_attentionpack.codec.layout import KINDS, Kind
from vllm_attentionpack.codec.quantize import choose_scale, to_codes
from vllm_attentionpack.evaluate.simulate.capture import Captured

_RATE = 2e-3


def refine(
    codec: LayerCodec, captured: Captured, gram: Tensor, scale: float, steps: int, seed: int = 0
) -> tuple[LayerCodec, float, float]:
    """A codec of the same bytes with other bases.

    Args:
        codec: closed form.
        captured: calibration prompts of the layer.
        gram: float `[Hq, D, D]`, see `LayerStatistics`.
        scale: what logits are multiplied by.
        steps: of Adam, one prompt each.
        seed: of the order of the prompts.

    Returns:
        The codec, and the mean relative error of the last and first tenth of the steps.
    """
    root = _root(gram)
    units = [_Unit(group, kind) for group in codec.groups for kind in KINDS]
    optimizer = torch.optim.Adam([options for unit in units for options in unit.options()])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    starts = torch.tensor([0, *captured.lengths]).cumsum(0)
    generator = torch.Generator().manual_seed(seed)
    history = []
    for _ in range(steps):
        prompt = int(torch.randint(len(captured.lengths), (1,), generator=generator))
        rows = slice(int(starts[prompt]), int(starts[prompt + 1]))
        query, visual = captured.query[rows], captured.visual[rows]
        read = []
        for kind, x in zip(KINDS, (captured.key[rows], captured.value[rows]), strict=True):
            split = x.flatten(1).chunk(len(codec.groups), dim=1)
            chosen = (unit for unit in units if unit.kind == kind)
            parts = [unit.read(part, visual) for unit, part in zip(chosen, split, strict=True)]
            read.append(torch.cat(parts, dim=1).view_as(x))
        exact = _attend(query, captured.key[rows], captured.value[rows], scale, root)
        error = (_attend(query, *read, scale, root) - exact).square().sum()
        loss = error / exact.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history.append(float(loss))
    pairs = zip(units[0::2], units[1::2], strict=True)
    bases: list[dict[Kind, Basis]] = [
        {"key": key.basis(), "value": value.basis()} for key, value in pairs
    ]
    tenth = max(1, steps // 10)
    last, first = sum(history[-tenth:]) / tenth, sum(history[:tenth]) / tenth
    return LayerCodec(codec.layout, bases), last, first


class _Unit:
    """One (head group, K|V) whose maps are being refined."""

    def __init__(self, group: GroupCodec, kind: Kind) -> None:
        self.kind = kind
        self._part: PlaneCodec = getattr(group, kind)
        self._encode = self._part.basis.encode.clone().requires_grad_()
        self._decode = self._part.basis.decode.clone().requires_grad_()

    def options(self) -> list[dict[str, object]]:
        """Steps in proportion to the size of each map."""
        return [
            {"params": [x], "lr": _RATE * float(x.detach().square().mean().sqrt())}
            for x in (self._encode, self._decode)
        ]

    def basis(self) -> Basis:
        return replace(self._part.basis, encode=self._encode.detach(), decode=self._decode.detach())

    def read(self, x: Tensor, visual: Tensor) -> Tensor:
        """What the codes of `x` `[T, GD]` stand for."""
        part, basis = self._part, self._part.basis
        which = visual.long() if basis.num_modalities == 2 else torch.zeros_like(visual.long())
        result = torch.zeros_like(x)
        for m in range(basis.num_modalities):
            rows = which == m
            latent = (x[rows] - basis.mean[m]) @ self._encode[m]
            with torch.no_grad():
                scale = choose_scale(latent, part.zero_point, part.step, basis.weight[m])
                coded = to_codes(latent, scale, part.zero_point) - part.zero_point
                coded = coded * scale[:, None]
            result[rows] = basis.mean[m] + (latent + (coded - latent).detach()) @ self._decode[m]
        return result


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, root: Tensor) -> Tensor:
    """Output of every query head in the metric of the output projection, `[Hq, T, D]`."""
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(repeats, 0) for x in (k, v))
    future = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
    weights = (q @ k.mT * scale).masked_fill(future, float("-inf")).softmax(-1)
    return weights @ v @ root


def _root(gram: Tensor) -> Tensor:
    value, vector = torch.linalg.eigh(gram)
    return ((vector * value.clamp_min(0).sqrt()[:, None]) @ vector.mT).float()


def refined(
    codecs: Sequence[LayerCodec],
    captured: Sequence[Captured],
    grams: Sequence[Tensor],
    scales: Sequence[float],
    steps: int,
) -> tuple[list[LayerCodec], list[tuple[float, float]]]:
    """Every layer refined by itself."""
    result, errors = [], []
    for codec, seen, gram, scale in zip(codecs, captured, grams, scales, strict=True):
        better, last, first = refine(codec, seen, gram, scale, steps)
        result.append(better)
        errors.append((first, last))
    return result, errors
