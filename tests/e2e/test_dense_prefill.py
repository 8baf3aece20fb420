"""Prefill over a decompressed context, in the engine."""

import pytest
import torch

from tests.support.engines import Engine, compacted
from tests.support.outputs import agreement
from tests.support.reference import MODEL
from vllm_attentionpack.attention import dense_prefill
from vllm_attentionpack.attention.dense_prefill import DensePrefill

pytestmark = pytest.mark.engine

CHUNK = 96


@pytest.fixture(scope="module")
def prompts(dense):
    """Those that take two chunks and more."""
    lengths = [len(output.prompt_token_ids) for output in dense.outputs]
    chosen = [i for i, length in enumerate(lengths) if length > CHUNK + dense_prefill.MIN_QUERIES]
    return [dense.prompts[i] for i in chosen[:12]]


def answers(engine: Engine, prompts, greedy):
    assert engine.llm.reset_prefix_cache()
    with engine.at_most(CHUNK):
        return engine.generate(prompts, greedy)


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="needs AVX-512")
@pytest.mark.parametrize("pack", ["windowed", "eightfold"])
def test_says_what_attention_in_latents_says(
    engines, calibrated, prompts, greedy, pack, monkeypatch
):
    """Chunks of a prompt, some with requests that decode, with and without exact tokens."""
    path = getattr(calibrated, pack)
    assert len(prompts) >= 8
    latents = engines.get(MODEL, dtype="bfloat16", **compacted(path, prefill="sdpa"))
    want = answers(latents, prompts, greedy)

    contexts, mixed = [], []
    attend = DensePrefill.attend

    def record(self, dense, *args):
        contexts.extend(dense.contexts)
        mixed.append(dense.rest is not None)
        return attend(self, dense, *args)

    monkeypatch.setattr(DensePrefill, "attend", record)
    engine = engines.get(MODEL, dtype="bfloat16", **compacted(path, prefill="dense"))
    found = agreement(want, answers(engine, prompts, greedy))
    assert max(contexts) > 0 and any(mixed) and not all(mixed)
    assert found.share >= 0.9
    # Two ways of rounding in bfloat16; at a first difference both tokens were about as likely.
    assert found.noise <= 0.2
    assert all(gap <= 0.2 for gap in found.gaps)


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="needs AVX-512")
def test_exact_pages_give_the_dense_answers(engines, exact_pack, prompts, greedy):
    stock = answers(engines.get(MODEL, dtype="bfloat16"), prompts, greedy)
    engine = engines.get(MODEL, dtype="bfloat16", **compacted(exact_pack, prefill="dense"))
    found = agreement(stock, answers(engine, prompts, greedy))
    assert found.share >= 0.9
    assert all(gap <= 0.2 for gap in found.gaps)
