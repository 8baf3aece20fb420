"""What a simulated cache format is: what it gives back for keys and values, and what it stores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_attentionpack.codec.codec import LayerCodec, PlaneCodec
from vllm_attentionpack.codec.layout import DENSE_BYTES, KINDS, Kind
from vllm_attentionpack.packfile.schema import Pack


@dataclass(frozen=True)
class CacheShape:
    """The layers that are compared; all others stay dense.

    Attributes:
        layer_names: vLLM's names, in the order of the model.
    """

    layer_names: tuple[str, ...]
    num_query_heads: int
    num_kv_heads: int
    head_size: int

    @property
    def dense_bytes(self) -> int:
        """Bytes per token of all layers in bfloat16."""
        per_layer = len(KINDS) * self.num_kv_heads * self.head_size * DENSE_BYTES
        return len(self.layer_names) * per_layer


@dataclass(frozen=True)
class ExactTokens:
    """Tokens that a query reads as they are, in bfloat16.

    Attributes:
        sinks: the first tokens of a request.
        recent: the last tokens up to the query's own.
        beside_codes: whether their codes are stored as well (a second cache beside the first), or
            they are coded only when they leave the window.
    """

    sinks: int = 0
    recent: int = 0
    beside_codes: bool = True

    def __bool__(self) -> bool:
        return self.sinks > 0 or self.recent > 0

    def count(self, length: int) -> int:
        """Exact tokens of a request of `length` tokens."""
        return min(length, self.sinks + self.recent)

    def mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        """bool `[q, n]`: which keys each query reads exactly, by their positions."""
        recent = queries[:, None] - keys[None, :] < self.recent
        return recent | (keys < self.sinks)[None, :]


@dataclass(frozen=True)
class Tokens:
    """The tokens of a step, `T` in all.

    Attributes:
        lengths: tokens of each request, one after the other.
        visual: bool `[T]`.
        positions: int `[T]`, what keys are turned by (`codec.positions`).
    """

    lengths: Sequence[int]
    visual: Tensor
    positions: Tensor

    def anchors(self, span: int) -> Tensor:
        """int `[T]`: the position of the first token of each token's span."""
        parts = []
        for positions in self.positions.split(list(self.lengths)):
            first = torch.arange(len(positions), device=positions.device) // span * span
            parts.append(positions[first])
        return torch.cat(parts)


class SimulatedCodec(Protocol):
    """A cache format.

    Attributes:
        exact: see `ExactTokens`.
        full_share: share of the tokens, those that gathered most attention up to a query, whose
            values are read as `reconstruct` gives them; the others as `coarse_value` does. One for
            every codec without partial decompression.
    """

    exact: ExactTokens
    full_share: float

    def reconstruct(
        self, layer: int, key: Tensor, value: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        """Keys and values as attention would read them.

        Args:
            layer: index into `CacheShape.layer_names`.
            key: float32 `[T, Hk, D]`, rotated, of whole requests one after the other.
            value: float32 `[T, Hk, D]`.
            tokens: what else is known of the `T` tokens.

        Returns:
            float32, shaped as the inputs.
        """
        ...

    def coarse_value(self, layer: int, value: Tensor, tokens: Tokens) -> Tensor:
        """Values of tokens outside `full_share`; asked for only where that is below one."""
        ...

    def request_bytes(self, length: int, visual: int) -> float:
        """Bytes over all layers, everything counted.

        Args:
            length: tokens of a request.
            visual: how many of them are visual.
        """
        ...


class TokenCodec:
    """A codec that stores every token alike and reads every value in full.

    Args:
        shape: of the cache.
        bytes_per_token: over all layers, scales and padding included.
        exact: tokens that stay exact.
    """

    full_share = 1.0

    def __init__(
        self, shape: CacheShape, bytes_per_token: float, exact: ExactTokens | None = None
    ) -> None:
        self.shape = shape
        self.bytes_per_token = bytes_per_token
        self.exact = exact or ExactTokens()

    def reconstruct(
        self, layer: int, key: Tensor, value: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def coarse_value(self, layer: int, value: Tensor, tokens: Tokens) -> Tensor:
        raise NotImplementedError

    def request_bytes(self, length: int, visual: int) -> float:
        exact = self.exact.count(length)
        coded = length if self.exact.beside_codes else length - exact
        return coded * self.bytes_per_token + exact * self.shape.dense_bytes


class DenseCodec(TokenCodec):
    """The cache as it is, in the model's own type: what every other codec is compared with."""

    def __init__(self, shape: CacheShape) -> None:
        super().__init__(shape, shape.dense_bytes)

    def reconstruct(
        self, layer: int, key: Tensor, value: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        return key, value


class PackCodec(TokenCodec):
    """Our own format, one `LayerCodec` per layer."""

    def __init__(
        self, shape: CacheShape, codecs: Sequence[LayerCodec], exact: ExactTokens | None = None
    ) -> None:
        super().__init__(shape, sum(codec.layout.bytes_per_token for codec in codecs), exact)
        self._codecs = codecs

    @classmethod
    def of(
        cls,
        shape: CacheShape,
        pack: Pack,
        device: torch.device,
        exact: ExactTokens | None = None,
    ) -> "PackCodec":
        """The codec of a whole pack, on `device`."""
        return cls(shape, [pack.codec(i).to(device) for i in range(len(pack.layers))], exact)

    def reconstruct(
        self, layer: int, key: Tensor, value: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        codec = self._codecs[layer]
        if codec.anchors is None:
            return self._read(codec, key, value, tokens)
        rotary = codec.anchors.rotary
        cos, sin = codec.anchors.tables(tokens.anchors(codec.anchors.span), tokens.positions)
        read, read_value = self._read(codec, rotary.turn_by(key, cos, -sin), value, tokens)
        return rotary.turn_by(read, cos, sin), read_value

    def _read(
        self, codec: LayerCodec, key: Tensor, value: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        read_key, read_value = torch.empty_like(key), torch.empty_like(value)
        for group, heads in codec.group_heads():
            x: dict[Kind, Tensor] = {
                "key": key[:, heads].flatten(1),
                "value": value[:, heads].flatten(1),
            }
            codes = group.encode(x, tokens.visual)
            for kind, read in zip(KINDS, (read_key, read_value), strict=True):
                part: PlaneCodec = getattr(group, kind)
                rebuilt = part.reconstruct(*codes[kind], tokens.visual)
                read[:, heads] = rebuilt.unflatten(1, (-1, key.shape[-1]))
        return read_key, read_value
