"""Orders of latent dims and products of packed matrices."""

import gc
from weakref import ref

import pytest
import torch

from tests.support.cpu import threads
from vllm_attentionpack.codec.codec import identity_codec
from vllm_attentionpack.codec.layout import PlaneCounts
from vllm_attentionpack.ops.cpu import library
from vllm_attentionpack.ops.cpu.maps import PackedMap
from vllm_attentionpack.ops.cpu.plan import key_order, plan_of, value_lanes, value_order


def test_orders_hold_every_dim_once():
    for n8, n4, n2 in ((4, 8, 16), (36, 24, 48), (0, 0, 16), (20, 0, 0)):
        counts = PlaneCounts(n8=n8, n4=n4, n2=n2)
        assert sorted(key_order(counts).tolist()) == list(range(counts.num_columns))
        for lanes in (8, 16):
            order = value_order(counts, lanes)
            assert len(order) % lanes == 0
            assert len(order) == sum(value_lanes(counts, lanes))
            assert sorted(order[order >= 0].tolist()) == list(range(counts.num_columns))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("repeats", [1, 7])
@pytest.mark.parametrize("count", [1, 2])
def test_products_of_packed_matrices(isa, dtype, repeats, count):
    """Views, odd sizes, more rows than one turn takes, and runs of very different magnitude."""
    runs, width, tokens, heads = [64, 200, 48, 1], 83, 33, 3
    spread = torch.cat([torch.full((n,), 10.0**-i) for i, n in enumerate(runs)])
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(heads, sum(runs), width, generator=generator)
    packed = PackedMap(matrix, library.kernels(), runs)
    x = torch.randn(tokens, heads, repeats, 2 * sum(runs), generator=generator)
    x = (x[..., : sum(runs)] * spread).to(dtype).transpose(0, 1)
    shift = torch.randn(sum(runs), generator=generator) * spread
    for taken in (None, shift):
        out = torch.full((tokens, heads, repeats, width + 5), 7.0)
        with threads(count):
            part = out[..., :width].transpose(0, 1)
            packed.into(part, x, 0.5, taken)
        centred = x.double() - (0 if taken is None else taken.double())
        want = 0.5 * centred @ matrix.double()[:, None]
        assert (part - want).abs().max() < 1e-3 * want.abs().max()
        assert (out[..., width:] == 7).all()


def test_a_plan_goes_with_its_codec(isa):
    codec = identity_codec(2, 16)
    made = ref(plan_of(codec, library.kernels(), packed=True))
    assert made() is not None
    del codec
    gc.collect()
    assert made() is None
