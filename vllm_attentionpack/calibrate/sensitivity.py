"""What an error in each layer's keys or values does to the model's answers, measured.

The statistics price errors by the energy they add to a layer's own output. Layers differ in what
the rest of the model makes of that energy, by a factor of ten and more, so one layer's keys or
values are coded at a time, all else exact, and the divergence of the answers is set against the
distortion that the statistics foretell. Divergences of single parts nearly add up (docs/log.md),
which also foretells the loss of a whole pack before it is measured.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from vllm_attentionpack.calibrate.metrics import Part
from vllm_attentionpack.codec.layout import KINDS
from vllm_attentionpack.evaluate.simulate.codec import TokenCodec, Tokens

if TYPE_CHECKING:
    from vllm_attentionpack.evaluate.simulate.measure import Simulator

#: A part without a measurable effect still gets this fraction of the mean divergence, so that it
#: is not starved on the word of a few prompts.
_FLOOR = 0.03


class PartCodec(TokenCodec):
    """A codec in some layers' keys or values; the rest is exact."""

    def __init__(self, codec: TokenCodec, parts: set[Part]) -> None:
        super().__init__(codec.shape, codec.bytes_per_token, codec.exact)
        self._codec, self._parts = codec, parts

    def reconstruct(
        self, layer: int, key: Tensor, value: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        coded = [(layer, kind) in self._parts for kind in KINDS]
        if not any(coded):
            return key, value
        read_key, read_value = self._codec.reconstruct(layer, key, value, tokens)
        return read_key if coded[0] else key, read_value if coded[1] else value


def measure_sensitivity(
    simulator: "Simulator",
    codec: TokenCodec,
    distortion: Mapping[Part, float],
    progress: Callable[[float], None],
) -> Mapping[Part, float]:
    """Nats per token for each unit of distortion, by layer and K or V.

    Args:
        simulator: on calibration prompts.
        codec: whose errors are injected, part by part.
        distortion: what the statistics foretell of each part of it (`Assembler.distortion`).
        progress: told the fraction done after each part.
    """
    loss: dict[Part, float] = {}
    for part in distortion:
        loss[part] = simulator.measure(PartCodec(codec, {part})).mean_kl()
        progress(len(loss) / len(distortion))
    floor = _FLOOR * sum(loss.values()) / len(loss)
    # Where nothing can be lost (keys that never vary, a layer without output), no price matters.
    return {
        part: (loss[part] + floor) / distortion[part] if distortion[part] > 0 else 0.0
        for part in loss
    }
