"""Plain forms of vLLM's operators: the same numbers, and a derivative."""

from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops as ops

from vllm_attentionpack.compat import autograd

TOKENS, EXPERTS, CHOSEN, HIDDEN, INNER = 23, 4, 2, 64, 96


@pytest.mark.parametrize("activation", sorted(autograd._ACTIVATIONS))
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted-before"])
def test_experts_give_what_the_fused_ones_give(activation: str, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x = random(TOKENS, HIDDEN)
    w1 = random(EXPERTS, 2 * INNER, HIDDEN) / HIDDEN**0.5
    w2 = random(EXPERTS, HIDDEN, INNER) / INNER**0.5
    experts = SimpleNamespace(w1_bias=random(EXPERTS, 2 * INNER), w2_bias=random(EXPERTS, HIDDEN))
    weights, chosen = random(TOKENS, EXPERTS).softmax(-1).topk(CHOSEN)
    if weighted:  # vLLM does so for one expert only, and the weights are in the states
        weights, chosen = weights[:, :1], chosen[:, :1]
    chosen = chosen.int()
    fused = torch.empty_like(x)
    packed = (ops.cpu_prepack_moe_weight(w, "vec") for w in (w1, w2))
    biases = experts.w1_bias, experts.w2_bias
    ops.cpu_fused_moe(fused, x, *packed, *biases, weights, chosen, activation, "vec", weighted)

    x.requires_grad_()
    plain = torch.empty(TOKENS, HIDDEN)
    autograd._apply_experts(
        experts,
        output=plain,
        hidden_states=x,
        w1=w1,
        w2=w2,
        topk_weights=weights,
        topk_ids=chosen,
        activation=SimpleNamespace(value=activation),
        expert_map=None,
        apply_router_weight_on_input=weighted,
    )
    torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(plain.sum(), [x])
    assert gradient.abs().min() > 0
