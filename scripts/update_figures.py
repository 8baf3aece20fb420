#!/usr/bin/env python3
"""Write the figures of docs/results/ into the documents; `--check` says whether they are there."""

import argparse
import sys
from pathlib import Path

from vllm_attentionpack.report.markdown import with_figures

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "quality.md", ROOT / "docs" / "window.md")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when stale")
    options = parser.parse_args()
    stale = []
    for document in DOCUMENTS:
        before = document.read_text()
        after = with_figures(before, ROOT / "docs" / "results")
        if after != before:
            stale.append(document)
            if not options.check:
                document.write_text(after)
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
