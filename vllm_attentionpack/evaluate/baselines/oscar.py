"""The form of OSCAR: rotations from what attention reads, INT2, exact sinks and recent tokens.

Z. Zhou et al., "OSCAR: Offline Spectral Covariance-Aware Rotation for 2-bit KV Cache Quantization"
(arXiv 2605.17757). Per KV head, keys turn into the eigenvectors of `E[q qᵀ]` and values into those
of the attention-weighted value covariance, followed by a Hadamard matrix whose columns are in
bit-reversed order; rows are clipped at a calibrated quantile of their absolute values and coded to
two bits between least and largest, a 16-bit scale and zero point per (token, head, K|V).

What differs here: the value covariance weighs every calibration token alike (the statistics at hand
hold no softmax weights), and the clipping quantile is one of a few, the best by squared error on
calibration data.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_attentionpack.codec.layout import KINDS, Kind
from vllm_attentionpack.evaluate.baselines.hadamard import hadamard
from vllm_attentionpack.evaluate.simulate.codec import CacheShape, ExactTokens, TokenCodec, Tokens

_CLIPS = (1.0, 0.98, 0.96, 0.92, 0.88)
#: Scale and zero point.
_SCALE_BYTES = 4


class Oscar(TokenCodec):
    """INT2 in rotated coordinates.

    Args:
        shape: of the cache.
        query_second: per layer float `[Hq, D, D]`, `E[q qᵀ]` of rotated queries.
        samples: per layer keys and values float32 `[T, Hk, D]` of calibration tokens.
        exact: sinks and recent tokens; kept instead of codes.
        bits: of an element.
    """

    def __init__(
        self,
        shape: CacheShape,
        query_second: Sequence[Tensor],
        samples: Sequence[tuple[Tensor, Tensor]],
        exact: ExactTokens,
        bits: int = 2,
    ) -> None:
        units = len(shape.layer_names) * shape.num_kv_heads * len(KINDS)
        super().__init__(shape, units * (shape.head_size * bits / 8 + _SCALE_BYTES), exact)
        self._bits = bits
        mix = hadamard(shape.head_size)[:, _bit_reversal(shape.head_size)]
        self._rotations: list[dict[Kind, Tensor]] = []
        self._clips: list[dict[Kind, float]] = []
        for second, (key, value) in zip(query_second, samples, strict=True):
            grouped = second.float().unflatten(0, (shape.num_kv_heads, -1)).sum(1)
            targets = {"key": grouped, "value": torch.einsum("tha,thb->hab", value, value)}
            rotations: dict[Kind, Tensor] = {}
            clips: dict[Kind, float] = {}
            for kind, x in zip(KINDS, (key, value), strict=True):
                rotations[kind] = torch.linalg.eigh(targets[kind]).eigenvectors.flip(-1) @ mix
                errors = [
                    (self._read(x, rotations[kind], clip) - x).square().sum() for clip in _CLIPS
                ]
                clips[kind] = _CLIPS[int(torch.stack(errors).argmin())]
            self._rotations.append(rotations)
            self._clips.append(clips)

    def reconstruct(
        self, layer: int, key: Tensor, value: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        rotation, clip = self._rotations[layer], self._clips[layer]
        return (
            self._read(key, rotation["key"], clip["key"]),
            self._read(value, rotation["value"], clip["value"]),
        )

    def _read(self, x: Tensor, rotation: Tensor, clip: float) -> Tensor:
        turned = torch.einsum("thd,hdc->thc", x, rotation)
        limit = turned.abs().quantile(clip, dim=-1, keepdim=True)
        turned = turned.clamp(-limit, limit)
        low, high = turned.amin(-1, keepdim=True), turned.amax(-1, keepdim=True)
        scale = ((high - low) / (2**self._bits - 1)).clamp_min(1e-8)
        codes = ((turned - low) / scale).round()
        read = codes * scale.half().float() + low.half().float()
        return torch.einsum("thc,hdc->thd", read, rotation)


def _bit_reversal(size: int) -> Tensor:
    width = size.bit_length() - 1
    return torch.tensor([int(f"{i:0{width}b}"[::-1], 2) for i in range(size)])
