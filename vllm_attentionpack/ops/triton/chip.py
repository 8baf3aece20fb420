"""What of a GPU the kernels are fitted to, architecture by architecture."""

from dataclasses import dataclass
from functools import cache

import torch

from vllm_attentionpack.ops.triton.tiles import Cut


@dataclass(frozen=True)
class Fit:
    """What suits one generation of tensor cores, by the compile table
    (`docs/results/triton_compile.md`): no run on a GPU stands behind it yet.

    Attributes:
        keys: pieces of the keys where eight warps share a program.
        values: likewise of the values.
        narrow_tile: tokens of one step of four warps.
        wide_tile: likewise of eight warps, at most.
        scores: of one step of eight warps at most, tokens times query rows.
        narrow_sums: of values that a thread of four warps holds, at most.
        wide_sums: likewise of eight warps.
        encodes_64: whether a program that encodes takes 64 of many tokens, not 16 or 32.
    """

    keys: Cut
    values: Cut
    narrow_tile: int
    wide_tile: int
    scores: int
    narrow_sums: int
    wide_sums: int
    encodes_64: bool


#: `mma.sync` has 16 rows for each warp: operands of 64 value columns would leave four of eight
#: warps to repeat what the others do, with twice the sums in registers. Every warp reads all
#: queries, so that small pieces of them are soon out of its registers again.
_MMA = Fit(
    keys=Cut(largest=16),
    values=Cut(largest=64, rows=128),
    narrow_tile=64,
    wide_tile=128,
    scores=2048,
    narrow_sums=80,
    wide_sums=80,
    encodes_64=False,
)
#: `wgmma` has 64 rows for every four warps, which tokens are among scores. Pieces of 32 bytes of
#: values are copied to shared memory ahead; wider ones would wait their turn in registers.
_WGMMA = Fit(
    keys=Cut(largest=64),
    values=Cut(largest=32, rows=64),
    narrow_tile=64,
    wide_tile=128,
    scores=8192,
    narrow_sums=128,
    wide_sums=128,
    encodes_64=True,
)
#: `tcgen05` takes operands from tensor or shared memory: unpacked codes make a detour, and every
#: product is waited for. Tiles of fewer than 64 tokens leave it to the values, whose sums take no
#: registers.
_TCGEN05 = Fit(
    keys=Cut(largest=128),
    values=Cut(largest=64, rows=128),
    narrow_tile=32,
    wide_tile=32,
    scores=8192,
    narrow_sums=80,
    wide_sums=128,
    encodes_64=False,
)
_FITS = {9: _WGMMA, 10: _TCGEN05}


@dataclass(frozen=True)
class Chip:
    """A GPU.

    Attributes:
        multiprocessors: how many programs really run at a time, in units of one for each.
        shared_bytes: shared memory of one program at most.
        generation: major number of the compute capability.
    """

    multiprocessors: int
    shared_bytes: int
    generation: int

    @property
    def fit(self) -> Fit:
        return _FITS.get(self.generation, _MMA)


#: Stands for a GPU where Triton's interpreter runs on a CPU.
_INTERPRETER = Chip(multiprocessors=4, shared_bytes=1 << 18, generation=9)


@cache
def chip(device: torch.device) -> Chip:
    """The GPU that `device` is."""
    if device.type != "cuda":
        return _INTERPRETER
    found = torch.cuda.get_device_properties(device)
    # What a program has without asking for more, if this PyTorch does not know the most.
    most = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
    return Chip(found.multi_processor_count, most, found.major)
