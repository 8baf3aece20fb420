#!/usr/bin/env python3
"""Write the figures of docs/results/ into the README; `--check` says whether they are there."""

import argparse
import sys
from pathlib import Path

from vllm_attentionpack.report.readme import with_figures

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when stale")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = with_figures(before, ROOT / "docs" / "results")
    if options.check:
        return int(after != before)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
