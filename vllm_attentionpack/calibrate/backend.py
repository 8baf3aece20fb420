"""The attention backend ATTENTIONPACK_STATS: the platform's own one, watched.

It attends exactly as the platform's default and shows each step's queries, keys and values to the
recorder that calibration has put on the layer. Layers without a recorder are served as usual, so
the start-up of the engine (profiling, warm-up) leaves no trace in the statistics.

A step whose metadata can attend by itself (`evaluate.simulate.replay`) is left to it: that is how
codecs are compared inside one running engine.
"""

from functools import cache
from typing import Any

from vllm_attentionpack.errors import ConfigError
from vllm_attentionpack.evaluate.simulate.step import SimulatedStep
from vllm_attentionpack.plugin import STATISTICS_BACKEND

#: The attribute of an attention layer that holds its recorder.
RECORDER = "attentionpack_recorder"


class StatisticsBackend:
    """What `statistics_backend_path` adds to a backend class.

    By itself it is only the name that the registry knows: the plugin's hook on the platform's
    selection puts a class built on the platform's default in its place.
    """

    @staticmethod
    def get_name() -> str:
        return STATISTICS_BACKEND

    @staticmethod
    def get_impl_cls() -> type:
        raise ConfigError(
            f"the attention backend {STATISTICS_BACKEND} was selected without the hooks of "
            "vllm_attentionpack. It serves calibration only: use 'attentionpack calibrate'."
        )


class _Watched:
    """Goes before an `AttentionImpl` class: shows what its `forward` is given."""

    def forward(
        self,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        output: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if isinstance(attn_metadata, SimulatedStep):
            return attn_metadata.attend(layer, query, key, value, output)
        recorder = getattr(layer, RECORDER, None)
        if recorder is not None and attn_metadata is not None:
            recorder.record(query, key, value, attn_metadata.num_actual_tokens)
        return super().forward(  # type: ignore[misc]
            layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
        )


@cache
def statistics_backend_path(default_path: str) -> str:
    """The importable path of the watched version of a backend class.

    Args:
        default_path: `module.Class` of the platform's default `AttentionBackend`.
    """
    from vllm.utils.import_utils import resolve_obj_by_qualname

    default = resolve_obj_by_qualname(default_path)
    impl = default.get_impl_cls()
    # Subclasses, since vLLM's own code asks isinstance(layer.impl, ...) of its defaults.
    watched = type(f"Watched{impl.__name__}", (_Watched, impl), {})
    name = f"Watched{default.__name__}"
    backend = type(
        name,
        (StatisticsBackend, default),
        {"get_impl_cls": staticmethod(lambda: watched), "__module__": __name__},
    )
    globals()[name] = backend
    return f"{__name__}.{name}"
