#!/usr/bin/env python3
"""Ablations of the calibration on a model, each alone at equal bytes; store the rows as JSON.

Rows are grouped by the question that they answer; `base` is what `attentionpack calibrate` does by
default at 8x with all KV heads joint. See `measure_codecs` for how it is measured.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from calibration_study import questions
from calibration_study.questions import Study
from calibration_study.setting import Setting, store

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "reference-vlm"

QUESTIONS: dict[str, Callable[[Study], None]] = {
    "groups": questions.groups,
    "modalities": questions.modalities,
    "metrics": questions.metrics,
    "sensitivity": questions.sensitivity,
    "key_price": questions.key_price,
    "bits": questions.bits,
    "scales": questions.scales,
    "rotation": questions.rotation,
    "context": questions.context,
    "data": questions.data,
    "exact": questions.exact,
    "refinement": questions.refinement,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="reference_vlm", help="of the result file")
    parser.add_argument("--model", type=Path, default=EXAMPLE / "model")
    parser.add_argument("--data", type=Path, default=EXAMPLE / "calibrate.jsonl")
    parser.add_argument("--heldout", type=Path, default=EXAMPLE / "heldout.jsonl")
    parser.add_argument("--heldout-tokens", type=int, help="use whole items up to so many")
    parser.add_argument("--calibration-tokens", type=int, help="stop gathering after so many")
    parser.add_argument("--sensitivity-tokens", type=int, default=8192)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-context", type=int, default=512)
    parser.add_argument("--ratio", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args()
    with Setting.start(
        options.model, options.data, options.max_model_len, options.calibration_tokens
    ) as setting:
        setting.sensitivity_tokens = options.sensitivity_tokens
        table = setting.table(setting.items(options.heldout), options.heldout_tokens)
        study = Study(setting, table, options.ratio, options.max_context)
        study.add("base", "base", study.base_codec)
        suffix = "" if set(options.only) == set(QUESTIONS) else "_" + "_".join(options.only)
        path = options.out / f"{options.name}_calibration{suffix}.json"
        for name in options.only:
            QUESTIONS[name](study)
            store(path, setting, table, vars(options))  # what is done outlives an interruption
    return 0


if __name__ == "__main__":
    sys.exit(main())
