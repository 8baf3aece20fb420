"""vLLM plugin that serves models from a compacted KV cache."""

__version__ = "0.1.0"
