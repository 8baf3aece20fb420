"""Rotary planes of heads."""

import pytest
import torch

from vllm_attentionpack.codec.positions import Anchors, Rotary


@pytest.mark.parametrize("interleaved", [False, True])
def test_pre_rope_planes_are_views(interleaved):
    """An index from the host could not be captured in a CUDA graph."""
    anchors = Anchors(Rotary(torch.ones(5, dtype=torch.float64), interleaved), 64, 2)
    heads = torch.arange(12).expand(3, 12).contiguous()
    found = anchors.pre_rope_planes(heads)
    for part, dims in zip(found, anchors.rotary.plane_dims(12), strict=True):
        assert torch.equal(part, heads[:, dims[:2]])
        assert part.untyped_storage().data_ptr() == heads.untyped_storage().data_ptr()
