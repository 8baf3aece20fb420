"""Compiles every GPU kernel variant ahead of time and writes docs/results/triton_compile.json.

    python scripts/compile_kernels.py [--capability 90] [--limit N]

No GPU is needed. Exits with an error if a variant breaks a rule that is checked: shared memory
within the chip's, and tensor cores in every product.
"""

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton

from vllm_attentionpack.bench.compile_table import (
    SHARED_LIMIT,
    cases,
    compile_launch,
    launches,
    variants,
)

RESULT = Path(__file__).parent.parent / "docs" / "results" / "triton_compile.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, action="append", choices=sorted(SHARED_LIMIT))
    parser.add_argument("--limit", type=int, help="only the first cases")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    options = parser.parse_args()
    wanted = cases()[: options.limit]
    found = []
    work = [
        (index, number, capability)
        for index, number in _numbered(wanted)
        for capability in options.capability or sorted(SHARED_LIMIT)
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        for row in pool.map(_compile, work):
            found.append(row)
            print(
                f"| {row['kernel']} | {row['case']} | sm_{row['capability']} | {row['warps']} "
                f"| {row['registers']} | {row['spill_bytes']} | {row['shared_bytes']} "
                f"| {'yes' if row['tensor_cores'] else 'no'} | {row['instructions']} |",
                flush=True,
            )
            RESULT.write_text(
                json.dumps({"triton": triton.__version__, "variants": found}, indent=1) + "\n"
            )
    broken = [
        row
        for row in found
        if row["shared_bytes"] > SHARED_LIMIT[row["capability"]]
        or (row["kernel"] != "merge_kernel" and not row["tensor_cores"])
    ]
    print(f"{len(found)} variants, {len(broken)} break a rule")
    return 1 if broken else 0


def _numbered(wanted: list) -> list[tuple[int, int]]:
    order = {id(case): index for index, case in enumerate(wanted)}
    counts: dict[int, list] = {}
    for case, launch in variants(wanted):
        counts.setdefault(order[id(case)], []).append(launch.kernel.__name__)
    return [
        (index, number)
        for index, names in counts.items()
        for number, launch in enumerate(launches(wanted[index]))
        if launch.kernel.__name__ in names
    ]


def _compile(work: tuple[int, int, int]) -> dict:
    index, number, capability = work
    case = cases()[index]
    return compile_launch(launches(case)[number], capability, case.name).row()


if __name__ == "__main__":
    sys.exit(main())
