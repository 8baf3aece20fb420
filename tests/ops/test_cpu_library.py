"""The library of CPU kernels: its ops in PyTorch, when it is chosen, and what it loads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.test_spans import case_of
from tests.support.cases import random_codec
from tests.support.paging import paged_batch
from vllm_attentionpack.ops import cpu
from vllm_attentionpack.ops.cpu import library
from vllm_attentionpack.ops.select import select_ops

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name", ["cpu_attend", "cpu_store", "cpu_project", "cpu_unpack", "cpu_exact"]
)
def test_custom_ops_have_fakes(name):
    """PyTorch's own check: schema, mutation, fake tensors."""
    codec = random_codec(2, 2, 32)
    case = paged_batch(codec, 4, [40], [1], 16)
    plan = cpu._plan(codec, torch.bfloat16)
    table = plan.table(16)
    if name == "cpu_attend":
        codec, case, steps = case_of(cpu, pre_rope=5)
        (turns,) = steps.turns(codec.anchors)
        absorbed = cpu.absorb_query(case.query, codec, 0.2, turns)
        plan = cpu._plan(codec, torch.float32)
        rows = [turns.rows.size, turns.rows.first, turns.rows.stop]
        args = (absorbed.latent, plan.table(16), plan.widths, case.kv_cache, case.block_table, None)
        args += (case.context_lens, case.batch.query_start_loc, 16, 2, False, 32)
        args += (case.batch.num_tokens, turns.rows.row_starts, rows)
        args += (plan.own_basis, plan.own_mean, absorbed.own)
    elif name == "cpu_project":
        packed = plan.absorb.maps[0]
        x, out = torch.randn(2, 3, 1, 32), torch.empty(2, 3, 1, packed.width)
        args = ([x], torch.randn(32), [packed.matrix], [packed.scale], [packed.bounds], 0.5)
        angles = torch.randn(3, 12)
        args += (
            torch.tensor([2, 0, 2], dtype=torch.int32),
            angles.cos(),
            angles.sin(),
            True,
            [out],
        )
    elif name == "cpu_unpack":
        rank = codec.layout.groups[0].key.num_columns
        args = (case.kv_cache, case.block_table[0], table[0, 0], rank, 40, 16, True)
    elif name == "cpu_exact":
        pages, slots = torch.randn(5, 8, 2, 2, 32), torch.arange(6)[None]
        args = (case.query, pages, slots, slots < 4, case.batch.query_start_loc, 0.2)
    else:
        encode = plan.encode[0]["key"]
        latent = torch.randn(3, len(encode.step))
        args = (latent, encode.step, encode.weight, torch.arange(3), None)
        args += (table[0, 0], case.kv_cache, 16)
    op = getattr(torch.ops.attentionpack, name).default
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_chosen_by_default_on_a_cpu():
    name, ops, passed_over = select_ops("auto", torch.device("cpu"))
    assert (name, ops) == ("cpu", cpu)
    assert set(passed_over) == {"triton"}


def test_passed_over_on_other_devices():
    assert "CPU" in cpu.unavailable(torch.device("cuda"))


def test_says_so_where_the_kernels_are_missing(monkeypatch):
    """A package that was installed without a compiler runs on the reference ops and says why."""
    monkeypatch.setattr(library, "_MODULE", "vllm_attentionpack.ops.cpu._no_kernels")
    monkeypatch.delenv(library.LIBRARY_VARIABLE, raising=False)
    library._load.cache_clear()
    library.find_kernels.cache_clear()
    try:
        name, _, passed_over = select_ops("auto", torch.device("cpu"))
    finally:
        library._load.cache_clear()
        library.find_kernels.cache_clear()
    assert name == "reference"
    assert "compiler" in passed_over["cpu"]


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, "quantum")
    assert "quantum" in cpu.unavailable(torch.device("cpu"))


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_built_where_there_is_a_compiler():
    assert not isinstance(library.find_kernels(), str)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no /proc")
def test_one_openmp_runtime():
    """The kernels run on PyTorch's threads: a second runtime would have threads of its own."""
    script = """
from tests.support.cases import random_codec
from tests.support.paging import attend_codes, paged_batch
from vllm_attentionpack.ops import cpu

codec = random_codec(2, 2, 32)
case = paged_batch(codec, 4, [40], [1], 16)
attend_codes(cpu, codec, case, case.seq_lens, True)
print(open("/proc/self/maps").read())
"""
    # In a process of its own: other tests load libraries that bring a runtime along.
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    files = {line.split()[-1] for line in done.stdout.splitlines() if "/" in line}
    runtimes = [f for f in files if any(x in f.rsplit("/")[-1] for x in ("gomp", "iomp", "libomp"))]
    assert len(runtimes) == 1, runtimes
