#!/usr/bin/env python3
"""Measure served packs over ratios and exact tokens, generated and teacher-forced, as JSON.

Every row is calibrated as `attentionpack calibrate` does, served by the real engine, and compared
on held-out items with one dense run of the same engine. A minute or two per row on two cores.
"""

import json
import sys
import tempfile
from itertools import product
from pathlib import Path

from calibration_study.options import subject_parser

from vllm_attentionpack.calibrate.run import calibrate
from vllm_attentionpack.calibrate.settings import PRE_ROPE_TURN
from vllm_attentionpack.evaluate.answers import run_engine
from vllm_attentionpack.evaluate.data import read_dataset
from vllm_attentionpack.evaluate.run import TOP_LOGPROBS, evaluate
from vllm_attentionpack.report.machine import describe_machine


def main() -> int:
    parser = subject_parser(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[4, 8, 12, 16])
    parser.add_argument(
        "--exact",
        nargs="+",
        type=_exact,
        default=[(0, 0), (4, 32), (4, 64)],
        help="sinks and window, as 4+64",
    )
    parser.add_argument("--pre-rope", action="store_true", help="as calibrate's")
    parser.add_argument("--pre-rope-turn", type=float, default=PRE_ROPE_TURN, help="as calibrate's")
    parser.add_argument("--joint-kv", action="store_true", help="as calibrate's")
    options = parser.parse_args()
    engine = {"dtype": "bfloat16", "max_model_len": options.max_model_len}
    model = str(options.model)
    dense = run_engine(model, read_dataset(options.heldout).items, None, engine, TOP_LOGPROBS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder) / "pack.safetensors"
        for ratio, (sinks, window) in product(options.ratios, options.exact):
            exact = {"sinks": sinks, "window": window}
            settings = {
                **exact,
                "max_context": options.max_context,
                "anchor_span": options.anchor_span,
                "pre_rope": options.pre_rope,
                "pre_rope_turn": options.pre_rope_turn,
                "joint_kv": options.joint_kv,
                "max_tokens": options.calibration_tokens,
                "sensitivity_tokens": options.sensitivity_tokens,
            }
            calibrate(model, options.data, ratio, pack, **settings, **engine)
            found = evaluate(model, pack, options.heldout, engine, dense=dense)
            rows.append({"asked": ratio, **exact, **found.model_dump()})
            result = {
                "machine": describe_machine(),
                "engine": engine | {"model": options.model.name},
                "max_context": options.max_context,
                "rows": rows,
            }
            (options.out / f"{options.name}_packs.json").write_text(
                json.dumps(result, indent=1) + "\n"
            )
    return 0


def _exact(text: str) -> tuple[int, int]:
    sinks, window = text.split("+")
    return int(sinks), int(window)


if __name__ == "__main__":
    sys.exit(main())
