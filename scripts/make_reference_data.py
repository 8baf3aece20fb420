#!/usr/bin/env python3
"""Write calibrate.jsonl, heldout.jsonl and their image pools for a model of the training script.

With --long the items have up to about 4,000 tokens, and their text comes from files of this machine
that training holds out; without, they are the items of the reference model.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from reference_vlm.corpus import held_out_text
from reference_vlm.dataset import LONG_SPLITS, SPLITS, write_split
from reference_vlm.verify import check_item
from transformers import AutoTokenizer

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "reference-vlm"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=EXAMPLE, help="holds model/ and text/; receives the data"
    )
    parser.add_argument(
        "--long", action="store_true", help="items for long contexts; writes text/ as well"
    )
    options = parser.parse_args()
    folder = options.folder
    if options.long:
        (folder / "text").mkdir(parents=True, exist_ok=True)
        for part, split in enumerate(LONG_SPLITS):
            text = held_out_text(part, len(LONG_SPLITS))
            (folder / "text" / split.text_source).write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for split in LONG_SPLITS if options.long else SPLITS:
        items = write_split(split, folder)
        for item in items:
            check_item(item, tokenizer)
        print(f"{split.name}: {len(items)} items", dict(Counter(i["kind"] for i in items)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
