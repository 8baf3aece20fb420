"""How the queries of one step are cut into rectangular batches. Host side, once per step."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

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
        query_start_loc: int32 `[B + 1]`, where the tokens of each request start, on the device.
        host_starts: the same on the host.
        max_seq_lens: `B` upper bounds of the sequence lengths.
    """

    query_start_loc: Tensor
    host_starts: tuple[int, ...]
    max_seq_lens: tuple[int, ...]

    @classmethod
    def build(
        cls,
        host_starts: Sequence[int],
        max_seq_lens: Sequence[int],
        device: torch.device,
        query_start_loc: Tensor | None = None,
    ) -> "QueryBatch":
        """Describes a step.

        Args:
            host_starts: `B + 1` offsets into the tokens, on the host.
            max_seq_lens: `B` upper bounds of the sequence lengths, on the host.
            device: where the tokens lie.
            query_start_loc: the offsets as int32 on `device`, where they are there already.
        """
        if query_start_loc is None:
            query_start_loc = torch.tensor(host_starts, dtype=torch.int32, device=device)
        return cls(query_start_loc, tuple(host_starts), tuple(max_seq_lens))

    @property
    def num_tokens(self) -> int:
        """`T`."""
        return self.host_starts[-1]

    @cached_property
    def max_query_len(self) -> int:
        """The most tokens of one request."""
        return max((b - a for a, b in pairwise(self.host_starts)), default=0)

    @cached_property
    def max_seq_len(self) -> int:
        """No request is longer than this."""
        return max(self.max_seq_lens, default=0)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The requests by number of new tokens; together they hold every token once.

        Made when first asked for: it copies to the device, which kernels that read
        `query_start_loc` do without.
        """
        by_length: defaultdict[int, list[int]] = defaultdict(list)
        for request, (start, stop) in enumerate(pairwise(self.host_starts)):
            if stop > start:
                by_length[stop - start].append(request)
        device = self.query_start_loc.device
        requests_in_all = len(self.host_starts) - 1
        if list(map(len, by_length.values())) == [requests_in_all]:
            # Nothing to copy from the host, so that a CUDA graph can be captured around it.
            every = torch.arange(requests_in_all, device=device)
            tokens = torch.arange(self.num_tokens, device=device).view(requests_in_all, -1)
            return (Segment(every, tokens, self.max_seq_len),)
        segments = []
        for length, requests in sorted(by_length.items()):
            firsts = torch.tensor([self.host_starts[r] for r in requests])
            tokens = firsts[:, None] + torch.arange(length)
            segments.append(
                Segment(
                    torch.tensor(requests, device=device),
                    tokens.to(device),
                    max(self.max_seq_lens[r] for r in requests),
                )
            )
        return tuple(segments)
