"""A sound pack file."""

from pathlib import Path

import pytest

from tests.support.packfiles import PACK
from vllm_attentionpack.packfile import save_pack


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A sound file of `PACK`."""
    file = tmp_path / "a.pack.safetensors"
    save_pack(PACK, file)
    return file
