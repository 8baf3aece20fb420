"""Evaluation: what is refused before an engine starts, and which engine starts first."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.packfiles import FINGERPRINT
from tests.support.packs import identity_pack
from vllm_attentionpack.errors import PackFileError, PackMismatchError
from vllm_attentionpack.evaluate import run
from vllm_attentionpack.packfile import save_pack


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The packs of the engines that were started; the first one refuses its pack."""
    started: list[Any] = []

    def run_engine(model: str, items: Any, pack: Path | None, *_: Any) -> None:
        started.append(pack)
        raise PackMismatchError("another model")

    monkeypatch.setattr(run, "run_engine", run_engine)
    return started


def test_the_pack_is_checked_before_the_dense_run(tmp_path: Path, engines: list[Any]) -> None:
    data, pack = tmp_path / "items.jsonl", tmp_path / "pack"
    data.write_text('{"text": "a b"}\n')
    names = [f"layers.{i}" for i in range(FINGERPRINT.num_layers)]
    save_pack(identity_pack(FINGERPRINT, names), pack)
    with pytest.raises(PackMismatchError):
        run.evaluate("model", pack, data)
    assert engines == [pack]  # its model is checked where the engine starts

    damaged = bytearray(pack.read_bytes())
    damaged[-1] ^= 1
    pack.write_bytes(damaged)
    with pytest.raises(PackFileError, match="do not match its checksum"):
        run.evaluate("model", pack, data)
    assert engines == [pack]
