"""Reading and writing pack files. Every check that a file must pass is here; nothing is evaluated.

A digest over the header and every tensor guards against damage and careless edits, not against an
attacker.
"""

import contextlib
import hashlib
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vllm_attentionpack.codec.codec import Basis
from vllm_attentionpack.codec.layout import KINDS, Kind
from vllm_attentionpack.codec.positions import Anchors, Rotary
from vllm_attentionpack.errors import PackFileError
from vllm_attentionpack.packfile.schema import FORMAT_VERSION, LayerPack, Pack, PackHeader

_HEADER_KEY = "attentionpack"
#: A tensor rather than a second metadata entry: safetensors writes those in random order, and the
#: same pack must give the same file.
_DIGEST = "sha256"
_Schema = TypeVar("_Schema", bound=BaseModel)
_BASIS_FIELDS = ("mean", "encode", "decode", "weight")


def save_pack(pack: Pack, path: str | os.PathLike[str]) -> None:
    """Writes a pack; the file appears whole or not at all.

    Raises:
        PackFileError: the file cannot be written.
    """
    header = pack.header.model_dump_json()
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(pack.layers):
        if layer.anchors is not None:
            tensors[_frequencies(i)] = layer.anchors.rotary.frequencies.double().clone()
        for g, (bases, variance) in enumerate(zip(layer.bases, layer.variance, strict=True)):
            for kind in KINDS:
                prefix = _prefix(i, g, kind)
                fields = {**bases[kind].tensors(), "variance": variance[kind].float()}
                for field, tensor in fields.items():
                    # safetensors refuses views and shared memory
                    tensors[prefix + field] = tensor.cpu().contiguous().clone()
    tensors[_DIGEST] = _digest(header, tensors)
    metadata = {_HEADER_KEY: header}
    with _partial(Path(path)) as partial:
        # not `save_file`: what it writes can be read by its owner alone
        partial.write_bytes(save(tensors, metadata))
        os.replace(partial, path)


def check_target(path: str | os.PathLike[str]) -> None:
    """Checks that a pack can be written, before the work that it is to hold; leaves no file.

    Raises:
        PackFileError: as `save_pack`; or vLLM would take it for weights.
    """
    target = Path(path)
    if target.suffix == ".safetensors" and os.path.exists(target.parent / "config.json"):
        raise PackFileError(
            f"the pack cannot be written to '{target}': that folder holds a model, and vLLM would "
            "load the pack with its weights. Give the path of a file in another folder."
        )
    with _partial(target) as partial:
        if target.is_dir():
            raise IsADirectoryError("it is a folder")
        partial.touch()


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """Where to write what is to become `target`; gone in the end."""
    partial = target.parent / f"{target.name}.{os.getpid()}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
    except OSError as error:
        raise PackFileError(
            f"the pack cannot be written to '{target}' ({error}). Give the path of a file in a "
            "folder that can be written to and has room."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def read_header(path: str | os.PathLike[str]) -> PackHeader:
    """Reads and checks the header alone, without the tensors.

    Raises:
        PackFileError: missing, truncated or foreign file, newer format, invalid header.
    """
    target = Path(path)
    if not os.path.isfile(target):  # `Path.is_file` raises where a name is too long
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
    digest = tensors.pop(_DIGEST, None)
    rotaries: dict[tuple[bool, bytes], Rotary] = {}
    layers = [_read_layer(target, header, i, tensors, rotaries) for i in range(len(header.layers))]
    expected = {
        _prefix(i, g, kind) + field
        for i, layer in enumerate(header.layers)
        for g in range(len(layer.groups))
        for kind in KINDS
        for field in (*_BASIS_FIELDS, "variance")
    }
    expected |= {_frequencies(i) for i, layer in enumerate(header.layers) if layer.rotary}
    if surplus := set(tensors) - expected:
        raise PackFileError(
            f"'{target}' holds tensors that its header does not name: {sorted(surplus)[:3]}. "
            "Calibrate again."
        )
    if digest is None or not torch.equal(digest, _digest(metadata[_HEADER_KEY], tensors)):
        raise PackFileError(
            f"the contents of '{target}' do not match its checksum: the file was damaged or "
            "edited. Copy or calibrate the pack again."
        )
    return Pack(header, layers)


def _parse_header(target: Path, text: str) -> PackHeader:
    version = _validated(target, _Version, text).format_version
    if version > FORMAT_VERSION:
        raise PackFileError(
            f"'{target}' has pack format {version}; this version of vllm-attentionpack reads "
            f"formats up to {FORMAT_VERSION}. Upgrade vllm-attentionpack or calibrate again."
        )
    header = _validated(target, PackHeader, text)
    try:
        header.layouts()
    except ValueError as error:
        raise _invalid(target, str(error)) from error
    _check_consistency(target, header)
    return header


class _Version(BaseModel):
    """All that is read of a header before its format is known."""

    format_version: int


def _validated(target: Path, schema: type[_Schema], text: str) -> _Schema:
    try:
        return schema.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise _invalid(target, _first_problem(error)) from error


def _invalid(target: Path, problem: str) -> PackFileError:
    return PackFileError(f"the header of '{target}' is not valid: {problem}. Calibrate again.")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(map(str, problem["loc"]))
    if not key:
        return problem["msg"]
    if problem["type"] == "missing":
        return f"'{key}' is missing"
    return f"'{key}' = {reprlib.repr(problem['input'])}: {problem['msg']}"


def _check_consistency(target: Path, header: PackHeader) -> None:
    heads = header.fingerprint.num_kv_heads
    if len(header.layers) != header.fingerprint.num_layers:
        raise PackFileError(
            f"the header of '{target}' names {len(header.layers)} layers for a model of "
            f"{header.fingerprint.num_layers}. Calibrate again."
        )
    names = [layer.name for layer in header.layers]
    for layer in header.layers:
        if names.count(layer.name) > 1:
            raise PackFileError(
                f"the header of '{target}' names the layer '{layer.name}' twice. Calibrate again."
            )
        if layer.rotary and not (
            header.anchor_span
            and layer.rotary.pre_rope <= layer.rotary.planes
            and 2 * layer.rotary.planes <= header.fingerprint.head_size
        ):
            raise PackFileError(
                f"layer '{layer.name}' of '{target}' turns {2 * layer.rotary.planes} of "
                f"{header.fingerprint.head_size} dims at an anchor span of {header.anchor_span}, "
                f"{layer.rotary.pre_rope} planes of them pre-RoPE. Calibrate again."
            )
        if len(layer.groups) * header.heads_per_group != heads:
            raise PackFileError(
                f"layer '{layer.name}' of '{target}' has {len(layer.groups)} head groups of "
                f"{header.heads_per_group} for {heads} KV heads. Calibrate again."
            )
        for group in layer.groups:
            if not (group.key.counts().rank and group.value.counts().rank):
                raise PackFileError(
                    f"layer '{layer.name}' of '{target}' keeps no dim of the keys or the values of "
                    "a head group. Calibrate again."
                )


def _read_layer(
    target: Path,
    header: PackHeader,
    index: int,
    tensors: dict[str, Tensor],
    rotaries: dict[tuple[bool, bytes], Rotary],
) -> LayerPack:
    """`rotaries` are those of the layers before, for layers that turn alike to share."""
    layout = header.layouts()[index]
    dims = layout.group_dims
    modalities = header.num_modalities
    bases: list[dict[Kind, Basis]] = []
    variance: list[dict[Kind, Tensor]] = []
    for g, group in enumerate(header.layers[index].groups):
        group_bases: dict[Kind, Basis] = {}
        group_variance: dict[Kind, Tensor] = {}
        for kind in KINDS:
            columns = getattr(group, kind).counts().num_columns
            shapes = {
                "mean": (modalities, dims),
                "encode": (modalities, dims, columns),
                "decode": (modalities, columns, dims),
                "weight": (modalities, columns),
                "variance": (modalities, layout.coded_dims),
            }
            fields = {
                field: _checked(target, _prefix(index, g, kind) + field, shape, tensors)
                for field, shape in shapes.items()
            }
            group_variance[kind] = fields.pop("variance")
            group_bases[kind] = Basis(**fields)
        bases.append(group_bases)
        variance.append(group_variance)
    rotary = header.layers[index].rotary
    if rotary is None:
        return LayerPack(bases, variance)
    shape = (rotary.planes,)
    frequencies = _checked(target, _frequencies(index), shape, tensors, torch.float64)
    known = rotary.interleaved, frequencies.numpy().tobytes()
    turns = rotaries.setdefault(known, Rotary(frequencies, rotary.interleaved))
    return LayerPack(bases, variance, Anchors(turns, header.anchor_span, rotary.pre_rope))


def _checked(
    target: Path,
    name: str,
    shape: tuple[int, ...],
    tensors: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    if name not in tensors:
        raise PackFileError(f"'{target}' lacks the tensor '{name}'. Calibrate again.")
    tensor = tensors[name]
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise PackFileError(
            f"tensor '{name}' of '{target}' is {tensor.dtype} {tuple(tensor.shape)}, expected "
            f"{dtype} {shape}. Calibrate again."
        )
    if not torch.isfinite(tensor).all():
        raise PackFileError(
            f"tensor '{name}' of '{target}' holds values that are not finite. Calibrate again."
        )
    return tensor


def _prefix(layer: int, group: int, kind: Kind) -> str:
    return f"layers.{layer}.groups.{group}.{kind}."


def _frequencies(layer: int) -> str:
    return f"layers.{layer}.frequencies"


def _digest(header: str, tensors: dict[str, Tensor]) -> Tensor:
    """SHA-256 over the header and every tensor with its name, uint8 `[32]`."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
