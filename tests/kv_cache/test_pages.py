"""Block sizes of the two caches: equal pages, little padding, blocks that divide each other."""

import pytest

from vllm_attentionpack.kv_cache.pages import (
    MAX_PADDING,
    PREFERRED_EXACT_TOKENS,
    exact_blocks,
    page_geometry,
)

# Bytes per token of one dense bfloat16 layer: 8 heads x 128, 2 x 64, 32 x 128.
DENSE = (4096, 512, 16384)


@pytest.mark.parametrize("dense", DENSE)
@pytest.mark.parametrize("ratio", [2, 3, 4, 5, 6, 8, 10, 12, 16])
@pytest.mark.parametrize("block_size", [None, 16, 64, 128])
def test_pages(dense, ratio, block_size):
    stored = int(dense / ratio) // 4 * 4
    pages = page_geometry(stored, dense, block_size)
    assert pages.block_size % 16 == 0 and pages.block_size % pages.exact_block_size == 0
    assert pages.block_size == block_size or block_size is None
    used = pages.block_size * stored, pages.exact_block_size * dense
    assert pages.page_bytes == max(used)
    assert (pages.padding, pages.exact_padding) == tuple(1 - u / pages.page_bytes for u in used)
    assert pages.padding <= MAX_PADDING
    if block_size is None:
        # A pack of so few bytes cannot come nearer to its ratio than a plane's 4 bytes.
        assert pages.exact_padding <= MAX_PADDING + (0.01 if dense == 512 else 0)
        assert PREFERRED_EXACT_TOKENS / 2 <= pages.exact_block_size <= 2 * PREFERRED_EXACT_TOKENS


def test_bytes_of_a_request():
    pages = page_geometry(512, 4096)
    assert (pages.block_size, pages.exact_block_size) == (64, 8)
    # 32 compacted blocks; one for sinks, five for 32 tokens that start anywhere
    assert pages.request_bytes(2048, 4, 32) == (32 + 1 + 5) * 8 * 4096
    assert pages.request_bytes(2049, 0, 0) == 33 * 8 * 4096
    # no more blocks than its tokens fill, with one under way, whatever may stay exact
    for sinks, window in ((9**9, 0), (0, 9**9), (2000, 2000)):
        assert pages.request_bytes(2048, sinks, window) == (32 + 257) * 8 * 4096


@pytest.mark.parametrize(
    ("sinks", "window", "margin", "blocks"),
    [(0, 0, 1, 0), (1, 0, 1, 1), (9, 1, 1, 2), (0, 2, 1, 2), (4, 32, 1, 1 + 5), (4, 32, 8, 1 + 6)],
)
def test_exact_blocks(sinks, window, margin, blocks):
    assert exact_blocks(8, sinks, window, margin) == blocks


def test_block_sizes_that_no_plane_fits():
    with pytest.raises(ValueError, match="not a positive multiple of 16"):
        page_geometry(512, 4096, 24)
