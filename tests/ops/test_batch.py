"""How the tokens of a step belong to requests."""

import torch

from vllm_attentionpack.ops import QueryBatch

CPU = torch.device("cpu")


def test_segments_hold_every_token_once():
    batch = QueryBatch.build([0, 2, 3, 3, 5, 6], [7, 9, 4, 8, 1], CPU)
    assert (batch.num_tokens, batch.max_query_len, batch.max_seq_len) == (6, 2, 9)
    found = [(s.requests.tolist(), s.tokens.tolist(), s.max_seq_len) for s in batch.segments]
    assert found == [([1, 4], [[2], [5]], 9), ([0, 3], [[0, 1], [3, 4]], 8)]


def test_a_uniform_batch_is_one_segment():
    batch = QueryBatch.build([0, 3, 6], [5, 6], CPU)
    (segment,) = batch.segments
    assert segment.requests.tolist() == [0, 1]
    assert segment.tokens.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert segment.max_seq_len == 6


def test_offsets_on_the_device_are_taken_as_they_are():
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    assert QueryBatch.build([0, 1], [1], CPU, offsets).query_start_loc is offsets
