"""What errors in keys and values cost, and the bases that this makes of a layer's moments.

An error `e` in the logits of query head `j` moves the layer's output by about `e² tr(Mⱼ Cov_v)`
(`Mⱼ` the Gram matrix of the head's slice of the output projection, `Cov_v` the covariance of the
values that it mixes), and an error in a value by `eᵀ Mⱼ e`, both times the same square of the
softmax weight. Hence the metrics, in one unit, summed over the query heads that read KV head `h`::

    keys    KEY_PRICE sum_j scale² Cqⱼ tr(Mⱼ Cov_v,h)
    values  sum_j Mⱼ

`KEY_PRICE` is below one because attention is not diffuse: where one token gets most of the weight,
the output is close to its value, and an error in its logit moves little.

Layers are compared by distortion over the energy of their own output,
`sum_j tr(Mⱼ E[v vᵀ])`: a layer that writes little into the residual stream is not starved for it,
nor one that writes much fed for it.

Where gradients were gathered (`calibrate.gradients`), they price an error in any direction of a
token's keys and values by what the model's answers lose. They know of small errors only: one that
draws attention to a token which had none costs what no gradient tells. The metrics above, which ask
for no weight, stay beside them as a guard, brought to the same scale.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_attentionpack.calibrate.moments import LayerMoments, MomentAccumulator
from vllm_attentionpack.codec.layout import Kind, units_of
from vllm_attentionpack.codec.positions import Anchors
from vllm_attentionpack.codec.transform import (
    PrincipalBasis,
    fisher_basis,
    lean_on_all,
    principal_basis,
)

#: Measured on the reference VLM (docs/log.md): flat between 0.1 and 0.3.
KEY_PRICE = 0.15

#: What the guard adds, as a multiple of all that gradients say of a kind. Measured (docs/log.md):
#: without it images lose three to ten times as much at 16x; four times as much of it takes a third
#: off what gradients bring.
GUARD = 0.5

#: The keys or the values of a layer.
Part = tuple[int, Kind]


@dataclass(frozen=True)
class FisherMetrics:
    """Half the Fisher information of the answers in keys and values, as they are coded.

    Attributes:
        metric: by what is coded together, float64 `[M, n, GD, GD]` for each of the `n` head groups
            (`2 GD` of joint keys and values): an error `e` in every token costs the mean over
            modalities, by share, of `eᵀ metric e` nats per scored token.
    """

    metric: dict[tuple[Kind, ...], Tensor]

    @classmethod
    def of(cls, sums: MomentAccumulator, num_modalities: int, joint_kv: bool) -> "FisherMetrics":
        """Of what was summed of gradients; a modality that none was seen of is priced like all."""
        seen = int((sums.count > 0).sum())
        moments = sums.finalize(1, min(seen, num_modalities))
        share = moments.count.double() / moments.count.sum()
        metric = {}
        for kinds in units_of(joint_kv):
            found = moments.joint_kv or getattr(moments, kinds[0])
            groups = [lean_on_all(group, moments.count, share) for group in found.second.unbind(1)]
            metric[kinds] = torch.stack(groups, 1).expand(num_modalities, -1, -1, -1)
        return cls(metric)


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration knows of one layer.

    Attributes:
        name: vLLM's name of the attention layer.
        scale: what logits are multiplied by.
        moments: see `LayerMoments`.
        gram: float64 `[Hq, D, D]`, `Mⱼ = Wⱼ Wⱼᵀ` of the rows `Wⱼ` `[D, hidden]` of the output
            projection that query head `j` feeds.
        anchors: what keys are turned back by before they are coded; None for as they come.
        fisher: what an error costs in nats, see `calibrate.gradients`; None where it was not
            gathered.
    """

    name: str
    scale: float
    moments: LayerMoments
    gram: Tensor
    anchors: Anchors | None = None
    fisher: FisherMetrics | None = None

    @property
    def head_size(self) -> int:
        return self.gram.shape[-1]


def layer_bases(
    layer: LayerStatistics, heads_per_group: int, regularization: float
) -> list[dict[tuple[Kind, ...], PrincipalBasis]]:
    """Of every head group of one layer the basis of what is coded together."""
    metrics = {"key": key_metric(layer), "value": value_metric(layer)}
    moments = layer.moments
    result = []
    for g in range(moments.key.mean.shape[1]):
        heads = slice(g * heads_per_group, (g + 1) * heads_per_group)
        group: dict[tuple[Kind, ...], PrincipalBasis] = {}
        for kinds in units_of(moments.joint_kv is not None):
            coded = moments.joint_kv or getattr(moments, kinds[0])
            seen = coded.second[:, g], coded.mean[:, g], moments.count
            of_heads = [metrics[kind][heads] for kind in kinds]
            if layer.fisher is None:
                group[kinds] = principal_basis(*seen, of_heads, regularization)
            else:
                metric = guarded(layer.fisher.metric[kinds][:, g], of_heads)
                group[kinds] = fisher_basis(*seen, metric, len(kinds), regularization)
        result.append(group)
    return result


def guarded(fisher: Tensor, of_heads: Sequence[Tensor]) -> Tensor:
    """Fisher metrics with the guard.

    Args:
        fisher: float64 `[M, n, n]`, of keys, of values, or of both in turn.
        of_heads: the metrics of their heads, float64 `[G, D, D]` each.
    """
    result = fisher.clone()
    size = fisher.shape[-1] // len(of_heads)
    for i, heads in enumerate(of_heads):
        own = slice(i * size, (i + 1) * size)
        guard = torch.block_diag(*heads)
        total = guard.trace()
        if total > 0:
            of_modality = fisher[:, own, own].diagonal(dim1=1, dim2=2).sum(1)
            result[:, own, own] += GUARD * of_modality[:, None, None] / total * guard
    return result


def value_metric(layer: LayerStatistics) -> Tensor:
    """float64 `[Hk, D, D]`: what an error in a value costs in the layer's output."""
    return _by_kv_head(layer.gram, layer).sum(1)


def key_metric(layer: LayerStatistics) -> Tensor:
    """float64 `[Hk, D, D]`: what an error in a key costs in the layer's output."""
    second, mean = _value_moments(layer)
    covariance = second - mean[:, :, None] * mean[:, None, :]
    gram = _by_kv_head(layer.gram, layer)
    energy = torch.einsum("hjab,hab->hj", gram, covariance).clamp_min(0)
    price = KEY_PRICE * layer.scale**2 * energy
    return torch.einsum("hj,hjab->hab", price, _by_kv_head(layer.moments.query, layer))


def output_energy(layer: LayerStatistics) -> float:
    """Mean squared length of what values add to the layer's output, at softmax weight one.

    Infinite for a layer that adds nothing: no error in it is worth a byte.
    """
    second, _ = _value_moments(layer)
    energy = float(torch.einsum("hjab,hab->", _by_kv_head(layer.gram, layer), second))
    return energy if energy > torch.finfo(torch.float32).tiny else math.inf


def _value_moments(layer: LayerStatistics) -> tuple[Tensor, Tensor]:
    """Second moment `[Hk, D, D]` and mean `[Hk, D]` of each head's values over all modalities."""
    share = layer.moments.count.double() / layer.moments.count.sum()
    second = torch.einsum("m,mnab->nab", share, layer.moments.value.second)
    mean = torch.einsum("m,mna->na", share, layer.moments.value.mean)
    size = layer.head_size
    heads_per_group = second.shape[-1] // size
    blocks = second.unflatten(1, (heads_per_group, size)).unflatten(3, (heads_per_group, size))
    diagonal = blocks.diagonal(dim1=1, dim2=3)  # [n, D, D, G]
    return diagonal.permute(0, 3, 1, 2).flatten(0, 1), mean.reshape(-1, size)


def _by_kv_head(per_query_head: Tensor, layer: LayerStatistics) -> Tensor:
    """`[Hq, D, D]` as `[Hk, Hq / Hk, D, D]`: consecutive query heads share a KV head."""
    mean = layer.moments.value.mean
    num_kv_heads = mean.shape[1] * mean.shape[2] // layer.head_size
    return per_query_head.unflatten(0, (num_kv_heads, -1))
