"""One vLLM engine at a time, whichever tests share a process."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.support.engines import Engines


@pytest.fixture(scope="session")
def engines() -> "Iterator[Engines]":
    from tests.support.engines import Engines  # loads vLLM, which most tests do without

    # One thread: on a shared machine a second one spends its time waiting for the first.
    torch.set_num_threads(1)
    pool = Engines()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def no_engine(engines: "Engines") -> None:
    """For tests that start engines of their own: what vLLM keeps per process is free for them."""
    engines.close()
