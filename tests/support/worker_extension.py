"""Mixed into vLLM's workers (`--worker-extension-cls`): looks into their process from outside."""

from typing import Any


class Inspection:
    """Methods for `collective_rpc`; what they return can be sent as JSON."""

    vllm_config: Any

    def measured_cache(self) -> dict[str, Any]:
        """What this rank's KV caches take in memory, by layer.

        Returns:
            `bytes`: of each layer's cache, its share of shared memory; `tokens`: its slots;
            `allocated`: bytes behind all of them; `content`: bytes per token that the codec fills.
        """
        layers = self.vllm_config.compilation_config.static_forward_context
        cached = {name: layer for name, layer in layers.items() if hasattr(layer, "kv_cache")}
        storages = [layer.kv_cache.untyped_storage() for layer in cached.values()]
        return {
            "bytes": {
                name: layer.kv_cache.numel() * layer.kv_cache.element_size()
                for name, layer in cached.items()
            },
            "tokens": {
                name: layer.kv_cache.shape[0] * layer.kv_cache.shape[2]
                for name, layer in cached.items()
            },
            "allocated": sum({s.data_ptr(): s.nbytes() for s in storages}.values()),
            "content": {
                name: layer.impl.codec.layout.content_bytes_per_token
                for name, layer in cached.items()
                if hasattr(layer, "impl")  # an exact cache has none
            },
        }

    def count_stored_tokens(self) -> None:
        """Starts counting from zero."""
        layers = self.vllm_config.compilation_config.static_forward_context
        ops = next(layer.impl.state.ops for layer in layers.values() if hasattr(layer, "impl"))
        self._stored = {"tokens": 0, "visual": 0}
        if not hasattr(ops.store_kv, "counted"):
            ops.store_kv = self._counting(ops.store_kv)

    def stored_tokens(self) -> dict[str, int]:
        """Tokens that were encoded since `count_stored_tokens`, summed over layers."""
        return self._stored

    def _counting(self, store_kv: Any) -> Any:
        def counting(
            key: Any, value: Any, kv_cache: Any, slots: Any, visual: Any, *rest: Any
        ) -> None:
            store_kv(key, value, kv_cache, slots, visual, *rest)
            used = slots >= 0
            self._stored["tokens"] += int(used.sum())
            self._stored["visual"] += 0 if visual is None else int((visual & used).sum())

        counting.counted = True  # type: ignore[attr-defined]
        return counting
