"""Kernels compiled for GPUs that are not there."""

import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vllm_attentionpack.bench.compile_table import Compiled, table

pytest.importorskip("triton")

COMPILE = """
import torch
from vllm_attentionpack.bench.compile_table import SHARED_LIMIT, Case, compile_launch, launches
from vllm_attentionpack.bench.shapes import LayerShape

SHARED_LIMIT[89] = 99 * 1024  # as of 8.6 and 12.0: the least of all that are supported
for launch in launches(Case(LayerShape({shape}), **{step}), {capability}):
    if launch.kernel.__name__ in {kernels}:
        made = compile_launch(launch, {capability})
        assert not made.faults(), made
        assert made.async_copies or launch.kernel.__name__ != "attend_kernel", made
        print(made)
"""

MISSING = """
import json
from vllm_attentionpack.bench.compile_table import SHARED_LIMIT, cases, variant_key, variants

rows = json.load(open({table!r}))["variants"]
wanted = {{
    variant_key(launch, capability)
    for capability in SHARED_LIMIT
    for _, launch in variants(cases(), capability)
}}
print("differ by", len(wanted ^ {{row["key"] for row in rows}}))
"""

#: What breaks a rule as it stands (docs/gpu.md says why): kernel, layer, capability.
KNOWN_FAULTS = {
    ("attend_kernel", "32/8x128 G=8 ratio 4", 90),
    ("attend_kernel", "32/8x128 G=8 ratio 8", 90),
    ("attend_kernel", "32/8x128 G=2 ratio 8", 80),
    ("attend_kernel", "32/8x128 G=2 ratio 8", 90),
    ("attend_kernel", "32/8x128 G=2 ratio 8", 100),
    ("attend_kernel", "32/8x128 G=2 ratio 4", 90),
    ("attend_kernel", "32/8x128 G=2 ratio 4", 100),
    ("attend_kernel", "32/8x128 G=1 ratio 8 joint K/V", 80),
    ("attend_kernel", "32/8x128 G=1 ratio 8 joint K/V", 90),
}
TABLE = Path(__file__).parents[2] / "docs" / "results" / "triton_compile.json"

SPECIALISE = """
from vllm_attentionpack.bench.compile_table import Case, variants
from vllm_attentionpack.bench.shapes import LayerShape

layer = LayerShape(8, 2, 64, 1, 8)
for _, launch in variants([Case(layer, requests=n) for n in (17, 32, 40, 48)], 90):
    print(launch.kernel.__name__)
"""

CALL = """
import torch, triton
from triton.backends.compiler import GPUTarget
from vllm_attentionpack.bench.compile_table import Case, launches, source
from vllm_attentionpack.bench.shapes import LayerShape

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

called = []
def note(compile, **_):
    called.append((compile["signature"], compile["constants"], compile["configs"][0]))
    return True  # and compile nothing

triton.runtime.driver.set_active(Driver())
triton.knobs.runtime.jit_cache_hook = note
pairs, whole = LayerShape(32, 8, 128, 2, 8, modalities=2), LayerShape(16, 1, 256, 1, 8)
for case in (Case(pairs, requests=17, ranges=True), Case(whole, query_len=3, causal=True)):
    for launch in launches(case, 90):
        launch.kernel[launch.grid](**launch.arguments, **launch.options)
        signature, constants, attributes = called.pop()
        ours = source(launch)
        assert (signature, constants) == (ours.signature, ours.constants), launch.kernel
        assert {k: v for k, v in attributes.items() if v} == ours.attrs, launch.kernel
        print(launch.kernel.__name__)
"""

GOOD = Compiled(
    key="1",
    kernel="store_kernel",
    case="some layer",
    capability=80,
    warps=4,
    registers=200,
    spill_bytes=0,
    shared_bytes=1 << 15,
    products=4,
    scalar_products=0,
    matrix_instructions=("HMMA",),
    async_copies=True,
    instructions=1000,
    seconds=1.5,
)


def run(program: str) -> str:
    """In a process of its own: in the interpreter, where other tests may be, nothing compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "step", "kernels", "capability"),
    [
        ("32, 8, 128, 8, 8", {}, {"attend_kernel"}, 80),
        ("32, 8, 128, 8, 8", {}, {"attend_kernel"}, 90),
        ("32, 8, 128, 8, 8", {}, {"attend_kernel"}, 100),
        ("32, 8, 128, 8, 8", {}, {"store_kernel"}, 89),
        (
            "32, 8, 128, 1, 8",
            {"query_len": 512, "requests": 2, "dtype": torch.float32},
            {"exact_kernel"},
            89,
        ),
        ("32, 8, 128, 1, 8", {}, {"attend_kernel", "store_kernel", "merge_kernel"}, 80),
        ("32, 8, 128, 2, 8", {"query_len": 2048, "requests": 2}, {"store_kernel"}, 90),
        ("16, 4, 64, 4, 8", {}, {"absorb_kernel", "up_project_kernel"}, 100),
        # 132 splits: more than the merge takes at a time.
        ("32, 8, 128, 8, 8", {"requests": 1, "context": 32768}, {"merge_kernel"}, 90),
    ],
)
def test_variants_keep_the_rules(shape, step, kernels, capability):
    out = run(COMPILE.format(shape=shape, step=step, kernels=kernels, capability=capability))
    assert out.count("Compiled(") == len(kernels)


def committed() -> list[Compiled]:
    return [Compiled(**row) for row in json.loads(TABLE.read_text())["variants"]]


def test_the_committed_table_breaks_no_rule_but_those_known():
    faults = {
        (row.kernel, row.case.split(",")[0], row.capability) for row in committed() if row.faults()
    }
    assert faults == KNOWN_FAULTS


@pytest.mark.slow
def test_the_committed_table_is_of_these_sources():
    """Else run `scripts/compile_kernels.py`, which compiles what has changed."""
    if json.loads(TABLE.read_text())["triton"] != importlib.metadata.version("triton"):
        pytest.skip("the table was made with another Triton")
    assert run(MISSING.format(table=str(TABLE))).split()[-1] == "0"


@pytest.mark.slow
def test_what_is_compiled_is_what_a_call_on_a_gpu_would_compile():
    """By Triton's own binding of arguments, up to the compiler, for a GPU that is not there."""
    assert len(run(CALL).split()) == 2 * 7


@pytest.mark.slow
def test_the_size_of_a_batch_makes_no_new_variant():
    """It would be compiled while requests wait."""
    names = run(SPECIALISE).split()
    for kernel in ("store_kernel", "absorb_kernel", "attend_kernel", "up_project_kernel"):
        assert names.count(kernel) == 1


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spill_bytes": 8}, "spills"),
        ({"shared_bytes": 164 * 1024}, "shared memory"),
        ({"scalar_products": 1}, "tensor cores"),
        ({"matrix_instructions": ()}, "tensor cores"),
    ],
)
def test_every_rule_is_checked(change, fault):
    assert GOOD.faults() == []
    (found,) = replace(GOOD, **change).faults()
    assert fault in found


def test_a_kernel_without_products_needs_no_tensor_cores():
    assert replace(GOOD, products=0, matrix_instructions=()).faults() == []


def test_the_table_has_a_line_per_variant_and_a_column_per_architecture():
    rows = [GOOD, replace(GOOD, capability=90), replace(GOOD, kernel="attend_kernel")]
    lines = table(rows).splitlines()
    assert lines[0].endswith("| sm_80 | sm_90 |")
    assert lines[2].startswith("| attend_kernel ") and lines[2].endswith("| - |")
    assert lines[3].count("200 / 0 / 32 HMMA") == 2
