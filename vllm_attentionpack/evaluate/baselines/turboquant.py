"""TurboQuant, with the presets and bytes of vLLM.

A. Zandieh et al., "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate"
(arXiv 2504.19874). A key is normalised, rotated at random and quantised per coordinate with the
Lloyd-Max codebook of a Gaussian; its norm is stored in 16 bits, and the vector of codebook levels
is brought back to unit norm before use (norm correction). vLLM quantises values uniformly between
their least and largest element, both kept in 16 bits, and has no residual (QJL) stage.
"""

import math
from functools import cache

import torch
from torch import Tensor

from vllm_attentionpack.evaluate.baselines.hadamard import random_rotation
from vllm_attentionpack.evaluate.simulate.codec import CacheShape, TokenCodec, Tokens


class TurboQuant(TokenCodec):
    """One preset.

    Args:
        shape: of the cache.
        key_bits: 8 for fp8 keys (no rotation), else bits of the codebook.
        value_bits: bits of a value's element.
        norm_correction: see above.
        lloyd_values: code values as keys are, which is the paper's form, instead of vLLM's.
        exact_layers: how many layers stay dense at either end (vLLM: 2).
    """

    def __init__(
        self,
        shape: CacheShape,
        key_bits: int,
        value_bits: int,
        norm_correction: bool,
        lloyd_values: bool = False,
        exact_layers: int = 0,
    ) -> None:
        size, layers = shape.head_size, len(shape.layer_names)
        rotated = [2 + math.ceil(size * bits / 8) for bits in (key_bits, value_bits)]
        key_bytes = size if key_bits == 8 else rotated[0]
        value_bytes = rotated[1] if lloyd_values else 4 + math.ceil(size * value_bits / 8)
        slot = key_bytes + value_bytes
        slot += slot % 2
        dense = min(2 * exact_layers, layers)
        total = (layers - dense) * shape.num_kv_heads * slot + dense * shape.dense_bytes / layers
        super().__init__(shape, total)
        self._key_bits, self._value_bits = key_bits, value_bits
        self._corrected, self._lloyd_values = norm_correction, lloyd_values
        self._dense = {i for i in range(layers) if min(i, layers - 1 - i) < exact_layers}
        self._rotation = random_rotation(size)

    def reconstruct(
        self, layer: int, key: Tensor, value: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        if layer in self._dense:
            return key, value
        if self._key_bits == 8:
            read_key = key.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        else:
            read_key = self._rotated(key, self._key_bits)
        if self._lloyd_values:
            return read_key, self._rotated(value, self._value_bits)
        return read_key, _uniform(value, self._value_bits)

    def _rotated(self, x: Tensor, bits: int) -> Tensor:
        norm = x.norm(dim=-1, keepdim=True)
        level = lloyd_max(bits) / x.shape[-1] ** 0.5
        turned = (x / (norm + 1e-8)) @ self._rotation
        coded = level[torch.bucketize(turned, (level[1:] + level[:-1]) / 2)]
        if self._corrected:
            coded = coded / coded.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        return norm.half().float() * (coded @ self._rotation.T)


def _uniform(x: Tensor, bits: int) -> Tensor:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
    codes = ((x - low) / scale).round().clamp(0, 2**bits - 1)
    return codes * scale.half().float() + low.half().float()


@cache
def lloyd_max(bits: int) -> Tensor:
    """float32 `[2**bits]`, rising: the levels of least mean squared error for a unit Gaussian.

    S. Lloyd, "Least squares quantization in PCM" (1957); J. Max (1960).
    """
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    weight = torch.exp(-x * x / 2)
    # equal shares of the cube root of the density, which is optimal in the limit of many levels
    share = torch.cumsum(weight ** (1 / 3), 0)
    share = share / share[-1]
    level = x[torch.searchsorted(share, (torch.arange(2**bits).double() + 0.5) / 2**bits)]
    for _ in range(5000):
        owner = torch.bucketize(x, (level[1:] + level[:-1]) / 2)
        mass = torch.zeros_like(level).index_add_(0, owner, weight)
        moved = torch.zeros_like(level).index_add_(0, owner, weight * x) / mass.clamp_min(1e-300)
        done = (moved - level).abs().max() < 1e-9
        level = moved
        if done:
            break
    return level.float()
