"""Finds in a loaded vLLM model what calibration needs to know of each attention layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.v1.attention.backend import AttentionType

from vllm_attentionpack.errors import UnsupportedModelError

logger = init_logger(__name__)

_ROWS_PER_CHUNK = 1024
#: Attributes of the platform's attention that `AttentionPackImpl` refuses as arguments.
_UNSERVABLE = {
    "alibi_slopes": "ALiBi",
    "logits_soft_cap": "logits soft capping",
    "sinks": "attention sinks",
}


@dataclass(frozen=True)
class AttentionSite:
    """One decoder attention layer in its model.

    Attributes:
        layer: the layer.
        rotary: the module that turns its queries and keys, None if there is none.
        output: the projection that reads its output, None if it was not found.
    """

    layer: Attention
    rotary: nn.Module | None
    output: LinearBase | None


def attention_sites(model: nn.Module) -> list[AttentionSite]:
    """The decoder layers with full attention, in the order of the model.

    Layers with a sliding window are left out: their cache is small, and stays dense.

    Raises:
        UnsupportedModelError: no such layer, or one that could not be served: with ALiBi, soft
            caps or attention sinks, unlike the others, or on another layer's cache.
    """
    modules = dict(model.named_modules())
    found = [
        (path, module)
        for path, module in modules.items()
        if isinstance(module, Attention)
        and module.attn_type == AttentionType.DECODER
        and module.sliding_window is None
    ]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder layer with full attention and keys and values "
            "of its own (multi-head latent attention and sliding windows have none). Serve it with "
            "another --attention-backend."
        )
    found.sort(key=lambda entry: _numbers(entry[1].layer_name))
    _check_servable([layer for _, layer in found])
    return [_site(modules, path, layer) for path, layer in found]


def _numbers(layer_name: str) -> list[int]:
    return [int(part) for part in layer_name.split(".") if part.isdecimal()]


def _check_servable(layers: list[Attention]) -> None:
    def shape(layer: Attention) -> tuple[int, int, int]:
        return layer.num_heads, layer.num_kv_heads, layer.head_size

    for layer in layers:
        reason = None
        used = [name for attribute, name in _UNSERVABLE.items() if _has(layer.impl, attribute)]
        if used:
            reason = f"it uses {', '.join(used)}, and a compacted cache could not serve it"
        elif shape(layer) != shape(layers[0]):
            reason = f"its (query heads, KV heads, head size) {shape(layer)} differ from the "
            reason += f"{shape(layers[0])} of '{layers[0].layer_name}'"
        elif layer.head_size_v != layer.head_size:
            reason = f"its values have {layer.head_size_v} dims and its keys {layer.head_size}"
        elif layer.kv_sharing_target_layer_name is not None:
            reason = f"it reads the cache of '{layer.kv_sharing_target_layer_name}'"
        if reason:
            raise UnsupportedModelError(
                f"layer '{layer.layer_name}' cannot be calibrated: {reason}. A pack needs the same "
                "heads in all layers with full attention, and plain softmax. Serve this model with "
                "another --attention-backend."
            )


def _has(impl: Any, attribute: str) -> bool:
    """Whether the attribute is given: a number but zero, or any tensor."""
    value = getattr(impl, attribute, None)
    return value is not None and (isinstance(value, Tensor) or bool(value))


def _site(modules: dict[str, nn.Module], path: str, layer: Attention) -> AttentionSite:
    rotary = None
    for ancestor in _ancestors(modules, path):
        if not getattr(ancestor, "use_rope", True):  # of a module that turns other layers' keys
            break
        candidate = getattr(ancestor, "rotary_emb", None)
        if isinstance(candidate, nn.Module):
            rotary = candidate
            break
    return AttentionSite(layer, rotary, _output_projection(modules, path, layer))


def _ancestors(modules: dict[str, nn.Module], path: str) -> Iterator[nn.Module]:
    while path:
        path = path.rpartition(".")[0]
        yield modules[path]


def _output_projection(
    modules: dict[str, nn.Module], path: str, layer: Attention
) -> LinearBase | None:
    """The sibling that takes `Hq * D` inputs. By type first: query projections may fit by size."""
    parent = next(_ancestors(modules, path))
    fitting = [
        child
        for child in parent.children()
        if isinstance(child, LinearBase) and child.input_size == layer.num_heads * layer.head_size
    ]
    rows = [child for child in fitting if isinstance(child, RowParallelLinear)]
    chosen = rows or fitting
    return chosen[0] if len(chosen) == 1 else None


@torch.inference_mode()
def output_gram(site: AttentionSite, dtype: torch.dtype) -> Tensor:
    """`Mⱼ = Wⱼ Wⱼᵀ` of every query head's rows of the output projection.

    The effective weights come from running the projection on identity rows, which holds for
    quantised and repacked weights alike.

    Args:
        site: the layer.
        dtype: of the model's activations.

    Returns:
        float64 `[Hq, D, D]` on the host; the identity, with a warning, where the projection was not
        found.
    """
    layer = site.layer
    heads, size = layer.num_heads, layer.head_size
    if site.output is None:
        logger.warning(
            "The output projection of %s was not found: the errors of its values are weighted "
            "alike, which costs quality at high ratios.",
            layer.layer_name,
        )
        return torch.eye(size, dtype=torch.float64).repeat(heads, 1, 1)
    device = next(site.output.parameters()).device
    zero = _run(site.output, torch.zeros(1, heads * size, dtype=dtype, device=device))
    gram = torch.empty(heads, size, size, dtype=torch.float64)
    step = max(1, _ROWS_PER_CHUNK // size)
    for start in range(0, heads, step):
        stop = min(start + step, heads)
        rows = torch.zeros((stop - start) * size, heads * size, dtype=dtype, device=device)
        rows[:, start * size : stop * size].fill_diagonal_(1)
        weight = (_run(site.output, rows) - zero).unflatten(0, (-1, size))  # [heads, D, hidden]
        gram[start:stop] = (weight @ weight.mT).double().cpu()
    return gram


def _run(linear: LinearBase, x: Tensor) -> Tensor:
    out = linear(x)
    return (out[0] if isinstance(out, tuple) else out).float()
