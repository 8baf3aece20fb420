#!/usr/bin/env python3
"""Measure what exact sinks and recent tokens buy: quality and capacity over a grid, as JSON.

As `measure_codecs.py` measures: teacher forcing on held-out items, every token that is not exact
read from its codes. All layers have pages of one size, as a server with exact tokens wants them.
Capacity is that of a bfloat16 model on pages of the default geometry.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

from calibration_study.setting import Setting, store

from vllm_attentionpack.evaluate.simulate.codec import CacheShape, ExactTokens, PackCodec
from vllm_attentionpack.kv_cache.pages import page_geometry

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "reference-vlm"
CONTEXTS = (2048, 32768)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="reference_vlm", help="of the result file")
    parser.add_argument("--model", type=Path, default=EXAMPLE / "model")
    parser.add_argument("--data", type=Path, default=EXAMPLE / "calibrate.jsonl")
    parser.add_argument("--heldout", type=Path, default=EXAMPLE / "heldout.jsonl")
    parser.add_argument("--heldout-tokens", type=int, help="use whole items up to so many")
    parser.add_argument("--calibration-tokens", type=int, help="stop gathering after so many")
    parser.add_argument("--sensitivity-tokens", type=int, default=8192)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-context", type=int, default=512)
    parser.add_argument("--ratios", type=float, nargs="+", default=[4, 8, 12, 16])
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 16, 32, 64, 128])
    parser.add_argument("--sinks", type=int, nargs="+", default=[0, 1, 4, 16])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args()
    with Setting.start(
        options.model, options.data, options.max_model_len, options.calibration_tokens
    ) as setting:
        setting.sensitivity_tokens = options.sensitivity_tokens
        table = setting.table(setting.items(options.heldout), options.heldout_tokens)
        fitted = setting.fitted(max(setting.group_sizes), options.max_context)
        for ratio in options.ratios:
            assembled = fitted.assembler.at(ratio, sensitivity=fitted.sensitivity, max_page_sizes=1)
            (size,) = {header.bytes_per_token for header in assembled.headers}
            codecs = assembled.codecs(table.device)
            for window, sinks in product(options.windows, options.sinks):
                codec = PackCodec(setting.shape, codecs, ExactTokens(sinks, window))
                name = f"{ratio:g}x codes, {sinks} + {window} exact"
                table.add(
                    f"{ratio:g}x",
                    name,
                    codec,
                    window=window,
                    sinks=sinks,
                    **{
                        f"capacity_{n}": capacity(setting.shape, size, sinks, window, n)
                        for n in CONTEXTS
                    },
                )
            store(options.out / f"{options.name}_window.json", setting, table, vars(options))
    return 0


def capacity(shape: CacheShape, size: int, sinks: int, window: int, context: int) -> float:
    """Requests of `context` tokens that fit where one of a dense cache does."""
    dense = shape.dense_bytes // len(shape.layer_names)
    if window < 2 and not sinks:
        return dense / size
    pages = page_geometry(size, dense)
    return context * dense / pages.request_bytes(context, sinks, window)


if __name__ == "__main__":
    sys.exit(main())
