"""Two tensor-parallel ranks, each with the head groups of its own KV heads."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.generate_sharded import ARGUMENTS, SECTION, chosen_logprobs, sampling
from tests.support.engines import compacted
from tests.support.outputs import token_ids
from tests.support.packs import identity_pack
from tests.support.reference import CALIBRATION_DATA, MODEL, questions
from vllm_attentionpack.packfile import Pack, save_pack
from vllm_attentionpack.packfile.shard import shard_layout

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="each rank is bound to a core of its own"),
]

QUESTIONS = 20
TOKENS = 24
SCRIPT = Path(__file__).parent / "generate_sharded.py"
START_SECONDS = 300


@dataclass(frozen=True)
class Runs:
    """The same questions on one rank and on two.

    Attributes:
        pack: from which both were served.
        one: outputs of one rank.
        two: what `generate_sharded.py` printed.
    """

    pack: Pack
    one: list[Any]
    two: dict[str, Any]


@pytest.fixture(scope="module")
def runs(engines: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    from vllm_attentionpack.calibrate.run import calibrate

    folder = tmp_path_factory.mktemp("tensor-parallel")
    engines.close()
    pack = calibrate(
        str(MODEL),
        CALIBRATION_DATA,
        8.0,
        folder / "pack",
        group_size=1,
        anchor_span=32,
        sensitivity="uniform",
        max_tokens=6000,
        max_model_len=ARGUMENTS["max_model_len"],
    )
    names = [layer.name for layer in pack.header.layers]
    save_pack(identity_pack(pack.header.fingerprint, names, heads_per_group=2), folder / "joint")

    engine = engines.get(MODEL, **ARGUMENTS, **compacted(folder / "pack", **SECTION))
    prompts = [question.prompt for question in questions(engine.llm)[:QUESTIONS]]
    one = engine.generate(prompts, sampling(TOKENS))
    engines.close()

    arguments = [folder / "pack", folder / "joint", QUESTIONS, TOKENS]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Runs(pack, one, json.loads(done.stdout.splitlines()[-1]))


def test_two_ranks_give_the_tokens_of_one(runs):
    """All of them; in bfloat16 the order of a sum decides one token in forty."""
    assert runs.two["token_ids"] == token_ids(runs.one)
    assert len({tuple(ids) for ids in runs.two["token_ids"]}) > QUESTIONS // 2


def test_two_ranks_give_the_probabilities_of_one(runs):
    """But for float32 rounding, 1e-6, and what a code costs that rounds the other way after it."""
    for one, two in zip(runs.one, runs.two["logprobs"], strict=True):
        assert two == pytest.approx(chosen_logprobs(one), abs=0.01)


def test_pages_are_equal_on_both_ranks_and_half_as_large(runs):
    first, second = runs.two["caches"]
    assert first["bytes"] == second["bytes"]
    assert first["tokens"] == second["tokens"]
    assert first["allocated"] == second["allocated"] <= ARGUMENTS["kv_cache_memory_bytes"]
    layouts = runs.pack.header.layouts()
    for layer, layout in zip(runs.pack.header.layers, layouts, strict=True):
        shards = [shard_layout(layout, 2, rank) for rank in range(2)]
        per_token = first["bytes"][layer.name] / first["tokens"][layer.name]
        assert per_token == max(shard.content_bytes_per_token for shard in shards)
        assert per_token < layout.bytes_per_token
        for rank, shard in zip(runs.two["caches"], shards, strict=True):
            assert rank["content"][layer.name] == shard.content_bytes_per_token


def test_a_pack_that_codes_the_heads_of_both_ranks_jointly_is_refused(runs):
    assert runs.two["refused"] == (
        "PackMismatchError: tensor_parallel_size is 2, but the pack codes 2 KV heads jointly, "
        "which makes 1 head group(s): allowed degrees are [1]. "
        "Calibrate with a smaller --group-size to shard further."
    )
