"""What the package's own tools ask of the vLLM engines that they start."""

import gc
import inspect
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from vllm_attentionpack import plugin
from vllm_attentionpack.config import DISABLE_VARIABLE
from vllm_attentionpack.errors import ConfigError

if TYPE_CHECKING:
    from vllm import LLM

#: KV-cache bytes of an engine on a CPU. vLLM would take nine tenths of the machine's memory, which
#: it shares with everything else there; our tools need little.
CPU_KV_CACHE_BYTES = 1 << 30
_CPU_KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"


def engine_arguments(model: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `vllm.LLM`: what the user gave over our defaults."""
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {"model": model}
    if current_platform.is_cpu():
        arguments["enforce_eager"] = True  # compiling takes longer than most of our runs
        if not os.environ.get(_CPU_KV_CACHE_VARIABLE):
            arguments["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
    return arguments | dict(given)


def start(arguments: Mapping[str, Any]) -> "LLM":
    """Starts an engine.

    Args:
        arguments: of `vllm.LLM`, as from `engine_arguments`.

    Raises:
        ConfigError: no model is there, vLLM refuses it or an argument, or our backends are
            disabled.
    """
    model = arguments["model"]
    if model.startswith((".", "/", "~")) and not os.path.isdir(os.path.expanduser(model)):
        raise ConfigError(f"no model at '{model}'. Give the folder of a model, or its name.")
    per_kind = arguments.get("attention_config", {}).get("backend_per_kind", {})
    backends = {arguments.get("attention_backend"), *per_kind.values()}
    if backends & set(plugin.BACKENDS) and plugin.disabled():
        raise ConfigError(f"{DISABLE_VARIABLE} is 1, which turns this package off. Unset it.")
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    known = {*EngineArgs.__dataclass_fields__, *inspect.signature(LLM).parameters}
    if unknown := sorted(set(arguments) - known):
        raise ConfigError(
            f"vLLM has no engine argument {', '.join(map(repr, unknown))}. Correct the name or "
            "leave it out."
        )
    try:
        return LLM(**arguments)
    # What vLLM's configuration and the model hub raise. All else is no mistake in what was given,
    # or cannot be told from a defect: it keeps its traceback.
    except (ValidationError, OSError) as error:
        told = str(error)
        if isinstance(error, ValidationError):
            told = "; ".join(
                f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors()
            )
        raise ConfigError(
            f"vLLM does not start with the model '{model}' ({' '.join(told.split())}). Give the "
            "folder or the name of a model that vLLM serves, and engine arguments that it takes."
        ) from error


def shut_down(llm: Any) -> None:
    """Ends an engine and frees what it held in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
