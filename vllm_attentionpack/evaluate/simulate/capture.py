"""Keys, values and query moments of a few prompts, as they are: for baselines and ablations.

Memory grows with the tokens; calibration itself streams moments instead (`calibrate.moments`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_attentionpack.evaluate.simulate.measure import Simulator


@dataclass(frozen=True)
class Captured:
    """One layer.

    Attributes:
        query: float32 `[T, Hq, D]`, rotated.
        key: float32 `[T, Hk, D]`, rotated.
        value: float32 `[T, Hk, D]`.
        visual: bool `[T]`.
        positions: int64 `[T]`, temporal ones under M-RoPE.
        lengths: tokens of each prompt.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visual: Tensor
    positions: Tensor
    lengths: tuple[int, ...]

    @property
    def query_second(self) -> Tensor:
        """float32 `[Hq, D, D]`, `E[q qᵀ]`."""
        heads = self.query.transpose(0, 1)
        return heads.mT @ heads / len(self.query)


def capture(simulator: Simulator) -> list[Captured]:
    """What every compared layer is given for the simulator's prompts, under a dense cache."""
    seen: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in simulator.shape.layer_names]

    def keep(layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        seen[layer].append((query.float(), key.float().clone(), value.float().clone()))

    simulator.observe(keep)
    prompts = simulator.recorded
    visual = torch.cat([prompt.visual for prompt in prompts])
    positions = torch.cat([prompt.temporal_positions for prompt in prompts])
    lengths = tuple(prompt.length for prompt in prompts)
    result = []
    for steps in seen:
        query, key, value = (torch.cat(parts) for parts in zip(*steps, strict=True))
        result.append(Captured(query, key, value, visual, positions, lengths))
    return result
