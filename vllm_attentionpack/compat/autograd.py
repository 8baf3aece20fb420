"""Gradients through a model that vLLM has loaded.

Symptom: a replayed forward gives hidden states that autograd knows nothing of. Cause: vLLM's
operators are for inference and have no derivative: attention behind an opaque operator, fused norms
and rotary embeddings, functions compiled for inference, and on CPUs linear layers that pack their
weights and drop them. All of them have a form in plain PyTorch, which these contexts select. What
has none (quantised weights, fused experts) is found out by `calibrate.gradients`, which compares
with differences.

Remove when vLLM can be asked for its plain operators at run time.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint


@contextmanager
def plain_cpu_linears() -> Iterator[None]:
    """Models that are loaded meanwhile keep the weights of their linear layers on CPUs."""
    from vllm.model_executor.layers import utils

    dispatch = utils.dispatch_cpu_unquantized_gemm

    def keep(layer: Any, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            layer.cpu_linear = linear
        else:
            dispatch(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = keep
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = dispatch


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
