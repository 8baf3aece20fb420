"""Compiles every kernel for GPUs that are not there and reports what the compiler made of it.

Launches are recorded from the very host code that serves, on empty tensors, and compiled ahead of
time: registers, spills and shared memory follow from the assembly, and so does whether tensor cores
are used. Needs Triton, whose package carries the assembler, and no GPU.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vllm_attentionpack.bench.shapes import LayerShape
from vllm_attentionpack.ops import QueryBatch
from vllm_attentionpack.ops import triton as ops

#: Bytes of shared memory that one program can have (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_TENSOR_CORE_OPS = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA")
_KERNELS = {
    "attend": "attend_kernel",
    "merge": "merge_kernel",
    "project": ("absorb_kernel", "up_project_kernel"),
    "store": "store_kernel",
}
_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


#: Of a launch; everything else goes to the kernel.
_OPTIONS: tuple[str, ...] = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Case:
    """What is served when the kernels are launched.

    Attributes:
        layer: the layer.
        block_size: `S`.
        query_len: new tokens of each request.
        requests: `B`.
        dtype: of queries, keys and values.
        causal: whether new tokens are read from the codes.
        context: longest request.
    """

    layer: LayerShape
    block_size: int = 128
    query_len: int = 1
    requests: int = 32
    dtype: torch.dtype = torch.bfloat16
    causal: bool = False
    context: int = 8192

    @property
    def name(self) -> str:
        return (
            f"{self.layer.name}, S={self.block_size}, {self.query_len} new, "
            f"{str(self.dtype).removeprefix('torch.')}{', causal' if self.causal else ''}"
        )


@dataclass(frozen=True)
class Launch:
    """A recorded call of a kernel: its function, arguments by name, and the compiler's options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Compiled:
    """What became of one kernel for one architecture.

    Attributes:
        kernel: its name.
        case: the first case that launches this variant.
        capability: e.g. 90 for sm_90.
        warps: warps of a program.
        registers: per thread.
        spill_bytes: local memory per thread; 0 if nothing spills.
        shared_bytes: of a program.
        tensor_cores: whether the assembly has matrix instructions.
        async_copies: whether it has asynchronous copies to shared memory.
        instructions: of the longest loop, or of all where there is none.
    """

    kernel: str
    case: str
    capability: int
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_cores: bool
    async_copies: bool
    instructions: int

    def row(self) -> dict[str, Any]:
        return asdict(self)


def cases() -> list[Case]:
    """Every kind of layer and step that the kernels are built for."""
    gqa, mha = (32, 8, 128), (32, 32, 128)
    out = [
        Case(LayerShape(*gqa, 8, 8)),
        Case(LayerShape(*gqa, 8, 8), query_len=4),
        Case(LayerShape(*gqa, 8, 8), query_len=2048, requests=2),
        Case(LayerShape(*gqa, 8, 8), query_len=4, causal=True),
        Case(LayerShape(*gqa, 8, 4)),
        Case(LayerShape(*gqa, 8, 8, modalities=2)),
        Case(LayerShape(*gqa, 1, 8)),
        Case(LayerShape(*gqa, 2, 8)),
        Case(LayerShape(*mha, 8, 8)),
        Case(LayerShape(*mha, 8, 8, modalities=2)),
        Case(LayerShape(16, 1, 256, 1, 8)),
    ]
    out += [Case(LayerShape(16, 4, size, 4, 8), dtype=torch.float16) for size in (64, 80, 96)]
    out += [Case(LayerShape(*gqa, 8, 8), block_size=size) for size in (16, 32, 64)]
    return out


def launches(case: Case) -> list[Launch]:
    """The kernels that one step of `case` launches."""
    layer, device = case.layer, torch.device("cpu")
    tokens = case.requests * case.query_len
    codec = layer.codec(device)
    cache = torch.empty(1, codec.layout.block_bytes(case.block_size), dtype=torch.uint8)
    table = torch.empty(case.requests, 1024, dtype=torch.int32)
    lens = torch.full((case.requests,), case.context, dtype=torch.int32)
    starts = range(0, tokens + 1, case.query_len)
    batch = QueryBatch.build(list(starts), [case.context] * case.requests, device)
    query = torch.empty(tokens, layer.query_heads, layer.head_size, dtype=case.dtype)
    key = torch.empty(tokens, layer.kv_heads, layer.head_size, dtype=case.dtype)
    slots = torch.empty(tokens, dtype=torch.int64)
    visual = torch.zeros(tokens, dtype=torch.bool) if layer.modalities == 2 else None
    with _recording() as recorded:
        ops.store_kv(key, key, cache, slots, visual, codec, case.block_size)
        absorbed = ops.absorb_query(query, codec, 1.0)
        attended = ops.paged_attention(
            absorbed, cache, table, None, lens, batch, codec, case.block_size, case.causal
        )
        ops.up_project(attended, codec)
    return recorded


def compile_launch(launch: Launch, capability: int, case: str = "") -> Compiled:
    """Compiles one launch as Triton would at its first call on a GPU of that capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        if isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[index,] = value
            continue
        else:
            signature[parameter.name] = "i32" if type(value) is int else "fp32"
            aligned = type(value) is int and value % 16 == 0
        if aligned:
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options)
    )
    registers, stack, assembly = _disassemble(built.asm["cubin"])
    return Compiled(
        kernel=kernel.__name__,
        case=case,
        capability=capability,
        warps=built.metadata.num_warps,
        registers=registers,
        spill_bytes=stack,
        shared_bytes=built.metadata.shared,
        tensor_cores=any(re.search(rf"\b{op}\b", assembly) for op in _TENSOR_CORE_OPS),
        async_copies=bool(re.search(r"\b(LDGSTS|UTMALDG|UBLKCP)\b", assembly)),
        instructions=_longest_loop(assembly),
    )


def variants(wanted: list[Case]) -> Iterator[tuple[Case, Launch]]:
    """The launches of all cases, each different one once."""
    seen = set()
    for case in wanted:
        for launch in launches(case):
            key = _identity(launch)
            if key not in seen:
                seen.add(key)
                yield case, launch


def _identity(launch: Launch) -> tuple[Any, ...]:
    items = []
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if isinstance(value, Tensor):
            items.append(str(value.dtype))
        elif parameter.is_constexpr:
            items.append(repr(value))
        else:
            items.append(f"{value == 1} {isinstance(value, int) and value % 16 == 0}")
    return launch.kernel.__name__, *items, *sorted(launch.options.items())


@contextmanager
def _recording() -> Iterator[list[Launch]]:
    from importlib import import_module

    recorded: list[Launch] = []
    with mock.patch.dict("os.environ"):
        patches = []
        for module_name, names in _KERNELS.items():
            module = import_module(f"vllm_attentionpack.ops.triton.{module_name}")
            for name in (names,) if isinstance(names, str) else names:
                recorder = _Recorder(getattr(module, name), recorded)
                patches.append(mock.patch.object(module, name, recorder))
        for patch in patches:
            patch.start()
        try:
            yield recorded
        finally:
            for patch in patches:
                patch.stop()


class _Recorder:
    """Stands for a kernel: `recorder[grid](...)` notes the launch and does nothing."""

    def __init__(self, kernel: Any, recorded: list[Launch]) -> None:
        self.kernel, self.recorded = kernel, recorded

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        options: dict[str, int] = {k: kwargs.pop(k) for k in _OPTIONS if k in kwargs}
        names = [parameter.name for parameter in self.kernel.params]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        assert arguments.keys() == set(names), arguments.keys() ^ set(names)
        self.recorded.append(Launch(self.kernel, arguments, options))


def _disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers per thread, bytes of stack per thread, and the assembly."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(flag: str) -> str:
            done = subprocess.run(
                [tool, flag, file.name], capture_output=True, text=True, check=True
            )
            return done.stdout + done.stderr

        usage = re.search(r"REG:(\d+) STACK:(\d+)", run("-res-usage"))
        if usage is None:
            raise RuntimeError("cuobjdump reports no registers: its output has changed")
        return int(usage[1]), int(usage[2]), run("-sass")


def _longest_loop(assembly: str) -> int:
    """Instructions between the farthest backward branch and its target; all where none is."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", assembly)
    code = [(int(address, 16), text) for address, text in lines]
    longest = 0
    for address, text in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and (first := int(target[1], 16)) < address:
            longest = max(longest, sum(first <= a <= address for a, _ in code))
    return longest or len(code)
