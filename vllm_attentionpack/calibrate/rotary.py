"""How a rotary module turns heads, read from the module's own tables.

Whatever scaling made the frequencies (linear, llama3, YaRN, NTK), position `n` must turn plane `i`
by `n * frequencies[i]`: that is checked on the table, not looked up by class.

Modules of vLLM turn the queries and keys of a layer. Models that vLLM takes from Transformers have
modules that make cosines and sines, once for all layers, and a function beside their class turns by
them; which dims it pairs is found out by calling it.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from vllm_attentionpack.codec.positions import Rotary
from vllm_attentionpack.errors import UnsupportedModelError

#: Positions at which the frequencies read at position 1 are checked. Far enough to expose
#: frequencies that change, near enough for float32 angles to hold `_TOLERANCE`.
_CHECKED = (2, 3, 7, 50, 333)
_TOLERANCE = 1e-3
#: Transformers' name of layers without windows.
_FULL_ATTENTION = "full_attention"


def rotary_of(module: nn.Module, layer_name: str) -> Rotary:
    """The rotation that `module` applies.

    Args:
        module: a rotary embedding, as it stands in the model.
        layer_name: for the message.

    Raises:
        UnsupportedModelError: its angles are not proportional to the position, or it keeps its
            tables in a way that this package does not know.
    """
    if is_called_once(module):
        return _rotary_of_transformers(module, layer_name)
    cos, sin = _tables(module, layer_name)
    interleaved = not bool(getattr(module, "is_neox_style", True))
    return Rotary(_frequencies(cos, sin, module, layer_name), interleaved)


def is_called_once(module: nn.Module) -> bool:
    """Whether a step calls the rotary module once, not in every layer: those of Transformers."""
    return hasattr(module, "rope_type") and not hasattr(module, "cos_sin_cache")


def _tables(module: nn.Module, layer_name: str) -> tuple[Tensor, Tensor]:
    """float64 cosines and sines `[positions, planes]`, times a common amplitude."""
    compute: Any = getattr(module, "_compute_cos_sin_cache", None)
    if compute is None or not hasattr(module, "cos_sin_cache"):
        raise _unsupported(module, layer_name, "it has no single table of cosines and sines")
    # Afresh in float32: the module's own copy may be rounded to bfloat16. Modules that keep several
    # tables take arguments here or return a tuple.
    try:
        table = compute()
    except TypeError as error:
        raise _unsupported(module, layer_name, "its table depends on the prompt") from error
    if not isinstance(table, Tensor) or table.ndim != 2 or len(table) < 2 or table.is_complex():
        raise _unsupported(module, layer_name, "its table is not [positions, dims]")
    cos, sin = table[: max(_CHECKED) + 1].double().cpu().chunk(2, dim=-1)
    return cos, sin


def _rotary_of_transformers(module: nn.Module, layer_name: str) -> Rotary:
    rope_type: Any = module.rope_type
    layer_type: tuple[str, ...] = ()
    if isinstance(rope_type, dict):  # by the type of the layer; with windows they are not coded
        layer_type = (_FULL_ATTENTION,)
        rope_type = rope_type.get(_FULL_ATTENTION)
    if rope_type in (None, "dynamic", "longrope"):
        raise _unsupported(module, layer_name, "its frequencies depend on the prompt")
    apply: Any = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        raise _unsupported(module, layer_name, "no function beside its class turns by its tables")
    device = next(module.buffers()).device
    positions = torch.arange(max(_CHECKED) + 1, device=device)
    # [1, positions, dims] each
    tables = module(torch.zeros(1, device=device), positions[None], *layer_type)
    heads = torch.randn(len(positions), 1, tables[0].shape[-1], device=device)
    asked = heads.transpose(0, 1)[None]
    turned = apply(asked, asked, *tables)[0][0].transpose(0, 1)
    turned = (turned * heads.norm() / turned.norm()).cpu()  # without the amplitude of the tables
    cos, sin = (table[0].double().cpu() for table in tables)
    # every plane has two columns of the tables: half of them apart, or side by side
    apart, beside = slice(cos.shape[-1] // 2), slice(None, None, 2)
    for columns, interleaved in ((apart, False), (apart, True), (beside, True)):
        frequencies = _frequencies(cos[:, columns], sin[:, columns], module, layer_name)
        found = Rotary(frequencies, interleaved)
        if torch.allclose(found.turn(heads.cpu(), positions.cpu()), turned, atol=_TOLERANCE):
            return found
    raise _unsupported(module, layer_name, "it pairs dims in no way that this package knows")


def _frequencies(cos: Tensor, sin: Tensor, module: nn.Module, layer_name: str) -> Tensor:
    """float64 `[planes]`, from cosines and sines `[positions, planes]` times an amplitude."""
    amplitude = (cos.square() + sin.square()).sqrt()
    if float((amplitude - amplitude[0]).abs().max()) > _TOLERANCE * float(amplitude[0].max()):
        raise _unsupported(module, layer_name, "its table does not hold rotations")
    frequencies = torch.atan2(sin[1], cos[1])
    for position in _CHECKED:
        if position < len(cos):
            error = torch.atan2(sin[position], cos[position]) - position * frequencies
            error = torch.remainder(error + torch.pi, 2 * torch.pi) - torch.pi
            if float(error.abs().max()) > _TOLERANCE:
                raise _unsupported(module, layer_name, "its angles do not grow with the position")
    return frequencies


def _unsupported(module: nn.Module, layer_name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer '{layer_name}' turns its keys by {type(module).__name__}, which cannot be "
        f"calibrated: {reason}. Supported: rotary embeddings whose frequencies are the same at "
        "every position (default, linear, llama3, YaRN, NTK, M-RoPE). Serve this model with "
        "another --attention-backend."
    )
