"""What vLLM has no seam for, as guarded changes at run time; `patches/` holds the same as diffs.

Each module states symptom, cause, and when to remove it. All of them pass through untouched when
neither of our backends is selected, and step aside where the installed vLLM needs no help.

    selection       CPU honours a selected backend; refusals become one clear message
    layer_spec      bytes per token that differ between layers
    modality        which tokens of a step are visual
    rope_positions  rotary positions of a step's requests
    engine_args     the start-up check in the main process
    autograd        gradients through a loaded model, while calibration asks for them
    pickling        a spawned process can read a configuration that selects our backends
    features        what the installed vLLM must offer
"""

from vllm_attentionpack.compat import engine_args, pickling, selection
from vllm_attentionpack.compat.features import (
    check_features,
    missing_to_register,
    version_message,
)
from vllm_attentionpack.compat.modality import modality_mask
from vllm_attentionpack.compat.rope_positions import positions_every

__all__ = [
    "check_features",
    "install",
    "missing_to_register",
    "modality_mask",
    "positions_every",
    "version_message",
]


def install() -> None:
    """Installs the hooks that only wait for a selection of our backends. Idempotent, cheap.

    The hooks on the model side import half of vLLM; `selection` installs them when one of our
    backends is resolved, which vLLM does before it builds the first attention layer.
    """
    selection.install()
    engine_args.install()
    pickling.install()
