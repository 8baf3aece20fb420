"""The pack file: what is written comes back."""

import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.cases import random_codec
from tests.support.packfiles import (
    FINGERPRINT,
    PACK,
    assert_equal,
    make_pack,
)
from tests.support.packs import pack_of
from vllm_attentionpack.codec.layout import PlaneCounts
from vllm_attentionpack.errors import PackFileError
from vllm_attentionpack.packfile import Pack, check_target, load_pack, read_header, save_pack


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


def test_joint_keys_and_values_round_trip(tmp_path):
    counts = PlaneCounts(n8=4, n4=8, n2=16)
    pack = pack_of(
        lambda _: random_codec(2, 1, 16, 2, counts, joint_kv=True), FINGERPRINT, ["a", "b"]
    )
    save_pack(pack, tmp_path / "p")
    loaded = load_pack(tmp_path / "p")
    assert_equal(loaded, pack)
    assert all(layout.joint_kv for layout in loaded.header.layouts())
    assert loaded.layers[0].variance[0]["key"].shape == (2, 32)


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


def test_a_target_is_checked_without_a_trace(path):
    save_pack(PACK, path)
    for good in (path, path.parent / "new" / "p"):
        check_target(good)
    assert not list((path.parent / "new").iterdir())
    assert_equal(load_pack(path), PACK)
    for bad in (path.parent, path / "p", Path("."), Path("/"), path.parent / ("long" * 99)):
        with pytest.raises(PackFileError, match=f"cannot be written to '{bad}'"):
            check_target(bad)
    assert sorted(file.name for file in path.parent.iterdir()) == sorted(["new", path.name])


def test_a_target_that_vllm_would_load_as_weights_is_refused(tmp_path):
    (tmp_path / "config.json").touch()
    check_target(tmp_path / "model.pack")
    with pytest.raises(PackFileError, match=r"holds a model, .* file in another folder"):
        check_target(tmp_path / "pack.safetensors")


def test_saving_onto_a_folder_or_under_a_file_is_refused(path):
    for target in (path.parent, path / "p"):
        with pytest.raises(PackFileError, match=f"cannot be written to '{target}'"):
            save_pack(PACK, target)
    assert_equal(load_pack(path), PACK)
