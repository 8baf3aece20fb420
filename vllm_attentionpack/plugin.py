"""The `vllm.general_plugins` entry point: makes `--attention-backend ATTENTIONPACK` known to vLLM.

vLLM calls `register` in every process. What vLLM does when this module cannot be imported, or when
the plugin is disabled: it logs, goes on, and refuses the backend's name as unknown. A request for
compaction therefore never ends in a dense cache.
"""

import logging
import os

from vllm_attentionpack.config import DISABLE_VARIABLE
from vllm_attentionpack.errors import UnsupportedVersionError

#: Below vLLM's own logger, so that its handlers and level apply; its module need not be imported.
logger = logging.getLogger("vllm.attentionpack")

#: Attends on compacted pages.
BACKEND = "ATTENTIONPACK"
#: Calibration: the platform's default backend plus gathering of statistics.
STATISTICS_BACKEND = "ATTENTIONPACK_STATS"

#: vLLM's name for the layers that can be compacted, where backends are chosen by kind.
FULL_ATTENTION = "full_attention"

#: Enum member -> class path of every backend that we register.
BACKENDS = {
    BACKEND: "vllm_attentionpack.attention.backend.AttentionPackBackend",
    STATISTICS_BACKEND: "vllm_attentionpack.calibrate.backend.StatisticsBackend",
}


def register() -> None:
    """Registers both backends and installs what vLLM has no seam for. Idempotent; never raises.

    Models served with other backends must not suffer from us, so a failure is logged and the names
    stay unregistered: vLLM then refuses them as unknown. Interfaces that only serving needs are
    looked at when one of our backends is selected, which raises `UnsupportedVersionError`.
    """
    if disabled():
        # Not info: vLLM loads plugins before it has set up its log, which drops anything lower.
        logger.warning("vllm-attentionpack is disabled by %s=1.", DISABLE_VARIABLE)
        return
    try:
        _register()
    # Whatever it is: vLLM calls plugins unguarded.
    except Exception:
        logger.exception("vllm-attentionpack could not register its attention backends.")


def disabled() -> bool:
    """Whether the environment asks to register nothing."""
    return os.environ.get(DISABLE_VARIABLE) == "1"


def _register() -> None:
    from vllm_attentionpack import compat

    if missing := compat.missing_to_register():
        raise UnsupportedVersionError(compat.version_message(missing))
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    # Before the names: a name without the hooks would be ignored on CPU and served dense.
    compat.install()
    for name, path in BACKENDS.items():
        if name not in AttentionBackendEnum.__members__:
            AttentionBackendEnum.register(name, path)
