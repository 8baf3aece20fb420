#!/usr/bin/env python3
"""Measure packs of the reference model over ratios and group sizes; store them as JSON.

Every row is calibrated on calibrate.jsonl and compared on heldout.jsonl with one dense run of the
same engine. About a minute per row on two cores.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from vllm_attentionpack.calibrate.run import calibrate
from vllm_attentionpack.evaluate.answers import run_engine
from vllm_attentionpack.evaluate.data import read_dataset
from vllm_attentionpack.evaluate.run import TOP_LOGPROBS, evaluate
from vllm_attentionpack.report.machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "reference-vlm"
ENGINE = {"dtype": "bfloat16", "max_model_len": 2048}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[4, 8, 12, 16])
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "results" / "reference_vlm_packs.json"
    )
    options = parser.parse_args()
    model, heldout = str(EXAMPLE / "model"), EXAMPLE / "heldout.jsonl"
    dense = run_engine(model, read_dataset(heldout).items, None, ENGINE, TOP_LOGPROBS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ratio in options.ratios:
            for group_size in options.group_sizes:
                pack = Path(folder) / f"{ratio:g}-{group_size}.pack.safetensors"
                data = EXAMPLE / "calibrate.jsonl"
                calibrate(model, data, ratio, pack, group_size=group_size, **ENGINE)
                found = evaluate(model, pack, heldout, ENGINE, dense=dense)
                rows.append({"group_size": group_size, "asked": ratio, **found.model_dump()})
    result = {"machine": describe_machine(), "engine": ENGINE, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
