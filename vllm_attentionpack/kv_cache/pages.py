"""How many tokens the blocks of the two caches hold, so that they have equal bytes.

vLLM draws the blocks of all caches from one pool, so a block of the compacted cache and one of the
exact cache take the bytes of the larger. A block holds the tokens of all layers side by side, each
with its own bytes; beside dense layers, which vLLM wants to have pages of one size, of one layer.
Block sizes must divide each other, because prefix-cache hits land on multiples of all of them.
"""

from dataclasses import dataclass

from vllm_attentionpack.codec.layout import BLOCK_SIZE_MULTIPLE, check_block_size

#: Padding that is accepted in exchange for blocks of the preferred size.
MAX_PADDING = 0.03
#: Smaller exact blocks waste less at both ends of the window, but make longer block tables.
PREFERRED_EXACT_TOKENS = 8
#: Compacted blocks of more tokens make prefix-cache hits too coarse.
MAX_BLOCK_SIZE = 256


@dataclass(frozen=True)
class PageGeometry:
    """The pages of one engine.

    Attributes:
        block_size: tokens of a compacted block, `S`.
        exact_block_size: tokens of an exact block; divides `S`.
        page_bytes: of either block.
        bytes_per_token: of the compacted layers in a block.
        exact_bytes_per_token: of the same layers in the model's dtype.
    """

    block_size: int
    exact_block_size: int
    page_bytes: int
    bytes_per_token: int
    exact_bytes_per_token: int

    @property
    def padding(self) -> float:
        """Share of a compacted block that is padding."""
        return 1 - self.block_size * self.bytes_per_token / self.page_bytes

    @property
    def exact_padding(self) -> float:
        """Share of an exact block that is padding."""
        return 1 - self.exact_block_size * self.exact_bytes_per_token / self.page_bytes

    def holding(self, bytes_per_token: int, exact_bytes_per_token: int) -> "PageGeometry":
        """Blocks of as many tokens for other layers: those of one pipeline stage."""
        page_bytes = max(
            self.block_size * bytes_per_token, self.exact_block_size * exact_bytes_per_token
        )
        return PageGeometry(
            self.block_size,
            self.exact_block_size,
            page_bytes,
            bytes_per_token,
            exact_bytes_per_token,
        )

    def request_bytes(self, tokens: int, sinks: int, window: int, margin: int = 1) -> int:
        """Bytes of the blocks that a request of `tokens` tokens takes at most."""
        exact = exact_blocks(self.exact_block_size, sinks, window, margin, tokens)
        blocks = -(-tokens // self.block_size) + exact
        return blocks * self.page_bytes


def exact_blocks(
    block_size: int, sinks: int, window: int, margin: int = 1, longest: int | None = None
) -> int:
    """The most exact blocks that one request holds.

    Args:
        block_size: tokens of an exact block.
        sinks: exact tokens at the start of the request.
        window: exact tokens at its end, the newest included.
        margin: tokens of the steps under way.
        longest: tokens of the request, `margin` left out; None where they are not known.
    """
    # One more, because a window need not start with a block.
    recent = -(-(window - 1 + margin) // block_size) + 1 if window > 1 else 0
    blocks = -(-sinks // block_size) + recent
    return blocks if longest is None else min(blocks, -(-(longest + margin) // block_size))


def page_geometry(
    bytes_per_token: int, exact_bytes_per_token: int, block_size: int | None = None
) -> PageGeometry:
    """Chooses block sizes with little padding.

    Args:
        bytes_per_token: see `PageGeometry`.
        exact_bytes_per_token: likewise.
        block_size: tokens of a compacted block, if that is given.

    Returns:
        Among the geometries with at most `MAX_PADDING` in either block the one whose exact blocks
        are nearest to `PREFERRED_EXACT_TOKENS`; if there is none, the one with the least padding,
        of compacted blocks first, since these hold nearly everything.
    """
    sizes = (
        range(BLOCK_SIZE_MULTIPLE, MAX_BLOCK_SIZE + 1, BLOCK_SIZE_MULTIPLE)
        if block_size is None
        else [check_block_size(block_size)]
    )
    candidates = [
        PageGeometry(
            size,
            exact,
            max(size * bytes_per_token, exact * exact_bytes_per_token),
            bytes_per_token,
            exact_bytes_per_token,
        )
        for size in sizes
        for exact in range(1, size + 1)
        if size % exact == 0
    ]
    good = [c for c in candidates if max(c.padding, c.exact_padding) <= MAX_PADDING]
    if good:
        return min(
            good,
            key=lambda c: (
                abs(c.exact_block_size - PREFERRED_EXACT_TOKENS),
                c.padding,
                c.block_size,
            ),
        )
    return min(candidates, key=lambda c: (round(c.padding, 2), c.exact_padding, c.block_size))
