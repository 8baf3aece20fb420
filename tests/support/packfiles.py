"""A pack file of two layers, and what tests do to files: edit them, expect a refusal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from tests.support.cases import random_codec
from tests.support.packs import pack_of
from vllm_attentionpack.codec.layout import KINDS, PlaneCounts
from vllm_attentionpack.errors import PackFileError
from vllm_attentionpack.packfile import Fingerprint, Pack, load_pack, read_header

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
