#!/usr/bin/env python3
"""Time and memory of calibrating an 8B-shaped model on synthetic activations; stored as JSON.

Moments of all layers are gathered from random tokens, a few steps of which are enough to see the
time of one, and so are those of gradients. Bases are made for a few layers and scaled. Minutes are
of one processor core. The model's own forwards and backwards come on top.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from itertools import product
from pathlib import Path

import torch

from vllm_attentionpack.calibrate.assemble import Assembler
from vllm_attentionpack.calibrate.gradients import DRAWS
from vllm_attentionpack.calibrate.metrics import FisherMetrics, LayerStatistics
from vllm_attentionpack.calibrate.moments import (
    MomentAccumulator,
    auto_group_dims,
    auto_group_size,
)
from vllm_attentionpack.calibrate.settings import SENSITIVITY_TOKENS
from vllm_attentionpack.codec.positions import Rotary
from vllm_attentionpack.report.machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
#: Layers, query heads, KV heads, head size.
SHAPES = {
    "8B, 32/8 heads x 128": (32, 32, 8, 128),
    "7B, 32/32 heads x 128": (32, 32, 32, 128),
}
STEP_TOKENS = 2048
CALIBRATION_TOKENS = 100_000
GRADIENTS = DRAWS * SENSITIVITY_TOKENS
BASIS_LAYERS = 1


def _measure(
    layers: int, heads: int, kv_heads: int, size: int, steps: int, joint_kv: bool
) -> dict[str, float]:
    torch.set_num_threads(1)
    group_size = auto_group_size(kv_heads, size, auto_group_dims(False, joint_kv))
    frequencies = 1e6 ** (-torch.arange(size // 2, dtype=torch.float64) / (size // 2))
    rotary = Rotary(frequencies)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(STEP_TOKENS, heads, size, generator=generator)
    key, value = torch.randn(2, STEP_TOKENS, kv_heads, size, generator=generator)
    positions = torch.arange(STEP_TOKENS)
    visual = positions % 2 == 0
    before = _resident()
    shape = heads, kv_heads, size, group_size, rotary, joint_kv
    moments = [MomentAccumulator(*shape) for _ in range(layers)]
    start = time.process_time()
    for _ in range(steps):
        for accumulator in moments:
            accumulator.add(query, key, value, positions, visual)
    per_token = (time.process_time() - start) / (steps * STEP_TOKENS)
    held = _resident() - before
    shape = 0, kv_heads, size, group_size, None, joint_kv
    gradients = [MomentAccumulator(*shape) for _ in range(layers)]
    start = time.process_time()
    for sums in gradients:
        sums.add(key[:, :0], key, value, None, visual)
    per_gradient = (time.process_time() - start) / STEP_TOKENS
    both = _resident() - before
    gram = torch.eye(size, dtype=torch.float64).repeat(heads, 1, 1)
    start = time.process_time()
    Assembler(
        (
            LayerStatistics(
                str(i),
                size**-0.5,
                moments[i].finalize(32768, 2),
                gram,
                fisher=FisherMetrics.of(gradients[i], 2, joint_kv),
            )
            for i in range(BASIS_LAYERS)
        ),
        group_size,
        1e-2,
    )
    bases = (time.process_time() - start) / BASIS_LAYERS
    return {
        "heads_per_group": group_size,
        "moments_gb": held / 1e9,
        "gradients_gb": (both - held) / 1e9,
        "gathering_minutes": per_token * CALIBRATION_TOKENS / 60,
        "gradients_minutes": per_gradient * GRADIENTS / 60,
        "bases_minutes": bases * layers / 60,
    }


def _resident() -> int:
    """Bytes in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "results" / "calibration_cost.json"
    )
    options = parser.parse_args()
    rows = {}
    # A process for each: memory that an earlier one let go of would hold the moments of the next.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for (name, shape), joint_kv in product(SHAPES.items(), (False, True)):
            row = f"{name}, joint K/V" if joint_kv else name
            rows[row] = pool.apply(_measure, (*shape, options.steps, joint_kv))
            print(row, rows[row], flush=True)
    result = {
        "machine": describe_machine(),
        "tokens": CALIBRATION_TOKENS,
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
