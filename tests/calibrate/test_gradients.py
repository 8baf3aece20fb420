"""Fisher information by gradients: against its closed form, against differences, and refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vllm_attentionpack.calibrate import gradients
from vllm_attentionpack.calibrate.gradients import FisherGatherer, TurnedLayer
from vllm_attentionpack.codec.positions import Anchors, Rotary
from vllm_attentionpack.errors import UnsupportedModelError
from vllm_attentionpack.evaluate.simulate.codec import CacheShape, DenseCodec, ExactTokens, Tokens
from vllm_attentionpack.evaluate.simulate.recording import Recorded

KV_HEADS, SIZE, HIDDEN, WORDS = 2, 4, 6, 5
DIMS = KV_HEADS * SIZE
NONE = ExactTokens()


class Linear(nn.Module):
    """Hidden states of the scored tokens are sums of all keys and values, times matrices."""

    def __init__(self, scored: int, generator: torch.Generator) -> None:
        super().__init__()
        maps = 0.05 * torch.randn(2, scored, DIMS, HIDDEN, generator=generator)
        self.register_buffer("maps", maps)
        self.head = torch.randn(HIDDEN, WORDS, generator=generator)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.head


class Toy:
    """What `FisherGatherer` asks of a simulator, for one layer."""

    shape = CacheShape(("a",), KV_HEADS, KV_HEADS, SIZE)
    device = torch.device("cpu")

    def __init__(
        self, prompts: list[Recorded], scored: int, breaks: bool = False, grid: float = 0.0
    ) -> None:
        self.recorded = prompts
        self.tokens = sum(prompt.length for prompt in prompts)
        generator = torch.Generator().manual_seed(0)
        self.model = Linear(scored, generator)
        self.breaks, self.grid = breaks, grid
        self.cached = {
            id(p): torch.randn(2, p.length, KV_HEADS, SIZE, generator=generator) for p in prompts
        }
        for p in prompts:  # as the engine would have recorded it
            rows = slice(p.length - scored - 1, p.length - 1)
            p.hidden[rows] = self.scored_hidden(p, DenseCodec(self.shape))

    def scored_hidden(self, prompt: Recorded, codec: Any) -> Tensor:
        key, value = codec.reconstruct(0, *self.cached[id(prompt)], None)
        if self.breaks:
            value = value.detach() + 0 * value
        sums = torch.stack([x.flatten(1).sum(0) for x in (key, value)])
        hidden = torch.einsum("kd,ksdh->sh", sums, self.model.maps)
        if self.grid:
            hidden = hidden + ((hidden / self.grid).round() * self.grid - hidden).detach()
        return hidden

    @contextmanager
    def differentiated(self, prompt: Recorded, codec: Any) -> Iterator[Tensor]:
        yield self.scored_hidden(prompt, codec)


def prompt(owner: int, visual: list[bool], scored: int) -> Recorded:
    count = len(visual)
    return Recorded(
        owner,
        torch.arange(count),
        None,
        torch.arange(count),
        torch.tensor(visual),
        torch.zeros(scored, dtype=torch.int64),
        torch.zeros(count, HIDDEN),
    )


def gathered(toy: Toy, joint_kv: bool = False, modalities: int = 2, **options: Any) -> Any:
    simulator: Any = toy
    layers = [TurnedLayer(None, None, 16)]
    gatherer = FisherGatherer(simulator, layers, NONE, KV_HEADS, joint_kv, **options)
    done: list[float] = []
    gatherer.gather(done.append)
    assert done[-1] == 1
    (metrics,) = gatherer.metrics(modalities)
    return metrics.metric


def closed_form(toy: Toy, one: Recorded) -> Tensor:
    """Half of `sum Jᵀ (diag(p) - p pᵀ) J` per scored token, by one token's keys and values."""
    hidden = toy.scored_hidden(one, gradients._Shifted(toy.shape, NONE))
    p = toy.model.compute_logits(hidden).softmax(-1)
    of_words = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    jacobian = torch.einsum("ksdh,hw->skdw", toy.model.maps, toy.model.head).flatten(1, 2)
    return torch.einsum("saw,swx,sbx->ab", jacobian, of_words, jacobian).detach() / (2 * len(p))


@pytest.mark.parametrize("joint_kv", [False, True])
def test_metrics_are_the_fisher_information(
    monkeypatch: pytest.MonkeyPatch, joint_kv: bool
) -> None:
    """Here every token of a prompt is worth the same; prompts count alike, whatever they score."""
    monkeypatch.setattr(gradients, "DRAWS", 4000)
    prompts = [prompt(3, [False] * 3 + [True] * 2, 3), prompt(7, [False] * 4, 3)]
    toy = Toy(prompts, 3)
    first, second = (closed_form(toy, one) for one in prompts)
    # nats that one error in all of a modality costs, over its share of the nine tokens
    wanted = torch.stack([(3 * first + 4 * second) / 2 / (7 / 9), 2 * first / 2 / (2 / 9)])
    found = gathered(toy, joint_kv)
    blocks = (
        {("key", "value"): slice(None)}
        if joint_kv
        else {("key",): slice(DIMS), ("value",): slice(DIMS, None)}
    )
    for kinds, dims in blocks.items():
        expected = wanted[:, dims, dims].double()
        error = (found[kinds][:, 0] - expected).flatten(1).norm(dim=1)
        assert (error < 0.1 * expected.flatten(1).norm(dim=1)).all()


def test_what_was_not_seen_leans_on_what_was() -> None:
    toy = Toy([prompt(0, [False] * 5, 2)], 2)
    (text, visual) = gathered(toy)[("key",)][:, 0]
    assert torch.equal(text, visual)
    assert gathered(toy, modalities=1)[("key",)].shape == (1, 1, DIMS, DIMS)


def test_the_same_seed_gives_the_same_metrics() -> None:
    toy = Toy([prompt(0, [False] * 5, 2)], 2)
    first, again, other = (gathered(toy, seed=seed)[("key",)] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_part_without_derivative_is_refused() -> None:
    """Half of what errors do is missing: no gradient is None, and differences tell."""
    with pytest.raises(UnsupportedModelError, match=r"Linear are \d+% off .*: measured'"):
        gathered(Toy([prompt(0, [False] * 5, 2)], 2, breaks=True))


def test_plain_operators_that_do_something_else_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    toy = Toy([prompt(0, [False] * 5, 2)], 2)

    @contextmanager
    def halved(one: Recorded, codec: Any) -> Iterator[Tensor]:
        yield toy.scored_hidden(one, codec) / 2

    monkeypatch.setattr(toy, "differentiated", halved)
    with pytest.raises(UnsupportedModelError, match=r"plain operators of Linear give .* 50% off"):
        gathered(toy)


def test_rounding_is_told_from_a_missing_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the smallest step does is lost in it, what a larger one does is not."""
    coarse = Toy([prompt(0, [False] * 5, 2)], 2, grid=0.1)
    gathered(coarse)
    monkeypatch.setattr(gradients, "_STEPS", gradients._STEPS[:1])
    with pytest.raises(UnsupportedModelError, match=r"Linear are \d+% off"):
        gathered(coarse)


def test_a_model_without_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy([prompt(0, [False] * 5, 2)], 2)

    @contextmanager
    def cut(one: Recorded, codec: Any) -> Iterator[Tensor]:
        yield toy.scored_hidden(one, codec).detach()

    monkeypatch.setattr(toy, "differentiated", cut)
    with pytest.raises(UnsupportedModelError, match="the model has no gradients"):
        gathered(toy)


ROTARY = Rotary(torch.tensor([1.0, 0.3], dtype=torch.float64))


@pytest.mark.parametrize("pre_rope", [0, 1, 2])
def test_gradients_stand_where_keys_are_coded(pre_rope: int) -> None:
    """`gᵀ e` of what is coded is `gᵀ e` of keys as they come."""
    generator = torch.Generator().manual_seed(0)
    key, gradient = torch.randn(2, 40, KV_HEADS, SIZE, generator=generator)
    positions = torch.arange(40) + 3
    tokens = Tokens([40], torch.zeros(40, dtype=torch.bool), positions)
    anchors = Anchors(ROTARY, 16, pre_rope)
    cos, sin = anchors.tables(tokens.anchors(16), positions)
    layer = TurnedLayer(ROTARY, anchors, 64)
    coded = layer.as_coded(gradient, tokens, None)
    torch.testing.assert_close(coded, ROTARY.turn_by(gradient, cos, -sin))
    dots = (coded * ROTARY.turn_by(key, cos, -sin)).sum(-1)
    torch.testing.assert_close(dots, (gradient * key).sum(-1))
    drawn = layer.as_coded(gradient, tokens, torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn.norm(dim=-1), gradient.norm(dim=-1))
    assert torch.allclose(drawn, coded) == (pre_rope == 2)


def test_keys_that_do_not_turn_stay() -> None:
    tokens = Tokens([5], torch.zeros(5, dtype=torch.bool), torch.arange(5))
    key = torch.randn(5, KV_HEADS, SIZE)
    assert TurnedLayer(None, None, 8).as_coded(key, tokens, torch.Generator()) is key
    as_they_come = TurnedLayer(ROTARY, None, 8)
    torch.testing.assert_close(as_they_come.as_coded(key, tokens, None), key)
