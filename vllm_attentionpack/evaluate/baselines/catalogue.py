"""All baselines by name, in the order of their bytes."""

from vllm_attentionpack.evaluate.baselines.oscar import Oscar
from vllm_attentionpack.evaluate.baselines.request_svd import RequestSvd
from vllm_attentionpack.evaluate.baselines.scalar import (
    BFloat16,
    Fp8PerTensor,
    Int4PerTokenHead,
    Int8PerTokenHead,
)
from vllm_attentionpack.evaluate.baselines.turboquant import TurboQuant
from vllm_attentionpack.evaluate.simulate.capture import Captured
from vllm_attentionpack.evaluate.simulate.codec import (
    CacheShape,
    ExactTokens,
    SimulatedCodec,
)

#: Fewest layers for which vLLM's dense boundary layers of TurboQuant leave any compressed.
_LAYERS_WITH_BOUNDARY = 5


def baselines(
    shape: CacheShape, captured: "list[Captured]", exact: ExactTokens
) -> dict[str, SimulatedCodec]:
    """Every baseline that the shape allows.

    Args:
        shape: of the cache.
        captured: calibration tokens of each layer, for OSCAR.
        exact: OSCAR's exact tokens.
    """
    codecs: dict[str, SimulatedCodec] = {
        "bf16": BFloat16(shape),
        "fp8 e4m3 per tensor": Fp8PerTensor(shape),
        "int8 per token-head": Int8PerTokenHead(shape),
        "int4 per token-head": Int4PerTokenHead(shape),
        "TurboQuant k8v4": TurboQuant(shape, 8, 4, norm_correction=False),
        "TurboQuant 4bit": TurboQuant(shape, 4, 4, norm_correction=True),
        "TurboQuant 3bit": TurboQuant(shape, 3, 3, norm_correction=True),
        "TurboQuant 4bit, Lloyd-Max values": TurboQuant(shape, 4, 4, True, lloyd_values=True),
        "TurboQuant 3bit, Lloyd-Max values": TurboQuant(shape, 3, 3, True, lloyd_values=True),
    }
    if len(shape.layer_names) >= _LAYERS_WITH_BOUNDARY:
        codecs["TurboQuant 3bit, 2 + 2 layers dense"] = TurboQuant(
            shape, 3, 3, norm_correction=True, exact_layers=2
        )
    queries = [layer.query_second for layer in captured]
    samples = [(layer.key, layer.value) for layer in captured]
    name = f"OSCAR INT2, {exact.sinks} + {exact.recent} exact"
    codecs[name] = Oscar(shape, queries, samples, exact)
    if any(layer.visual.any() for layer in captured):
        for rank in (64, 32, 16):
            codecs[f"per-request SVD {rank}/{rank}"] = RequestSvd(shape, rank, rank)
    return codecs
