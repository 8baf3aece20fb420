"""The CPU kernels; everything else is in pyproject.toml.

They are plain C++ behind a C interface: PyTorch is not needed to build them, and a machine without
a compiler gets the package without them (`optional`).
"""

import os
from glob import glob

from setuptools import Extension, setup

SOURCES = ["dispatch", "scalar", "avx2", "avx512", "avx512_vnni"]
FOLDER = "vllm_attentionpack/ops/cpu/csrc"
# For `scripts/test.sh --sanitize`, which builds with -fsanitize.
EXTRA = os.environ.get("ATTENTIONPACK_CFLAGS", "").split()

setup(
    ext_modules=[
        Extension(
            "vllm_attentionpack.ops.cpu._kernels",
            sources=[f"{FOLDER}/{name}.cpp" for name in SOURCES],
            depends=sorted(glob(f"{FOLDER}/*.h") + glob(f"{FOLDER}/*.inc")),
            language="c++",
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fopenmp",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-Wno-psabi",
                "-Wno-maybe-uninitialized",
                "-Wno-uninitialized",
                *EXTRA,
            ],
            # -fopenmp is for the compiler only: PyTorch has loaded an OpenMP runtime already, and
            # a second one would have threads of its own.
            extra_link_args=EXTRA,
            optional=True,
        )
    ]
)
