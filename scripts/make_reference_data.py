#!/usr/bin/env python3
"""Write calibrate.jsonl, heldout.jsonl and their image pools for the reference model."""

import argparse
import sys
from collections import Counter
from pathlib import Path

from reference_vlm.dataset import SPLITS, write_split
from reference_vlm.verify import check_item
from transformers import AutoTokenizer

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "reference-vlm"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=EXAMPLE, help="holds model/ and text/; receives the data"
    )
    folder = parser.parse_args().folder
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for split in SPLITS:
        items = write_split(split, folder)
        for item in items:
            check_item(item, tokenizer)
        print(f"{split.name}: {len(items)} items", dict(Counter(i["kind"] for i in items)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
