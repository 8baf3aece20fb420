#!/usr/bin/env python3
"""Measure our packs and every baseline on a model, at counted bytes; store the rows as JSON.

Everything runs in one engine: every token of the held-out items is read from codes, answers are
teacher-forced (an answer counts as right when every one of its tokens is the likeliest). Model and
cache are float32, so that a codec is charged with its own rounding only; "bf16" shows what the
dense cache of a bfloat16 model rounds. `--draw` draws held-out items of the reference model anew,
three times as many as the repository holds, by a seed that neither calibration nor training knows.
"""

import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from calibration_study.options import simulation_parser, started
from calibration_study.setting import drawn_items, store

from vllm_attentionpack.calibrate.assemble import Assembler
from vllm_attentionpack.calibrate.moments import auto_group_dims, auto_group_size
from vllm_attentionpack.calibrate.settings import PRE_ROPE_ANCHOR_SPAN, PRE_ROPE_TURN
from vllm_attentionpack.evaluate.baselines.catalogue import baselines
from vllm_attentionpack.evaluate.simulate.capture import capture
from vllm_attentionpack.evaluate.simulate.codec import ExactTokens, PackCodec
from vllm_attentionpack.evaluate.simulate.measure import Simulator


def main() -> int:
    parser = simulation_parser(__doc__)
    parser.add_argument("--draw", action="store_true", help="instead of --heldout")
    parser.add_argument("--group-sizes", type=int, nargs="+", help="[default: all]")
    parser.add_argument("--baselines", nargs="+", help="only those with one of these in the name")
    parser.add_argument("--captured-tokens", type=int, default=16_384, help="for OSCAR's rotations")
    parser.add_argument("--ratios", type=float, nargs="*", default=[4, 5, 6, 8, 10, 12, 16])
    parser.add_argument("--exact-ratios", type=float, nargs="*", default=[4, 6, 8, 10, 12, 16])
    parser.add_argument("--short-spans", type=int, nargs="*", default=[64, 16, 1])
    parser.add_argument("--pre-rope-spans", type=int, nargs="*", default=[PRE_ROPE_ANCHOR_SPAN])
    parser.add_argument("--joint-kv-turns", type=float, nargs="*", default=[PRE_ROPE_TURN, 0.5])
    parser.add_argument("--sensitivity", choices=["gradients", "measured"], default="gradients")
    parser.add_argument("--forms", nargs="*", help="only these other ones of ours, by whole names")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--recent", type=int, default=64)
    options = parser.parse_args()
    exact = f"{options.sinks} + {options.recent} exact"
    none, kept = ExactTokens(), ExactTokens(options.sinks, options.recent)
    with (
        tempfile.TemporaryDirectory() as folder,
        started(options) as setting,
    ):
        items = drawn_items(Path(folder)) if options.draw else setting.items(options.heldout)
        table = setting.table(items, options.heldout_tokens)
        table.keep = partial(  # a stopped run leaves the rows that it has
            store, options.out / f"{options.name}_codecs.json", setting, table, vars(options)
        )

        def fit(group_size: int, beside: ExactTokens, **form: Any) -> Assembler:
            priced = beside if options.sensitivity == "gradients" else None
            return setting.assembler(
                group_size, options.max_context, gradients_beside=priced, **form
            )

        captured = capture(
            Simulator(setting.llm, setting.shape, setting.dataset.items, options.captured_tokens)
        )
        coded_only_when_old = ExactTokens(options.sinks, options.recent, beside_codes=False)
        for name, codec in baselines(setting.shape, captured, coded_only_when_old).items():
            if options.baselines and not any(part in name for part in options.baselines):
                continue
            table.add(name.split()[0] if " " in name else name, name, codec)
        del captured
        for group_size in options.group_sizes or setting.group_sizes:
            joint = group_size == max(setting.group_sizes)
            family = "ours" if joint else f"ours, {group_size} heads per group"
            ratios = options.ratios if joint else (4.0, 8.0)
            assembler = fit(group_size, beside=none) if ratios else None
            for ratio in ratios:
                fitted = setting.priced(assembler, ratio=ratio)
                assembled = fitted.at(ratio)
                codec = PackCodec(setting.shape, assembled.codecs(table.device))
                table.add(family, f"{family} {ratio:g}x", codec, predicted=fitted.predicted)
            if not joint or not options.exact_ratios:
                continue
            assembler = fit(group_size, beside=kept)
            for ratio in options.exact_ratios:
                beside = setting.priced(assembler, exact=kept, ratio=ratio)
                codec = PackCodec(setting.shape, beside.at(ratio).codecs(table.device), kept)
                table.add(f"ours, {exact}", f"ours {ratio:g}x codes, {exact}", codec)
        forms: list[tuple[int, float | None, bool]] = [
            (span, None, False) for span in options.short_spans
        ]
        forms += [(span, PRE_ROPE_TURN, False) for span in options.pre_rope_spans]
        forms += [(setting.anchor_span, None, True), (1, None, True)]
        forms += product(options.pre_rope_spans, options.joint_kv_turns, [True])
        for span, turn, joint_kv in forms:
            keys = [f"anchors every {span}" if span > 1 else "un-rotated keys"]
            if turn is not None:
                keys[0] += " and pre-RoPE" + (
                    f" from {turn:g} rad" if turn != PRE_ROPE_TURN else ""
                )
            elif span == setting.anchor_span:
                keys = []
            if joint_kv:
                keys.append("joint K/V")
            if options.forms is not None and ", ".join(keys) not in options.forms:
                continue
            most = auto_group_dims(turn is not None, joint_kv)
            heads, dims = setting.shape.num_kv_heads, setting.shape.head_size
            group_size = auto_group_size(heads, dims, most)
            form = {"anchor_span": span, "pre_rope_turn": turn, "joint_kv": joint_kv}
            for beside in (none, kept):
                named = ", ".join([exact, *keys] if beside else keys)
                assembler = fit(group_size, beside=beside, **form)
                for ratio in (4.0, 8.0, 16.0):
                    assembled = setting.priced(assembler, exact=beside, ratio=ratio).at(ratio)
                    codec = PackCodec(setting.shape, assembled.codecs(table.device), beside)
                    table.add(f"ours, {named}", f"ours {ratio:g}x codes, {named}", codec)
    return 0


if __name__ == "__main__":
    sys.exit(main())
