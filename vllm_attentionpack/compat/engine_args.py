"""The start-up check in the main process.

Symptom: a wrong pack shows up in a worker's traceback, after the model was loaded.
Cause: vLLM calls no plugin between the finished configuration and the start of its processes.
    `Platform.check_and_update_config` runs earlier (block size and cache dtype are not final) and
    inside pydantic, which wraps an error into a dump of all arguments.
Remove when: vLLM lets a backend validate the finished `VllmConfig`.
"""

import logging
import multiprocessing
from collections.abc import Callable, Mapping
from typing import Any

from vllm_attentionpack.compat.features import check_features
from vllm_attentionpack.compat.wrap import wrap_method
from vllm_attentionpack.config import SECTION

logger = logging.getLogger("vllm.attentionpack")


def install() -> None:
    """Checks each finished configuration that selects the compacting backend. Idempotent.

    Child processes (engines, workers) get a configuration that passed the check.
    """
    if multiprocessing.parent_process() is not None:
        return
    from vllm.engine.arg_utils import EngineArgs

    wrap_method(EngineArgs, "create_engine_config", _make)


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        from vllm_attentionpack.plugin import BACKEND, BACKENDS

        selected = selected_backends(vllm_config)
        if BACKEND in selected:
            check_features()
            from vllm_attentionpack.attention import preflight

            preflight.check(vllm_config)
        elif _has_section(vllm_config.additional_config) and not selected & BACKENDS.keys():
            logger.warning(
                "additional-config has a section '%s', but no layer is served from it: the KV "
                "cache is dense. Pass --attention-backend %s, or drop the section.",
                SECTION,
                BACKEND,
            )
        return vllm_config

    return create_engine_config


def _has_section(additional_config: Any) -> bool:
    return isinstance(additional_config, Mapping) and SECTION in additional_config


def selected_backends(vllm_config: Any) -> set[str]:
    """Names of all attention backends that a configuration asks for."""
    attention = vllm_config.attention_config
    chosen = [attention.backend, *attention.backend_per_kind.values()]
    return {backend.name for backend in chosen if backend is not None}
