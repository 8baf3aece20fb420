"""Registration: idempotent, switched off by the environment, loud when it fails, harmless else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_attentionpack import compat, plugin
from vllm_attentionpack.compat.selection import PER_KIND_OPTION
from vllm_attentionpack.config import DISABLE_VARIABLE

MODEL = Path(__file__).parents[2] / "examples" / "reference-vlm" / "model"


@pytest.fixture
def names(monkeypatch) -> dict[str, str]:
    """An empty registry in the place of vLLM's; what gets registered there."""
    registered: dict[str, str] = {}

    class Registry:
        __members__ = registered

        @staticmethod
        def register(name: str, path: str) -> None:
            assert name not in registered
            registered[name] = path

    monkeypatch.setattr("vllm.v1.attention.backends.registry.AttentionBackendEnum", Registry)
    monkeypatch.setattr(compat, "install", lambda: None)
    monkeypatch.delenv(DISABLE_VARIABLE, raising=False)
    return registered


def test_registers_both_backends_once(names):
    plugin.register()
    plugin.register()
    assert names == plugin.BACKENDS


def test_is_switched_off_by_the_environment(names, monkeypatch, caplog):
    monkeypatch.setenv(DISABLE_VARIABLE, "1")
    plugin.register()
    assert names == {}
    assert f"disabled by {DISABLE_VARIABLE}=1" in caplog.text


def test_leaves_the_names_unknown_when_the_hooks_fail(names, monkeypatch, caplog):
    def fail() -> None:
        raise RuntimeError("vLLM moved it")

    monkeypatch.setattr(compat, "install", fail)
    plugin.register()
    assert names == {}, "a name without the hooks would be served dense on CPU"
    assert "vLLM moved it" in caplog.text


def test_leaves_the_names_unknown_when_vllm_cannot_register(names, monkeypatch, caplog):
    from vllm.platforms.interface import Platform

    monkeypatch.setattr(Platform, "get_attn_backend_cls", lambda cls, which: "")
    plugin.register()
    assert names == {}
    assert "lacks Platform.get_attn_backend_cls" in caplog.text
    assert "works with vLLM 0.32 and 0.33" in caplog.text


def test_importing_the_entry_point_imports_no_vllm():
    code = (
        "import sys, vllm_attentionpack.plugin; "
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('vllm', 'torch')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_the_options_of_vllm_know_the_backends():
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    plugin.register()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    per_kind = PER_KIND_OPTION.removeprefix("--attention-config ").strip("'")
    arguments = parser.parse_args(["--model", "x", "--attention-config", per_kind])
    chosen = arguments.attention_config.backend_per_kind["full_attention"]
    assert chosen.name == plugin.BACKEND
    arguments = parser.parse_args(["--model", "x", "--attention-backend", plugin.BACKEND])
    assert arguments.attention_backend == plugin.BACKEND


REASONS = {"disabled": f"disabled by {DISABLE_VARIABLE}=1", "import error": "half an installation"}


@pytest.mark.slow
@pytest.mark.parametrize("how", REASONS)
def test_vllm_refuses_the_backend_of_a_broken_installation(how, tmp_path):
    """vLLM only logs an entry point that does not load; selecting the backend must not go on."""
    environment = dict(os.environ)
    if how == "disabled":
        environment[DISABLE_VARIABLE] = "1"
    else:
        (tmp_path / "vllm_attentionpack").mkdir()
        source = f"raise ImportError({REASONS[how]!r})"
        (tmp_path / "vllm_attentionpack" / "__init__.py").write_text(source)
        environment["PYTHONPATH"] = str(tmp_path)
    code = (
        "from vllm.engine.arg_utils import EngineArgs\n"
        f"args = EngineArgs(model={str(MODEL)!r}, attention_backend='ATTENTIONPACK')\n"
        "args.create_engine_config()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Unknown attention backend: 'ATTENTIONPACK'" in done.stderr
    assert REASONS[how] in done.stdout + done.stderr
