"""Gradients through a model that vLLM has loaded.

Symptom: a replayed forward gives hidden states that autograd knows nothing of. Cause: vLLM's
operators are for inference and have no derivative: attention behind an opaque operator, fused norms
and rotary embeddings, functions compiled for inference, and on CPUs linear layers and experts that
pack their weights and drop them. All of them have a form in plain PyTorch, which these contexts
select. What has none (quantised weights, fused experts on GPUs) is found out by
`calibrate.gradients`, which compares with differences.

Remove when vLLM can be asked for its plain operators at run time.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu
from torch.utils.checkpoint import checkpoint


@contextmanager
def plain_cpu_layers() -> Iterator[None]:
    """Models that are loaded meanwhile keep the weights of linear layers and experts on CPUs."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield
        return
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    dispatch = utils.dispatch_cpu_unquantized_gemm
    pack = CPUUnquantizedExperts.process_weights_after_loading

    def keep_linear(layer: Any, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            layer.cpu_linear = linear
        else:
            dispatch(layer, remove_weight)

    def keep_experts(experts: Any, layer: Any) -> None:
        if experts.moe_config.activation.value in _ACTIVATIONS:
            experts.apply = MethodType(_apply_experts, experts)
        else:
            pack(experts, layer)

    with (
        _set(utils, "dispatch_cpu_unquantized_gemm", keep_linear),
        _set(CPUUnquantizedExperts, "process_weights_after_loading", keep_experts),
    ):
        yield


#: Of gated experts, by vLLM's names.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
}


def _apply_experts(
    experts: Any,
    output: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: Any,
    *_: Any,
    apply_router_weight_on_input: bool,
    **__: Any,
) -> None:
    """In place of `CPUUnquantizedExperts.apply`, which has the same arguments.

    Args:
        experts: `w1_bias` `[E, 2 I]` and `w2_bias` `[E, hidden]`, or None.
        output: `[T, hidden]`, filled.
        hidden_states: `[T, hidden]`.
        w1: `[E, 2 I, hidden]`, gates first.
        w2: `[E, hidden, I]`.
        topk_weights: `[T, k]`.
        topk_ids: int `[T, k]`.
        activation: of the gates.
        apply_router_weight_on_input: whether `hidden_states` have been weighted.
    """
    total = torch.zeros_like(hidden_states, dtype=torch.float32)
    for i in topk_ids.unique().tolist():
        token, choice = (topk_ids == i).nonzero(as_tuple=True)
        bias1, bias2 = (None if b is None else b[i] for b in (experts.w1_bias, experts.w2_bias))
        gate, up = linear(hidden_states[token], w1[i], bias1).chunk(2, dim=-1)
        found = linear(_ACTIVATIONS[activation.value](gate) * up, w2[i], bias2).float()
        if not apply_router_weight_on_input:
            found = found * topk_weights[token, choice, None]
        total = total.index_add(0, token, found)
    output.copy_(total)


@contextmanager
def plain_operators(model: nn.Module) -> Iterator[None]:
    """Forwards of `model` are of operators that autograd knows, where there are such."""
    from vllm import ir
    from vllm.ir.op import IrOp
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers.attention import Attention

    with ExitStack() as changes:
        changes.enter_context(ir.enable_torch_wrap(False))
        # norms of some models are compiled, for inference
        changes.enter_context(torch.compiler.set_stance("force_eager"))
        decorated = getattr(type(model).forward, "__wrapped__", None)
        if decorated is not None:  # by torch.no_grad()
            changes.enter_context(_set(model, "forward", MethodType(decorated, model)))
        for op in IrOp.registry.values():
            changes.enter_context(op.set_priority(["native"]))
        for module in model.modules():
            if isinstance(module, CustomOp):
                changes.enter_context(_set(module, "_forward_method", module.forward_native))
            if isinstance(module, Attention):
                changes.enter_context(_set(module, "use_direct_call", True))
        yield


@contextmanager
def recomputed_layers(model: nn.Module) -> Iterator[None]:
    """Decoder layers keep their inputs only and are computed again on every way back."""
    with ExitStack() as changes:
        for layer in _decoder_layers(model):
            changes.enter_context(_set(layer, "forward", _recomputed(layer.forward)))
        yield


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _recomputed(forward: Any) -> Any:
    def again(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return again


def _decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Entries of module lists with one decoder attention layer each."""
    from vllm.model_executor.layers.attention import Attention

    for found in model.modules():
        if isinstance(found, nn.ModuleList):
            for layer in found:
                if sum(isinstance(module, Attention) for module in layer.modules()) == 1:
                    yield layer
