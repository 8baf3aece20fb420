"""Which tokens the pages hold as visual, against where the images are."""

import itertools

import pytest
import torch
from PIL import ImageOps

from tests.support.engines import Engine
from tests.support.pages import visual_bits
from tests.support.reference import IMAGE_TOKEN
from vllm_attentionpack.packfile import read_header

pytestmark = pytest.mark.engine

BLOCK = 16


@pytest.fixture(scope="module")
def two_tokens():
    """The first is computed from the prompt, and stored in the step that gives the second."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def image_prompts(dense):
    return [question.prompt for question in dense.questions if question.visual]


@pytest.fixture(scope="module")
def text_prompts(dense):
    return [question.prompt for question in dense.questions if not question.visual]


def expected_and_stored(engine: Engine, request_id: str):
    """Modality by token id and by the pages, of the tokens that a request has stored."""
    request = engine.request(request_id)
    known = request.num_computed_tokens
    expected = torch.tensor(request.all_token_ids[:known]) == IMAGE_TOKEN
    return expected, visual_bits(engine, engine.block_ids(request_id), known)


def run_until_stored(engine: Engine, request_ids: list[str]) -> None:
    """Steps until every request has stored its prompt and a token of its own."""
    while any(engine.request(i).num_output_tokens < 2 for i in request_ids):
        engine.step()


def image_spans(token_ids: list[int]) -> list[tuple[int, int]]:
    """First and last position of each image."""
    runs = itertools.groupby(enumerate(token_ids), key=lambda pair: pair[1] == IMAGE_TOKEN)
    positions = [[i for i, _ in run] for visual, run in runs if visual]
    return [(run[0], run[-1]) for run in positions]


def test_the_pack_separates_modalities(calibrated):
    assert read_header(calibrated.eightfold).num_modalities == 2


@pytest.mark.parametrize("chunk", [None, 23])
def test_images_and_texts_in_one_batch(
    small_blocks, image_prompts, text_prompts, two_tokens, chunk
):
    engine = small_blocks
    assert engine.llm.reset_prefix_cache()
    mixed = [p for pair in zip(image_prompts[:4], text_prompts[:4], strict=True) for p in pair]
    ids = [engine.add(prompt, two_tokens) for prompt in mixed]
    with engine.schedules() as steps, engine.at_most(chunk or 4096):
        # Requests that finish early would lose their blocks: look at each when it is ready.
        seen = {}
        while len(seen) < len(ids):
            engine.step()
            for i in set(ids) - set(seen):
                if engine.request(i).num_output_tokens == 2:
                    seen[i] = (*expected_and_stored(engine, i), engine.request(i).prompt_token_ids)
    engine.finish()

    for n, i in enumerate(ids):
        expected, stored, prompt = seen[i]
        assert len(expected) == len(prompt) + 1
        assert expected.any() == (n % 2 == 0)
        assert (stored == expected).all()
    if chunk is None:
        assert len(steps[0]) == len(ids)
    else:
        cut = [seen[i] for i in ids[::2] if cuts_an_image(steps, i, seen[i][2])]
        assert cut, "no image was cut in two"


def cuts_an_image(steps, request_id, prompt) -> bool:
    """Whether a chunk of the request ended inside an image."""
    ends = list(itertools.accumulate(step.get(request_id, 0) for step in steps))
    return any(first < end <= last for first, last in image_spans(prompt) for end in ends)


def test_texts_alone(small_blocks, text_prompts, two_tokens):
    engine = small_blocks
    assert engine.llm.reset_prefix_cache()
    ids = [engine.add(prompt, two_tokens) for prompt in text_prompts[:3]]
    run_until_stored(engine, ids)
    for i in ids:
        expected, stored = expected_and_stored(engine, i)
        assert len(expected) > 20
        assert not stored.any() and not expected.any()
    engine.finish()


def test_a_prefix_hit_that_ends_inside_an_image(small_blocks, image_prompts, two_tokens):
    engine = small_blocks
    assert engine.llm.reset_prefix_cache()
    tried = 0
    for prompt in image_prompts:
        # The same prompt with another second image: cached up to the block where that begins.
        images = prompt["multi_modal_data"]["image"]
        other = [images[0], ImageOps.mirror(images[1]), *images[2:]]
        changed = {**prompt, "multi_modal_data": {"image": other}}
        first = engine.add(prompt, two_tokens)
        spans = image_spans(list(engine.request(first).prompt_token_ids))
        hit = spans[1][0] // BLOCK * BLOCK
        inside = spans[0][0] < hit <= spans[0][1]
        engine.finish()
        if not inside:
            continue
        second = engine.add(changed, two_tokens)
        with engine.schedules() as steps:
            run_until_stored(engine, [second])
        expected, stored = expected_and_stored(engine, second)
        assert steps[0] == {second: engine.request(second).num_prompt_tokens - hit}
        assert expected.any() and (stored == expected).all()
        engine.finish()
        tried += 1
        if tried == 3:
            return
    raise AssertionError(f"only {tried} prompts have a block that ends inside their first image")
