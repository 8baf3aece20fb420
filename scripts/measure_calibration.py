#!/usr/bin/env python3
"""Ablations of the calibration on a model, each alone at equal bytes; store the rows as JSON.

Rows are grouped by the question that they answer; `base` is what `attentionpack calibrate` does by
default at 8x with all KV heads joint. See `measure_codecs` for how it is measured.
"""

import sys
from collections.abc import Callable

from calibration_study import questions
from calibration_study.options import simulation_parser, started
from calibration_study.questions import Study
from calibration_study.setting import store

QUESTIONS: dict[str, Callable[[Study], None]] = {
    "groups": questions.groups,
    "modalities": questions.modalities,
    "metrics": questions.metrics,
    "sensitivity": questions.sensitivity,
    "key_price": questions.key_price,
    "bits": questions.bits,
    "widths": questions.widths,
    "ideal": questions.ideal,
    "scales": questions.scales,
    "rotation": questions.rotation,
    "context": questions.context,
    "data": questions.data,
    "exact": questions.exact,
    "refinement": questions.refinement,
}


def main() -> int:
    parser = simulation_parser(__doc__)
    parser.add_argument("--ratio", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    options = parser.parse_args()
    with started(options) as setting:
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
