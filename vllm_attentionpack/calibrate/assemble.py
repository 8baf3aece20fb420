"""From the moments of all layers to ranks, bits and bases. Plain PyTorch: needs no engine."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_attentionpack.calibrate.metrics import LayerStatistics, Part, layer_bases, output_energy
from vllm_attentionpack.codec.allocate import MAX_PAGE_SIZE_CLASSES, UnitCurve, allocate, unit_curve
from vllm_attentionpack.codec.codec import LayerCodec, bases_by_kind
from vllm_attentionpack.codec.layout import (
    DENSE_BYTES,
    KINDS,
    PLANE_QUANTUM,
    SCALE_BYTES,
    GroupLayout,
    Kind,
    PlaneCounts,
    units_of,
)
from vllm_attentionpack.codec.positions import Anchors
from vllm_attentionpack.codec.transform import PrincipalBasis
from vllm_attentionpack.errors import BudgetError, ConfigError
from vllm_attentionpack.packfile.schema import (
    GroupHeader,
    LayerHeader,
    LayerPack,
    RotaryHeader,
)

#: Of joint kinds, errors of either are worth at least this fraction of what the other's are.
_LEAST_PRICE = 1e-6


@dataclass(frozen=True)
class Budget:
    """The bytes per token that a model of given shape can be stored in."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    heads_per_group: int
    joint_kv: bool = False

    @property
    def num_units(self) -> int:
        """Of a layer: head groups of K and V, or of both at once where they are joint."""
        return self.num_kv_heads // self.heads_per_group * len(units_of(self.joint_kv))

    @property
    def coded_dims(self) -> int:
        """See `LayerLayout.coded_dims`."""
        return self.heads_per_group * self.head_size * len(units_of(self.joint_kv)[0])

    @property
    def fixed_bytes(self) -> int:
        """Bytes per token and layer that are not codes."""
        return self.num_units * SCALE_BYTES

    @property
    def dense_bytes(self) -> int:
        """Bytes per token of the whole model in bfloat16."""
        return self.num_layers * self.num_kv_heads * len(KINDS) * self.head_size * DENSE_BYTES

    def ratio_range(self) -> tuple[float, float]:
        """The smallest ratio (a byte for every dim) and the largest (one quantum per K and V)."""
        most = len(KINDS) * self.num_kv_heads * self.head_size + self.fixed_bytes
        least = self.num_units * PLANE_QUANTUM + self.fixed_bytes
        return (
            self.dense_bytes / (self.num_layers * most),
            self.dense_bytes / (self.num_layers * least),
        )

    def bytes_per_token(self, ratio: float) -> float:
        """The budget at `ratio`; raises `BudgetError` when it cannot be met."""
        smallest, largest = self.ratio_range()
        if not smallest <= ratio <= largest:
            raise BudgetError(
                f"a compression ratio of {ratio:g} cannot be met: with {self.num_kv_heads} KV "
                f"heads of {self.head_size} in groups of {self.heads_per_group}, the smallest "
                f"ratio is {_round_up(smallest)} (a byte for every dim) and the largest is "
                f"{_round_down(largest)}. Choose a --ratio between them"
                + (", or a larger --group-size." if ratio > largest else ".")
            )
        return self.dense_bytes / ratio


def _round_up(ratio: float) -> str:
    return f"{-(-ratio * 100 // 1) / 100:.2f}"


def _round_down(ratio: float) -> str:
    return f"{ratio * 100 // 1 / 100:.2f}"


def check_weights(layer_weights: Sequence[float] | None, num_layers: int) -> None:
    """Raises `ConfigError` unless there is one positive weight per layer, or none at all."""
    if layer_weights is not None and (len(layer_weights) != num_layers or min(layer_weights) <= 0):
        raise ConfigError(
            f"layer weights are {list(layer_weights)}; expected {num_layers} positive numbers, one "
            "per layer."
        )


@dataclass(frozen=True)
class Assembled:
    """Ranks, bits and bases of all layers.

    Attributes:
        loss: what the statistics foretell of all layers, in nats per scored token where prices
            are: measured, or of gradients.
        distortion: what they foretell of each layer's keys and values, over its output energy;
            empty where gradients price both as one.
    """

    headers: tuple[LayerHeader, ...]
    packs: list[LayerPack]
    loss: float
    distortion: dict[Part, float]
    heads_per_group: int
    head_size: int

    def codecs(self, device: torch.device) -> list[LayerCodec]:
        """The codec of every layer."""
        return [
            LayerCodec(
                header.layout(self.heads_per_group, self.head_size), pack.bases, pack.anchors
            ).to(device)
            for header, pack in zip(self.headers, self.packs, strict=True)
        ]


@dataclass(frozen=True)
class Unit:
    """What is coded together: the keys or the values of a head group, or both.

    Attributes:
        kinds: which.
        basis: by the metrics of `layer_bases` times `scale`.
        scale: of each kind; one where it is coded alone, and its price turns no basis.
        curve: in units of the layer's output energy, priced; in nats where gradients were gathered.
    """

    kinds: tuple[Kind, ...]
    basis: PrincipalBasis
    scale: tuple[float, ...]
    curve: UnitCurve

    @classmethod
    def of(cls, kinds: tuple[Kind, ...], basis: PrincipalBasis, energy: float) -> "Unit":
        """At prices of one."""
        curve = unit_curve(basis.spectrum.numpy() / energy)
        return cls(kinds, basis, (1.0,) * len(kinds), curve)

    def priced(self, prices: tuple[float, ...], energy: float) -> "Unit":
        """The same where errors are worth so much."""
        if len(self.kinds) == 1:
            return replace(self, curve=self.curve.priced(*prices))
        # what is worth nothing could not be whitened
        floor = max(_LEAST_PRICE * max(prices), torch.finfo(torch.float32).tiny)
        prices = tuple(max(price, floor) for price in prices)
        repeats = self.basis.root.shape[1] // len(prices)
        basis = self.basis.priced([price for price in prices for _ in range(repeats)])
        return replace(Unit.of(self.kinds, basis, energy), scale=prices)

    def distortion(self, counts: PlaneCounts, energy: float) -> dict[Kind, float]:
        """What the statistics foretell of each kind, over the layer's output energy, unpriced."""
        errors = self.basis.errors(counts).unflatten(0, (len(self.kinds), -1)).sum(1) / energy
        errors = errors / torch.tensor(self.scale, dtype=torch.float64)
        return dict(zip(self.kinds, errors.tolist(), strict=True))


class Assembler:
    """The bases of all layers, from which packs of any ratio follow quickly.

    Args:
        layers: in the order of the model; taken one by one, so that the moments of one need not
            stay when those of the next are averaged. With gradients of all or of none.
        heads_per_group: `G`, as the moments were gathered.
        regularization: see `codec.transform.principal_basis`.
    """

    def __init__(
        self, layers: Iterable[LayerStatistics], heads_per_group: int, regularization: float
    ) -> None:
        self.names: list[str] = []
        self.anchors: list[Anchors | None] = []
        self.output_energies: list[float] = []
        #: Of each layer, the units of each group in turn.
        self.units: list[list[Unit]] = []
        #: Whether bases are those of `FisherMetrics`.
        self.in_nats = False
        head_size, num_groups, joint_kv = 0, 0, False
        for layer in layers:
            self.in_nats = layer.fisher is not None
            energy = 1.0 if self.in_nats else output_energy(layer)
            self.names.append(layer.name)
            self.anchors.append(layer.anchors)
            self.output_energies.append(energy)
            groups = layer_bases(layer, heads_per_group, regularization)
            self.units.append(
                [
                    Unit.of(kinds, basis, energy)
                    for group in groups
                    for kinds, basis in group.items()
                ]
            )
            head_size, num_groups = layer.head_size, len(groups)
            joint_kv = layer.moments.joint_kv is not None
        self.budget = Budget(
            len(self.names), num_groups * heads_per_group, head_size, heads_per_group, joint_kv
        )
        self._priced: tuple[Mapping[Part, float], list[list[Unit]]] | None = None

    def units_at(self, sensitivity: "Mapping[Part, float] | None") -> list[list[Unit]]:
        """`units` at these prices of each layer's keys and values; the last ones are kept."""
        if sensitivity is None:
            return self.units
        if self._priced is None or self._priced[0] is not sensitivity:
            priced = [
                [
                    unit.priced(tuple(sensitivity[i, kind] for kind in unit.kinds), energy)
                    for unit in units
                ]
                for i, (units, energy) in enumerate(
                    zip(self.units, self.output_energies, strict=True)
                )
            ]
            self._priced = sensitivity, priced
        return self._priced[1]

    def at(
        self,
        ratio: float,
        layer_weights: Sequence[float] | None = None,
        sensitivity: Mapping[Part, float] | None = None,
        max_page_sizes: int = MAX_PAGE_SIZE_CLASSES,
    ) -> Assembled:
        """Chooses ranks and bits.

        Args:
            ratio: dense bfloat16 bytes over stored bytes, scales and padding counted; met or
                exceeded.
            layer_weights: the price of each layer's relative distortion; all alike by default.
            sensitivity: the price of each layer's keys and values, as measured; multiplies the
                layer's weight. All alike by default; not with gradients, which price by themselves.
            max_page_sizes: see `codec.allocate.allocate`.

        Raises:
            BudgetError: the ratio cannot be met.
            ConfigError: not one positive weight per layer.
        """
        num_layers = len(self.names)
        bytes_per_token = self.budget.bytes_per_token(ratio)
        check_weights(layer_weights, num_layers)
        weights = list(layer_weights) if layer_weights is not None else [1.0] * num_layers
        units = self.units_at(sensitivity)
        curves = [[unit.curve for unit in of_layer] for of_layer in units]
        fixed = [self.budget.fixed_bytes] * num_layers
        chosen = allocate(curves, weights, bytes_per_token, fixed, max_page_sizes)
        headers, packs, loss = [], [], 0.0
        distortion: dict[Part, float] = {}
        for i, (counts, size) in enumerate(chosen):
            header, pack = _layer(self.names[i], units[i], self.anchors[i], counts, size)
            headers.append(header)
            packs.append(pack)
            loss += sum(unit.curve.at(n) for unit, n in zip(units[i], counts, strict=True))
            if self.in_nats:
                continue
            for unit, spent in zip(units[i], counts, strict=True):
                for kind, lost in unit.distortion(spent, self.output_energies[i]).items():
                    distortion[i, kind] = distortion.get((i, kind), 0.0) + lost
        budget = self.budget
        return Assembled(
            tuple(headers), packs, loss, distortion, budget.heads_per_group, budget.head_size
        )


def assemble(
    layers: Iterable[LayerStatistics],
    *,
    ratio: float,
    heads_per_group: int,
    regularization: float,
    layer_weights: Sequence[float] | None = None,
    max_page_sizes: int = MAX_PAGE_SIZE_CLASSES,
) -> tuple[tuple[LayerHeader, ...], list[LayerPack]]:
    """Chooses bases, ranks and bits of one pack; see `Assembler`."""
    assembler = Assembler(layers, heads_per_group, regularization)
    assembled = assembler.at(ratio, layer_weights, max_page_sizes=max_page_sizes)
    return assembled.headers, assembled.packs


def _layer(
    name: str,
    units: Sequence[Unit],
    anchors: Anchors | None,
    counts: Sequence[PlaneCounts],
    size: int,
) -> tuple[LayerHeader, LayerPack]:
    """`counts` in the order of the units."""
    chosen = list(zip(units, counts, strict=True))
    per_group = len(units_of(len(units[0].kinds) > 1))
    groups, truncated, variance = [], [], []
    for first in range(0, len(chosen), per_group):
        of_group = chosen[first : first + per_group]
        groups.append(GroupHeader.of(GroupLayout.of([spent for _, spent in of_group])))
        truncated.append(bases_by_kind([unit.basis.truncate(spent) for unit, spent in of_group]))
        spectra: dict[Kind, Tensor] = {
            kind: unit.basis.variance.float() for unit, _ in of_group for kind in unit.kinds
        }
        variance.append(spectra)
    header = LayerHeader(
        name=name, bytes_per_token=size, groups=tuple(groups), rotary=RotaryHeader.of(anchors)
    )
    return header, LayerPack(truncated, variance, anchors)
