"""Builders are told the rotary positions of their step's requests, and of no others."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_attentionpack import compat
from vllm_attentionpack.compat import rope_positions

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MAX_LEN = 32


def prompt_positions(length: int, seed: int) -> torch.Tensor:
    """`[3, length]`, unlike the token indices and unlike each other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 500, (3, length), generator=generator)


class Case:
    """A request: prompt positions `[3, length]` and what later tokens add to their index."""

    def __init__(self, length: int, delta: int) -> None:
        self.prompt, self.delta = prompt_positions(length, length), delta

    def position(self, token: int) -> int:
        length = self.prompt.shape[1]
        return int(self.prompt[0, token]) if token < length else token + self.delta


CASES = [Case(7, -3), Case(1, 0), Case(12, -5)]


def expected(cases, stride, count, rows):
    told = [[case.position(n * stride) for n in range(count)] for case in cases]
    return told + [list(range(0, stride * count, stride))] * (rows - len(cases))


class OlderStep:
    """The older runner, as far as the hook looks at it."""

    def __init__(self, cases=CASES, mrope=True):
        names = [f"request {i}" for i in range(len(cases))]
        self.runner = SimpleNamespace(
            uses_mrope=mrope,
            input_batch=SimpleNamespace(req_ids=names),
            # In another order than the rows.
            requests={
                name: SimpleNamespace(
                    mrope_positions=case.prompt if mrope else None,
                    mrope_position_delta=case.delta if mrope else None,
                    num_prompt_tokens=case.prompt.shape[1],
                )
                for name, case in reversed(list(zip(names, cases, strict=True)))
            },
        )

    def build(self, ask, dummy=False):
        hook = rope_positions._make_build(lambda runner, num_tokens, **kwargs: ask())
        scheduled = None if dummy else dict.fromkeys(self.runner.input_batch.req_ids, 1)
        return hook(self.runner, 1, num_scheduled_tokens=scheduled)


class NewerStep:
    """The newer runner's model state, as far as the hook looks at it."""

    SLOTS = (4, 0, 3, 1)

    def __init__(self, cases=CASES, mrope=True):
        table = torch.full((6 * 3, MAX_LEN), 9999, dtype=torch.int32)
        delta = torch.full((6,), 9999, dtype=torch.int32)
        slots = list(self.SLOTS[: len(cases)])
        for slot, case in zip(slots, cases, strict=True):
            table[3 * slot : 3 * slot + 3, : case.prompt.shape[1]] = case.prompt
            delta[slot] = case.delta
        state = SimpleNamespace(
            num_dims=3,
            max_model_len=MAX_LEN,
            prefill_positions=SimpleNamespace(gpu=table),
            prefill_delta=SimpleNamespace(gpu=delta),
        )
        self.state = SimpleNamespace(rope_state=state if mrope else None)
        self.batch = SimpleNamespace(
            idx_mapping=torch.tensor(slots),
            prefill_len_np=np.array([case.prompt.shape[1] for case in cases], np.int32),
        )

    def build(self, ask, dummy=False):
        hook = rope_positions._make_prepare(lambda state, batch, mode, **kwargs: ask())
        batch = self.batch
        if dummy:
            rows = len(batch.idx_mapping)
            batch = SimpleNamespace(
                idx_mapping=torch.arange(rows), prefill_len_np=np.zeros(rows, np.int32)
            )
        return hook(self.state, batch, None, for_capture=dummy)


@pytest.fixture(params=[OlderStep, NewerStep], ids=["v1", "v2"])
def step(request):
    return request.param


def every(stride=3, count=4, rows=3):
    return lambda: compat.positions_every(stride, count, rows, CPU)


@pytest.mark.parametrize(("stride", "count"), [(1, 12), (3, 4), (5, 1), (8, 10)])
def test_prompts_and_what_follows_them(step, stride, count):
    """The last reaches beyond the longest request that fits."""
    told = step().build(every(stride, count))
    assert told.dtype == torch.int64 and told.shape == (3, count)
    assert told.tolist() == expected(CASES, stride, count, 3)


def test_padded_rows_hold_token_indices(step):
    told = step().build(every(rows=5))
    assert told.tolist() == expected(CASES, 3, 4, 5)


def test_all_groups_of_a_step_are_told(step):
    def ask():
        first = every()()
        assert every()() is first
        other = every(stride=2)()
        return first, other

    first, other = step().build(ask)
    assert first.tolist() == expected(CASES, 3, 4, 3)
    assert other.tolist() == expected(CASES, 2, 4, 3)


def test_nothing_is_told_outside_of_a_step(step):
    assert every()() is None
    assert step().build(every()) is not None
    assert every()() is None


def test_a_failing_step_leaves_nothing_behind(step):
    def fail():
        assert every()() is not None
        raise RuntimeError("no metadata")

    with pytest.raises(RuntimeError, match="no metadata"):
        step().build(fail)
    assert every()() is None


def test_dummy_steps_are_told_nothing(step):
    real = step()
    assert real.build(every(), dummy=True) is None
    assert real.build(every()) is not None
    assert real.build(every(), dummy=True) is None


def test_models_without_mrope_are_told_nothing(step):
    assert step(mrope=False).build(every()) is None


def test_another_engine_within_a_step_is_told_its_own(step):
    def ask():
        assert step(mrope=False).build(every()) is None
        assert step(CASES[:1]).build(every(rows=1)).tolist() == expected(CASES[:1], 3, 4, 1)
        return every()()

    assert step().build(ask).tolist() == expected(CASES, 3, 4, 3)


def test_another_thread_is_told_nothing(step):
    def ask():
        told = []
        thread = threading.Thread(target=lambda: told.append(every()()))
        thread.start()
        thread.join()
        return told

    assert step().build(ask) == [None]


def test_rows_of_another_batch_are_an_error(step):
    with pytest.raises(AssertionError, match="3 requests were asked for as 2"):
        step().build(every(rows=2))


def test_a_later_step_sees_its_own_requests(step):
    assert step().build(every()).tolist() == expected(CASES, 3, 4, 3)
    later = [CASES[2], CASES[0]]
    assert step(later).build(every(rows=2)).tolist() == expected(later, 3, 4, 2)


def test_a_prompt_that_grew_is_read_anew():
    step = OlderStep(CASES[:1])
    step.build(every(rows=1))
    grown = Case(11, -4)
    (request,) = step.runner.requests.values()
    request.mrope_positions, request.mrope_position_delta = grown.prompt, grown.delta
    request.num_prompt_tokens = 11
    assert step.build(every(rows=1)).tolist() == expected([grown], 3, 4, 1)


def test_the_older_runner_computes_the_same():
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    length = 20
    step = OlderStep()
    runner = step.runner
    for request in runner.requests.values():
        request.prompt_token_ids, request.prompt_embeds = [0] * request.num_prompt_tokens, None
    used = torch.zeros(3, 3 * length, dtype=torch.int64)
    runner.mrope_positions = SimpleNamespace(cpu=used, np=used.numpy())
    runner.input_batch.num_computed_tokens_cpu = np.zeros(3, np.int32)
    scheduled = dict.fromkeys(runner.input_batch.req_ids, length)
    GPUModelRunner._calc_mrope_positions(runner, SimpleNamespace(num_scheduled_tokens=scheduled))
    told = step.build(every(1, length))
    assert told.tolist() == used[0].view(3, length).tolist()


def test_installs_once_for_the_runners_that_are_loaded(monkeypatch):
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu.model_runner", SimpleNamespace())
    monkeypatch.setattr(
        GPUModelRunner, "_build_attention_metadata", GPUModelRunner._build_attention_metadata
    )
    rope_positions.install()
    hooks = GPUModelRunner._build_attention_metadata, DefaultModelState.prepare_attn
    assert all(hasattr(hook, "__wrapped__") for hook in hooks)
    rope_positions.install()
    assert hooks == (GPUModelRunner._build_attention_metadata, DefaultModelState.prepare_attn)
    assert not any(hasattr(hook.__wrapped__, "__wrapped__") for hook in hooks)


# Configurations


def config(mrope=True, pruning=False, ubatching=False, v2=False, multimodal=True):
    found = SimpleNamespace(is_multimodal_pruning_enabled=lambda: pruning)
    return SimpleNamespace(
        model_config=SimpleNamespace(
            uses_mrope=mrope, multimodal_config=found if multimodal else None
        ),
        parallel_config=SimpleNamespace(use_ubatching=ubatching),
        use_v2_model_runner=v2,
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"multimodal": False}, None),
        ({"pruning": True}, "--video-pruning-rate"),
        ({"pruning": True, "mrope": False}, None),
        ({"ubatching": True}, "--enable-dbo"),
        ({"ubatching": True, "v2": True}, None),
        ({"ubatching": True, "mrope": False}, None),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else "",
)
def test_says_what_cannot_be_relied_on(changes, words):
    reason = rope_positions.unsupported(config(**changes))
    assert reason is None if words is None else words in reason


def test_reads_the_pruning_that_vllm_configures():
    from vllm.config.multimodal import MultiModalConfig

    plain = config()
    plain.model_config.multimodal_config = MultiModalConfig()
    assert rope_positions.unsupported(plain) is None
    plain.model_config.multimodal_config = MultiModalConfig(video_pruning_rate=0.5)
    assert "--video-pruning-rate" in rope_positions.unsupported(plain)


# A whole run


@pytest.mark.engine
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_builders_are_told_what_the_model_uses(runner):
    if runner == "v2" and importlib.util.find_spec("triton") is None:
        pytest.skip("the newer model runner needs triton")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "v2" else "0",
        "TRITON_INTERPRET": "1",
    }
    done = subprocess.run(
        [sys.executable, "tests/plugin/watch_positions.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["v2"] == (runner == "v2")
    assert report["wrong"] == []
    sizes = [len(names) for names in report["steps"]]
    assert max(sizes) == 3 and sizes[0] < 3, "prompts come in chunks, then all decode at once"
    assert report["compared"] > report["moved"] > 100 and report["decoded"] > 20
    assert len(report["dummies"]) >= 2 and not any(report["dummies"])
    assert not report["told_late"]
