"""The check of the GPU kernels, which must run where vLLM is not installed."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")

WITHOUT_VLLM = """
import sys
sys.modules["vllm"] = None  # whoever imports it fails
import vllm_attentionpack.bench.gpu_check
from vllm_attentionpack.ops.triton import attend, merge, project, store
print("imported")
"""


def test_the_kernels_and_their_check_need_no_vllm():
    done = subprocess.run([sys.executable, "-c", WITHOUT_VLLM], capture_output=True, text=True)
    assert done.stdout == "imported\n", done.stderr[-2000:]
