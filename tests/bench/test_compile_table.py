"""Kernels compiled for GPUs that are not there."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
from vllm_attentionpack.bench.compile_table import SHARED_LIMIT, Case, compile_launch, launches
from vllm_attentionpack.bench.shapes import LayerShape
import torch

case = Case(LayerShape({shape}), query_len={query_len}, dtype=torch.float16)
for launch in launches(case):
    if launch.kernel.__name__ in {kernels}:
        made = compile_launch(launch, {capability})
        assert made.tensor_cores, made
        assert made.shared_bytes <= SHARED_LIMIT[{capability}], made
        assert made.registers <= 255 and made.spill_bytes <= {spill}, made
        assert made.async_copies or launch.kernel.__name__ != "attend_kernel", made
        print(made)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "query_len", "kernels", "capability", "spill"),
    [
        ("32, 8, 128, 8, 8", 1, {"attend_kernel"}, 90, 64),
        ("32, 8, 128, 1, 8, 2", 1, {"attend_kernel"}, 80, 0),
        ("16, 4, 64, 4, 8", 1, {"absorb_kernel", "up_project_kernel"}, 100, 0),
    ],
)
def test_variants_compile_ahead_of_time(shape, query_len, kernels, capability, spill):
    program = PROGRAM.format(
        shape=shape, query_len=query_len, kernels=kernels, capability=capability, spill=spill
    )
    # A process of its own: in the interpreter, where other tests may be, nothing compiles.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Compiled(") == len(kernels)
