"""One engine, its statistics and its held-out items: what all measurements share."""

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from vllm_attentionpack.calibrate.assemble import Assembled, Assembler
from vllm_attentionpack.calibrate.collector import Collector
from vllm_attentionpack.calibrate.engine import feed, statistics_engine
from vllm_attentionpack.calibrate.gradients import FisherGatherer
from vllm_attentionpack.calibrate.layers import output_gram
from vllm_attentionpack.calibrate.metrics import FisherMetrics, LayerStatistics
from vllm_attentionpack.calibrate.moments import GroupMoments
from vllm_attentionpack.calibrate.sensitivity import measure_sensitivity
from vllm_attentionpack.calibrate.settings import DEFAULT_ANCHOR_SPAN, SENSITIVITY_TOKENS
from vllm_attentionpack.codec.layout import Kind
from vllm_attentionpack.codec.transform import PrincipalBasis
from vllm_attentionpack.evaluate.data import Dataset, Item, read_dataset
from vllm_attentionpack.evaluate.simulate.codec import (
    CacheShape,
    ExactTokens,
    PackCodec,
    SimulatedCodec,
    TokenCodec,
)
from vllm_attentionpack.evaluate.simulate.measure import Scores, Simulator, grouped
from vllm_attentionpack.report.machine import describe_machine

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "reference-vlm"
REGULARIZATION = 1e-2

MakeCodec = Callable[[Assembled], TokenCodec]


def drawn_items(folder: Path) -> tuple[Item, ...]:
    """Held-out items of the reference model, drawn into `folder`, which must outlive them."""
    from reference_vlm.dataset import Split, write_split

    shutil.copytree(EXAMPLE / "text", folder / "text")
    write_split(Split("drawn", 30_011, 216, 144, 120, 156, 78, 26, "apache-2.0.txt"), folder)
    return read_dataset(folder / "drawn.jsonl").items


@dataclass
class Fitted:
    """Bases with measured sensitivities.

    Attributes:
        predicted: nats per token that the statistics foretell of the pack made last.
    """

    assembler: Assembler
    sensitivity: Mapping[tuple[int, Kind], float] | None
    predicted: float | None = None

    @property
    def bases(self) -> list[list[dict[Kind, PrincipalBasis]]]:
        """Per layer and head group, of keys and values that are not joint."""
        return [
            [
                {"key": key.basis, "value": value.basis}
                for key, value in zip(units[::2], units[1::2], strict=True)
            ]
            for units in self.assembler.units
        ]

    def at(self, ratio: float) -> Assembled:
        assembled = self.assembler.at(ratio, sensitivity=self.sensitivity)
        if self.sensitivity is not None or self.assembler.in_nats:
            self.predicted = assembled.loss
        return assembled


class Table:
    """Rows of codecs measured on the same items.

    Args:
        simulator: on the items.
        items: the same.
    """

    def __init__(self, simulator: Simulator, items: Sequence[Item]) -> None:
        self.simulator = simulator
        self.items = items
        self.device = simulator.device
        self.rows: list[dict[str, Any]] = []
        self.keep: Callable[[], None] | None = None
        recorded = {prompt.owner for prompt in simulator.recorded}
        self._groups = {
            name: [i for i in chosen if i in recorded]
            for name, chosen in _shown_groups(items).items()
        }
        self.dense = self._figures(simulator.dense())

    def add(self, family: str, name: str, codec: SimulatedCodec, **facts: Any) -> dict[str, Any]:
        """Measures a codec, prints and keeps its row."""
        start = time.monotonic()
        scores = self.simulator.measure(codec)
        size = self.simulator.bytes_per_token(codec)
        row = {
            "family": family,
            "name": name,
            "bytes_per_token": size,
            "ratio": self.simulator.shape.dense_bytes / size,
            "mean_kl": scores.mean_kl(),
            "groups": self._figures(scores),
            **facts,
        }
        for group, chosen in self._groups.items():
            row["groups"][group]["bytes_per_token"] = self.simulator.bytes_per_token(codec, chosen)
        self.rows.append(row)
        if self.keep:
            self.keep()
        cells = row["groups"].values()
        print(
            f"{row['ratio']:6.2f}x {name:44s}",
            " / ".join(f"{cell['kl']:.5f}" for cell in cells),
            " ",
            " / ".join(f"{cell['accuracy']:.4f}" for cell in cells if cell["accuracy"] is not None),
            f" ({time.monotonic() - start:.0f} s)",
            flush=True,
        )
        return row

    def _figures(self, scores: Scores) -> dict[str, Any]:
        return {
            name: asdict(scores.figures(self.items, chosen))
            for name, chosen in self._groups.items()
        }


def _shown_groups(items: Sequence[Item]) -> dict[str, list[int]]:
    """Image questions, and the text items by kind."""
    groups = grouped(items)
    text_kinds = {
        f"kind={item.extra['kind']}" for item in items if item.extra.get("modality") == "text"
    }
    shown = ["modality=visual", *sorted(text_kinds)]
    return {name: groups[name] for name in shown if name in groups}


@dataclass
class Setting:
    """A running engine on the statistics backend.

    Attributes:
        llm: vLLM's.
        dataset: the calibration data.
        shape: of the cache.
        calibration_tokens: stop gathering after so many; None for all data.
        sensitivity_tokens: that sensitivities are measured on.
        anchor_span: tokens whose keys share an anchor, if contexts may be longer.
    """

    llm: Any
    dataset: Dataset
    shape: CacheShape
    engine: dict[str, Any]
    calibration_tokens: int | None = None
    sensitivity_tokens: int = SENSITIVITY_TOKENS
    anchor_span: int = DEFAULT_ANCHOR_SPAN
    _collector: Collector | None = None
    _sensitivity: Simulator | None = None

    @classmethod
    @contextmanager
    def start(
        cls, model: Path, data: Path, max_model_len: int, calibration_tokens: int | None = None
    ) -> "Iterator[Setting]":
        """Starts the engine in float32 (`measure_codecs` says why)."""
        engine = {"dtype": "float32", "max_model_len": max_model_len}
        with statistics_engine(str(model), 0, engine) as llm:
            (collector,) = llm.apply_model(lambda m: Collector.install(m, 1))
            collector.remove()
            layers = [recorder.layer for recorder in collector.recorders]
            shape = CacheShape(
                tuple(layer.layer_name for layer in layers),
                layers[0].num_heads,
                layers[0].num_kv_heads,
                layers[0].head_size,
            )
            yield cls(
                llm, read_dataset(data), shape, engine | {"model": model.name}, calibration_tokens
            )

    @property
    def group_sizes(self) -> list[int]:
        """All divisors of the KV heads."""
        heads = self.shape.num_kv_heads
        return [size for size in range(1, heads + 1) if heads % size == 0]

    def items(self, path: Path) -> tuple[Item, ...]:
        return read_dataset(path).items

    def table(self, items: Sequence[Item], max_tokens: int | None = None) -> Table:
        return Table(Simulator(self.llm, self.shape, items, max_tokens), items)

    def statistics(
        self,
        group_size: int,
        max_context: int,
        modalities: int,
        items: Sequence[Item] | None = None,
        max_tokens: int | None = None,
        anchor_span: int | None = None,
        pre_rope_turn: float | None = None,
        joint_kv: bool = False,
        gradients_beside: ExactTokens | None = None,
    ) -> list[LayerStatistics]:
        """What `attentionpack calibrate` would gather; `anchor_span` in place of the setting's.

        With gradients beside exact tokens, without any where that is None.
        """
        span = self.anchor_span if anchor_span is None else anchor_span
        whole = self.shape.num_kv_heads
        plain = items is None and max_tokens is None
        collector = self._collector if plain else None
        if collector is None:
            (collector,) = self.llm.apply_model(
                lambda m: Collector.install(m, whole, joint_kv=True)
            )
            chosen = self.dataset.items if items is None else tuple(items)
            taken, limit = collector, max_tokens or self.calibration_tokens
            feed(
                self.llm,
                replace(self.dataset, items=chosen),
                lambda: taken.tokens,
                limit,
                0,
                lambda *_: None,
            )
            collector.remove()
            if plain:
                self._collector = collector
        turned = collector.turned(max_context, span, pre_rope_turn)
        fisher: Iterator[FisherMetrics | None] = repeat(None)
        if gradients_beside is not None:
            gatherer = FisherGatherer(
                self.sensitivity_simulator, turned, gradients_beside, group_size, joint_kv
            )
            gatherer.gather(lambda _: None)
            fisher = gatherer.metrics(modalities)
        result = []
        for recorder, anchors, metrics in zip(
            collector.recorders, [layer.anchors for layer in turned], fisher, strict=False
        ):
            assert recorder.moments is not None
            moments = recorder.moments.finalize(max_context, modalities, anchors)
            gram = output_gram(recorder.site, torch.float32)
            layer = recorder.layer
            dims = group_size * layer.head_size
            both = moments.joint_kv
            assert both is not None
            split = replace(
                moments,
                key=_split(moments.key, dims),
                value=_split(moments.value, dims),
                joint_kv=_split_joint(both, dims) if joint_kv else None,
            )
            scale = layer.impl.scale
            result.append(LayerStatistics(layer.layer_name, scale, split, gram, anchors, metrics))
        return result

    @property
    def modalities(self) -> int:
        """2 where the calibration data has images."""
        kinds = {item.extra.get("modality") for item in self.dataset.items}
        return 2 if {"visual", "text"} <= kinds else 1

    def fitted(self, group_size: int, max_context: int, modalities: int | None = None) -> Fitted:
        """As `attentionpack calibrate` would fit at 8x for a server that keeps no token exact."""
        return self.priced(self.assembler(group_size, max_context, modalities))

    def assembler(
        self,
        group_size: int,
        max_context: int,
        modalities: int | None = None,
        anchor_span: int | None = None,
        pre_rope_turn: float | None = None,
        joint_kv: bool = False,
        gradients_beside: ExactTokens | None = None,
    ) -> Assembler:
        """See `statistics`."""
        modalities = modalities or self.modalities
        statistics = self.statistics(
            group_size,
            max_context,
            modalities,
            anchor_span=anchor_span,
            pre_rope_turn=pre_rope_turn,
            joint_kv=joint_kv,
            gradients_beside=gradients_beside,
        )
        return Assembler(statistics, group_size, REGULARIZATION)

    @property
    def sensitivity_simulator(self) -> Simulator:
        """On the calibration prompts that sensitivities are measured on."""
        if self._sensitivity is None:
            items = list(self.dataset.items)
            random.Random(0).shuffle(items)
            self._sensitivity = Simulator(self.llm, self.shape, items, self.sensitivity_tokens)
        return self._sensitivity

    def priced(
        self,
        assembler: Assembler,
        make: MakeCodec | None = None,
        exact: ExactTokens | None = None,
        ratio: float = 8.0,
    ) -> Fitted:
        """With sensitivities measured at `ratio` beside `exact`, or as gradients have it."""
        if assembler.in_nats:
            return Fitted(assembler, None)
        return self.priced_at(assembler, Fitted(assembler, None), make, exact, ratio)

    def priced_at(
        self,
        assembler: Assembler,
        start: Fitted,
        make: MakeCodec | None = None,
        exact: ExactTokens | None = None,
        ratio: float = 8.0,
    ) -> Fitted:
        """The same, from the errors of the pack of `start`."""
        assembled = start.at(ratio)
        simulator = self.sensitivity_simulator
        codec = (
            PackCodec(self.shape, assembled.codecs(simulator.device), exact)
            if make is None
            else make(assembled)
        )
        sensitivity = measure_sensitivity(simulator, codec, assembled.distortion, lambda _: None)
        return Fitted(assembler, sensitivity)


def _split(moments: GroupMoments, dims: int) -> GroupMoments:
    """Of one group of all heads the groups of `dims` dims, by leaving out what lies between."""
    blocks = moments.second[:, 0].unflatten(2, (-1, dims)).unflatten(1, (-1, dims))
    own = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    return GroupMoments(own, moments.mean[:, 0].unflatten(1, (-1, dims)))


def _split_joint(moments: GroupMoments, dims: int) -> GroupMoments:
    """The same of joint keys and values: of each group `dims` dims of either."""
    whole = moments.mean.shape[-1] // 2
    order = torch.arange(2 * whole).view(2, -1, dims).transpose(0, 1).flatten()
    ordered = GroupMoments(moments.second[..., order, :][..., order], moments.mean[..., order])
    return _split(ordered, 2 * dims)


def store(path: Path, setting: Setting, table: Table, options: Mapping[str, Any]) -> None:
    """Writes the rows with what they were measured on."""
    shape = setting.shape
    result = {
        "machine": describe_machine(),
        "engine": setting.engine,
        "subject": {
            "name": options.get("name", path.stem),
            "layers": len(shape.layer_names),
            "query_heads": shape.num_query_heads,
            "kv_heads": shape.num_kv_heads,
            "head_size": shape.head_size,
            "dense_bytes_per_token": shape.dense_bytes,
            "mean_context": table.simulator.tokens / len(table.simulator.recorded),
        },
        "options": {
            key: value.name if isinstance(value, Path) else str(value)  # no machine's folders
            for key, value in options.items()
            if key != "out"
        },
        "note": (
            "Held-out items, teacher-forced, every token read from codes. Bytes count scales, "
            "bases, windows and padding, averaged over the items' tokens."
        ),
        "dense": table.dense,
        "rows": table.rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
