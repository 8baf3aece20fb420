#!/usr/bin/env python3
"""Measure what exact sinks and recent tokens buy: quality and capacity over a grid, as JSON.

As `measure_codecs.py` measures: teacher forcing on held-out items, every token that is not exact
read from its codes. Gradients are those beside each window and four sinks.
Capacity is that of a bfloat16 model on blocks of the default geometry.
"""

import sys
from itertools import product

from calibration_study.options import simulation_parser, started
from calibration_study.setting import store

from vllm_attentionpack.calibrate.settings import DEFAULT_SINKS
from vllm_attentionpack.evaluate.simulate.codec import CacheShape, ExactTokens, PackCodec
from vllm_attentionpack.kv_cache.pages import page_geometry

CONTEXTS = (2048, 32768)


def main() -> int:
    parser = simulation_parser(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[4, 8, 12, 16])
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 16, 32, 64, 128])
    parser.add_argument("--sinks", type=int, nargs="+", default=[0, 1, 4, 16])
    options = parser.parse_args()
    with started(options) as setting:
        table = setting.table(setting.items(options.heldout), options.heldout_tokens)
        assemblers = {}
        for ratio, window in product(options.ratios, options.windows):
            exact = ExactTokens(DEFAULT_SINKS, window) if window else ExactTokens()
            if window not in assemblers:
                assemblers[window] = setting.assembler(
                    max(setting.group_sizes), options.max_context, gradients_beside=exact
                )
            assembler = assemblers[window]
            assembled = setting.priced(assembler, exact=exact, ratio=ratio).at(ratio)
            size = sum(header.bytes_per_token for header in assembled.headers)
            codecs = assembled.codecs(table.device)
            for sinks in options.sinks:
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
    if window < 2 and not sinks:
        return shape.dense_bytes / size
    pages = page_geometry(size, shape.dense_bytes)
    return context * shape.dense_bytes / pages.request_bytes(context, sinks, window)


if __name__ == "__main__":
    sys.exit(main())
