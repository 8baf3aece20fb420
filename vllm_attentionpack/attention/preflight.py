"""Checks of the whole configuration before vLLM starts its processes."""

from typing import Any


def check(vllm_config: Any) -> None:
    """Raises one of our errors when the configuration cannot be served from a compacted cache."""
