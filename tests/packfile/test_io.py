"""The pack file: what is written comes back, and every damaged or foreign file is refused."""

import json
import math
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from tests.support.cases import random_codec
from tests.support.packs import pack_of
from vllm_attentionpack.codec.codec import Basis
from vllm_attentionpack.codec.layout import KINDS, PlaneCounts
from vllm_attentionpack.errors import PackFileError
from vllm_attentionpack.packfile import Fingerprint, Pack, load_pack, read_header, save_pack
from vllm_attentionpack.packfile.schema import FORMAT_VERSION

HEADER, DIGEST = "attentionpack", "sha256"
TENSOR = "layers.0.groups.0.key.encode"
FINGERPRINT = Fingerprint(
    architecture="TestForCausalLM",
    num_layers=2,
    num_query_heads=4,
    num_kv_heads=2,
    head_size=16,
    rope='{"rope_parameters": {"rope_theta": 10000}}',
)


def make_pack(seed: int = 0) -> Pack:
    """Two layers of two head groups, two modalities; values without any 2-bit or 8-bit dim."""
    return pack_of(
        lambda layer: random_codec(
            2,
            1,
            16,
            key=PlaneCounts(n8=4, n4=8),
            value=PlaneCounts(n4=8),
            padding=3 * layer,
            seed=2 * seed + layer,
        ),
        FINGERPRINT,
        ["model.layers.0.attn", "model.layers.1.attn"],
    )


PACK = make_pack()
#: A busy disk is no failure.
patient = settings(deadline=None)


def contents(pack: Pack) -> dict[str, torch.Tensor]:
    return {
        f"{i}.{g}.{kind}.{name}": tensor
        for i, layer in enumerate(pack.layers)
        for g, (bases, variance) in enumerate(zip(layer.bases, layer.variance, strict=True))
        for kind in KINDS
        for name, tensor in {**bases[kind].tensors(), "variance": variance[kind]}.items()
    }


def assert_equal(found: Pack, expected: Pack) -> None:
    assert found.header == expected.header
    tensors, wanted = contents(found), contents(expected)
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, wanted[name]), name


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A sound file of `PACK`."""
    file = tmp_path / "a.pack.safetensors"
    save_pack(PACK, file)
    return file


def rewrite(
    file: Path,
    tensors: Callable[[dict[str, torch.Tensor]], Any] = lambda _: None,
    metadata: Callable[[dict[str, str]], Any] = lambda _: None,
) -> None:
    """Edits the tensors and the metadata of a file in place; the checksum stays what it was."""
    with safe_open(file, framework="pt") as opened:
        kept = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        texts = dict(opened.metadata())
    tensors(kept)
    metadata(texts)
    file.write_bytes(save(kept, texts))


def edit_header(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    def metadata(texts: dict[str, str]) -> None:
        header = json.loads(texts[HEADER])
        edit(header)
        texts[HEADER] = json.dumps(header)

    rewrite(file, metadata=metadata)


def refused(file: Path, *said: str, reads_header: bool = False) -> None:
    """`load_pack` refuses in one line that names the file; `read_header` too unless told."""
    with pytest.raises(PackFileError) as caught:
        load_pack(file)
    message = str(caught.value)
    for part in (f"'{file}'", *said):
        assert part in message
    assert "\n" not in message
    assert message.endswith(".")
    if reads_header:
        read_header(file)
    else:
        with pytest.raises(PackFileError):
            read_header(file)


# What is written comes back


def test_round_trip(path):
    assert_equal(load_pack(path), PACK)
    assert read_header(path) == PACK.header


def test_the_codec_of_a_loaded_pack_reconstructs_the_same(path):
    x, visual = torch.randn(5, 16), torch.arange(5) % 2 == 0
    loaded = load_pack(path)
    for layer in range(2):
        for ours, theirs in zip(loaded.codec(layer).groups, PACK.codec(layer).groups, strict=True):
            codes, scale = ours.key.encode(x, visual)
            expected = theirs.key.reconstruct(*theirs.key.encode(x, visual), visual)
            assert torch.equal(ours.key.reconstruct(codes, scale, visual), expected)


def test_one_modality_and_joint_heads_round_trip(tmp_path):
    pack = pack_of(
        lambda _: random_codec(2, 2, 16, 1, PlaneCounts(n16=32), PlaneCounts(n2=32)),
        FINGERPRINT,
        ["a", "b"],
    )
    save_pack(pack, tmp_path / "p")
    loaded = load_pack(tmp_path / "p")
    assert_equal(loaded, pack)
    assert loaded.layers[0].bases[0]["key"].encode.shape == (1, 32, 32)


def test_transposed_and_shared_tensors_can_be_saved(tmp_path):
    shared = torch.randn(2, 12, 16)
    layers = list(PACK.layers)
    bases = [dict(group) for group in layers[0].bases]
    for group in bases:
        group["key"] = replace(group["key"], encode=shared.mT, decode=shared)
    pack = Pack(PACK.header, [replace(layers[0], bases=bases), layers[1]])
    save_pack(pack, tmp_path / "p")
    assert_equal(load_pack(tmp_path / "p"), pack)


def test_the_same_pack_gives_the_same_file(path, tmp_path):
    for again in range(5):  # an order drawn at random would show
        save_pack(make_pack(), tmp_path / str(again))
        assert (tmp_path / str(again)).read_bytes() == path.read_bytes()


# Writing is all or nothing


def test_saving_replaces_and_makes_folders(path, tmp_path):
    save_pack(make_pack(1), path)
    assert_equal(load_pack(path), make_pack(1))
    save_pack(PACK, str(tmp_path / "new" / "folder" / "p"))
    assert_equal(load_pack(tmp_path / "new" / "folder" / "p"), PACK)


def test_others_may_read_what_the_umask_lets_them(path):
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("failing", ["write_bytes", "replace"])
def test_a_failing_save_leaves_the_old_file_and_nothing_else(path, monkeypatch, failing):
    def half_written(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    if failing == "write_bytes":
        monkeypatch.setattr(Path, "write_bytes", half_written)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PackFileError, match=f"cannot be written to '{path}' .*has room"):
        save_pack(make_pack(1), path)
    monkeypatch.undo()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert_equal(load_pack(path), PACK)


def test_saving_onto_a_folder_or_under_a_file_is_refused(path):
    for target in (path.parent, path / "p"):
        with pytest.raises(PackFileError, match=f"cannot be written to '{target}'"):
            save_pack(PACK, target)
    assert_equal(load_pack(path), PACK)


# No pack at all


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


# Fuzzing: whatever happens to a file, `load_pack` refuses it or returns the same pack


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> tuple[Path, bytes]:
    """A file to overwrite, and its sound bytes."""
    file = tmp_path_factory.mktemp("fuzz") / "p"
    save_pack(PACK, file)
    return file, file.read_bytes()


def refused_or_equal(file: Path) -> None:
    try:
        found = load_pack(file)
    except PackFileError as error:
        assert str(file) in str(error)
    else:
        assert_equal(found, PACK)


#: Bytes in front of the tensors: where a flipped byte can do anything but spoil a number.
HEADER_BYTES = 4800
flips = st.lists(
    st.tuples(
        st.one_of(st.integers(0, HEADER_BYTES), st.integers(0, 1 << 16)), st.integers(1, 255)
    ),
    min_size=1,
    max_size=4,
)


@patient
@given(flips)
@example([(0, 1)])  # a header length that is off by one
@example([(7, 128)])  # ... and by 2**63
def test_flipped_bytes(sound, changes):
    file, original = sound
    assert int.from_bytes(original[:8], "little") > HEADER_BYTES
    data = bytearray(original)
    for position, mask in changes:
        data[position % len(data)] ^= mask
    file.write_bytes(data)
    refused_or_equal(file)


@patient
@given(
    st.integers(0, 1 << 16),
    st.integers(0, 1 << 16),
    st.one_of(st.binary(max_size=40), st.sampled_from([b"{}", b"[", b'"', b"\\ud800", b"NaN"])),
)
def test_replaced_stretches(sound, start, length, filling):
    file, original = sound
    start %= len(original)
    file.write_bytes(original[:start] + filling + original[start + length % 200 :])
    refused_or_equal(file)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, child in inner:
        found.append((*here, key))
        if isinstance(child, dict | list):
            found += places(child, (*here, key))
    return found


HEADER_JSON = PACK.header.model_dump(mode="json")


@patient
@given(st.sampled_from(places(HEADER_JSON)), json_values)
@example(("provenance", "model"), "\ud800")
@example(("layers", 0, "groups", 0, "key", "n8"), 4 * 10**30)
@example(("fingerprint", "head_size"), 10**30)
@example(("layers", 0, "bytes_per_token"), 28.0)
def test_any_value_anywhere_in_the_header(sound, place, value):
    """`load_pack` refuses, and what `read_header` lets pass can be used."""
    file, original = sound
    header = json.loads(json.dumps(HEADER_JSON))
    parent = header
    for key in place[:-1]:
        parent = parent[key]
    unchanged = parent[place[-1]] == value and type(parent[place[-1]]) is type(value)
    parent[place[-1]] = value
    file.write_bytes(original)
    rewrite(file, metadata=lambda m: m.update({HEADER: json.dumps(header)}))
    try:
        found = read_header(file)
    except PackFileError as error:
        assert str(file) in str(error)
    else:
        assert (found == PACK.header) == unchanged
        assert math.isfinite(found.compression_ratio)
        assert found.bytes_per_token > 0
    # other white space alone breaks the checksum
    with pytest.raises(PackFileError):
        load_pack(file)
