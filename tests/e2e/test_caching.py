"""What the prefix cache returns is as good as computing it again."""

import itertools

import pytest

from tests.support.outputs import agreement, token_ids
from tests.support.reference import dialogues

pytestmark = pytest.mark.engine

BLOCK = 16


def test_a_hit_changes_no_bit(small_blocks, dense, greedy):
    """In chunks of one block, because tokens of a chunk attend to each other exactly."""
    lengths = [len(output.prompt_token_ids) for output in dense.outputs]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i])[:8:2]:
        prompt = dense.prompts[i]
        with small_blocks.at_most(BLOCK):
            (first,) = small_blocks.generate([prompt], greedy)
            with small_blocks.schedules() as steps:
                (second,) = small_blocks.generate([prompt], greedy, keep_cache=True)

        # The last token is always computed: its logits are wanted.
        hit = (lengths[i] - 1) // BLOCK * BLOCK
        assert (first.num_cached_tokens, second.num_cached_tokens) == (0, hit)
        assert sum(steps[0].values()) == lengths[i] - hit
        assert token_ids([first]) == token_ids([second])
        for a, b in zip(first.outputs[0].logprobs, second.outputs[0].logprobs, strict=True):
            assert {t: p.logprob for t, p in a.items()} == {t: p.logprob for t, p in b.items()}


@pytest.mark.parametrize("visual", [True, False])
def test_turns_of_a_dialogue(from_codes, greedy, visual):
    chosen = dialogues(from_codes.llm, visual)[:3]
    for turns in chosen:
        alone = [from_codes.generate([turn], greedy)[0] for turn in turns]
        assert from_codes.llm.reset_prefix_cache()
        followed = [from_codes.generate([turn], greedy, keep_cache=True)[0] for turn in turns]

        assert [output.num_cached_tokens for output in alone] == [0] * len(turns)
        assert followed[0].num_cached_tokens == 0
        for before, output in itertools.pairwise(followed):
            known = len(before.prompt_token_ids)
            assert output.prompt_token_ids[:known] == before.prompt_token_ids
            # Blocks that the answer filled may come on top.
            assert output.num_cached_tokens >= known // BLOCK * BLOCK > 0
        found = agreement(alone, followed)
        assert found.agreed == found.tokens and not found.gaps
        assert found.noise <= 1e-3
