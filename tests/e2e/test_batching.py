"""Whatever vLLM's scheduler does with a request, its tokens stay the same."""

import pytest

from tests.support.engines import Engine, compacted
from tests.support.outputs import agreement, token_ids
from tests.support.reference import MODEL

pytestmark = pytest.mark.engine

BLOCK = 16
REQUESTS = 12


@pytest.fixture
def exact(engines, exact_pack) -> Engine:
    return engines.get(MODEL, block_size=BLOCK, dtype="float32", **compacted(exact_pack))


@pytest.fixture(scope="module")
def long_answer():
    """Sampling parameters of answers that go on after their end: decoding takes a while."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=40, logprobs=5, ignore_eos=True)


@pytest.fixture(scope="module")
def prompts(dense):
    """The longest, every second one with images."""
    lengths = [len(output.prompt_token_ids) for output in dense.outputs]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    visual = [i for i in order if dense.questions[i].visual]
    text = [i for i in order if not dense.questions[i].visual]
    mixed = [i for pair in zip(visual, text, strict=False) for i in pair]
    return [dense.prompts[i] for i in mixed[:REQUESTS]]


@pytest.fixture(scope="module")
def alone(engines, calibrated, prompts, long_answer):
    """What `from_codes` answers when each request has the engine for itself."""
    section = compacted(calibrated.eightfold, exact_prefill=False)
    engine = engines.get(MODEL, block_size=BLOCK, dtype="float32", **section)
    return [engine.generate([prompt], long_answer)[0] for prompt in prompts]


def assert_same(first, second, noise: float) -> None:
    found = agreement(first, second)
    assert found.agreed == found.tokens == REQUESTS * 40
    assert not found.gaps
    assert found.noise <= noise


def test_chunks_of_a_prompt(from_codes, alone, prompts, long_answer):
    with from_codes.schedules() as steps, from_codes.at_most(40):
        outputs = from_codes.generate(prompts, long_answer)

    assert max(sum(step.values()) for step in steps) == 40
    assert sum(len(output.prompt_token_ids) for output in outputs) // 40 < len(steps)
    assert_same(alone, outputs, noise=1e-3)


def test_requests_that_arrive_while_others_decode(from_codes, alone, prompts, long_answer):
    assert from_codes.llm.reset_prefix_cache()
    ids, last = [], {}
    with from_codes.schedules() as steps, from_codes.at_most(100):
        for prompt in prompts:
            ids.append(from_codes.add(prompt, long_answer))
            for _ in range(3):
                last.update(from_codes.step())
        last.update(from_codes.finish())

    mixed = [step for step in steps if min(step.values()) == 1 < max(step.values())]
    assert len(mixed) >= REQUESTS
    assert_same(alone, [last[i] for i in ids], noise=1e-3)
    assert from_codes.used_blocks == 0


def test_aborted_requests_leave_the_others_alone(from_codes, alone, prompts, long_answer):
    assert from_codes.llm.reset_prefix_cache()
    ids = [from_codes.add(prompt, long_answer) for prompt in prompts]
    with from_codes.at_most(100):
        for _ in range(6):
            from_codes.step()
        states = {i: from_codes.request(i).num_output_tokens for i in ids}
        # One that decodes, one in the middle of its prompt, one that waits.
        decoding = next(i for i in ids if states[i] > 0)
        prefilling = next(
            i for i in ids if states[i] == 0 < from_codes.request(i).num_computed_tokens
        )
        waiting = next(i for i in reversed(ids) if from_codes.request(i).num_computed_tokens == 0)
        aborted = {decoding, prefilling, waiting}
        assert len(aborted) == 3
        held = from_codes.used_blocks
        from_codes.abort(aborted)
        assert from_codes.used_blocks < held
        last = from_codes.finish()

    kept = [n for n, i in enumerate(ids) if i not in aborted]
    assert set(last) == {ids[n] for n in kept}
    assert token_ids([last[ids[n]] for n in kept]) == token_ids([alone[n] for n in kept])
    assert from_codes.used_blocks == 0


def test_preempted_requests(engines, calibrated, alone, prompts, long_answer):
    """Blocks for two of the longest requests: others are thrown out and computed again."""
    blocks, budget = 38, 64
    engine = engines.get(
        MODEL,
        block_size=BLOCK,
        dtype="float32",
        num_gpu_blocks_override=blocks,
        max_num_batched_tokens=budget,
        max_num_seqs=REQUESTS,
        max_model_len=blocks * BLOCK // 2,
        **compacted(calibrated.eightfold, exact_prefill=False),
    )
    assert engine.cache_config.num_gpu_blocks == blocks
    ids = [engine.add(prompt, long_answer) for prompt in prompts]
    preemptions, last = {}, {}
    with engine.schedules() as steps:
        while engine.llm.llm_engine.has_unfinished_requests():
            last.update(engine.step())
            running = engine.scheduler.requests.values()
            preemptions.update({request.request_id: request.num_preemptions for request in running})

    assert sum(preemptions.values()) >= 2
    assert max(sum(step.values()) for step in steps) == budget
    assert_same(alone, [last[i] for i in ids], noise=1e-3)
    assert engine.used_blocks == 0


def test_chunks_of_a_prompt_beside_exact_attention(exact, prompts, long_answer):
    """The tokens of a chunk attend to each other exactly, to earlier chunks in the cache."""
    whole = exact.generate(prompts, long_answer)
    with exact.schedules() as steps, exact.at_most(40):
        outputs = exact.generate(prompts, long_answer)

    assert max(sum(step.values()) for step in steps) == 40
    # Keys in the cache are rounded to bfloat16, those of the chunk are not.
    assert_same(whole, outputs, noise=0.2)


def test_samples_share_their_prompt(exact, prompts):
    """Each is what a request of its own gives; vLLM adds the sample's number to the seed."""
    from vllm import SamplingParams

    settings = {"temperature": 1.5, "max_tokens": 12, "ignore_eos": True}
    (together,) = exact.generate(prompts[:1], SamplingParams(n=4, seed=7, **settings))
    apart = [
        exact.generate(prompts[:1], SamplingParams(seed=7 + i, **settings))[0] for i in range(4)
    ]

    assert [list(sample.token_ids) for sample in together.outputs] == token_ids(apart)
    assert len({tuple(sample.token_ids) for sample in together.outputs}) == 4
    # In the very step in which the first sample writes the prompt's blocks, the others read them.
    assert together.num_cached_tokens >= BLOCK
    assert exact.used_blocks == 0


def test_requests_that_arrive_at_default_settings(small_blocks, prompts, greedy):
    """Every prompt attends to itself exactly, whoever decodes in the same step."""
    alone = [small_blocks.generate([prompt], greedy)[0] for prompt in prompts]
    assert small_blocks.llm.reset_prefix_cache()
    ids, last = [], {}
    with small_blocks.schedules() as steps:
        for prompt in prompts:
            ids.append(small_blocks.add(prompt, greedy))
            last.update(small_blocks.step())
        last.update(small_blocks.finish())

    assert sum(min(step.values()) == 1 < max(step.values()) for step in steps) >= REQUESTS // 2
    found = agreement(alone, [last[i] for i in ids])
    assert found.agreed == found.tokens
    assert not found.gaps
    # In bfloat16 a batch of another shape may round to another code.
    assert found.noise <= 0.5
