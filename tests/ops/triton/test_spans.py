"""Anchored keys by GPU kernels, and planes that are coded pre-RoPE."""

import pytest
import torch

from tests.ops.test_spans import case_of, check
from vllm_attentionpack.ops import triton as kernels
from vllm_attentionpack.ops import turns

#: See `tests.ops.triton.test_attention.TOLERANCE`.
TOLERANCE = 4e-3


@pytest.mark.parametrize(
    ("sizes", "pre_rope"),
    [((48, 16), 0), ((48, 16), 5), ((16, 48), 5), ((128, 32), 0), ((128, 32), 12)],
    ids=str,
)
@pytest.mark.parametrize("causal", [False, True])
def test_spans_match_the_oracle(causal, pre_rope, sizes):
    """Spans of less than a tile, of no whole number of tiles, of two; GPT-J's planes if causal."""
    codec, case, steps = case_of(kernels, causal, *sizes, pre_rope)
    stops = case.seq_lens if causal else case.context_lens
    check(codec, case, steps, None, stops, causal, TOLERANCE)


@pytest.mark.parametrize("pre_rope", [0, 5])
def test_ranges_in_many_calls(pre_rope, monkeypatch):
    monkeypatch.setattr(turns, "MAX_TURNED", 300)
    codec, case, steps = case_of(kernels, pre_rope=pre_rope)
    starts = torch.tensor([0, 1, 4, 50, 49, 60, 3, 100], dtype=torch.int32)
    check(codec, case, steps, starts, case.context_lens - 20, False, TOLERANCE)


def test_spans_of_joint_keys_and_values():
    codec, case, steps = case_of(kernels, False, 48, 16, 5, joint_kv=True)
    check(codec, case, steps, None, case.context_lens, False, TOLERANCE)
