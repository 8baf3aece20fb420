"""Synthetic images: one coloured shape with a digit on a dark noisy background."""

import math

import torch
from torch import Tensor

COLORS = torch.tensor(  # rows in the order of wording.COLOR_NAMES
    [
        (220, 40, 40),
        (40, 185, 60),
        (50, 90, 240),
        (235, 215, 50),
        (175, 60, 205),
        (235, 235, 235),
    ],
    dtype=torch.float32,
)
_FONT = (  # 5x7 glyphs of 0..9
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)
GLYPHS = torch.tensor([[int(dot) for dot in g.replace(" ", "")] for g in _FONT])  # [10, 35]

# The CLIP statistics of Qwen2-VL's image processor.
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])

PATCH = 14
TOKEN_PX = 28  # one visual token covers 2 x 2 patches


LABEL_TOKENS = 8  # "Image 12:", the two image markers, the line end
SIDES_PX = (56, 448)  # the sprite needs the first, the image processor keeps the second as it is


def prompt_tokens(n: int, size: int) -> int:
    """About how many tokens `n` labelled images of `size` px take."""
    return n * ((size // TOKEN_PX) ** 2 + LABEL_TOKENS)


def largest_size(tokens: float) -> int:
    """Side in px of the largest image that takes at most `tokens` visual tokens, within bounds."""
    side = TOKEN_PX * math.isqrt(max(0, int(tokens)))
    return min(max(side, SIDES_PX[0]), SIDES_PX[1])


class _Draw:
    """Random numbers for `n` images; the call order is part of what a seed means."""

    def __init__(self, n: int, generator: torch.Generator, device: torch.device):
        self.n, self.generator, self.device = n, generator, device

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(self.n, *shape, generator=self.generator, device=self.device)

    def integer(self, low: int, high: int) -> Tensor:
        """[n, 1, 1] whole numbers of low..high as floats"""
        drawn = torch.randint(
            low, high + 1, (self.n,), generator=self.generator, device=self.device
        )
        return drawn.float().view(self.n, 1, 1)


def render(
    digit: Tensor,
    color: Tensor,
    shape: Tensor,
    size: int,
    generator: torch.Generator,
    jitter: int = 4,
) -> Tensor:
    """Draw images from attribute indices [n].  Returns uint8 [n, size, size, 3].

    The 56 px sprite (shape, white plate, black digit at 4 px per dot) lies at a random multiple of
    28 px, moved by at most `jitter` px: without that grid the small vision tower learns no digits.
    """
    n, device = len(digit), digit.device
    draw = _Draw(n, generator, device)
    cells = size // TOKEN_PX - 2
    center_x = 28 + 28 * draw.integer(0, cells) + draw.integer(-jitter, jitter)
    center_y = 28 + 28 * draw.integer(0, cells) + draw.integer(-jitter, jitter)
    radius = 24 + 2 * draw.uniform(1, 1)
    axis = torch.arange(size, device=device).float() + 0.5
    px, py = axis.view(1, 1, -1) - center_x, axis.view(1, -1, 1) - center_y
    inside = _inside(shape.view(n, 1, 1), px / radius, py / radius)
    plate, ink = _digit_masks(digit, px, py, draw, min(jitter, 2))

    image = (draw.uniform(1, 1, 3) * 80).expand(n, size, size, 3)
    fill = (COLORS.to(device)[color] + (draw.uniform(3) * 2 - 1) * 18).view(n, 1, 1, 3)
    image = torch.where(inside[..., None], fill, image)
    image = torch.where(plate[..., None], 225 + draw.uniform(1, 1, 1) * 30, image)
    image = torch.where(ink[..., None], draw.uniform(1, 1, 1) * 30, image)
    image = image + (draw.uniform(size, size, 1) * 2 - 1) * 14
    return image.clamp(0, 255).round().to(torch.uint8)


def _inside(shape: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """bool [n, size, size]: pixels of the shape, offsets given in units of its radius"""
    circle = dx**2 + dy**2 < 1
    square = torch.maximum(dx.abs(), dy.abs()) < 0.86
    triangle = (dy < 0.95) & (dx.abs() < (dy + 1.05) * 0.56)
    return torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))


def _digit_masks(
    digit: Tensor, px: Tensor, py: Tensor, draw: _Draw, jitter: int
) -> tuple[Tensor, Tensor]:
    """bool [n, size, size] twice: the white plate and the digit's dots"""
    n, size = len(digit), px.shape[-1]
    left = draw.integer(-jitter, jitter) - 10
    top = (draw.integer(-jitter, jitter) + 4.0) - 14
    plate = (px > left - 2) & (px < left + 22) & (py > top - 1) & (py < top + 29)
    column, row = torch.floor((px - left) / 4), torch.floor((py - top) / 4)
    on_grid = (column >= 0) & (column < 5) & (row >= 0) & (row < 7)
    dot = (row.clamp(0, 6) * 5 + column.clamp(0, 4)).long().view(n, -1)
    ink = torch.gather(GLYPHS.to(digit.device)[digit], 1, dot).view(n, size, size)
    return plate, (ink > 0) & on_grid


def to_patches(images: Tensor) -> Tensor:
    """The image processor's pixel path: uint8 [n, S, S, 3] -> float [n, 4 g^2, 588], g = S // 28.

    Patches come in merge order, with one temporal copy (the processor's two copies are equal).
    """
    n, size = images.shape[:2]
    g = size // TOKEN_PX
    x = (images.float() * (1 / 255) - MEAN.to(images.device)) / STD.to(images.device)
    x = x.view(n, g, 2, PATCH, g, 2, PATCH, 3)
    return x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(n, 4 * g * g, 3 * PATCH * PATCH)
