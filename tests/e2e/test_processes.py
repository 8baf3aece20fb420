"""The path of every user: the engine in a process of its own, the worker in another."""

import pytest

from tests.support.engines import compacted
from tests.support.outputs import agreement
from tests.support.reference import MODEL, accuracy
from vllm_attentionpack.engine import shut_down
from vllm_attentionpack.packfile import read_header

pytestmark = pytest.mark.engine

QUESTIONS = 20


@pytest.fixture
def llm(engines, dense, calibrated, monkeypatch):
    from vllm import LLM

    engines.close()
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    llm = LLM(
        str(MODEL),
        enforce_eager=True,
        kv_cache_memory_bytes=dense.kv_bytes,
        max_model_len=1024,
        worker_extension_cls="tests.support.worker_extension.Inspection",
        **compacted(calibrated.eightfold),
    )
    yield llm
    shut_down(llm)


def test_generate_from_another_process(llm, dense, calibrated, greedy):
    header = read_header(calibrated.eightfold)
    assert header.compression_ratio == 8
    some = dense.questions[:QUESTIONS]
    outputs = llm.generate([question.prompt for question in some], greedy, use_tqdm=False)

    right = accuracy(some, dense.outputs[:QUESTIONS])
    assert right > 0.8 and accuracy(some, outputs) >= right - 1 / QUESTIONS
    # The same code as in one process: not the dense distribution.
    assert agreement(dense.outputs[:QUESTIONS], outputs).noise > 1e-3
    cache = llm.llm_engine.vllm_config.cache_config
    assert abs(cache.kv_cache_size_tokens - 8 * dense.kv_tokens) < 8 * cache.block_size
    (measured,) = llm.collective_rpc("measured_cache")
    assert measured["allocated"] == header.bytes_per_token * cache.kv_cache_size_tokens
    assert not hasattr(llm.llm_engine.engine_core, "engine_core")  # which an engine in here has
