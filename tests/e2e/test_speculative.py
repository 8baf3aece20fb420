"""Drafts that are verified, and rejected, on exact and compacted pages.

In processes of their own, as vLLM runs by default: prompt lookup loads a compiler that vLLM's CPU
worker cannot start beside.
"""

import pytest

from tests.support.engines import compacted
from tests.support.outputs import agreement
from tests.support.reference import MODEL
from vllm_attentionpack.engine import shut_down

pytestmark = pytest.mark.engine

LOOKUP = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}


def test_speculative_decoding(engines, calibrated, dense, greedy, monkeypatch):
    from vllm import LLM

    engines.close()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Text that says the same again and again is what a lookup finds drafts in.
    repeating = ["A work may be copied and a copy may be changed. " * 5, "one two three four " * 9]
    prompts = [*dense.prompts[::3], *repeating]
    outputs = []
    for speculative in (None, LOOKUP):
        llm = LLM(
            str(MODEL),
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            kv_cache_memory_bytes=64 << 20,
            disable_log_stats=False,
            speculative_config=speculative,
            **compacted(calibrated.windowed),
        )
        try:
            outputs.append(llm.generate(prompts, greedy, use_tqdm=False))
            counters = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
        finally:
            shut_down(llm)
    drafted = counters["vllm:spec_decode_num_draft_tokens"]
    accepted = counters["vllm:spec_decode_num_accepted_tokens"]
    assert 0 < accepted < drafted
    assert agreement(*outputs).share >= 0.97
