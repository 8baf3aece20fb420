#!/usr/bin/env python3
"""Measure the reference model's dense accuracy through vLLM and store it as JSON."""

import argparse
import json
import sys
from pathlib import Path

from reference_vlm.measure import measure

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "examples" / "reference-vlm")
    parser.add_argument("--items", default="heldout", help="name of the item file, no suffix")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "results" / "reference_vlm_dense.json"
    )
    options = parser.parse_args()
    result = measure(options.folder, options.items)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"overall": result["overall"], "by_kind": result["by_kind"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
