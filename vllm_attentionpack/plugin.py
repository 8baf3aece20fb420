"""The `vllm.general_plugins` entry point: makes `--attention-backend ATTENTIONPACK` known to vLLM.

vLLM calls `register` in every process. What vLLM does when this module cannot be imported, or when
the plugin is disabled: it logs, goes on, and refuses the backend's name as unknown. A request for
compaction therefore never ends in a dense cache.
"""

import copyreg
import logging
import os
from typing import Any

from vllm_attentionpack.config import DISABLE_VARIABLE

#: Below vLLM's own logger, so that its handlers and level apply; its module need not be imported.
logger = logging.getLogger("vllm.attentionpack")

#: Attends on compacted pages.
BACKEND = "ATTENTIONPACK"
#: Calibration: the platform's default backend plus gathering of statistics.
STATISTICS_BACKEND = "ATTENTIONPACK_STATS"

_PATHS = {
    BACKEND: "vllm_attentionpack.attention.backend.AttentionPackBackend",
    STATISTICS_BACKEND: "vllm_attentionpack.calibrate.backend.StatisticsBackend",
}


def register() -> None:
    """Registers both backends and installs what vLLM has no seam for. Idempotent.

    Never raises because of what the installed vLLM lacks: models served with other backends must
    not suffer. Where the hooks that guard a selection of our backends cannot be installed at all,
    the names stay unregistered, so that vLLM itself refuses them.
    """
    if os.environ.get(DISABLE_VARIABLE) == "1":
        logger.info("vllm-attentionpack is disabled by %s=1.", DISABLE_VARIABLE)
        return
    from vllm_attentionpack import compat

    if missing := compat.missing_to_register():
        logger.error(
            "vllm-attentionpack cannot register its attention backends: %s",
            compat.version_message(missing),
        )
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    compat.install()
    for name, path in _PATHS.items():
        if name not in AttentionBackendEnum.__members__:
            AttentionBackendEnum.register(name, path)
    # A member added at run time is pickled by value, which a spawned process cannot look up before
    # it has loaded its plugins; and it unpickles the configuration first. Remove when vLLM loads
    # plugins before that.
    copyreg.pickle(AttentionBackendEnum, _reduce_backend)


def _reduce_backend(member: Any) -> Any:
    if member.name in _PATHS:
        return _restore_backend, (member.name,)
    return member.__class__, (member.value,)


def _restore_backend(name: str) -> Any:
    register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[name]
