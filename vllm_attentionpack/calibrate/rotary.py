"""How a rotary module of vLLM turns heads, read from the module's own tables.

Whatever scaling made the frequencies (linear, llama3, YaRN, NTK), position `n` must turn plane `i`
by `n * frequencies[i]`: that is checked on the table, not looked up by class.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vllm_attentionpack.codec.positions import Rotary
from vllm_attentionpack.errors import UnsupportedModelError

#: Positions at which the frequencies read at position 1 are checked. Far enough to expose
#: frequencies that change, near enough for float32 angles to hold `_TOLERANCE`.
_CHECKED = (2, 3, 7, 50, 333)
_TOLERANCE = 1e-3


def rotary_of(module: nn.Module, layer_name: str) -> Rotary:
    """The rotation that `module` applies.

    Args:
        module: a rotary embedding of vLLM, as it stands in the model.
        layer_name: for the message.

    Raises:
        UnsupportedModelError: its angles are not proportional to the position, or it keeps its
            tables in a way that this package does not know.
    """
    cos, sin = _tables(module, layer_name)
    frequencies = torch.atan2(sin[1], cos[1])
    for position in _CHECKED:
        if position < len(cos):
            error = torch.atan2(sin[position], cos[position]) - position * frequencies
            error = torch.remainder(error + torch.pi, 2 * torch.pi) - torch.pi
            if float(error.abs().max()) > _TOLERANCE:
                raise _unsupported(module, layer_name, "its angles do not grow with the position")
    interleaved = not bool(getattr(module, "is_neox_style", True))
    return Rotary(frequencies, interleaved)


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
    table = table[: max(_CHECKED) + 1].double().cpu()
    cos, sin = table.chunk(2, dim=-1)
    amplitude = (cos.square() + sin.square()).sqrt()
    if float((amplitude - amplitude[0]).abs().max()) > _TOLERANCE * float(amplitude[0].max()):
        raise _unsupported(module, layer_name, "its table does not hold rotations")
    return cos, sin


def _unsupported(module: nn.Module, layer_name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer '{layer_name}' turns its keys by {type(module).__name__}, which cannot be "
        f"calibrated: {reason}. Supported: rotary embeddings whose frequencies are the same at "
        "every position (default, linear, llama3, YaRN, NTK, M-RoPE). Serve this model with "
        "another --attention-backend."
    )
