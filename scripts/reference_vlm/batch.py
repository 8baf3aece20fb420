"""Segments to padded tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import wording
from .wording import Segment

Row = tuple[list[int], list[int]]  # token ids, labels (-1: no loss)


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # [B, T]
    labels: Tensor  # [B, T], -1: no loss
    positions: Tensor  # [3, B, T], temporal, height, width
    patches: Tensor | None = None  # [n, 4 grid^2, 588], all images in row order
    images: Tensor | None = None  # uint8 [n, S, S, 3], the pixels of `patches`
    grid: int = 0  # merged tokens per image side


class Batcher:
    """Tokenises rows of segments and pads them on the right."""

    def __init__(self, tokenizer, device: str):
        self._core, self._device = tokenizer._tokenizer, device
        self.image_pad = tokenizer.convert_tokens_to_ids(wording.IMAGE_PAD)
        self.end_of_text = tokenizer.convert_tokens_to_ids(wording.END_OF_TEXT)

    def encode(self, samples: Sequence[Sequence[Segment]], image_tokens: int = 1) -> list[Row]:
        """Each image is one pad token in the text and `image_tokens` of them in the row."""
        pads = wording.IMAGE_PAD * image_tokens
        texts = [text.replace(wording.IMAGE_PAD, pads) for s in samples for text, _ in s]
        encoded = iter(self._core.encode_batch(texts, add_special_tokens=False))
        rows = []
        for sample in samples:
            ids: list[int] = []
            labels: list[int] = []
            for _, supervised in sample:
                new = next(encoded).ids
                ids += new
                labels += new if supervised else [-1] * len(new)
            rows.append((ids, labels))
        return rows

    def encode_text(self, text: str) -> Row:
        """Plain text after an end-of-text token, loss on every position."""
        ids = [self.end_of_text, *self._core.encode(text, add_special_tokens=False).ids]
        return ids, ids

    def collate(
        self,
        rows: Sequence[Row],
        grid: int = 0,
        patches: Tensor | None = None,
        images: Tensor | None = None,
    ) -> Batch:
        length = max(len(ids) for ids, _ in rows)
        ids = np.full((len(rows), length), self.end_of_text, np.int64)
        labels = np.full((len(rows), length), -1, np.int64)
        for i, (row_ids, row_labels) in enumerate(rows):
            ids[i, : len(row_ids)], labels[i, : len(row_labels)] = row_ids, row_labels
        tensors = (ids, labels, mrope_positions(ids, self.image_pad, grid))
        on_device = (torch.from_numpy(x).to(self._device) for x in tensors)
        return Batch(*on_device, patches=patches, images=images, grid=grid)


def mrope_positions(ids: np.ndarray, image_pad: int, grid: int) -> np.ndarray:
    """M-RoPE positions [3, B, T] of token ids [B, T] whose images are all `grid` x `grid` tokens.

    Equal to transformers' `get_rope_index`: an image advances the text position by `grid`.
    """
    is_image = ids == image_pad
    text_before = np.cumsum(~is_image, 1) - ~is_image
    pads_before = np.cumsum(is_image, 1) - is_image
    side, tokens = max(1, grid), max(1, grid * grid)
    start = text_before + pads_before // tokens * grid
    inside = pads_before % tokens
    height = start + np.where(is_image, inside // side, 0)
    width = start + np.where(is_image, inside % side, 0)
    return np.stack([start, height, width]).astype(np.int64)
