"""Start a wide model from a trained narrow one of the same depth and head size.

The narrow residual stream x [h] becomes E x [H] with a random E [H, h] of orthonormal columns, and
every matrix that reads or writes the stream is turned with it, so that the narrow model's heads and
MLPs compute what they did: |E x| = |x|, only RMSNorm divides by a mean over H instead of h numbers.
All further heads are fresh; none is a copy.  What else differs from the narrow model:

* embeddings get a random part outside the range of E, which only fresh heads read;
* tokens that the narrow model does not have are fresh;
* the RoPE base may differ; layer 0's positional heads keep the fresh start for the new base.
"""

import math
from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor, nn

OUTSIDE = 0.5  # embedding norm outside the range of E, relative to the norm inside


def widen(model: nn.Module, folder: str, tokenizer, seed: int) -> None:
    """Overwrite the freshly initialised `model` in place from the checkpoint in `folder`.

    `tokenizer` is the wide model's; the narrow one's lies in `folder`.
    """
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    narrow = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    _check_shapes(narrow, model)
    known, wanted = AutoTokenizer.from_pretrained(folder).get_vocab(), tokenizer.get_vocab()
    if lost := known.keys() - wanted.keys():
        raise ValueError(f"the start has tokens that the wider model has not: {sorted(lost)}")
    rows = [(row, wanted[token]) for token, row in known.items()]
    with torch.no_grad():
        _Widening(narrow, model, rows, seed).apply()


def _check_shapes(narrow: nn.Module, wide: nn.Module) -> None:
    old, new = narrow.config.text_config, wide.config.text_config
    for name in ("num_hidden_layers", "intermediate_size"):
        if getattr(old, name) != getattr(new, name):
            raise ValueError(f"{name} is {getattr(new, name)}, the start has {getattr(old, name)}")
    for name, of in (
        ("head size", lambda c: c.hidden_size // c.num_attention_heads),
        ("queries per KV head", lambda c: c.num_attention_heads // c.num_key_value_heads),
    ):
        if of(old) != of(new):
            raise ValueError(f"{name} is {of(new)}, the start has {of(old)}")


def trained_heads(seed: int, layers: int, narrow: int, wide: int) -> list[list[int]]:
    """Per layer: which of the `wide` KV heads the `narrow` model's KV heads become.

    Layer 0 keeps the slots of the positional heads.
    """
    rng = Random(seed)
    return [rng.sample(range(wide), narrow) if i else list(range(narrow)) for i in range(layers)]


class _Widening:
    """`rows` pairs a token's row in the narrow embedding with the one in the wide embedding."""

    def __init__(
        self, narrow: nn.Module, wide: nn.Module, rows: Sequence[tuple[int, int]], seed: int
    ):
        self.narrow, self.wide = narrow, wide
        self.old_rows, self.new_rows = torch.tensor(rows).T
        self.old, self.new = narrow.config.text_config, wide.config.text_config
        self.generator = torch.Generator().manual_seed(seed)
        gauss = self._normal(self.new.hidden_size, self.old.hidden_size)
        self.E = torch.linalg.qr(gauss).Q  # [H, h]
        self.slots = trained_heads(
            seed,
            self.old.num_hidden_layers,
            self.old.num_key_value_heads,
            self.new.num_key_value_heads,
        )
        # RMSNorm of E x is sqrt(H / h) times E RMSNorm(x).
        self.gain = math.sqrt(self.new.hidden_size / self.old.hidden_size)

    def apply(self) -> None:
        old, new = self.narrow.model, self.wide.model
        self._vision(old.visual, new.visual)
        embedding = old.language_model.embed_tokens.weight[self.old_rows]
        new.language_model.embed_tokens.weight[self.new_rows] = (
            embedding @ self.E.T + self._outside(embedding)
        )
        self.wide.lm_head.weight[self.new_rows] = self._reader(
            self.narrow.lm_head.weight[self.old_rows], old.language_model.norm.weight
        )
        layers = zip(old.language_model.layers, new.language_model.layers, strict=True)
        for index, (source, target) in enumerate(layers):
            self._mlp(source, target)
            self._heads(source, target, self.slots[index], positional=index == 0)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _outside(self, inside: Tensor) -> Tensor:
        """Random rows [n, H] orthogonal to the range of E, with OUTSIDE times the norms."""
        drawn = self._normal(len(inside), self.new.hidden_size)
        drawn -= drawn @ self.E @ self.E.T
        return drawn / drawn.norm(dim=1, keepdim=True) * inside.norm(dim=1, keepdim=True) * OUTSIDE

    def _reader(self, weight: Tensor, norm: Tensor) -> Tensor:
        """A matrix [n, h] behind an RMSNorm, as [n, H] behind one whose weight is 1."""
        return (weight * norm) @ self.E.T / self.gain

    def _vision(self, source: nn.Module, target: nn.Module) -> None:
        last = "merger.mlp.2."
        state = source.state_dict()
        state[last + "weight"] = self.E @ state[last + "weight"]
        state[last + "bias"] = self.E @ state[last + "bias"]
        target.load_state_dict(state)

    def _mlp(self, source: nn.Module, target: nn.Module) -> None:
        norm = source.post_attention_layernorm.weight
        for name in ("gate_proj", "up_proj"):
            weight = getattr(source.mlp, name).weight
            getattr(target.mlp, name).weight.copy_(self._reader(weight, norm))
        target.mlp.down_proj.weight.copy_(self.E @ source.mlp.down_proj.weight)

    def _heads(
        self, source: nn.Module, target: nn.Module, slots: list[int], positional: bool
    ) -> None:
        """KV head i of `source`, with its query heads, goes to KV head slots[i] of `target`."""
        norm, old, new = source.input_layernorm.weight, source.self_attn, target.self_attn
        queries = self.old.num_attention_heads // self.old.num_key_value_heads
        for name, width in (("q_proj", queries), ("k_proj", 1), ("v_proj", 1)):
            rows = width * old.head_dim
            for i, slot in enumerate(slots):
                here, there = (slice(j * rows, (j + 1) * rows) for j in (i, slot))
                from_, to = getattr(old, name), getattr(new, name)
                to.weight[there] = self._reader(from_.weight[here], norm)
                if name == "v_proj" or not positional:
                    to.bias[there] = from_.bias[here]
                if name == "q_proj":
                    new.o_proj.weight[:, there] = self.E @ old.o_proj.weight[:, here]
