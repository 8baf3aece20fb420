#!/usr/bin/env python3
"""Measure the reference model's dense accuracy through vLLM; store it as JSON and in its card."""

import argparse
import json
import re
import sys
from pathlib import Path

from reference_vlm.measure import MAX_MODEL_LEN, length_table, measure, table

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "examples" / "reference-vlm")
    parser.add_argument("--items", default="heldout", help="name of the item file, no suffix")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "results" / "reference_vlm_dense.json"
    )
    parser.add_argument("--max-model-len", type=int, default=MAX_MODEL_LEN)
    parser.add_argument("--limit", type=int, help="only the first items; they are a mix")
    parser.add_argument("--card", type=Path, help="document whose tables are replaced")
    options = parser.parse_args()
    result = measure(options.folder, options.items, options.max_model_len, options.limit)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.card:
        card = options.card.read_text()
        for name, shown in (("measured", table(result)), ("lengths", length_table(result))):
            card = re.sub(
                rf"(<!-- {name} -->\n).*?(\n<!-- end -->)",
                lambda found, shown=shown: found[1] + shown + found[2],
                card,
                flags=re.DOTALL,
            )
        options.card.write_text(card)
    print(json.dumps({"overall": result["overall"], "by_kind": result["by_kind"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
