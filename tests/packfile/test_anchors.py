"""Packs whose keys are coded relative to anchors."""

import pytest
import torch
from safetensors import safe_open

from tests.support.packfiles import DIGEST, FINGERPRINT, HEADER, edit_header, refused, rewrite
from tests.support.packs import identity_pack
from vllm_attentionpack.codec.positions import Anchors, Rotary
from vllm_attentionpack.packfile import load_pack, save_pack
from vllm_attentionpack.packfile.io import _digest
from vllm_attentionpack.packfile.shard import shard_codec

NAMES = ["model.layers.0.attn", "model.layers.1.attn"]
SPAN = 64
FREQUENCIES = "layers.0.frequencies"


@pytest.fixture
def path(tmp_path):
    rotary = Rotary(0.5 ** torch.arange(6, dtype=torch.float64), interleaved=True)
    file = tmp_path / "anchored.safetensors"
    save_pack(identity_pack(FINGERPRINT, NAMES, anchors=Anchors(rotary, SPAN, 2)), file)
    return file


def test_anchors_come_back_and_are_shared(path):
    pack = load_pack(path)
    assert pack.header.anchor_span == SPAN
    codecs = [pack.codec(0), shard_codec(pack, 1, 2, 1)]
    for codec in codecs:
        assert codec.anchors.span == SPAN and codec.anchors.rotary.interleaved
        assert codec.anchors.pre_rope == codec.to(torch.device("meta")).anchors.pre_rope == 2
        assert torch.equal(
            codec.anchors.rotary.frequencies, 0.5 ** torch.arange(6, dtype=torch.float64)
        )
    # One table of angles serves all layers that turn alike, wherever they were moved to.
    first, second = (codec.to(torch.device("meta")).anchors.rotary for codec in codecs)
    assert first is second and first.frequencies.is_meta


def test_a_pack_without_anchors_has_none(tmp_path):
    file = tmp_path / "plain.safetensors"
    save_pack(identity_pack(FINGERPRINT, NAMES), file)
    pack = load_pack(file)
    assert pack.header.anchor_span == 0 and pack.codec(0).anchors is None


def test_a_pack_of_the_first_format_is_read(tmp_path):
    """It knew nothing of anchors."""
    file = tmp_path / "old.safetensors"
    save_pack(identity_pack(FINGERPRINT, NAMES), file)

    def without_anchors(header):
        header["format_version"] = 1
        del header["anchor_span"]
        for layer in header["layers"]:
            del layer["rotary"]

    edit_header(file, without_anchors)
    with safe_open(file, framework="pt") as opened:
        text = opened.metadata()[HEADER]

    def seal(tensors):
        del tensors[DIGEST]
        tensors[DIGEST] = _digest(text, tensors)

    rewrite(file, tensors=seal)
    pack = load_pack(file)
    assert pack.header.format_version == 1 and pack.codec(0).anchors is None


def test_frequencies_are_checked(path):
    rewrite(path, tensors=lambda kept: kept.pop(FREQUENCIES))
    refused(path, FREQUENCIES, reads_header=True)


@pytest.mark.parametrize(
    "broken", [torch.ones(5, dtype=torch.float64), torch.ones(6), torch.full((6,), torch.nan)]
)
def test_frequencies_of_another_shape_or_type(path, broken):
    rewrite(path, tensors=lambda kept: kept.update({FREQUENCIES: broken}))
    refused(path, FREQUENCIES, reads_header=True)


@pytest.mark.parametrize("change", [{"anchor_span": 0}, {"planes": 9}, {"pre_rope": 7}])
def test_what_turns_must_fit_the_heads(path, change):
    def edit(header):
        header["anchor_span"] = change.get("anchor_span", SPAN)
        header["layers"][0]["rotary"] |= {"planes": 6, "pre_rope": 2} | {
            name: value for name, value in change.items() if name != "anchor_span"
        }

    edit_header(path, edit)
    refused(path, "model.layers.0.attn", "anchor span")
