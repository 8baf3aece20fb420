"""Bases from calibration moments: error-weighted principal components of a head group.

Keys: an error `e` in a key costs `E|qᵀe|²` in logits, so keys are whitened by the square root of
the query moments of their head; values cost `eᵀ M e` in the layer's output, `M` the Gram matrix of
the output projection. Principal components of whitened vectors then make the squared error of the
latent *equal* to that cost. (KQ-SVD and OSCAR weight keys by queries in the same way.)
Both are scaled to the same unit, the energy of the error in the layer's output, so that keys,
values and heads compete for the same bytes. So may the keys and the values of a head group
share latents: principal components of both whitened vectors, one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_attentionpack.codec.codec import Basis
from vllm_attentionpack.codec.layout import PlaneCounts
from vllm_attentionpack.codec.quantize import step_and_distortion


@dataclass(frozen=True)
class PrincipalBasis:
    """All principal directions of one (layer, head group, K|V), before ranks and bits are chosen.

    Of joint keys and values `G` counts either's heads, keys first. The maps are kept as factors, in
    float32, which is all that a pack stores: those of a large model would otherwise be the peak of
    memory.

    Attributes:
        mean: float64 `[M, GD]`.
        vectors: float32 `[M, GD, GD]`, orthonormal columns, variances in falling order.
        root: `[1, G, D, D]`, the square root of each head's metric, or `[M, 1, GD, GD]`, of each
            modality's for the whole group.
        variance: float64 `[M, GD]`, of the latents: the error that dropping each dim costs.
        share: float64 `[M]`, the fraction of calibration tokens of each modality; sums to one.
    """

    mean: Tensor
    vectors: Tensor
    root: Tensor
    variance: Tensor
    share: Tensor

    @property
    def encode(self) -> Tensor:
        """float64 `[M, GD, GD]`, `c = (x - mean) @ encode`."""
        return _block_diagonal(self.root.double()) @ self.vectors.double()

    @property
    def decode(self) -> Tensor:
        """float64 `[M, GD, GD]`, the inverse of `encode`."""
        # One by one: batches fail in LAPACK on CPUs where several threads share them (torch 2.13).
        inverses = [torch.linalg.inv(root) for root in self.root.double().flatten(0, 1)]
        inverse = torch.stack(inverses).view_as(self.root)
        return self.vectors.double().mT @ _block_diagonal(inverse)

    @property
    def spectrum(self) -> Tensor:
        """float64 `[GD]`: the variance of each latent dim, averaged over modalities by share."""
        return (self.variance * self.share[:, None]).sum(0)

    def priced(self, prices: Sequence[float]) -> "PrincipalBasis":
        """The principal directions where the metric of each head is worth so much more, `[G]`."""
        size = self.root.shape[-1]
        scale = torch.tensor(prices, dtype=torch.float64).sqrt()
        dims = scale.repeat_interleave(size)
        vectors = self.vectors.double() * dims[:, None]
        variance, vectors = _principal(vectors * self.variance[:, None] @ vectors.mT)
        return replace(
            self,
            vectors=vectors.float(),
            root=self.root * scale[:, None, None],
            variance=variance,
        )

    def errors(self, counts: PlaneCounts) -> Tensor:
        """float64 `[G]`: the expected error of each head by its metric, averaged by share."""
        left = torch.ones_like(self.variance[0])
        bits = [b for b, dims in counts.dims_by_bits.items() for _ in range(dims)]
        left[: len(bits)] = torch.tensor([step_and_distortion(b)[1] for b in bits]).to(left)
        lost = torch.einsum(
            "m,mi,mdi->d", self.share, self.variance * left, self.vectors.double().square()
        )
        return lost.unflatten(0, (self.root.shape[1], -1)).sum(1)

    def truncate(self, counts: PlaneCounts) -> Basis:
        """The columns of the retained dims, measured in quantiser steps."""
        columns = counts.columns
        dims = [column.dim for column in columns]
        steps, shift, counted = torch.tensor(
            [(step_and_distortion(c.code_bits)[0], c.shift, not c.low) for c in columns],
            dtype=torch.float64,
            device=self.variance.device,
        ).T
        floor = self.variance.amax(1, keepdim=True).clamp_min(1e-30) * 1e-12
        unit = self.variance.maximum(floor)[:, dims].sqrt() * steps  # [M, R], one step of c
        return Basis(
            mean=self.mean.float(),
            encode=(self.encode[:, :, dims] / unit[:, None, :]).float(),
            decode=(self.decode[:, dims] * (unit * shift.exp2())[:, :, None]).float(),
            weight=(unit.square() * counted).float(),
        )


def principal_basis(
    second: Tensor,
    mean: Tensor,
    count: Tensor,
    metrics: Sequence[Tensor],
    regularization: float,
) -> PrincipalBasis:
    """Error-weighted principal components of one head group's keys, values or both.

    Args:
        second: float64 `[M, GD, GD]`, `E[x xᵀ]` per modality.
        mean: float64 `[M, GD]`, `E[x]` per modality.
        count: `[M]`, tokens seen of each modality.
        metrics: of keys, of values, or of both in turn float64 `[heads, D, D]`, the error metric of
            each head: an error `e` in head `h` costs `eᵀ metric[h] e`.
        regularization: fraction of the mean diagonal added to a metric (so that directions which
            calibration saw no query use are kept at a low price rather than for nothing) and, per
            head size of tokens, to a modality's covariance from all modalities together.
    """
    roots = torch.cat([_metric_roots(metric, regularization) for metric in metrics])
    return _basis(second, mean, count, roots[None])


def fisher_basis(
    second: Tensor,
    mean: Tensor,
    count: Tensor,
    metric: Tensor,
    kinds: int,
    regularization: float,
) -> PrincipalBasis:
    """Principal components by a metric of the whole head group.

    Args:
        second: see `principal_basis`; likewise `mean` and `count`.
        metric: float64 `[M, GD, GD]`, what an error in a token of each modality costs.
        kinds: 2 of joint keys and values, which are regularised apart; else 1.
        regularization: fraction of the mean diagonal that is added.
    """
    diagonal = metric.diagonal(dim1=1, dim2=2).unflatten(1, (kinds, -1))
    floor = (diagonal.mean(-1) * regularization).clamp_min(1e-30)
    floors = floor.repeat_interleave(diagonal.shape[-1], dim=1)
    roots = torch.stack([_root(m + torch.diag(f)) for m, f in zip(metric, floors, strict=True)])
    return _basis(second, mean, count, roots[:, None].float())


def _basis(second: Tensor, mean: Tensor, count: Tensor, roots: Tensor) -> PrincipalBasis:
    covariance = second - mean[:, :, None] * mean[:, None, :]
    share = count.double() / count.sum()
    covariance = lean_on_all(covariance, count, share)
    root = _block_diagonal(roots.double())
    variance, vectors = _principal(root @ covariance @ root)
    return PrincipalBasis(mean, vectors.float(), roots, variance, share)


def lean_on_all(of_modality: Tensor, count: Tensor, share: Tensor) -> Tensor:
    """Matrices `[M, n, n]` of modalities; one seen for few tokens leans on the mean of all.

    Its own would be singular.

    Args:
        of_modality: means over the tokens of each modality.
        count: `[M]`, tokens seen.
        share: `[M]`, of the mean.
    """
    pooled = (of_modality * share[:, None, None]).sum(0)
    lean = of_modality.shape[-1] / (count.double() + of_modality.shape[-1])
    return of_modality + (pooled - of_modality) * lean[:, None, None]


def _block_diagonal(blocks: Tensor) -> Tensor:
    """`[M, B, n, n]` as `[M, B n, B n]`."""
    return torch.stack([torch.block_diag(*of_modality) for of_modality in blocks])


def _principal(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Variances in falling order and their directions, float64 `[M, GD]` and `[M, GD, GD]`."""
    variance, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    return variance.flip(-1).clamp_min(0), vectors.flip(-1)


def _metric_roots(metric: Tensor, regularization: float) -> Tensor:
    """`metric^(1/2)` of every head, float64 `[G, D, D]`."""
    # One floor for the whole group: a head that hardly matters must not be whitened up.
    floor = metric.diagonal(dim1=-2, dim2=-1).mean() * regularization
    added = floor.clamp_min(1e-30) * torch.eye(metric.shape[-1], dtype=metric.dtype)
    return torch.stack([_root(head + added) for head in metric])


def _root(metric: Tensor) -> Tensor:
    value, vector = torch.linalg.eigh((metric + metric.T) / 2)
    smallest = value[-1].abs() * 1e-12  # rounding only: a floor was added
    return (vector * value.clamp_min(smallest).sqrt()) @ vector.T
