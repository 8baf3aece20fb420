"""Element-wise formats, as vLLM ships them."""

import torch
from torch import Tensor

from vllm_attentionpack.codec.layout import KINDS
from vllm_attentionpack.evaluate.baselines.hadamard import random_rotation
from vllm_attentionpack.evaluate.simulate.codec import CacheShape, TokenCodec, Tokens

#: vLLM keeps one float32 scale per (token, head, K|V); int4's zero point hides in its low bits.
_SCALE_BYTES = 4


class _ElementCodec(TokenCodec):
    """Keys and values are treated alike, head by head.

    Args:
        shape: of the cache.
        bits: of one element.
        scale_bytes: of one (token, head, K|V).
    """

    def __init__(self, shape: CacheShape, bits: int, scale_bytes: int) -> None:
        per_head = shape.head_size * bits / 8 + scale_bytes
        units = len(shape.layer_names) * shape.num_kv_heads * len(KINDS)
        super().__init__(shape, units * per_head)

    def reconstruct(
        self, layer: int, key: Tensor, value: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        return self._read(key), self._read(value)

    def _read(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class BFloat16(_ElementCodec):
    """The dense cache of a model whose activations are wider than bfloat16."""

    def __init__(self, shape: CacheShape) -> None:
        super().__init__(shape, 16, 0)

    def _read(self, x: Tensor) -> Tensor:
        return x.bfloat16().float()


class Fp8PerTensor(_ElementCodec):
    """`--kv-cache-dtype fp8_e4m3`, with the scale of 1 that vLLM takes for checkpoints without."""

    def __init__(self, shape: CacheShape) -> None:
        super().__init__(shape, 8, 0)

    def _read(self, x: Tensor) -> Tensor:
        limit = torch.finfo(torch.float8_e4m3fn).max
        return x.clamp(-limit, limit).to(torch.float8_e4m3fn).float()


class Int8PerTokenHead(_ElementCodec):
    """`--kv-cache-dtype int8_per_token_head`: symmetric, the scale from the largest element."""

    def __init__(self, shape: CacheShape) -> None:
        super().__init__(shape, 8, _SCALE_BYTES)

    def _read(self, x: Tensor) -> Tensor:
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-6)
        return (x / scale).round().clamp(-128, 127) * scale


class Int4PerTokenHead(_ElementCodec):
    """`--kv-cache-dtype int4_per_token_head`: rotated, asymmetric, a whole zero point of 4 bits."""

    def __init__(self, shape: CacheShape) -> None:
        super().__init__(shape, 4, _SCALE_BYTES)
        self._rotation = random_rotation(shape.head_size)

    def _read(self, x: Tensor) -> Tensor:
        turned = x @ self._rotation
        low, high = turned.amin(-1, keepdim=True), turned.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp_min(1e-6)
        zero = (-low / scale).round().clamp(0, 15)
        codes = (turned / scale + zero).round().clamp(0, 15)
        return ((codes - zero) * scale) @ self._rotation.T
