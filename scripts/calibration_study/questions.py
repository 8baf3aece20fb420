"""The questions of the ablation study; each adds its rows to the table of a `Study`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from calibration_study import codecs
from calibration_study.refine import refined
from calibration_study.setting import REGULARIZATION, Fitted, Setting, Table
from calibration_study.variants import Format, IdealCodec, VariantCodec, water_level
from vllm_attentionpack.calibrate.assemble import Assembler
from vllm_attentionpack.calibrate.collector import Collector
from vllm_attentionpack.calibrate.metrics import KEY_PRICE, LayerStatistics
from vllm_attentionpack.calibrate.moments import MomentAccumulator
from vllm_attentionpack.calibrate.rotary import rotary_of
from vllm_attentionpack.calibrate.settings import (
    DEFAULT_SINKS,
    DEFAULT_WINDOW,
    PRE_ROPE_ANCHOR_SPAN,
    PRE_ROPE_TURN,
)
from vllm_attentionpack.codec.layout import KINDS, Kind
from vllm_attentionpack.codec.positions import Rotary
from vllm_attentionpack.evaluate.data import Item, TextItem
from vllm_attentionpack.evaluate.simulate.capture import Captured, capture
from vllm_attentionpack.evaluate.simulate.codec import ExactTokens, PackCodec, TokenCodec
from vllm_attentionpack.evaluate.simulate.measure import Simulator

#: Tokens that share an anchor.
_SPANS = (1, 16, 64, 256, 1024)
_SPAN_NAMES = {0: "keys as they come", 1: "un-rotated keys"}


@dataclass
class Study:
    """What the questions share.

    Attributes:
        setting: the engine.
        table: of the held-out items.
        ratio: at which all is compared.
        max_context: positions averaged over.
    """

    setting: Setting
    table: Table
    ratio: float
    max_context: int

    @property
    def group_size(self) -> int:
        return max(self.setting.group_sizes)

    @cached_property
    def statistics(self) -> list[LayerStatistics]:
        return self.setting.statistics(self.group_size, self.max_context, self.setting.modalities)

    @cached_property
    def base(self) -> Fitted:
        return self.fit(self.statistics)

    @property
    def base_codec(self) -> PackCodec:
        return self.codec(self.base)

    @cached_property
    def captured(self) -> list[Captured]:
        setting = self.setting
        limit = setting.calibration_tokens
        return capture(Simulator(setting.llm, setting.shape, setting.dataset.items, limit))

    @cached_property
    def rotaries(self) -> list[Rotary]:
        (collector,) = self.setting.llm.apply_model(lambda m: Collector.install(m, self.group_size))
        collector.remove()
        sites = [recorder.site for recorder in collector.recorders]
        return [rotary_of(site.rotary, site.layer.layer_name) for site in sites if site.rotary]

    def fit(
        self, statistics: Sequence[LayerStatistics], regularization: float = REGULARIZATION
    ) -> Fitted:
        """With sensitivities measured for these statistics."""
        return self.setting.priced(Assembler(statistics, self.group_size, regularization))

    def codec(
        self, fitted: Fitted, ratio: float | None = None, exact: ExactTokens | None = None
    ) -> PackCodec:
        assembled = fitted.at(ratio or self.ratio)
        return PackCodec(self.setting.shape, assembled.codecs(self.table.device), exact)

    def variant(self, form: Format, fitted: Fitted | None = None, ratio: float = 0) -> VariantCodec:
        fitted = fitted or self.base
        return VariantCodec(
            self.setting.shape, fitted.bases, _prices(fitted), ratio or self.ratio, form
        )

    def ideal(self, fitted: Fitted, ratio: float) -> IdealCodec:
        return IdealCodec(self.setting.shape, fitted.bases, _prices(fitted), ratio)

    def add(self, question: str, name: str, codec: TokenCodec, **facts: Any) -> None:
        self.table.add(question, name, codec, **facts)


def _prices(fitted: Fitted) -> Mapping[tuple[int, Kind], float]:
    """Of the energy of errors in each layer's keys and values."""
    energies = fitted.assembler.output_energies
    assert fitted.sensitivity is not None
    return {part: price / energies[part[0]] for part, price in fitted.sensitivity.items()}


def groups(study: Study) -> None:
    """1. How many heads to code jointly."""
    for size in study.setting.group_sizes:
        fitted = study.setting.fitted(size, study.max_context)
        study.add("groups", f"{size} KV heads per group", study.codec(fitted))


def modalities(study: Study) -> None:
    """2. A basis per modality; unequal bytes at the same average over the held-out tokens."""
    if study.setting.modalities == 1:
        return
    pooled = study.setting.fitted(study.group_size, study.max_context, 1)
    study.add("modalities", "one basis", study.codec(pooled))
    study.add("modalities", "a basis per modality", study.base_codec)
    parts = [
        study.fit([codecs.one_modality(layer, m) for layer in study.statistics]) for m in (0, 1)
    ]
    prompts = study.table.simulator.recorded
    share = sum(int(p.visual.sum()) for p in prompts) / sum(p.length for p in prompts)
    budget = study.setting.shape.dense_bytes / study.ratio
    for factor in (1.0, 0.75, 0.5, 0.33):
        visual = budget * factor
        text = (budget - share * visual) / (1 - share)
        text_codec, visual_codec = (
            study.codec(part, study.setting.shape.dense_bytes / size)
            for part, size in zip(parts, (text, visual), strict=True)
        )
        name = f"own ranks, visual at {factor:g} of the bytes"
        study.add("modalities", name, codecs.ModalityCodec(text_codec, visual_codec))


def metrics(study: Study) -> None:
    """3. Weighting by queries and outputs, and its regularisation."""
    flat = [codecs.unweighted(layer) for layer in study.statistics]
    study.add("metrics", "unweighted", study.codec(study.fit(flat)))
    for value in (1e-3, 1e-2, 1e-1):
        fitted = study.fit(study.statistics, value)
        study.add("metrics", f"regularization {value:g}", study.codec(fitted))


def sensitivity(study: Study) -> None:
    """4. Prices per layer and K or V: none, from the codec's own error, from white noise."""
    base = study.base
    assembler = base.assembler
    assert base.sensitivity is not None
    study.add("sensitivity", "uniform", study.codec(Fitted(assembler, None)))
    prices = {f"{kind[0]}{layer}": price for (layer, kind), price in base.sensitivity.items()}
    study.add(
        "sensitivity",
        "the codec's errors, part by part",
        study.base_codec,
        prices=prices,
        predicted=base.predicted,
    )
    layers = range(len(assembler.names))
    by_layer = {
        (i, kind): float(np.mean([base.sensitivity[i, k] for k in KINDS]))
        for i in layers
        for kind in KINDS
    }
    study.add("sensitivity", "per layer only", study.codec(Fitted(assembler, by_layer)))
    by_kind = {
        (i, kind): float(np.mean([base.sensitivity[j, kind] for j in layers]))
        for i in layers
        for kind in KINDS
    }
    study.add("sensitivity", "per K and V only", study.codec(Fitted(assembler, by_kind)))
    study.add(
        "sensitivity",
        "white noise, part by part",
        study.codec(Fitted(assembler, _noise_sensitivity(study))),
    )
    again = study.setting.priced_at(assembler, base)
    study.add("sensitivity", "measured twice", study.codec(again))


def key_price(study: Study) -> None:
    """4b. The price of a key error where sensitivities are not measured, on calibration prompts."""
    assembler = study.base.assembler
    for price in (1.0, 0.5, 0.3, 0.15, 0.1, 0.05):
        # the constant multiplies every key's distortion, so this is the same as changing it
        factors = {"key": price / KEY_PRICE, "value": 1.0}
        prices = {(i, kind): factors[kind] for i in range(len(assembler.names)) for kind in KINDS}
        codec = study.codec(Fitted(assembler, prices))
        fitted_on = study.setting.sensitivity_simulator.measure(codec).mean_kl()
        study.add("key_price", f"{price:g}", codec, calibration_kl=fitted_on)


def _noise_sensitivity(study: Study) -> Mapping[tuple[int, Kind], float]:
    """Divergence for each unit of relative distortion of white noise."""
    assembler = study.base.assembler
    distortion = study.base.at(study.ratio).distortion
    result = {}
    for (layer, kind), value in distortion.items():
        decode = [group[kind].decode[0].float() for group in study.base.bases[layer]]
        energy = value * assembler.output_energies[layer]
        codec = codecs.NoiseCodec(study.setting.shape, layer, kind == "key", decode, energy)
        scores = study.setting.sensitivity_simulator.measure(codec)
        result[layer, kind] = max(scores.mean_kl(), 1e-9) / value
    floor = 0.03 * float(np.mean([result[part] * distortion[part] for part in result]))
    return {part: price + floor / distortion[part] for part, price in result.items()}


def bits(study: Study) -> None:
    """5. Bit widths, codebooks, clip search."""
    forms = {
        "{2, 4, 8}": Format(),
        "{2, 3, 4, 6, 8}": Format(bits=(2, 3, 4, 6, 8)),
        "{1, 2, 3, 4, 5, 6, 8}": Format(bits=(1, 2, 3, 4, 5, 6, 8)),
        "{2, 4, 8}, Lloyd-Max": Format(codebook="lloyd"),
        "{2, 3, 4, 6, 8}, Lloyd-Max": Format(bits=(2, 3, 4, 6, 8), codebook="lloyd"),
        "{4, 8}": Format(bits=(4, 8)),
        "{8}": Format(bits=(8,)),
        "one scale tried: max-fit": Format(candidates=(), fits=(1.0,)),
        "one scale tried: rms": Format(candidates=(1.0,), fits=()),
        "21 scales tried": Format(candidates=tuple(2 ** (i / 8) for i in range(-10, 11)), fits=()),
    }
    for name, form in forms.items():
        study.add("bits", name, study.variant(form))


def widths(study: Study) -> None:
    """5b. Widths that are sums of two planes' (6 = 4 + 2, 10 = 8 + 2, 12 = 8 + 4), by ratio."""
    for ratio in (4.0, 6.0, 8.0, 12.0):
        fitted = study.setting.priced(study.base.assembler, ratio=ratio)
        for chosen in ((2, 4, 8), (2, 4, 8, 12), (2, 4, 6, 8), (2, 4, 6, 8, 10, 12)):
            codec = study.variant(Format(bits=chosen), fitted, ratio)
            dims = np.concatenate([list(bits) for bits in codec.bits.values()])
            columns = int((dims > 0).sum() + np.isin(dims, (6, 10, 12)).sum())
            name = f"{ratio:g}x {{{', '.join(map(str, chosen))}}}"
            study.add("widths", name, codec, dims=int((dims > 0).sum()), columns=columns)


def ideal(study: Study) -> None:
    """5c. How far the quantiser is from codes without a bound on their length, at given bits."""
    for ratio in (4.0, study.ratio):
        study.add("ideal", f"ours {ratio:g}x", study.codec(study.base, ratio))
        study.add("ideal", f"ideal codes {ratio:g}x", study.ideal(study.base, ratio))
    assembler = study.setting.assembler(
        study.group_size, study.max_context, study.setting.modalities, anchor_span=1
    )
    fitted = study.setting.priced(assembler)
    for ratio in (4.0, study.ratio):
        name = f"ideal codes {ratio:g}x, un-rotated keys"
        unrotated = codecs.UnrotatedCodec(study.ideal(fitted, ratio), study.rotaries)
        study.add("ideal", name, unrotated)


def scales(study: Study) -> None:
    """6. The format of scales, and how many."""
    forms = {
        "log byte": Format(),
        "log byte, 4 steps to the octave": Format(scale="log4"),
        "fp8, 1 byte": Format(scale="fp8"),
        "bfloat16, 2 bytes": Format(scale="bf16", scale_bytes=2),
        "float, counted as 1 byte": Format(scale="float"),
        "log byte per plane": Format(per_plane=True),
        "none": Format(scale="none", candidates=(), fits=()),
    }
    for name, form in forms.items():
        study.add("scales", name, study.variant(form))


def rotation(study: Study) -> None:
    """7. Keys coded as they come or relative to anchors, alone and beside exact tokens.

    A span of one position codes them un-rotated; pre-RoPE are the planes that turn far within one.
    """
    setting = study.setting
    for kept in (ExactTokens(), ExactTokens(DEFAULT_SINKS, DEFAULT_WINDOW)):
        beside = f", {kept.sinks} + {kept.recent} exact" if kept else ""
        forms = [(span, False) for span in (0, *reversed(_SPANS))]
        forms += [(span, True) for span in (1024, PRE_ROPE_ANCHOR_SPAN)]
        for span, pre_rope in forms:
            if span >= study.max_context:
                continue
            assembler = setting.assembler(
                study.group_size,
                study.max_context,
                setting.modalities,
                span,
                PRE_ROPE_TURN if pre_rope else None,
            )
            fitted = setting.priced(assembler, exact=kept, ratio=study.ratio)
            codec = study.codec(fitted, exact=kept)
            name = _SPAN_NAMES.get(span, f"anchors every {span} tokens")
            if pre_rope:
                (planes,) = {anchors.pre_rope for anchors in assembler.anchors if anchors}
                name += f", {planes} planes pre-RoPE"
            name += beside
            gain = _key_gain(fitted)
            study.add("rotation", name, codec, span=span, exact=bool(kept), gain=gain)


def _key_gain(fitted: Fitted) -> float:
    """dB of a key's energy over its foretold distortion at two bits per element, mean of layers."""
    result = []
    for of_layer in fitted.bases:
        spectrum = np.concatenate([group["key"].spectrum.numpy() for group in of_layer])
        spectrum = np.maximum(spectrum, spectrum.max() * 1e-9)
        left = np.minimum(spectrum, water_level(spectrum, 2 * len(spectrum))).sum()
        result.append(10 * np.log10(spectrum.sum() / left))
    return float(np.mean(result))


def context(study: Study) -> None:
    """8. Statistics of prompts an eighth as long: as they come, or averaged over positions."""
    longest = max(study.captured[0].lengths)
    limit = max(16, longest // 8)
    for name, positions in (
        ("as they come", None),
        (f"averaged over {study.max_context} positions", study.max_context),
    ):
        for text, cut in (("whole prompts", None), (f"first {limit} tokens of each", limit)):
            statistics = _from_captured(study, positions, cut)
            study.add("context", f"{text}, {name}", study.codec(study.fit(statistics)))
    for factor in (4, 16):
        positions = study.max_context * factor
        statistics = study.setting.statistics(
            study.group_size, positions, study.setting.modalities, anchor_span=0
        )
        name = f"averaged over {factor}x the positions served"
        study.add("context", name, study.codec(study.fit(statistics)))


def _from_captured(study: Study, positions: int | None, cut: int | None) -> list[LayerStatistics]:
    shape, result = study.setting.shape, []
    for plain, seen, rotary in zip(study.statistics, study.captured, study.rotaries, strict=True):
        accumulator = MomentAccumulator(
            shape.num_query_heads,
            shape.num_kv_heads,
            shape.head_size,
            study.group_size,
            rotary if positions is not None else None,
        )
        kept = torch.cat([torch.arange(n) < (cut or n) for n in seen.lengths])
        accumulator.add(
            seen.query[kept],
            seen.key[kept],
            seen.value[kept],
            seen.positions[kept],
            seen.visual[kept],
        )
        moments = accumulator.finalize(positions or 1, study.setting.modalities)
        result.append(LayerStatistics(plain.name, plain.scale, moments, plain.gram))
    return result


def data(study: Study) -> None:
    """9. How many calibration tokens, and of what kind."""
    setting = study.setting
    for tokens in (500, 1000, 2000, 4000, 8000):
        statistics = setting.statistics(
            study.group_size, study.max_context, setting.modalities, max_tokens=tokens
        )
        seen = int(statistics[0].moments.count.sum())
        study.add("data", f"{seen} tokens", study.codec(study.fit(statistics)))
    kinds: dict[str, list[Item]] = {
        "text only": [i for i in setting.dataset.items if i.extra.get("modality") == "text"],
        "image chats only": [
            i for i in setting.dataset.items if i.extra.get("modality") == "visual"
        ],
        "plain text only": [i for i in setting.dataset.items if isinstance(i, TextItem)],
    }
    for name, items in kinds.items():
        if not items or len(items) == len(setting.dataset.items):
            continue
        two = 2 if name == "image chats only" else 1
        statistics = setting.statistics(study.group_size, study.max_context, two, items)
        study.add("data", name, study.codec(study.fit(statistics)))


def exact(study: Study) -> None:
    """10. Exact first and last tokens, beside codes."""
    longest = max(prompt.length for prompt in study.table.simulator.recorded)
    recents = [n for n in (16, 32, 64, 128, 256) if n <= longest // 4]
    for ratio in (6.0, 8.0, 10.0):
        for sinks, recent in [
            (0, 0),
            (4, 0),
            (64, 0),
            *((4, n) for n in recents),
            (0, recents[-1]),
        ]:
            if sinks > longest // 4:
                continue
            codec = study.codec(study.base, ratio, ExactTokens(sinks, recent))
            share = codec.exact.count(longest) / longest
            study.add("exact", f"{ratio:g}x, {sinks} + {recent}", codec, exact_share=share)


def refinement(study: Study) -> None:
    """11. Closed form against gradient steps."""
    assembled = study.base.at(study.ratio)
    grams = [layer.gram for layer in study.statistics]
    scales_ = [layer.scale for layer in study.statistics]
    for steps in (100, 400):
        better, errors = refined(
            assembled.codecs(torch.device("cpu")), study.captured, grams, scales_, steps
        )
        study.add(
            "refinement",
            f"{steps} steps per layer",
            PackCodec(study.setting.shape, better),
            errors=errors,
        )
