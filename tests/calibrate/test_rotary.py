"""Frequencies read from rotary modules: from vLLM's own tables, and from made-up hostile ones."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from vllm_attentionpack.calibrate.rotary import rotary_of
from vllm_attentionpack.errors import UnsupportedModelError

PLANES = 8
FREQUENCIES = 10000.0 ** (-torch.arange(PLANES, dtype=torch.float64) / PLANES)


class Module(nn.Module):
    """A rotary module with the table that `angles(position)` makes."""

    def __init__(
        self,
        angles: Callable[[torch.Tensor], torch.Tensor],
        amplitude: float = 1.0,
        is_neox_style: bool = True,
    ) -> None:
        super().__init__()
        turned = angles(torch.arange(512, dtype=torch.float64)[:, None])
        self._table = amplitude * torch.cat([turned.cos(), turned.sin()], dim=-1).float()
        self.is_neox_style = is_neox_style
        # what the module itself holds is rounded, and must not be what frequencies are read from
        self.register_buffer("cos_sin_cache", self._table.bfloat16())

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        return self._table


@pytest.mark.parametrize("amplitude", [1.0, 1.3])
@pytest.mark.parametrize("neox", [True, False])
def test_frequencies_are_recovered(amplitude: float, neox: bool) -> None:
    rotary = rotary_of(Module(lambda n: n * FREQUENCIES, amplitude, neox), "layer")
    torch.testing.assert_close(rotary.frequencies, FREQUENCIES, rtol=1e-6, atol=1e-7)
    assert rotary.interleaved is not neox


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 16.0,
    "original_max_position_embeddings": 256,
    "attention_factor": 1.2,
}
BY_LAYER = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 10}}


@pytest.mark.parametrize(
    ("name", "folder", "options", "interleaved", "planes"),
    [
        ("Olmo2", "olmo2", {"rope_parameters": YARN, "max_position_embeddings": 4096}, False, 32),
        ("GPTNeoX", "gpt_neox", {}, False, 8),  # a quarter of the dims turns
        ("Glm", "glm", {}, True, 32),  # half of them, pairs side by side
        ("Cohere", "cohere", {}, True, 32),  # pairs side by side in the tables, too
        ("Olmo3", "olmo3", {"rope_parameters": BY_LAYER}, False, 32),
    ],
)
def test_modules_of_transformers_turn_as_they_do_there(
    name: str, folder: str, options: dict[str, Any], interleaved: bool, planes: int
) -> None:
    code = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    config = getattr(code, f"{name}Config")(hidden_size=256, num_attention_heads=4, **options)
    module = getattr(code, f"{name}RotaryEmbedding")(config)
    rotary = rotary_of(module, "layer")
    assert (rotary.interleaved, len(rotary.frequencies)) == (interleaved, planes)

    positions = torch.tensor([0, 1, 400, 1999])
    x = torch.randn(4, 2, 2 * planes, generator=torch.Generator().manual_seed(0))
    layer_type = ("full_attention",) if name == "Olmo3" else ()
    cos, sin = module(x, positions[None], *layer_type)
    heads = x.transpose(0, 1)[None]
    turned, _ = code.apply_rotary_pos_emb(heads, heads, cos, sin)
    amplitude = YARN["attention_factor"] if "rope_parameters" in options else 1.0
    torch.testing.assert_close(
        amplitude * rotary.turn(x, positions), turned[0].transpose(0, 1), rtol=1e-3, atol=2e-3
    )


def test_modules_of_transformers_that_change_are_refused() -> None:
    code = importlib.import_module("transformers.models.olmo2.modeling_olmo2")
    module = code.Olmo2RotaryEmbedding(code.Olmo2Config(hidden_size=256, num_attention_heads=4))
    for rope_type in ("dynamic", "longrope", {"sliding_attention": "default"}):
        module.rope_type = rope_type
        with pytest.raises(UnsupportedModelError, match="depend on the prompt"):
            rotary_of(module, "layer")


def test_turning_back_undoes_the_table() -> None:
    rotary = rotary_of(Module(lambda n: n * FREQUENCIES), "layer")
    x = torch.randn(5, 2, 2 * PLANES, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 17, 100, 511])
    angle = (positions[:, None] * FREQUENCIES).float()[:, None]
    a, b = x.chunk(2, dim=-1)
    turned = torch.cat(
        [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1
    )
    torch.testing.assert_close(rotary.turn(turned, -positions), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("angles", "reason"),
    [
        (lambda n: n * FREQUENCIES * (1 + n / 4096), "do not grow with the position"),
        (lambda n: torch.where(n < 40, n, 3 * n) * FREQUENCIES, "do not grow with the position"),
    ],
)
def test_frequencies_that_change_are_refused(
    angles: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"'model.layers.3.attn' .*{reason}"):
        rotary_of(Module(angles), "model.layers.3.attn")


def test_tables_that_hold_no_rotations_are_refused() -> None:
    module = Module(lambda n: n * FREQUENCIES)
    module._table = module._table * torch.linspace(1, 2, 512)[:, None]
    with pytest.raises(UnsupportedModelError, match="does not hold rotations"):
        rotary_of(module, "layer")


def test_modules_without_one_table_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no single table"):
        rotary_of(nn.Linear(2, 2), "layer")
    module = Module(lambda n: n * FREQUENCIES)
    module._compute_cos_sin_cache = lambda length, factors: module._table  # type: ignore
    with pytest.raises(UnsupportedModelError, match="depends on the prompt"):
        rotary_of(module, "layer")
