import pytest
import torch

from tests.support.cpu import INSTRUCTION_SETS, instruction_set
from vllm_attentionpack.ops import cpu
from vllm_attentionpack.ops.cpu import library


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request):
    """Each instruction set of the CPU kernels in turn."""
    with instruction_set(request.param):
        assert cpu.unavailable(torch.device("cpu")) is None
        assert library.kernels().name == request.param
        yield request.param
