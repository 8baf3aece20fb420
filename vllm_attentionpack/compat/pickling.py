"""Sending a configuration that selects our backends to another process.

Symptom: a spawned engine process dies with "'vllm_attentionpack...' is not a valid
    AttentionBackendEnum" (spawning is the rule on CPU and wherever CUDA is already initialised).
Cause: an enum member is pickled by value, and the process unpickles its configuration before it
    loads plugins, so a member that a plugin added is not there yet.
Remove when: vLLM restores such members (`unpickle-registered-backends.patch` under `patches/`).
"""

import copyreg
from typing import Any


def install() -> None:
    """Makes unpickling one of our backends register it first. Idempotent."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if "__reduce_ex__" not in vars(AttentionBackendEnum):
        copyreg.pickle(AttentionBackendEnum, _reduce)


def _reduce(member: Any) -> Any:
    from vllm_attentionpack.plugin import BACKENDS

    if member.name in BACKENDS:
        return _restore, (member.name,)
    return member.__class__, (member.value,)


def _restore(name: str) -> Any:
    from vllm_attentionpack.plugin import register

    register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[name]
