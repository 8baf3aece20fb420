"""Reading and writing pack files. Every check that a file must pass is here; nothing is evaluated.

A digest over the header and every tensor guards against damage and careless edits, not against an
attacker.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_attentionpack.codec.codec import Basis
from vllm_attentionpack.codec.layout import KINDS, Kind
from vllm_attentionpack.errors import PackFileError
from vllm_attentionpack.packfile.schema import FORMAT_VERSION, LayerPack, Pack, PackHeader

_HEADER_KEY = "attentionpack"
_DIGEST_KEY = "attentionpack.sha256"
_BASIS_FIELDS = ("mean", "encode", "decode", "weight")


def save_pack(pack: Pack, path: str | os.PathLike[str]) -> None:
    """Writes a pack; the file appears whole or not at all."""
    header = pack.header.model_dump_json()
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(pack.layers):
        for g, (bases, variance) in enumerate(zip(layer.bases, layer.variance, strict=True)):
            for kind in KINDS:
                prefix = _prefix(i, g, kind)
                for field, tensor in bases[kind].tensors().items():
                    tensors[prefix + field] = (
                        tensor.cpu().clone()
                    )  # safetensors refuses shared memory
                tensors[prefix + "variance"] = variance[kind].float().cpu().clone()
    metadata = {_HEADER_KEY: header, _DIGEST_KEY: _digest(header, tensors)}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    save_file(tensors, partial, metadata)
    os.replace(partial, target)


def read_header(path: str | os.PathLike[str]) -> PackHeader:
    """Reads and checks the header alone, without the tensors.

    Raises:
        PackFileError: missing, truncated or foreign file, newer format, invalid header.
    """
    target = Path(path)
    if not target.is_file():
        raise PackFileError(
            f"no pack file at '{target}'. "
            "Give the path of a file made by 'attentionpack calibrate'."
        )
    try:
        with safe_open(target, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise PackFileError(
            f"'{target}' is not a complete safetensors file ({error}). "
            "Copy or calibrate the pack again."
        ) from error
    if _HEADER_KEY not in metadata:
        raise PackFileError(
            f"'{target}' is a safetensors file but not a pack. "
            "Give the path of a file made by 'attentionpack calibrate'."
        )
    return _parse_header(target, metadata[_HEADER_KEY])


def load_pack(path: str | os.PathLike[str]) -> Pack:
    """Reads a pack and checks all of it.

    Raises:
        PackFileError: as `read_header`; missing, surplus or misshapen tensors; values that are not
            finite; a digest that does not match the contents.
    """
    header = read_header(path)
    target = Path(path)
    with safe_open(target, framework="pt") as file:
        metadata = file.metadata()
        try:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise PackFileError(f"'{target}' is damaged ({error}). Calibrate again.") from error
    layers = [_read_layer(target, header, i, tensors) for i in range(len(header.layers))]
    expected = {
        _prefix(i, g, kind) + field
        for i, layer in enumerate(header.layers)
        for g in range(len(layer.groups))
        for kind in KINDS
        for field in (*_BASIS_FIELDS, "variance")
    }
    if surplus := set(tensors) - expected:
        raise PackFileError(
            f"'{target}' holds tensors that its header does not name: {sorted(surplus)[:3]}. "
            "Calibrate again."
        )
    if metadata.get(_DIGEST_KEY) != _digest(metadata[_HEADER_KEY], tensors):
        raise PackFileError(
            f"the contents of '{target}' do not match its checksum: the file was damaged or "
            "edited. Copy or calibrate the pack again."
        )
    return Pack(header, layers)


def _parse_header(target: Path, text: str) -> PackHeader:
    try:
        raw = json.loads(text)
        version = raw["format_version"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise PackFileError(
            f"the header of '{target}' is not valid ({error}). Calibrate again."
        ) from error
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise PackFileError(
            f"'{target}' has pack format {version}; this version of vllm-attentionpack reads "
            f"formats up to {FORMAT_VERSION}. Upgrade vllm-attentionpack or calibrate again."
        )
    try:
        header = PackHeader.model_validate(raw)
        header.layouts()
    except (ValidationError, ValueError) as error:
        first = str(error).replace("\n", " ")
        raise PackFileError(
            f"the header of '{target}' is not valid ({first}). Calibrate again."
        ) from error
    _check_consistency(target, header)
    return header


def _check_consistency(target: Path, header: PackHeader) -> None:
    heads = header.fingerprint.num_kv_heads
    if len(header.layers) != header.fingerprint.num_layers:
        raise PackFileError(
            f"the header of '{target}' names {len(header.layers)} layers for a model of "
            f"{header.fingerprint.num_layers}. Calibrate again."
        )
    for layer in header.layers:
        if len(layer.groups) * header.heads_per_group != heads:
            raise PackFileError(
                f"layer '{layer.name}' of '{target}' has {len(layer.groups)} head groups of "
                f"{header.heads_per_group} for {heads} KV heads. Calibrate again."
            )


def _read_layer(
    target: Path, header: PackHeader, index: int, tensors: dict[str, Tensor]
) -> LayerPack:
    dims = header.heads_per_group * header.fingerprint.head_size
    modalities = header.num_modalities
    bases: list[dict[Kind, Basis]] = []
    variance: list[dict[Kind, Tensor]] = []
    for g, group in enumerate(header.layers[index].groups):
        group_bases: dict[Kind, Basis] = {}
        group_variance: dict[Kind, Tensor] = {}
        for kind in KINDS:
            rank = getattr(group, kind).counts().rank
            shapes = {
                "mean": (modalities, dims),
                "encode": (modalities, dims, rank),
                "decode": (modalities, rank, dims),
                "weight": (modalities, rank),
                "variance": (modalities, dims),
            }
            fields = {
                field: _checked(target, _prefix(index, g, kind) + field, shape, tensors)
                for field, shape in shapes.items()
            }
            group_variance[kind] = fields.pop("variance")
            group_bases[kind] = Basis(**fields)
        bases.append(group_bases)
        variance.append(group_variance)
    return LayerPack(bases, variance)


def _checked(target: Path, name: str, shape: tuple[int, ...], tensors: dict[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise PackFileError(f"'{target}' lacks the tensor '{name}'. Calibrate again.")
    tensor = tensors[name]
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
        raise PackFileError(
            f"tensor '{name}' of '{target}' is {tensor.dtype} {tuple(tensor.shape)}, expected "
            f"torch.float32 {shape}. Calibrate again."
        )
    if not torch.isfinite(tensor).all():
        raise PackFileError(
            f"tensor '{name}' of '{target}' holds values that are not finite. Calibrate again."
        )
    return tensor


def _prefix(layer: int, group: int, kind: Kind) -> str:
    return f"layers.{layer}.groups.{group}.{kind}."


def _digest(header: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
