"""The README's main job: calibrate, serve over HTTP, ask, evaluate; all through the commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]


def test_the_main_job_ends_in_one_json_line(tmp_path):
    command = [sys.executable, "-m", "vllm_attentionpack.quickstart", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("(expected '") == 6
    result = json.loads(done.stdout.splitlines()[-1])

    assert list(result) == ["ratio", "bytes_per_token", "kv_tokens", "accuracy", "agreement", "kl"]
    assert result["bytes_per_token"] == {"dense": 2048, "packed": 256}
    assert result["ratio"] == 8
    capacity = result["kv_tokens"]
    # Exact tokens take their share of short requests.
    assert 4.5 * capacity["dense"] < capacity["packed"] < 8 * capacity["dense"]
    # What a working codec reaches with room to spare; broken attention is at chance.
    assert result["accuracy"]["dense"] > 0.9
    assert result["accuracy"]["packed"] > result["accuracy"]["dense"] - 0.03
    assert result["agreement"] > 0.9
    assert 0 < result["kl"] < 0.03
