"""A KV connector that moves whole compacted blocks and knows nothing of exact tokens."""

from types import SimpleNamespace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector


class CompactedBlocks(ExampleConnector, SupportsHMA):
    """vLLM's example, which stores blocks as files, for a model with two KV-cache groups."""

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        layers = forward_context.no_compile_layers
        compacted = {name: layer for name, layer in layers.items() if hasattr(layer, "impl")}
        super().start_load_kv(
            SimpleNamespace(
                no_compile_layers=compacted, attn_metadata=forward_context.attn_metadata
            ),
            **kwargs,
        )

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, None]:
        return False, None
