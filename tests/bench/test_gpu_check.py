"""The check of the GPU kernels from start to end, without a GPU and without vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
ENGINE_SKIPPED = "engine part skipped: no vLLM, no GPU, or a dry run"


def check(
    folder: Path, *arguments: str, program: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    """Runs the script where nothing that is optional can be imported and no GPU is seen."""
    hidden = folder / "hidden"
    hidden.mkdir()
    for name in ("vllm", "xformers", "flashinfer"):
        (hidden / f"{name}.py").write_text("raise ImportError('hidden')\n")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(hidden),
        "OUT": str(folder / "out"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        [ROOT / "scripts" / "gpu_check.sh", *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.mark.slow
def test_every_part_runs_in_the_interpreter(tmp_path):
    done = check(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "gpu_check_dry_run.json").read_text())
    assert found["dry_run"] and "out_of_time" not in found
    assert len(found["correct"]) == 8 and all(row["passed"] for row in found["correct"])
    assert found["rates"].keys() == {"copy_bytes_per_second", "matmul_flops"}
    (row,) = found["decode"]
    assert row["ours_seconds"] > 0 and row["speed_up"] > 0 and row["goal"] == 4
    assert row["dense_seconds"]["dense"].keys() == {"torch sdpa", "torch sdpa, heads packed"}
    assert found["prefill"]["store_seconds"] > 0
    assert [row.get("tile") for row in found["tune"]] == [None, 64, 64]
    assert all("seconds" in row for row in found["tune"])
    lines = done.stdout.splitlines()
    assert lines[0].startswith("gpu_check on none (interpreter): 8 of 8 comparisons passed; copy")
    assert lines[1].startswith("| layer | requests x context | ours | best dense | speed-up |")
    assert lines[3].count("|") == lines[1].count("|") and "failed" not in lines[3]
    assert lines[4].startswith("store of 64 tokens: ")
    assert lines[5:] == [ENGINE_SKIPPED]


@pytest.mark.slow
def test_out_of_time_it_reports_what_it_has(tmp_path):
    done = check(tmp_path, "--dry-run", "--budget", "2")
    assert done.returncode == 1, done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "gpu_check_dry_run.json").read_text())
    assert found["out_of_time"]
    assert [row["error"] for row in found["correct"]] == ["out of time"] * 2
    assert done.stdout.splitlines()[-3:] == [
        "prefill and store failed: not reached",
        "out of time: later parts are missing",
        ENGINE_SKIPPED,
    ]


@pytest.mark.slow
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    done = check(tmp_path)
    assert done.returncode == 2
    assert done.stderr == ("gpu_check: the kernels cannot run here: PyTorch finds no CUDA device\n")
    assert done.stdout == ENGINE_SKIPPED + "\n"
