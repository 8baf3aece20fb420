"""What the benchmarks print: tables for people, JSON for programs."""

import json
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vllm_attentionpack.bench import cpu_engine, cpu_ops
from vllm_attentionpack.bench.timing import copy_rate
from vllm_attentionpack.ops.cpu.library import kernels
from vllm_attentionpack.report.machine import describe_machine


def print_ops(repeats: int, threads: int | None, as_json: bool) -> None:
    """One line per row as soon as it is measured; with `as_json` one object per row."""
    if threads is not None:
        torch.set_num_threads(threads)
    if as_json:
        for row in cpu_ops.rows(repeats):
            print(json.dumps(row.to_dict()), flush=True)
        return
    console = Console()
    console.print(
        f"{describe_machine()['cpu']}, {torch.get_num_threads()} threads, kernels for "
        f"{kernels().name}; copying memory reads and writes {copy_rate():.1f} GB/s"
    )
    table = Table("row", "dense ms", "ours ms", "speedup", "goal", "GB/s", "GMAC/s")
    for row in cpu_ops.rows(repeats):
        table.add_row(
            row.name,
            f"{row.dense_ms:.2f}",
            f"{row.ours_ms:.2f}",
            f"{row.speedup:.2f}",
            f"{row.goal:g}",
            f"{row.dense_gb_s:.2f} / {row.ours_gb_s:.2f}",
            f"{row.dense_gmac_s:.1f} / {row.ours_gmac_s:.1f}",
        )
    console.print(table)


def print_engine(setup: cpu_engine.Setup, as_json: bool) -> None:
    """Both engines' rates and how they compare."""
    result: dict[str, Any] = cpu_engine.compare(setup)
    result["machine"] = describe_machine()
    if as_json:
        print(json.dumps(result))
        return
    table = Table("", "dense", "ours", "ours / dense", "goal")
    for name, ratio, goal in (
        ("prefill", "prefill_ratio", "0.95"),
        ("decode", "decode_speedup", "1.5"),
        ("largest_batch", "batch_ratio", "7.5"),
    ):
        dense, ours = result["dense"][name], result["ours"][name]
        table.add_row(name, f"{dense:.1f}", f"{ours:.1f}", f"{result[ratio]:.2f}", goal)
    Console().print(table)
