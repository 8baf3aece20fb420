"""How the queries of one step are cut into rectangular batches. Host side, once per step."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """The requests of a step that have the same number of new tokens.

    Attributes:
        requests: int64 `[b]`, rows of the block table.
        tokens: int64 `[b, q]`, rows of the query tensor.
        max_seq_len: no request of the segment is longer than this.
    """

    requests: Tensor
    tokens: Tensor
    max_seq_len: int


@dataclass(frozen=True)
class QueryBatch:
    """All new tokens of one step.

    Attributes:
        num_tokens: `T`.
        query_start_loc: int32 `[B + 1]`, where the tokens of each request start.
        max_query_len: the most tokens of one request.
        max_seq_len: no request is longer than this.
        segments: together they hold every token once.
    """

    num_tokens: int
    query_start_loc: Tensor
    max_query_len: int
    max_seq_len: int
    segments: tuple[Segment, ...]

    @classmethod
    def build(
        cls, query_start_loc: Sequence[int], max_seq_lens: Sequence[int], device: torch.device
    ) -> "QueryBatch":
        """Groups requests by query length.

        Args:
            query_start_loc: `B + 1` offsets into the tokens, on the host.
            max_seq_lens: `B` upper bounds of the sequence lengths, on the host.
        """
        by_length: defaultdict[int, list[int]] = defaultdict(list)
        for request in range(len(query_start_loc) - 1):
            length = query_start_loc[request + 1] - query_start_loc[request]
            if length > 0:
                by_length[length].append(request)
        segments = []
        for length, requests in sorted(by_length.items()):
            start = torch.tensor([query_start_loc[r] for r in requests])
            tokens = start[:, None] + torch.arange(length)
            segments.append(
                Segment(
                    torch.tensor(requests, device=device),
                    tokens.to(device),
                    max(max_seq_lens[r] for r in requests),
                )
            )
        return cls(
            query_start_loc[-1],
            torch.tensor(query_start_loc, dtype=torch.int32, device=device),
            max(by_length, default=0),
            max(max_seq_lens, default=0),
            tuple(segments),
        )
