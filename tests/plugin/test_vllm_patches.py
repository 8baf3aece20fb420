"""vLLM with the patches applied behaves like vLLM with our hooks, on both model runners."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugin.overlay import PATCHES, patched_vllm
from vllm_attentionpack.plugin import BACKEND

ROOT = Path(__file__).parents[2]
IMAGE_TOKEN = 262
RUNNERS = {"v1": "0", "v2": "1"}


@pytest.fixture(scope="module")
def patched(tmp_path_factory) -> Path:
    return patched_vllm(tmp_path_factory.mktemp("patched"), list(PATCHES))


def run(*arguments: str, path: Path | None, **environment: str) -> str:
    """Runs Python on the repository, before it `path` where given; returns the last line."""
    found = [str(p) for p in (path, ROOT) if p]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(found),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.engine
@pytest.mark.parametrize("runner", RUNNERS)
def test_patched_vllm_behaves_like_the_hooks(runner, patched):
    if runner == "v2" and importlib.util.find_spec("triton") is None:
        pytest.skip("the newer model runner needs triton")
    seen = {}
    for name, path in {"hooks": None, "patches": patched}.items():
        seen[name] = json.loads(
            run(
                "tests/plugin/watch_engine.py",
                path=path,
                VLLM_USE_V2_MODEL_RUNNER=RUNNERS[runner],
                TRITON_INTERPRET="1",
            )
        )
    assert seen["hooks"].pop("hooked") and not seen["patches"].pop("hooked")
    assert seen["hooks"] == seen["patches"]
    report = seen["hooks"]
    assert report["v2"] == (runner == "v2")
    assert report["idle"] == []
    assert len(report["layers"]) == len(set(report["layers"])) == 4
    for ids, visual in report["steps"]:
        images = [i for i, token in enumerate(ids) if token == IMAGE_TOKEN]
        assert visual == (images or None)
    counts = [len(visual or ()) for _, visual in report["steps"]]
    assert sum(counts) == 3 * 4 and 0 in counts, "three images of four tokens, and text steps"
    assert any(count % 4 for count in counts), "an image is split over two steps"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["hooks", "patches"])
def test_a_fresh_process_unpickles_the_backend(place, patched):
    """As a spawned engine does, which gets its configuration before it loads plugins."""
    make = (
        "import pickle; from vllm.plugins import load_general_plugins; load_general_plugins(); "
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E; "
        f"print(pickle.dumps([E.{BACKEND}, E.CPU_ATTN, E.CUSTOM]).hex())"
    )
    path = patched if place == "patches" else None
    text = run("-c", make, path=path)
    ours = b"vllm_attentionpack" in bytes.fromhex(text)
    assert ours == (place == "hooks"), "a patched vLLM needs no reducer of ours"
    show = "import pickle, sys; print([m.name for m in pickle.loads(bytes.fromhex(sys.argv[1]))])"
    assert run("-c", show, text, path=path) == str([BACKEND, "CPU_ATTN", "CUSTOM"])


SELECT = """
import json, sys, torch
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm_attentionpack.attention.backend import AttentionPackBackend
good = AttentionSelectorConfig(64, torch.bfloat16, "auto", 128)
bad = good._replace(has_sliding_window=True)
original = CpuPlatform.get_attn_backend_cls.__wrapped__
def ask(function, name, config):
    backend = AttentionBackendEnum[name] if name else None
    try:
        return function(CpuPlatform, backend, config, num_heads=4)
    except ValueError as error:
        return type(error).__name__
hooked = CpuPlatform.get_attn_backend_cls.__func__
print(json.dumps({
    place: [ask(f, n, c) for n in ("ATTENTIONPACK", "FLASH_ATTN", "TORCH_SDPA", "CPU_ATTN", None)
            for c in (good, bad)]
    for place, f in {"vllm": original, "hooked": hooked}.items()
}))
"""


@pytest.mark.slow
def test_the_cpu_platform_honours_the_selection(patched):
    bare = json.loads(run("-c", SELECT, path=None))
    with_patch = json.loads(run("-c", SELECT, path=patched))
    assert bare["hooked"] == with_patch["hooked"]
    ours, default = bare["hooked"][0], bare["vllm"][-1]
    assert ours == "vllm_attentionpack.attention.backend.AttentionPackBackend"
    assert bare["hooked"] == [ours, "UnsupportedModelError"] + [default] * 8
    assert bare["vllm"] == [default] * 10, "else the hook is no longer needed"
    assert with_patch["vllm"] == [ours, "ValueError"] + [default] * 8


def test_pickling_leaves_other_backends_alone():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_attentionpack.plugin import register

    register()
    for member in (AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum[BACKEND]):
        assert pickle.loads(pickle.dumps(member)) is member
