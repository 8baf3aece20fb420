"""Compiles every kernel for GPUs that are not there and reports what the compiler made of it.

Launches are recorded from the very host code that serves, on empty tensors, and compiled ahead of
time: registers, spills and shared memory follow from the assembly, and so does whether tensor cores
are used. Needs Triton, whose package carries the assembler, and no GPU.
"""

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vllm_attentionpack.bench.shapes import LayerShape
from vllm_attentionpack.calibrate.settings import DEFAULT_SINKS, DEFAULT_WINDOW
from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.codec.positions import Anchors, Rotary
from vllm_attentionpack.kv_cache.pages import PREFERRED_EXACT_TOKENS
from vllm_attentionpack.ops import QueryBatch
from vllm_attentionpack.ops import triton as ops
from vllm_attentionpack.ops.exact import ExactTokens
from vllm_attentionpack.ops.spans import StepSpans
from vllm_attentionpack.ops.triton import prepared
from vllm_attentionpack.ops.triton.chip import Chip

#: Bytes of shared memory that one program can have (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
#: `mma`, `wgmma` and `tcgen05` as they are called in the assembly.
_MATRIX_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA")
#: Of an H100 or H200; A100 and B200 have 108 and 148.
_MULTIPROCESSORS = 132
_KERNELS = {
    "attend": "attend_kernel",
    "exact": ("exact_kernel", "join_kernel"),
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
        ranges: whether only a range of each context is read, as beside an exact window.
        span: tokens that share an anchor; 0 for none.
        pre_rope: planes that are coded pre-RoPE.
    """

    layer: LayerShape
    block_size: int = 128
    query_len: int = 1
    requests: int = 32
    dtype: torch.dtype = torch.bfloat16
    causal: bool = False
    context: int = 8192
    ranges: bool = False
    span: int = 0
    pre_rope: int = 0

    @property
    def name(self) -> str:
        return (
            f"{self.layer.name}, S={self.block_size}, {self.requests}x{self.query_len} new, "
            f"{str(self.dtype).removeprefix('torch.')}{', causal' if self.causal else ''}"
            f"{', ranges' if self.ranges else ''}"
            f"{f', span {self.span}' if self.span else ''}"
            f"{f', {self.pre_rope} planes pre-RoPE' if self.pre_rope else ''}"
        )


@dataclass(frozen=True)
class Launch:
    """A recorded call of a kernel: grid, function, arguments by name, the compiler's options."""

    grid: tuple[int, ...]
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Compiled:
    """What became of one kernel for one architecture.

    Attributes:
        key: identifies source, specialisation, options, target and compiler.
        kernel: its name.
        case: the first case that launches this variant.
        capability: e.g. 90 for sm_90.
        warps: warps of a program.
        registers: per thread.
        spill_bytes: local memory per thread; 0 if nothing spills.
        shared_bytes: of a program.
        products: matrix products in the source, loops not unrolled.
        scalar_products: those of them that tensor cores do not do.
        matrix_instructions: the kinds in the assembly.
        async_copies: whether it has asynchronous copies to shared memory.
        instructions: of the longest loop, or of all where there is none.
        seconds: of a processor, to compile.
    """

    key: str
    kernel: str
    case: str
    capability: int
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    products: int
    scalar_products: int
    matrix_instructions: tuple[str, ...]
    async_copies: bool
    instructions: int
    seconds: float

    def faults(self) -> list[str]:
        """The rules that it breaks."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        if self.shared_bytes > SHARED_LIMIT[self.capability]:
            found.append(f"wants {self.shared_bytes} bytes of shared memory")
        if self.scalar_products or (self.products and not self.matrix_instructions):
            found.append("has products without tensor cores")
        return found


def cases() -> list[Case]:
    """Every kind of layer and step that the kernels are built for, no two of which launch alike."""
    joint, many = LayerShape(32, 8, 128, 8, 8), LayerShape(32, 32, 128, 8, 8)
    single, pairs = LayerShape(32, 8, 128, 1, 8), LayerShape(32, 8, 128, 2, 8)
    joint_single = replace(single, joint_kv=True)
    out = [
        Case(joint),
        Case(joint, requests=1, context=32768),
        Case(joint, query_len=4, causal=True),
        Case(joint, ranges=True),
        Case(LayerShape(32, 8, 128, 8, 4)),
        Case(LayerShape(32, 8, 128, 2, 4, spread=24)),
        Case(LayerShape(32, 8, 128, 8, 8, modalities=2)),
        Case(single),
        Case(single, query_len=2048, requests=2),
        Case(single, dtype=torch.float16),
        Case(pairs),
        Case(pairs, query_len=2048, requests=2),
        Case(many),
        Case(LayerShape(32, 32, 128, 8, 8, modalities=2)),
        Case(LayerShape(16, 1, 256, 1, 8)),
        Case(joint, span=1024),
        Case(pairs, span=1024),
        Case(single, span=64, pre_rope=10),
        Case(pairs, span=64, pre_rope=10),
        Case(LayerShape(32, 8, 128, 2, 4), span=64, pre_rope=10),
        Case(joint_single),
        Case(joint_single, query_len=2048, requests=2),
        Case(joint_single, span=64, pre_rope=10),
        Case(LayerShape(32, 8, 128, 1, 8, modalities=2, joint_kv=True)),
        Case(LayerShape(32, 8, 128, 2, 8, joint_kv=True)),
    ]
    out += [Case(LayerShape(16, 4, size, 4, 8), dtype=torch.float16) for size in (64, 80, 96)]
    out += [Case(joint, block_size=16)]
    out += [Case(single, block_size=size) for size in (32, 64)]
    return out


@cache
def _codec(layer: LayerShape, span: int, pre_rope: int, capability: int) -> LayerCodec:
    """One for each architecture: what a codec is prepared for, it stays prepared for."""
    codec = layer.codec(torch.device("cpu"))
    if span:
        frequencies = 5e5 ** -torch.linspace(0, 1, layer.head_size // 2, dtype=torch.float64)
        codec.anchors = Anchors(Rotary(frequencies), span, pre_rope)
    return codec


def launches(case: Case, capability: int) -> list[Launch]:
    """The kernels that one step of `case` launches on a GPU of that capability."""
    layer, device = case.layer, torch.device("cpu")
    tokens = case.requests * case.query_len
    codec = _codec(layer, case.span, case.pre_rope, capability)
    cache = torch.empty(1, codec.layout.block_bytes(case.block_size), dtype=torch.uint8)
    table = torch.empty(case.requests, 1024, dtype=torch.int32)
    lens = torch.full((case.requests,), case.context, dtype=torch.int32)
    edges = list(range(0, tokens + 1, case.query_len))
    batch = QueryBatch.build(edges, [case.context] * case.requests, device)
    query = torch.empty(tokens, layer.query_heads, layer.head_size, dtype=case.dtype)
    key = torch.empty(tokens, layer.kv_heads, layer.head_size, dtype=case.dtype)
    slots = torch.empty(tokens, dtype=torch.int64)
    pages = torch.empty(1, PREFERRED_EXACT_TOKENS, 2, *key.shape[1:], dtype=case.dtype)
    tokens_kept = ExactTokens.empty(case.requests, DEFAULT_SINKS, DEFAULT_WINDOW, device)
    visual = torch.zeros(tokens, dtype=torch.bool) if layer.modalities == 2 else None
    if case.ranges:  # as `locate_exact` gives them
        lens = lens.long()
    starts = torch.zeros_like(lens) if case.ranges else None
    with recording(Chip(_MULTIPROCESSORS, SHARED_LIMIT[capability], capability // 10)) as recorded:
        ops.store_kv(key, key, cache, slots, visual, codec, case.block_size)
        turns = None
        if codec.anchors is not None:
            anchors = torch.zeros(case.requests, -(-case.context // case.span), dtype=torch.int64)
            rest = (batch, lens, table, case.block_size)
            kernels: Any = ops
            spans = StepSpans(kernels, case.span, anchors, None, *rest)
            turns = spans.turns(codec.anchors)[0]
        absorbed = ops.absorb_query(query, codec, 1.0, turns)
        attended = ops.paged_attention(
            absorbed, cache, table, starts, lens, batch, codec, case.block_size, case.causal
        )
        codes = ops.up_project(attended, codec), attended.lse
        exact = ops.exact_attention(query, pages, tokens_kept, batch, 1.0)
        ops.merge_attention((query, codes[1]), exact, codes)
    return recorded


def variants(wanted: list[Case], capability: int) -> Iterator[tuple[Case, Launch]]:
    """The launches of all cases, each different one once."""
    seen = set()
    for case in wanted:
        for launch in launches(case, capability):
            key = (source(launch).hash(), *sorted(launch.options.items()))
            if key not in seen:
                seen.add(key)
                yield case, launch


def variant_key(launch: Launch, capability: int) -> str:
    """Changes with whatever could change the outcome of `compile_launch`."""
    import triton

    options = sorted(launch.options.items())
    what = f"{source(launch).hash()} {options} {capability} {triton.__version__}"
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def compile_launch(launch: Launch, capability: int, case: str = "") -> Compiled:
    """Compiles one launch as Triton would at its first call on a GPU of that capability."""
    import triton
    from triton.backends.compiler import GPUTarget

    before = _processor_seconds()
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True  # what lies on the disk took no time
        built = triton.compile(
            source(launch), target=GPUTarget("cuda", capability, 32), options=dict(launch.options)
        )
    seconds = _processor_seconds() - before
    registers, stack, assembly = _disassemble(built.asm["cubin"])
    return Compiled(
        key=variant_key(launch, capability),
        kernel=launch.kernel.__name__,
        case=case,
        capability=capability,
        warps=built.metadata.num_warps,
        registers=registers,
        spill_bytes=stack,
        shared_bytes=built.metadata.shared,
        products=len(re.findall(r"\btt\.dot\b", built.asm["ttir"])),
        # Products of tensor cores have layouts of their own; "blocked" ones are multiplied out.
        scalar_products=len(re.findall(r"\btt\.dot\b.*parent = #blocked", built.asm["ttgir"])),
        matrix_instructions=tuple(
            name for name in _MATRIX_INSTRUCTIONS if re.search(rf"\b{name}\b", assembly)
        ),
        async_copies=bool(re.search(r"\b(LDGSTS|UTMALDG|UBLKCP)\b", assembly)),
        instructions=_longest_loop(assembly),
        seconds=round(seconds, 1),
    )


def source(launch: Launch) -> Any:
    """What the compiler is given: types of arguments, constants, and what divides which."""
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        special = type(value) is int and not parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif parameter.is_constexpr or (special and value == 1):
            signature[parameter.name] = "constexpr"
            constants[index,] = value
            continue
        else:
            signature[parameter.name] = "i32" if type(value) is int else "fp32"
            aligned = special and value % 16 == 0
        if aligned:
            attributes[index,] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _processor_seconds() -> float:
    """Of this process and its finished children, of which the assembler is one."""
    return sum(os.times()[:4])


def table(rows: list[Compiled]) -> str:
    """Markdown: one line per variant, one column per capability."""
    capabilities = sorted({row.capability for row in rows})
    found: dict[tuple[str, str, int], dict[int, Compiled]] = {}
    for row in rows:
        found.setdefault((row.kernel, row.case, row.warps), {})[row.capability] = row
    lines = [
        "| kernel | first launched by | warps | "
        + " | ".join(f"sm_{capability}" for capability in capabilities)
        + " |",
        "|---" * (3 + len(capabilities)) + "|",
    ]
    for (kernel, case, warps), made in sorted(found.items()):
        cells = [_cell(made.get(capability)) for capability in capabilities]
        lines.append(f"| {kernel} | {case} | {warps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Compiled | None) -> str:
    if row is None:
        return "-"
    cell = f"{row.registers} / {row.spill_bytes} / {row.shared_bytes / 1024:.0f}"
    return " ".join([cell, *row.matrix_instructions])


@contextmanager
def recording(chip: Chip) -> Iterator[list[Launch]]:
    """Launches of the kernels are noted, as on that GPU, and not made."""
    from importlib import import_module

    recorded: list[Launch] = []
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(prepared, "chip", lambda device: chip))
        for module_name, names in _KERNELS.items():
            module = import_module(f"vllm_attentionpack.ops.triton.{module_name}")
            for name in (names,) if isinstance(names, str) else names:
                recorder = _Recorder(getattr(module, name), recorded)
                patches.enter_context(mock.patch.object(module, name, recorder))
        yield recorded


class _Recorder:
    """Stands for a kernel: `recorder[grid](...)` notes the launch and does nothing."""

    def __init__(self, kernel: Any, recorded: list[Launch]) -> None:
        self.kernel, self.recorded = kernel, recorded

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._note, grid)

    def _note(self, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        options: dict[str, int] = {k: kwargs.pop(k) for k in _OPTIONS if k in kwargs}
        names = [parameter.name for parameter in self.kernel.params]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        assert arguments.keys() == set(names), arguments.keys() ^ set(names)
        self.recorded.append(Launch(grid, self.kernel, arguments, options))


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
