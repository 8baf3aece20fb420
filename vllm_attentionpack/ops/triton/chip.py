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
        wide_tile: likewise of eight warps.
        sums: registers of a thread that hold sums of values, at most.
        encodes_64: whether a program that encodes takes 64 of many tokens, not 16 or 32.
    """

    keys: Cut
    values: Cut
    narrow_tile: int
    wide_tile: int
    sums: int
    encodes_64: bool


#: `mma.sync` has 16 rows for each warp: operands of 64 value columns would leave four of eight
#: warps to repeat what the others do, with twice the sums in registers.
_MMA = Fit(Cut(32), Cut(64, rows=128), 64, 64, sums=80, encodes_64=False)
#: `wgmma` has 64 rows for every four warps, which tokens are among scores. Pieces of 32 bytes of
#: values are copied to shared memory ahead; wider ones would wait their turn in registers.
_WGMMA = Fit(Cut(64), Cut(32, rows=64), 64, 128, sums=128, encodes_64=True)
#: `tcgen05` takes operands from tensor or shared memory: unpacked codes make a detour, and every
#: product is waited for. Tiles of fewer than 64 tokens leave it to the values.
_TCGEN05 = Fit(Cut(32), Cut(64, rows=64), 32, 32, sums=80, encodes_64=False)
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
