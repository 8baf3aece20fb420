"""Blocks of the paged cache as the reference reads them: planes to latents."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vllm_attentionpack.codec.codec import PlaneCodec
from vllm_attentionpack.codec.layout import Kind, LayerLayout, Plane
from vllm_attentionpack.codec.quantize import decode_scale, unpack_codes

#: The codec of a head group's keys or values, and the planes that they are read from.
CodecPlanes = tuple[PlaneCodec, list[Plane]]


@dataclass(frozen=True)
class Pages:
    """The pages of one segment: `block_table` is int64 `[b, max_blocks]`."""

    kv_cache: Tensor
    block_table: Tensor
    block_size: int

    def tiles(self, max_tokens: int, tile_tokens: int) -> Iterator[tuple[int, Tensor]]:
        """Yields (first token, block ids `[b, n]`) until `max_tokens` are covered."""
        blocks = min(-(-max_tokens // self.block_size), self.block_table.shape[1])
        step = max(1, tile_tokens // self.block_size)
        for start in range(0, blocks, step):
            ids = self.block_table[:, start : min(start + step, blocks)].clamp(
                0, self.kv_cache.shape[0] - 1
            )
            yield start * self.block_size, ids

    def read(self, ids: Tensor, codec_planes: CodecPlanes) -> tuple[Tensor, Tensor]:
        """Latents float32 `[b, n * S, R]` and modality bool `[b, n * S]` of some blocks."""
        codec, planes = codec_planes
        codes = []
        for plane in planes:
            data = plane_view(self.kv_cache, plane, self.block_size)[ids].flatten(1, 2)
            if plane.bits:
                codes.append(unpack_codes(data, plane.bits))
            else:
                scale, visual = decode_scale(data[..., 0])
        latent = (torch.cat(codes, -1) - codec.zero_point) * scale[..., None]
        return latent, visual


@cache  # every layer asks at every step; layouts are few and frozen
def planes_by_owner(layout: LayerLayout, block_size: int) -> dict[tuple[int, Kind], list[Plane]]:
    """The planes of every (head group, K|V) in the order of its columns, the scales last."""
    owners: dict[tuple[int, Kind], list[Plane]] = {}
    for plane in layout.planes(block_size):
        owners.setdefault((plane.group, plane.kind), []).append(plane)
    return owners


def plane_view(kv_cache: Tensor, plane: Plane, block_size: int) -> Tensor:
    """uint8 view `[num_blocks, S, bytes per token]` of one plane of every block."""
    stop = plane.offset + block_size * plane.bytes_per_token
    return kv_cache[:, plane.offset : stop].unflatten(1, (block_size, plane.bytes_per_token))
