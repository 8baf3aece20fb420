"""A pack for the configurations of `tests.support.configurations`."""

from pathlib import Path

import pytest

from tests.support.configurations import NAMES, PRINT
from tests.support.packs import identity_pack
from vllm_attentionpack.packfile import save_pack


@pytest.fixture
def pack(tmp_path) -> Path:
    path = tmp_path / "tiny.pack.safetensors"
    save_pack(identity_pack(PRINT, NAMES, heads_per_group=2), path)
    return path
