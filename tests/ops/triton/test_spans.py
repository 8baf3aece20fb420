"""Anchored keys by GPU kernels, which know nothing of anchors."""

import pytest

from tests.ops.test_spans import case_of, check
from vllm_attentionpack.ops import triton as kernels


@pytest.mark.parametrize("causal", [False, True])
def test_spans_match_the_oracle(causal):
    codec, case, steps = case_of(kernels)
    stops = case.seq_lens if causal else case.context_lens
    check(codec, case, steps, None, stops, causal, 4e-3)
