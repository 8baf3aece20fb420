"""Every damaged or foreign file is refused in one line."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.support.packfiles import (
    DIGEST,
    HEADER,
    TENSOR,
    edit_header,
    make_pack,
    refused,
    rewrite,
)
from vllm_attentionpack.codec.codec import Basis
from vllm_attentionpack.errors import PackFileError
from vllm_attentionpack.packfile import load_pack, save_pack
from vllm_attentionpack.packfile.schema import FORMAT_VERSION

#: A busy disk is no failure.
patient = settings(deadline=None)


def test_missing_file(tmp_path):
    refused(tmp_path / "none", "no pack file", "attentionpack calibrate")


def test_folder(tmp_path):
    refused(tmp_path, "no pack file", "attentionpack calibrate")


def test_a_path_that_no_file_can_have():
    refused(Path("x" * 5000), "no pack file")
    refused(Path("a\0b"), "no pack file")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated(path, part):
    data = path.read_bytes()
    path.write_bytes(data[: math.floor(len(data) * part)])
    refused(path, "not a complete safetensors file", "Copy or calibrate the pack again")


@pytest.mark.parametrize("kept", [4, 8, 9, -1])
def test_truncated_at_the_edges_of_its_parts(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    refused(path, "not a complete safetensors file")


def test_surplus_bytes(path):
    path.write_bytes(path.read_bytes() + b"\0")
    refused(path, "not a complete safetensors file")


@patient
@given(st.binary(max_size=400))
def test_random_bytes(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "random"
    file.write_bytes(data)
    with pytest.raises(PackFileError):
        load_pack(file)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {DIGEST: "0" * 64}])
def test_safetensors_without_our_header(tmp_path, metadata):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model", metadata)
    refused(tmp_path / "model", "is a safetensors file but not a pack", "attentionpack calibrate")


# Headers


def test_newer_format(path):
    # whatever else a newer format holds
    edit_header(path, lambda h: h.update(format_version=FORMAT_VERSION + 1, new={"a": 1}))
    refused(
        path,
        f"has pack format {FORMAT_VERSION + 1}",
        f"reads formats up to {FORMAT_VERSION}",
        "Upgrade vllm-attentionpack",
    )


@pytest.mark.parametrize("version", [0, -1, "2", 1.5, None, True, [1], 10**30])
def test_versions_that_are_none(path, version):
    edit_header(path, lambda h: h.update(format_version=version))
    refused(path, "format" if version == 10**30 else "'format_version'")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "no json",
        "[]",
        "null",
        "7",
        '"format_version"',
        "{}",
        '{"format_version": 1}',
        "[" * 100_000,
        '{"format_version": ' + "1" * 10_000 + "}",
    ],
    ids=lambda text: text[:20],
)
def test_header_that_is_no_header(path, text):
    rewrite(path, metadata=lambda m: m.update({HEADER: text}))
    refused(path, "the header of", "not valid", "Calibrate again")


def first_group(header: dict[str, Any]) -> dict[str, Any]:
    return header["layers"][0]["groups"][0]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda h: h.update(surprise=1), "'surprise'"),
        (lambda h: h["fingerprint"].update(surprise=1), "'fingerprint.surprise'"),
        (lambda h: h.pop("ratio"), "'ratio'"),
        (lambda h: h["fingerprint"].pop("rope"), "'fingerprint.rope'"),
        (lambda h: h.update(num_modalities=3), "'num_modalities' = 3"),
        (lambda h: h.update(max_context="long"), "'max_context' = 'long'"),
        (lambda h: h.update(ratio=math.inf), "'ratio' = inf"),
        (lambda h: h.update(ratio=math.nan), "'ratio' = nan"),
        (lambda h: first_group(h)["key"].update(n8=-4), "'layers.0.groups.0.key.n8' = -4"),
        (lambda h: first_group(h)["key"].update(n8=3), "multiple of 4 dims, got 3"),
        (lambda h: first_group(h)["key"].update(n8=0, n2=16), "a rank exceeds the 16 dims"),
        (lambda h: first_group(h)["key"].update(n8=0, n16=16), "cannot be mixed"),
        (lambda h: h["layers"][0].update(bytes_per_token=19), "cannot hold the 28 bytes"),
        (
            lambda h: first_group(h)["key"].update(n8=0, n4=0),
            "keeps no dim of the keys or the values of a head group",
        ),
        (lambda h: h["layers"][0]["groups"].pop(), "1 head groups of 1 for 2 KV heads"),
        (lambda h: h.update(heads_per_group=2), "2 head groups of 2 for 2 KV heads"),
        (lambda h: h["layers"].pop(), "names 1 layers for a model of 2"),
        (lambda h: h.update(layers=[]), "names 0 layers for a model of 2"),
        (
            lambda h: h["layers"][1].update(name=h["layers"][0]["name"]),
            "names the layer 'model.layers.0.attn' twice",
        ),
    ],
)
def test_impossible_header(path, edit, said):
    edit_header(path, edit)
    refused(path, said, "Calibrate again")


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: h["provenance"].update(model="another"),
        lambda h: h["fingerprint"].update(rope="{}"),
        lambda h: h.update(max_context=1),
        lambda h: h["layers"][0].update(bytes_per_token=64),
        lambda h: first_group(h).update(key={"n8": 4, "n4": 8, "n2": 0, "n16": 0}),
    ],
)
def test_a_value_that_was_edited_is_told_by_the_checksum(path, edit):
    edit_header(path, edit)
    refused(path, "do not match its checksum", "damaged or edited", reads_header=True)


@pytest.mark.parametrize(
    "digest", [None, torch.zeros(0, dtype=torch.uint8), torch.zeros(32, dtype=torch.uint8)]
)
def test_checksum_missing_or_wrong(path, digest):
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(DIGEST)
        if digest is not None:
            tensors[DIGEST] = digest

    rewrite(path, tensors=edit)
    refused(path, "do not match its checksum", reads_header=True)


# Tensors


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["mean", "encode", "decode", "weight"])
def test_a_basis_that_is_not_finite(tmp_path, field, value):
    """Saved by us, so that its checksum is right."""
    pack = make_pack()
    bases: dict[Any, Basis] = pack.layers[1].bases[1]
    broken = getattr(bases["value"], field).clone()
    broken.view(-1)[-1] = value
    bases["value"] = replace(bases["value"], **{field: broken})
    save_pack(pack, tmp_path / "p")
    refused(
        tmp_path / "p",
        f"'layers.1.groups.1.value.{field}'",
        "values that are not finite",
        reads_header=True,
    )


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (
            torch.zeros(2, 12, 16),
            "is torch.float32 (2, 12, 16), expected torch.float32 (2, 16, 12)",
        ),
        (torch.zeros(2 * 16 * 12), "is torch.float32 (384,)"),
        (torch.zeros(1, 16, 12), "is torch.float32 (1, 16, 12)"),
        (torch.zeros(()), "is torch.float32 ()"),
        (torch.zeros(2, 16, 12, dtype=torch.bfloat16), "is torch.bfloat16 (2, 16, 12)"),
        (torch.zeros(2, 16, 12, dtype=torch.float64), "is torch.float64 (2, 16, 12)"),
        (torch.zeros(2, 16, 12, dtype=torch.int32), "is torch.int32 (2, 16, 12)"),
    ],
    ids=lambda x: None if isinstance(x, str) else f"{x.dtype}{tuple(x.shape)}",
)
def test_wrong_shape_or_dtype(path, tensor, said):
    rewrite(path, tensors=lambda t: t.update({TENSOR: tensor}))
    refused(path, f"'{TENSOR}'", said, "Calibrate again", reads_header=True)


@pytest.mark.parametrize("field", ["mean", "encode", "decode", "weight", "variance"])
def test_missing_tensor(path, field):
    name = f"layers.1.groups.0.value.{field}"
    rewrite(path, tensors=lambda t: t.pop(name))
    refused(path, f"lacks the tensor '{name}'", "Calibrate again", reads_header=True)


@pytest.mark.parametrize("name", ["layers.2.groups.0.key.mean", "layers.0.groups.0.key.bias", ""])
def test_surplus_tensor(path, name):
    rewrite(path, tensors=lambda t: t.update({name: torch.zeros(1, dtype=torch.float16)}))
    refused(path, "tensors that its header does not name", f"['{name}']", reads_header=True)


def test_swapped_tensors(path):
    """Same names, same shapes, same bytes: only the checksum can tell."""
    names = ("layers.0.groups.0.key.mean", "layers.0.groups.1.key.mean")

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]

    rewrite(path, tensors=swap)
    refused(path, "do not match its checksum", reads_header=True)


@pytest.mark.parametrize("from_end", [1, 2, 1000])
def test_a_flipped_byte_in_a_tensor(path, from_end):
    data = bytearray(path.read_bytes())
    data[-from_end] ^= 1
    path.write_bytes(data)
    refused(path, "do not match its checksum", "damaged or edited", reads_header=True)
