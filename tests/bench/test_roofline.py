"""The analytic floors against figures worked out by hand."""

import pytest

from vllm_attentionpack.bench.roofline import (
    GOAL_SHAPES,
    GPUS,
    decode,
    dense_decode,
    dense_prefill,
    store,
    work_table,
)
from vllm_attentionpack.bench.shapes import LayerShape

LLAMA = LayerShape(32, 8, 128, 8, 8)
H200 = next(gpu for gpu in GPUS if gpu.name.startswith("H200"))


def test_dense_decode_moves_every_byte_of_the_cache_once():
    work = dense_decode(LLAMA, 32, 8192)
    # 2 * 8 heads * 128 dims * 2 bytes a token, and 32 queries and outputs of 32 * 128 bfloat16
    assert work.bytes == 32 * (8192 * 4096 + 2 * 32 * 128 * 2)
    assert work.flops == 32 * 8192 * 4 * 32 * 128
    assert work.bound(H200) == "memory"
    assert work.floor(H200) == pytest.approx(work.bytes / 4.8e12)


def test_codes_take_the_bytes_of_the_layout():
    attend = decode(LLAMA, 32, 1 << 17)[1]
    stored = 32 * (1 << 17) * LLAMA.layout().bytes_per_token
    assert stored < attend.bytes < 1.01 * stored
    dense = dense_decode(LLAMA, 32, 1 << 17)
    assert 7.9 < dense.bytes / attend.bytes < 8.1


def test_every_query_head_meets_the_ranks_of_its_own_group_only():
    joint, apart = (decode(LayerShape(32, 8, 128, group, 8), 1, 1000)[1].flops for group in (8, 1))
    layout = LLAMA.layout()
    ranks = layout.groups[0].key.num_columns + layout.groups[0].value.num_columns
    assert joint == 1000 * 2 * 32 * ranks
    assert apart < joint / 4


def test_layers_meet_their_ratio():
    for ratio in (4, 8, 12):
        found = LayerShape(32, 8, 128, 8, ratio).layout().compression_ratio
        assert ratio <= found < ratio * 1.05


def test_encoding_is_a_small_part_of_prefill():
    assert store(LLAMA, 8192).floor(H200) < 0.05 * dense_prefill(LLAMA, 8192).floor(H200)


def test_the_table_names_every_kernel_of_every_goal():
    lines = work_table().splitlines()[2:]
    for kernel in ("dense decode", "absorb_query", "paged_attention", "up_project"):
        assert sum(f"| {kernel}" in line for line in lines) == len(GOAL_SHAPES)
    assert sum("| store_kv |" in line for line in lines) == 1
