"""These tests run the GPU kernels in Triton's interpreter, on CPU tensors."""

import os

import pytest


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") != "1":
        # The variable counts when Triton is imported, which other tests do before.
        skip = pytest.mark.skip(reason="needs TRITON_INTERPRET=1 (a phase of scripts/test.sh)")
        for item in items:
            if "/ops/triton/" in str(item.path):
                item.add_marker(skip)
