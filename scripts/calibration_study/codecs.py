"""Codecs of the ablations: modalities at unequal bytes, un-rotated keys, noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_attentionpack.calibrate.metrics import LayerStatistics
from vllm_attentionpack.calibrate.moments import GroupMoments, LayerMoments
from vllm_attentionpack.codec.positions import Rotary
from vllm_attentionpack.evaluate.simulate.codec import CacheShape, TokenCodec, Tokens


class ModalityCodec(TokenCodec):
    """Text tokens by one codec, visual tokens by another, of other size."""

    def __init__(self, text: TokenCodec, visual: TokenCodec) -> None:
        super().__init__(text.shape, text.bytes_per_token)
        self._text, self._visual = text, visual

    def request_bytes(self, length: int, visual: int) -> float:
        return self._text.request_bytes(length - visual, 0) + self._visual.request_bytes(
            visual, visual
        )

    def reconstruct(
        self, layer: int, key: Tensor, value: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        as_text = self._text.reconstruct(layer, key, value, tokens)
        as_visual = self._visual.reconstruct(layer, key, value, tokens)
        chosen = tokens.visual[:, None, None]
        pairs = zip(as_text, as_visual, strict=True)
        read = [torch.where(chosen, visual, text) for text, visual in pairs]
        return read[0], read[1]


class UnrotatedCodec(TokenCodec):
    """Keys are turned back to position 0 before they are coded, and turned again when read."""

    def __init__(self, codec: TokenCodec, rotaries: Sequence[Rotary]) -> None:
        super().__init__(codec.shape, codec.bytes_per_token, codec.exact)
        self._codec, self._rotaries = codec, rotaries

    def reconstruct(
        self, layer: int, key: Tensor, value: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        rotary = self._rotaries[layer]
        turned = rotary.turn(key, -tokens.positions)
        read, read_value = self._codec.reconstruct(layer, turned, value, tokens)
        return rotary.turn(read, tokens.positions), read_value


class OnlyCodec(TokenCodec):
    """A codec in the keys or the values alone."""

    def __init__(self, codec: TokenCodec, keys: bool) -> None:
        super().__init__(codec.shape, codec.bytes_per_token, codec.exact)
        self._codec, self._keys = codec, keys

    def reconstruct(
        self, layer: int, key: Tensor, value: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        read_key, read_value = self._codec.reconstruct(layer, key, value, tokens)
        return (read_key, value) if self._keys else (key, read_value)


class NoiseCodec(TokenCodec):
    """White noise of given energy in the metric of the errors, in one layer's keys or values.

    Args:
        shape: of the cache.
        layer: which.
        keys: its keys or its values.
        decode: per head group float32 `[dims, GD]`, from latents whose squared error is the cost.
        energy: of the noise per token, in that cost.
    """

    def __init__(
        self, shape: CacheShape, layer: int, keys: bool, decode: Sequence[Tensor], energy: float
    ) -> None:
        super().__init__(shape, shape.dense_bytes)
        self._layer, self._keys, self._decode = layer, keys, decode
        dims = sum(len(part) for part in decode)
        self._size = (energy / dims) ** 0.5

    def reconstruct(
        self, layer: int, key: Tensor, value: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        if layer != self._layer:
            return key, value
        generator = torch.Generator().manual_seed(layer)
        parts = [
            torch.randn(len(key), len(part), generator=generator) @ part * self._size
            for part in self._decode
        ]
        noise = torch.cat(parts, dim=1).view_as(key)
        return (key + noise, value) if self._keys else (key, value + noise)


def one_modality(layer: LayerStatistics, modality: int) -> LayerStatistics:
    """The statistics of one modality alone."""
    moments = layer.moments
    pick = slice(modality, modality + 1)
    key, value = (
        GroupMoments(part.second[pick], part.mean[pick]) for part in (moments.key, moments.value)
    )
    chosen = LayerMoments(key, value, moments.query, moments.count[pick])
    return LayerStatistics(layer.name, layer.scale, chosen, layer.gram)


def unweighted(layer: LayerStatistics) -> LayerStatistics:
    """Query and output metrics that cost every direction alike, at the same mean."""
    moments = layer.moments
    changed = LayerMoments(moments.key, moments.value, _flat(moments.query), moments.count)
    return LayerStatistics(layer.name, layer.scale, changed, _flat(layer.gram))


def _flat(metric: Tensor) -> Tensor:
    mean = metric.diagonal(dim1=1, dim2=2).mean(1)
    return mean[:, None, None] * torch.eye(metric.shape[-1], dtype=metric.dtype)
