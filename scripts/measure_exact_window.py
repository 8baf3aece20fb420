#!/usr/bin/env python3
"""Measure what exact sinks and recent tokens buy: quality and capacity over a grid, as JSON.

Teacher forcing on the held-out data, every token read as later tokens read it. One engine per
ratio: the sinks and the window of a prompt that is computed at once come out of that step's own
tokens, so they can be changed while the engine runs. An answer counts as right when each of its
tokens is the likeliest.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_attentionpack import plugin
from vllm_attentionpack.config import SECTION
from vllm_attentionpack.engine import engine_arguments, shut_down
from vllm_attentionpack.evaluate.answers import Scored, score
from vllm_attentionpack.evaluate.compare import kl_divergence
from vllm_attentionpack.evaluate.data import Item, read_dataset
from vllm_attentionpack.evaluate.run import TOP_LOGPROBS
from vllm_attentionpack.packfile import PackHeader, read_header
from vllm_attentionpack.report.inspect import pack_pages
from vllm_attentionpack.report.machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "reference-vlm"
ENGINE = {"dtype": "bfloat16", "max_model_len": 2048, "enable_prefix_caching": False}
CONTEXTS = (2048, 32768)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(EXAMPLE / "model"))
    parser.add_argument("--data", type=Path, default=EXAMPLE / "calibrate.jsonl")
    parser.add_argument("--heldout", type=Path, default=EXAMPLE / "heldout.jsonl")
    parser.add_argument("--every", type=int, default=1, help="take every n-th held-out item")
    parser.add_argument("--max-model-len", type=int, default=ENGINE["max_model_len"])
    parser.add_argument("--ratios", type=float, nargs="+", default=[4, 8, 12, 16])
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 16, 32, 64, 128])
    parser.add_argument("--sinks", type=int, nargs="+", default=[0, 1, 4, 16])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "results" / "reference_vlm_window.json"
    )
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the grid is walked inside the engine
    engine = ENGINE | {"max_model_len": options.max_model_len}
    items = read_dataset(options.heldout).items[:: options.every]
    dense = _with_engine(options.model, None, engine, lambda llm: _score(llm, items))
    rows = [_row(items, dense, dense, {"ratio": 1.0, "codec": "dense"})]
    with tempfile.TemporaryDirectory() as folder:
        for ratio in options.ratios:
            pack = Path(folder) / f"{ratio:g}.pack.safetensors"
            _calibrate(options, ratio, pack)
            grid = [(w, s) for w in options.windows for s in options.sinks]
            found = _with_engine(
                options.model, pack, engine, lambda llm, grid=grid: _walk(llm, items, grid)
            )
            header = read_header(pack)
            for (window, sinks), scored in zip(grid, found, strict=True):
                facts = {
                    "ratio": ratio,
                    "reached": header.compression_ratio,
                    "window": window,
                    "sinks": sinks,
                    **{f"capacity_{n}": _capacity(header, window, sinks, n) for n in CONTEXTS},
                }
                rows.append(_row(items, dense, scored, facts))
                print(json.dumps(rows[-1]), flush=True)
    result = {"machine": describe_machine(), "engine": engine, "items": len(items), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _calibrate(options: argparse.Namespace, ratio: float, pack: Path) -> None:
    from vllm_attentionpack.calibrate.run import calibrate

    engine = {key: value for key, value in ENGINE.items() if key != "enable_prefix_caching"}
    engine["max_model_len"] = options.max_model_len
    calibrate(options.model, options.data, ratio, pack, **engine)


def _with_engine(model: str, pack: Path | None, engine: dict[str, Any], work: Any) -> Any:
    plugin.register()
    from vllm import LLM

    arguments = engine_arguments(model, {"max_logprobs": -1, **engine})
    if pack is not None:
        section = {"pack": str(pack), "exact_prefill": False, "window": 128, "sinks": 16}
        arguments |= {
            "attention_backend": plugin.BACKEND,
            "additional_config": {SECTION: section},
        }
    llm = LLM(**arguments)
    try:
        return work(llm)
    finally:
        shut_down(llm)


def _walk(llm: Any, items: Sequence[Item], grid: Sequence[tuple[int, int]]) -> list[list[Scored]]:
    from vllm_attentionpack.attention.impl import AttentionPackImpl

    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    impls = [layer.impl for layer in layers.values() if hasattr(layer, "impl")]
    state = next(impl.state for impl in impls if isinstance(impl, AttentionPackImpl))
    found = []
    for window, sinks in grid:
        state.config = state.config.model_copy(update={"window": window, "sinks": sinks})
        found.append(_score(llm, items))
    return found


def _score(llm: Any, items: Sequence[Item]) -> list[Scored]:
    return score(llm, items, min(TOP_LOGPROBS, llm.model_config.get_vocab_size()))


def _capacity(header: PackHeader, window: int, sinks: int, context: int) -> float:
    """Requests of `context` tokens that fit where one of a dense cache does."""
    if window < 2 and not sinks:
        return header.compression_ratio
    pages = pack_pages(header)
    return context * pages.exact_bytes_per_token / pages.request_bytes(context, sinks, window)


def _row(
    items: Sequence[Item], dense: list[Scored], scored: list[Scored], facts: dict[str, Any]
) -> dict[str, Any]:
    row = dict(facts)
    kinds = ["image" if x.extra["modality"] == "visual" else x.extra["kind"] for x in items]
    for kind in sorted(set(kinds)):
        chosen = [i for i, found in enumerate(kinds) if found == kind]
        kl = np.concatenate([kl_divergence(dense[i], scored[i]) for i in chosen])
        row[f"kl_{kind}"] = float(kl.mean())
        right = [np.all(scored[i].target >= scored[i].logprobs[:, 0]) for i in chosen]
        row[f"accuracy_{kind}"] = float(np.mean(right))
    return row


if __name__ == "__main__":
    sys.exit(main())
