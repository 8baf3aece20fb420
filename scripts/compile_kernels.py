"""Compiles every GPU kernel variant ahead of time: docs/results/triton_compile.json and .md.

    python scripts/compile_kernels.py [--capability 90] [--kernel attend_kernel]

No GPU is needed. Results are written as they come, and variants whose source and compiler have not
changed since are not compiled again. Exits with an error if a variant spills, wants more shared
memory than the chip has, has a product without tensor cores, or cannot be compiled in time.
"""

import argparse
import json
import multiprocessing
import sys
from dataclasses import asdict, replace
from pathlib import Path

import triton

from vllm_attentionpack.bench.compile_table import (
    SHARED_LIMIT,
    Compiled,
    Launch,
    cases,
    compile_launch,
    table,
    variant_key,
    variants,
)

RESULTS = Path(__file__).parent.parent / "docs" / "results"
INTRODUCTION = f"""# What the compiler made of the GPU kernels

Written by `scripts/compile_kernels.py`, Triton {triton.__version__}. Per variant and architecture:
registers per thread / bytes spilled per thread / KiB of shared memory, and the matrix instructions
in the assembly: HMMA is `mma`, HGMMA `wgmma`, UTCHMMA `tcgen05`. The merge has no product. A layer
is query heads / KV heads x head size, heads per group G, ratio, modalities M; S is the block size.
"-" stands where an architecture launches no such variant, or the one of an earlier line.

"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, action="append", choices=sorted(SHARED_LIMIT))
    parser.add_argument("--kernel", action="append", help="only kernels of this name")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one variant")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()

    wanted = {
        variant_key(launch, capability): (launch, capability, case.name)
        for capability in sorted(SHARED_LIMIT)
        for case, launch in variants(cases(), capability)
    }
    rows = {
        key: replace(row, case=wanted[key][2])
        for key, row in _read(options.out).items()
        if key in wanted
    }
    failed = 0
    for key, (launch, capability, case) in wanted.items():
        name = launch.kernel.__name__
        skipped = (options.capability and capability not in options.capability) or (
            options.kernel and name not in options.kernel
        )
        if key in rows or skipped:
            continue
        row = _compile(launch, capability, case, options.timeout)
        if row is None:
            failed += 1
            print(f"sm_{capability} {name}, {case}: not compiled", flush=True)
            continue
        rows[key] = row
        print(f"sm_{capability} {name}, {case}: {row.seconds} s", *row.faults(), flush=True)
        _write(options.out, [rows[key] for key in wanted if key in rows], len(wanted))
    _write(options.out, [rows[key] for key in wanted if key in rows], len(wanted))
    print(table(list(rows.values())))
    faulty = sum(bool(row.faults()) for row in rows.values())
    missing = len(wanted) - len(rows) - failed
    print(
        f"{len(rows)} variants compiled, of which {faulty} break a rule; "
        f"{failed} failed, {missing} not tried"
    )
    return 1 if faulty or failed else 0


def _compile(launch: Launch, capability: int, case: str, timeout: float) -> Compiled | None:
    """In a process of its own, which may hang or die."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        sender.send(compile_launch(launch, capability, case))

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(timeout) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


def _read(folder: Path) -> dict[str, Compiled]:
    path = folder / "triton_compile.json"
    if not path.exists():
        return {}
    rows = [Compiled(**row) for row in json.loads(path.read_text())["variants"]]
    return {row.key: row for row in rows}


def _write(folder: Path, rows: list[Compiled], wanted: int) -> None:
    found = {"triton": triton.__version__, "variants": [asdict(row) for row in rows]}
    (folder / "triton_compile.json").write_text(json.dumps(found, indent=1) + "\n")
    faulty = sum(bool(row.faults()) for row in rows)
    summary = f"{len(rows)} of {wanted} variants compiled so far; {faulty} break a rule.\n\n"
    (folder / "triton_compile.md").write_text(INTRODUCTION + summary + table(rows) + "\n")


if __name__ == "__main__":
    sys.exit(main())
