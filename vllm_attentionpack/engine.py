"""What the package's own tools ask of the vLLM engines that they start."""

import gc
import os
from collections.abc import Mapping
from typing import Any

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


def shut_down(llm: Any) -> None:
    """Ends an engine and frees what it held in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
