"""Are a model's KV heads natural?  Spectra of keys and values, and what every head contributes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import Batch
from .fast_forward import FastForward
from .tasks import Sampler

KEPT = 0.25  # share of the dimensions whose energy is reported
PIECES = {"k": "k_proj", "v": "v_proj"}


def batches(sampler: Sampler, tokens: int) -> list[Batch]:
    """About `tokens` of each task, a quarter of them in long samples; drawn by the sampler."""
    rows = max(1, tokens // 600)
    return [
        sampler.image_chat(rows, 6, 84),
        sampler.image_chat(1, 8, 224),
        sampler.recall_chat(rows, 12),
        sampler.passage_recall(rows, 8, 600),
        sampler.passage_recall(1, 8, 2000),
        sampler.text(rows, 600),
    ]


def spectra(model: nn.Module, data: list[Batch]) -> list[dict[str, float]]:
    """Per layer: energy in the top KEPT dimensions of all heads together and of every head alone.

    Energy is the share of the variance (mean removed) of keys before RoPE, or of values.  Alone, a
    head keeps KEPT of its own dimensions, so both numbers describe the same number of latents.
    "rank" is the effective rank exp(entropy of the spectrum), at most heads x head size.
    """
    layers = model.model.language_model.layers
    size = layers[0].self_attn.head_dim
    moments = [{piece: _Moments() for piece in PIECES} for _ in layers]
    with _outputs(layers, lambda i, piece, x: moments[i][piece].add(x)), torch.no_grad():
        forward = FastForward(model)
        for batch in data:
            forward.logits_at(batch)
    found = []
    for layer in moments:
        row = {}
        for piece, moment in layer.items():
            covariance = moment.covariance()
            heads = covariance.unfold(0, size, size).unfold(1, size, size).diagonal()  # [s, s, H]
            own = [torch.linalg.eigvalsh(heads[..., h]) for h in range(heads.shape[-1])]
            joint = torch.linalg.eigvalsh(covariance).clamp(min=0)
            kept_alone = sum(_top(values).item() for values in own)
            row[f"{piece} joint"] = (_top(joint) / joint.sum()).item()
            row[f"{piece} alone"] = kept_alone / joint.sum().item()
            share = joint / joint.sum()
            row[f"{piece} rank"] = torch.special.entr(share).sum().exp().item()
        found.append(row)
    return found


def contributions(model: nn.Module, data: list[Batch]) -> tuple[float, list[list[float]]]:
    """Loss in nats per supervised token, and per layer and KV head what its absence adds.

    Absent means that the queries' outputs of this KV head are zero.
    """
    layers = model.model.language_model.layers
    base = _loss(model, data)
    heads = layers[0].self_attn.k_proj.out_features // layers[0].self_attn.head_dim
    return base, [
        [loss_without(model, data, {layer: [head]}) - base for head in range(heads)]
        for layer in range(len(layers))
    ]


@torch.no_grad()
def loss_without(model: nn.Module, data: list[Batch], silent: Mapping[int, list[int]]) -> float:
    """Loss in nats per supervised token when the KV heads `silent`, by layer, are absent."""
    layers = model.model.language_model.layers
    kept = {layer: layers[layer].self_attn.o_proj.weight.clone() for layer in silent}
    for layer, heads in silent.items():
        attention = layers[layer].self_attn
        columns = attention.head_dim * attention.num_key_value_groups
        for head in heads:
            attention.o_proj.weight[:, head * columns : (head + 1) * columns] = 0
    loss = _loss(model, data)
    for layer, weight in kept.items():
        layers[layer].self_attn.o_proj.weight.copy_(weight)
    return loss


def table(result: dict, trained: list[list[int]]) -> str:
    """A stored measurement as a Markdown table; `trained` heads per layer come first."""
    lines = [
        "| layer | K: joint, alone, rank | V: joint, alone, rank | loss added without a head: "
        "trained before / fresh |",
        "|---|---|---|---|",
    ]
    added = result["loss_added_without_head"]
    for i, (row, losses, known) in enumerate(zip(result["layers"], added, trained, strict=True)):
        cells = [
            f"{row[f'{x} joint']:.3f}, {row[f'{x} alone']:.3f}, {row[f'{x} rank']:.0f}"
            for x in PIECES
        ]
        old = " ".join(f"{losses[head]:+.3f}" for head in known)
        fresh = " ".join(f"{x:+.3f}" for head, x in enumerate(losses) if head not in known)
        lines.append(f"| {i} | {cells[0]} | {cells[1]} | {old} / {fresh} |")
    return "\n".join(lines)


@torch.no_grad()
def _loss(model: nn.Module, data: list[Batch]) -> float:
    forward = FastForward(model)
    losses = [F.cross_entropy(*forward.logits_at(batch)).item() for batch in data]
    return sum(losses) / len(losses)


def _top(eigenvalues: Tensor) -> Tensor:
    """Sum of the largest KEPT of ascending eigenvalues [n]."""
    return eigenvalues[-round(KEPT * len(eigenvalues)) :].sum()


class _Moments:
    """Streamed first and second moments of rows [n, d]."""

    def __init__(self):
        self.count, self.sum, self.outer = 0, torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).double()
        self.count += len(rows)
        self.sum = self.sum + rows.sum(0)
        self.outer = self.outer + rows.T @ rows

    def covariance(self) -> Tensor:
        mean = self.sum / self.count
        return self.outer / self.count - torch.outer(mean, mean)


@contextmanager
def _outputs(layers: nn.ModuleList, seen: Callable[[int, str, Tensor], None]) -> Iterator[None]:
    """Call `seen(layer, piece, output)` for every output of the K and V projections."""

    def hook(i: int, piece: str):
        return lambda module, inputs, output: seen(i, piece, output)

    handles = [
        getattr(layer.self_attn, name).register_forward_hook(hook(i, piece))
        for i, layer in enumerate(layers)
        for piece, name in PIECES.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
