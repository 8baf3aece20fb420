"""What `scripts/gpu_check.sh` runs: the kernels on a GPU, against the reference and against others.

Parts: `rates` (copy bandwidth and matrix rate), `correct` (every kernel against the reference on
the same bytes), `decode` and `prefill` (with the encoding of new tokens) against dense attention,
`tune` (other launch shapes). None imports vLLM unless it is there to be measured. What fails or is
out of time is reported as such and ends nothing else. `--dry-run` takes the same path with tiny
shapes on a CPU, in Triton's interpreter: its times mean nothing, its comparisons do.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vllm_attentionpack.bench.gpu_correct import check_correct
from vllm_attentionpack.bench.gpu_measure import (
    GOALS,
    best_of,
    measure_decode,
    measure_machine,
    measure_prefill,
    tune,
)
from vllm_attentionpack.bench.gpu_pages import Run
from vllm_attentionpack.ops import triton as kernels


class OutOfTime(BaseException):
    """The budget is used up. Not an `Exception`: those are caught and reported, part by part."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_check.json")
    parser.add_argument("--budget", type=float, default=400, help="seconds for all parts")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in the interpreter")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry_run else "cuda")
    reason = kernels.unavailable(device)
    if reason:
        print(f"gpu_check: the kernels cannot run here: {reason}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    run = Run(device, options.dry_run, time.monotonic() + options.budget)
    result: dict[str, Any] = {"dry_run": run.dry, "machine": _machine(run), "correct": []}
    options.out.mkdir(parents=True, exist_ok=True)
    name = "gpu_check_dry_run.json" if run.dry else "gpu_check.json"

    def save() -> None:
        (options.out / name).write_text(json.dumps(result, indent=1) + "\n")

    def out_of_time(*_: Any) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, options.budget)
    try:
        _measure(run, result, save)
    except OutOfTime:
        result["out_of_time"] = True
    signal.setitimer(signal.ITIMER_REAL, 0)
    save()
    print(_table(result))
    passed = result["correct"] and all(row["passed"] for row in result["correct"])
    return 0 if passed else 1


def _measure(run: Run, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Fills `result` part by part, the most important first."""
    result["rates"] = _attempt(partial(measure_machine, run))
    copy_rate = result["rates"].get("copy_bytes_per_second", float("nan"))
    result["correct"] = check_correct(run)
    save()
    result["decode"] = []
    for goal in GOALS[:1] if run.dry else GOALS:
        row = {"layer": goal.layer.name, "requests": goal.requests, "context": goal.context}
        row |= _attempt(partial(measure_decode, run, goal, copy_rate))
        result["decode"].append(row)
        save()
    result["prefill"] = _attempt(partial(measure_prefill, run))
    save()
    result["tune"] = []
    for row in tune(run):
        result["tune"].append(row)


def _attempt(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `part` finds, or under "failed" why it found nothing."""
    try:
        return part()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def _machine(run: Run) -> dict[str, str]:
    import triton

    name = "none (interpreter)" if run.dry else torch.cuda.get_device_name(run.device)
    return {"gpu": name, "torch": torch.__version__, "triton": triton.__version__}


def _table(result: dict[str, Any]) -> str:
    """Markdown and plain lines of whatever parts there are."""
    correct, rates = result["correct"], result.get("rates", {})
    passed = sum(row["passed"] for row in correct)
    first = (
        f"gpu_check on {result['machine']['gpu']}: {passed} of {len(correct)} comparisons passed"
    )
    if "copy_bytes_per_second" in rates:
        first += (
            f"; copy {rates['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
            f"bf16 matmul {rates['matmul_flops'] / 1e12:.0f} TFLOP/s"
        )
    failed = [row for row in correct if not row["passed"]]
    lines = [first]
    lines += [f"FAILED {row['what']}, {row['dtype']}: {row['error']}" for row in failed[:8]]
    lines += [
        "| layer | requests x context | ours | best dense | speed-up | over fp8 | over TurboQuant "
        "| goal | of copy rate |",
        "|---" * 9 + "|",
    ]
    lines += [_decode_line(row) for row in result.get("decode", [])]
    lines.append(_prefill_line(result.get("prefill", {"failed": "not reached"})))
    if result.get("out_of_time"):
        lines.append("out of time: later parts are missing")
    return "\n".join(lines)


def _decode_line(row: dict[str, Any]) -> str:
    start = f"| {row['layer']} | {row['requests']} x {row['context']} "
    if "failed" in row:
        return f"{start}| failed: {row['failed'][:100]} | | | | | | |"
    best = best_of(row["dense_seconds"]["dense"])
    ratios = ("speed_up", "speed_up_over_fp8", "speed_up_over_turboquant")
    cells = [
        f"{row['ours_seconds'] * 1e6:.1f} us",
        f"{best * 1e6:.1f} us" if best else "none ran",
        *(_times(row[ratio]) for ratio in ratios),
        f"{row['goal']}",
        f"{row['share_of_copy_bandwidth']:.0%}",
    ]
    return start + "".join(f"| {cell} " for cell in cells) + "|"


def _prefill_line(prefill: dict[str, Any]) -> str:
    if "failed" in prefill:
        return f"prefill and store failed: {prefill['failed'][:100]}"
    dense = best_of(prefill["dense_prompt_attention_seconds"])
    share = f"{prefill['store_seconds'] / dense:.1%}" if dense else "unknown share"
    context = best_of(prefill["dense_context_attention_seconds"])
    times = context / prefill["context_attention_seconds"] if context else None
    return (
        f"store of {prefill['prompt']} tokens: {prefill['store_seconds'] * 1e6:.1f} us, {share}"
        " of the layer's dense prompt attention (goal: at most 5 %); "
        f"{prefill['chunk']} new tokens over {prefill['context']}: "
        f"{prefill['context_attention_seconds'] * 1e6:.1f} us, {_times(times)} times as fast "
        "as dense"
    )


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


if __name__ == "__main__":
    sys.exit(main())
