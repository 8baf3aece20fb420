"""Gathers moments while the engine runs: one recorder per attention layer, nothing global.

The order of accumulation is the order of the engine's steps; with the same prompts in the same
order, the same engine settings and the same machine, sums are the same to the last bit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention

from vllm_attentionpack import compat
from vllm_attentionpack.calibrate.backend import RECORDER
from vllm_attentionpack.calibrate.gradients import TurnedLayer
from vllm_attentionpack.calibrate.layers import AttentionSite, attention_sites, output_gram
from vllm_attentionpack.calibrate.metrics import FisherMetrics, LayerStatistics
from vllm_attentionpack.calibrate.moments import (
    MAX_AUTO_GROUP_DIMS,
    LayerMoments,
    MomentAccumulator,
    auto_group_size,
)
from vllm_attentionpack.calibrate.rotary import is_called_once, rotary_of
from vllm_attentionpack.codec.positions import Rotary
from vllm_attentionpack.errors import CalibrationDataError, ConfigError, UnsupportedModelError

logger = init_logger(__name__)


class _PositionWatch:
    """Remembers by what positions a rotary module turned last."""

    def __init__(self, module: nn.Module) -> None:
        self._positions: Tensor | None = None
        self._called_once = is_called_once(module)
        self._handle = module.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        place, name = (1, "position_ids") if self._called_once else (0, "positions")
        self._positions = kwargs[name] if name in kwargs else args[place]

    def take(self, num_tokens: int) -> Tensor | None:
        """The positions `[num_tokens]` of the turn since the last call, None if there was none.

        Of a module that is called once, those of the step. Of M-RoPE's three axes the temporal one
        counts (`codec.positions`).
        """
        positions = self._positions
        if not self._called_once:
            self._positions = None
        if positions is None:
            return None
        while positions.ndim > 1:
            positions = positions[0]
        return positions[:num_tokens]

    def remove(self) -> None:
        self._handle.remove()


class LayerRecorder:
    """Takes what one layer is given and keeps its moments.

    Args:
        site: the layer.
        rotary: how its rotary module turns, None without one.
        watch: of that module; layers may share it.
        heads_per_group: `G`.
        joint_kv: see `MomentAccumulator`.
    """

    def __init__(
        self,
        site: AttentionSite,
        rotary: Rotary | None,
        watch: _PositionWatch | None,
        heads_per_group: int,
        joint_kv: bool,
    ) -> None:
        self.site = site
        self.layer: Attention = site.layer
        self._rotary = rotary
        self._watch = watch
        self._heads_per_group = heads_per_group
        self._joint_kv = joint_kv
        self.moments: MomentAccumulator | None = None

    @torch.inference_mode()
    def record(self, query: Tensor, key: Tensor, value: Tensor, num_tokens: int) -> None:
        """Adds the first `num_tokens` of a step: `[T, Hq, D]`, `[T, Hk, D]`, `[T, Hk, D]`."""
        positions = self._watch.take(num_tokens) if self._watch is not None else None
        if self.moments is None:
            self.moments = self._begin(positions)
        if (positions is None) != (self.moments.rotary is None):
            raise UnsupportedModelError(
                f"layer '{self.layer.layer_name}' turns its keys in some steps only. Serve this "
                "model with another --attention-backend."
            )
        visual = compat.modality_mask(len(query), query.device)
        self.moments.add(
            query[:num_tokens],
            key[:num_tokens],
            value[:num_tokens],
            positions,
            None if visual is None else visual[:num_tokens],
        )

    def _begin(self, positions: Tensor | None) -> MomentAccumulator:
        if self._rotary is not None and positions is None:
            logger.warning(
                "%s has a rotary embedding that it does not call: its keys are taken not to turn.",
                self.layer.layer_name,
            )
        return MomentAccumulator(
            self.layer.num_heads,
            self.layer.num_kv_heads,
            self.layer.head_size,
            self._heads_per_group,
            self._rotary if positions is not None else None,
            self._joint_kv,
        )


@dataclass(frozen=True)
class Collector:
    """The recorders of a model, in the order of its layers."""

    recorders: list[LayerRecorder]
    watches: list[_PositionWatch]
    heads_per_group: int

    @classmethod
    def install(
        cls,
        model: nn.Module,
        group_size: int | str,
        auto_dims: int = MAX_AUTO_GROUP_DIMS,
        joint_kv: bool = False,
    ) -> "Collector":
        """Puts a recorder on every attention layer.

        Args:
            model: a loaded model whose layers use the statistics backend.
            group_size: `G`, or `auto`.
            auto_dims: dims of a head group at most, with `auto`.
            joint_kv: see `MomentAccumulator`.

        Raises:
            UnsupportedModelError: see `attention_sites` and `rotary_of`.
            ConfigError: `group_size` does not divide the KV heads.
        """
        sites = attention_sites(model)
        heads_per_group = _resolve_group_size(group_size, sites[0].layer, auto_dims)
        watches: dict[int, tuple[Rotary, _PositionWatch]] = {}  # by id: layers share modules
        recorders = []
        for site in sites:
            rotary = watch = None
            if site.rotary is not None:
                if id(site.rotary) not in watches:
                    watches[id(site.rotary)] = (
                        rotary_of(site.rotary, site.layer.layer_name),
                        _PositionWatch(site.rotary),
                    )
                rotary, watch = watches[id(site.rotary)]
            recorder = LayerRecorder(site, rotary, watch, heads_per_group, joint_kv)
            setattr(site.layer, RECORDER, recorder)
            recorders.append(recorder)
        return cls(recorders, [watch for _, watch in watches.values()], heads_per_group)

    def remove(self) -> None:
        """Takes recorders and hooks off the model."""
        for watch in self.watches:
            watch.remove()
        for recorder in self.recorders:
            delattr(recorder.layer, RECORDER)

    @property
    def tokens(self) -> int:
        """Tokens seen so far."""
        moments = self.recorders[0].moments
        return 0 if moments is None else int(moments.count.sum())

    @property
    def visual_tokens(self) -> int:
        """Visual tokens seen so far."""
        moments = self.recorders[0].moments
        return 0 if moments is None else int(moments.count[1])

    def statistics(
        self,
        turned: Sequence[TurnedLayer],
        num_modalities: int,
        dtype: torch.dtype,
        fisher: "Iterator[FisherMetrics] | None" = None,
    ) -> Iterator[LayerStatistics]:
        """The statistics of one layer after the other; a recorder gives up its sums, for room.

        Args:
            turned: how keys are coded, see `turned`.
            num_modalities: see `MomentAccumulator.finalize`.
            dtype: of the model.
            fisher: metrics of every layer, where they were gathered.

        Raises:
            CalibrationDataError: a layer that was given infinities or NaN.
        """
        for recorder, as_coded in zip(self.recorders, turned, strict=True):
            assert recorder.moments is not None
            moments = recorder.moments.finalize(
                as_coded.num_positions, num_modalities, as_coded.anchors
            )
            recorder.moments = None
            _check_finite(recorder.layer.layer_name, moments)
            yield LayerStatistics(
                recorder.layer.layer_name,
                recorder.layer.impl.scale,
                moments,
                output_gram(recorder.site, dtype),
                as_coded.anchors,
                next(fisher) if fisher is not None else None,
            )

    def turned(
        self, num_positions: int, anchor_span: int = 0, pre_rope_turn: float | None = None
    ) -> list[TurnedLayer]:
        """How keys turn in each layer.

        Args:
            num_positions: see `MomentAccumulator.finalize`.
            anchor_span: see `MomentAccumulator.anchors`.
            pre_rope_turn: likewise.

        Raises:
            UnsupportedModelError: a layer that never attended.
        """
        result = []
        for recorder in self.recorders:
            if recorder.moments is None:
                raise UnsupportedModelError(
                    f"layer '{recorder.layer.layer_name}' never attended during calibration."
                )
            anchors = recorder.moments.anchors(anchor_span, num_positions, pre_rope_turn)
            result.append(TurnedLayer(recorder.moments.rotary, anchors, num_positions))
        return result


def _check_finite(layer_name: str, moments: LayerMoments) -> None:
    """One such token spoils every sum."""
    seen = {"keys": moments.key.second, "values": moments.value.second, "queries": moments.query}
    broken = [what for what, sums in seen.items() if not torch.isfinite(sums).all()]
    if broken:
        raise CalibrationDataError(
            f"during calibration the layer '{layer_name}' was given {', '.join(broken)} that are "
            "infinite or no numbers: the model overflows on this data. Try another --dtype "
            "(bfloat16 or float32), and check that the model answers sensibly without this plugin."
        )


def _resolve_group_size(group_size: int | str, layer: Attention, auto_dims: int) -> int:
    heads = layer.num_kv_heads
    if group_size == "auto":
        return auto_group_size(heads, layer.head_size, auto_dims)
    allowed = [size for size in range(1, heads + 1) if heads % size == 0]
    if group_size not in allowed:
        raise ConfigError(
            f"the group size is {group_size}, but the model has {heads} KV heads: allowed are "
            f"{', '.join(map(str, allowed))} and 'auto'."
        )
    return int(group_size)
