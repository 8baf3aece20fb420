"""Exact sinks and recent tokens in a running engine, beside the compacted pages."""

import pytest

from tests.support.engines import Engine, compacted
from tests.support.outputs import agreement, token_ids
from tests.support.reference import MODEL, dialogues
from vllm_attentionpack.calibrate.settings import DEFAULT_SINKS, DEFAULT_WINDOW
from vllm_attentionpack.kv_cache.exact import ExactWindowSpec
from vllm_attentionpack.kv_cache.pages import exact_blocks, page_geometry
from vllm_attentionpack.packfile import read_header

pytestmark = pytest.mark.engine

BLOCK = 16
REQUESTS = 10


@pytest.fixture
def windowed(engines, calibrated) -> Engine:
    """8x with the advised exact tokens; blocks of 16 tokens."""
    return engines.get(MODEL, block_size=BLOCK, dtype="float32", **compacted(calibrated.windowed))


@pytest.fixture(scope="module")
def long_answer():
    """Sampling parameters of answers that outlast the window."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0, max_tokens=DEFAULT_WINDOW + 20, logprobs=5, ignore_eos=True
    )


@pytest.fixture(scope="module")
def prompts(dense):
    lengths = [len(output.prompt_token_ids) for output in dense.outputs]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [dense.prompts[i] for i in order[:REQUESTS]]


def exact_spec(engine: Engine) -> ExactWindowSpec:
    (spec,) = (
        group.kv_cache_spec
        for group in engine.scheduler.kv_cache_config.kv_cache_groups
        if isinstance(group.kv_cache_spec, ExactWindowSpec)
    )
    return spec


def held(engine: Engine, request_id: str) -> list[int]:
    """The exact blocks of a request by their place in its block table."""
    return [i for i, block in enumerate(engine.block_ids(request_id, group=1)) if block != 0]


def test_a_window_over_everything_is_dense_attention(engines, calibrated, dense, greedy):
    """8x codes that no query reads: stock vLLM's answers to the last bit of their ranking."""
    section = compacted(calibrated.windowed, window=1024, sinks=0)
    engine = engines.get(MODEL, **section)
    outputs = engine.generate(dense.prompts, greedy)
    found = agreement(dense.outputs, outputs)
    assert found.share >= 0.99
    with engine.forgetting():
        unread = engine.generate(dense.prompts, greedy)
    assert token_ids(unread) == token_ids(outputs)


def test_what_is_exact_helps(engines, calibrated, dense, greedy):
    """The same codes, with and without the window."""
    noise = {}
    for window in (0, 2 * DEFAULT_WINDOW):
        section = compacted(calibrated.windowed, window=window, sinks=window and 4)
        engine = engines.get(MODEL, **section)
        found = agreement(dense.outputs, engine.generate(dense.prompts, greedy))
        noise[window] = found.tokens - found.agreed
    assert noise[2 * DEFAULT_WINDOW] <= noise[0]


def test_layers_lie_side_by_side_in_a_block(windowed, calibrated):
    """Each with the bytes that its pack gives it, and next to no padding."""
    layers = read_header(calibrated.windowed).layers
    assert len({layer.bytes_per_token for layer in layers}) > 1
    caches = windowed.kv_caches
    for layer in layers:
        assert caches[layer.name].shape[1:] == (1, BLOCK, layer.bytes_per_token)
    (exact,) = caches.keys() - {layer.name for layer in layers}
    strides = {name: c.stride(0) * c.element_size() for name, c in caches.items()}
    (block_bytes,) = set(strides.values())
    content = {
        "codes": BLOCK * sum(layer.bytes_per_token for layer in layers),
        "exact": caches[exact][0].numel() * caches[exact].element_size(),
    }
    assert max(content.values()) == block_bytes
    assert min(content.values()) >= 0.97 * block_bytes


def test_blocks_of_a_request(windowed, prompts, long_answer):
    """Sinks stay, the window moves on, the rest is free: at every step."""
    assert windowed.llm.reset_prefix_cache()
    spec = exact_spec(windowed)
    size = spec.block_size
    assert (spec.sinks, spec.window) == (DEFAULT_SINKS, DEFAULT_WINDOW)
    request_id = windowed.add(prompts[0], long_answer)
    steps = 0
    while windowed.llm.llm_engine.has_unfinished_requests():
        windowed.step()
        if request_id not in windowed.scheduler.requests:
            break
        computed = windowed.request(request_id).num_computed_tokens
        first = max(computed - 1 - (spec.window - 1), 0) // size
        wanted = {*range(-(-spec.sinks // size)), *range(first, -(-computed // size))}
        assert wanted <= set(held(windowed, request_id))
        assert len(held(windowed, request_id)) <= spec.max_blocks_per_request
        steps += 1
    assert steps > DEFAULT_WINDOW
    assert windowed.used_blocks == 0


def test_whatever_the_scheduler_does(engines, calibrated, prompts, long_answer):
    """Arrivals, aborts and blocks that change hands; free blocks are no numbers at all times.

    Without prefix caching: what a request finds there it reads from codes.
    """
    section = compacted(calibrated.windowed)
    windowed = engines.get(
        MODEL, block_size=BLOCK, dtype="float32", enable_prefix_caching=False, **section
    )
    alone = [windowed.generate([prompt], long_answer)[0] for prompt in prompts]
    ids, last, poisoned = [], {}, 0
    for prompt in prompts:
        ids.append(windowed.add(prompt, long_answer))
        for _ in range(5):
            poisoned += windowed.poison_free_blocks()
            last.update(windowed.step())
    windowed.abort(ids[1::4])
    while windowed.llm.llm_engine.has_unfinished_requests():
        poisoned += windowed.poison_free_blocks()
        last.update(windowed.step())
    assert poisoned > 0 and windowed.used_blocks == 0
    kept = [n for n in range(REQUESTS) if n % 4 != 1]
    found = agreement([alone[n] for n in kept], [last[ids[n]] for n in kept])
    assert found.agreed == found.tokens == len(kept) * long_answer.max_tokens
    # A sum in another order may tip one number of a key into the next code; another's token, or
    # one out of a free block, would do far more.
    assert found.noise <= 1e-2


def test_preempted_requests(engines, calibrated, dense, prompts, long_answer):
    """Two requests fit until they grow; one is then thrown out and computed again."""
    lengths = sorted((len(output.prompt_token_ids) for output in dense.outputs), reverse=True)
    header = read_header(calibrated.windowed)
    dense_bytes = 2 * header.dense_bytes_per_token  # in float32
    pages = page_geometry(header.bytes_per_token, dense_bytes, BLOCK)
    exact = exact_blocks(pages.exact_block_size, DEFAULT_SINKS, DEFAULT_WINDOW)
    engine = engines.get(
        MODEL,
        block_size=BLOCK,
        dtype="float32",
        num_gpu_blocks_override=sum(-(-n // BLOCK) + exact for n in lengths[:2]) + 2,
        max_num_seqs=4,
        max_model_len=lengths[0] + long_answer.max_tokens,
        **compacted(calibrated.windowed),
    )
    alone = [engine.generate([prompt], long_answer)[0] for prompt in prompts[:4]]
    assert engine.llm.reset_prefix_cache()
    ids, last, preempted = [engine.add(p, long_answer) for p in prompts[:4]], {}, set()
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.poison_free_blocks()
        last.update(engine.step())
        preempted |= {r.request_id for r in engine.scheduler.requests.values() if r.num_preemptions}
    assert preempted and engine.used_blocks == 0
    for request_id, before in zip(ids, alone, strict=True):
        found = agreement([before], [last[request_id]])
        # A resumed request computes its answer's tokens together, and so sees them all exactly.
        assert request_id in preempted or found.agreed == found.tokens
        assert all(gap < 3 for gap in found.gaps)


def test_chunks_of_a_prompt(windowed, dense, greedy):
    """Chunks that end within the window, and windows that begin within a chunk."""
    whole = windowed.generate(dense.prompts, greedy)
    for tokens in (DEFAULT_WINDOW - 5, 3 * DEFAULT_WINDOW):
        with windowed.at_most(tokens):
            chunked = windowed.generate(dense.prompts, greedy)
        assert agreement(whole, chunked).share >= 0.9
        assert windowed.used_blocks == 0


@pytest.mark.parametrize("visual", [True, False])
def test_hits_are_those_of_stock_vllm(engines, calibrated, greedy, visual):
    """Turns of a dialogue: as many cached tokens, the same answers but for the codec's error."""
    results = []
    for section in ({}, compacted(calibrated.windowed)):
        engine = engines.get(MODEL, block_size=32, dtype="float32", **section)
        cold, warm = [], []
        for turns in dialogues(engine.llm, visual)[:4]:
            cold += [engine.generate([turn], greedy)[0] for turn in turns]
            assert engine.llm.reset_prefix_cache()
            warm += [engine.generate([turn], greedy, keep_cache=True)[0] for turn in turns]
        results.append((cold, warm))
    (_, stock), (cold, warm) = results
    assert [o.num_cached_tokens for o in warm] == [o.num_cached_tokens for o in stock]
    assert sum(o.num_cached_tokens for o in warm) > 0
    assert agreement(cold, warm).share >= 0.95


def test_several_completions(windowed, dense):
    """n > 1: each has a window of its own over one shared prompt, which it reads from codes."""
    from vllm import SamplingParams

    sampling = SamplingParams(n=3, temperature=1.0, top_k=1, max_tokens=24)
    outputs = windowed.generate(dense.prompts[::4], sampling)
    same = [c.text == output.outputs[0].text for output in outputs for c in output.outputs[1:]]
    assert sum(same) >= 0.9 * len(same) > 30
    assert windowed.used_blocks == 0


@pytest.mark.parametrize(("context", "goal"), [(2048, 6.0), (32768, 7.5)])
def test_capacity(engines, calibrated, monkeypatch, context, goal):
    """What vLLM itself reports, against its own dense cache of the same bytes."""
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    tokens = []
    for section in ({}, compacted(calibrated.windowed)):
        engine = engines.get(
            MODEL, max_model_len=context, kv_cache_memory_bytes=256 << 20, **section
        )
        tokens.append(engine.cache_config.kv_cache_size_tokens)
        assert engine.allocated_bytes <= 256 << 20
    assert tokens[1] / tokens[0] >= goal
    (line,) = [text for text in engine.messages if "exact are the first" in text]
    assert f"the first {DEFAULT_SINKS} and the last {DEFAULT_WINDOW} tokens" in line
