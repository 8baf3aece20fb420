"""Serves a few prompts on the reference model behind a stand-in backend and reports what it saw.

Run as a script; the last line of its output is one JSON object:

    v2       whether the newer model runner served
    hooked   whether the hooks of `compat` had anything to do
    layers   names of the layers whose spec the backend was asked for
    idle     visual tokens seen before the first request (profiling, warm-up)
    steps    for every forward with requests [token ids, indices of the visual tokens]
    outputs  the generated token ids
"""

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).parents[2] / "examples" / "reference-vlm"
FIRST_LAYER = "language_model.model.layers.0.self_attn.attn"


#: Small steps: an image is split over two of them.
ENGINE: dict[str, Any] = {
    "model": str(REFERENCE / "model"),
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 12,
}


def chats() -> list[list[dict[str, Any]]]:
    """A question about two images, one about none, and one about one."""
    from PIL import Image

    def ask(*images: int) -> list[dict[str, Any]]:
        files = [REFERENCE / "images" / "heldout" / f"{i:03}.png" for i in images]
        content: list[dict[str, Any]] = [
            {"type": "image_pil", "image_pil": Image.open(file)} for file in files
        ]
        return [{"role": "user", "content": [*content, {"type": "text", "text": "Which one?"}]}]

    return [ask(0, 1), ask(), ask(2)]


def allow_second_runner() -> None:
    """Lets vLLM for CPU accept a Triton without CPU backend; the interpreter runs the kernels."""
    import triton.backends

    driver = types.SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)


def stand_in(masks: list[list[int] | None], layers: list[str]) -> types.ModuleType:
    """A module in the place of `attention.backend`: dense attention that notes what it is told."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

    from vllm_attentionpack import compat

    class Impl(CPUAttentionBackendImpl):
        def forward(self, layer: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
            mask = compat.modality_mask(query.shape[0], query.device)
            if layer.layer_name == FIRST_LAYER:
                masks.append(None if mask is None else mask.nonzero().flatten().tolist())
            else:
                assert masks[-1] == (None if mask is None else mask.nonzero().flatten().tolist())
            return super().forward(layer, query, *args, **kwargs)

    class AttentionPackBackend(CPUAttentionBackend):
        @staticmethod
        def get_impl_cls() -> type:
            return Impl

        @classmethod
        def customize_layer_spec(cls, layer: Any, spec: Any, vllm_config: Any) -> Any:
            layers.append(layer.layer_name)
            return spec

    module = types.ModuleType("vllm_attentionpack.attention.backend")
    module.AttentionPackBackend = AttentionPackBackend  # type: ignore[attr-defined]
    return module


def main() -> dict[str, Any]:
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        allow_second_runner()
    import vllm_attentionpack.attention.preflight as preflight

    preflight.check = lambda vllm_config: None  # the stand-in needs no pack
    masks: list[list[int] | None] = []
    layers: list[str] = []
    from vllm import LLM, SamplingParams

    module = stand_in(masks, layers)
    sys.modules[module.__name__] = module

    llm = LLM(
        **ENGINE,
        attention_backend="ATTENTIONPACK",
    )
    idle = [mask for mask in masks if mask]
    masks.clear()
    ids: list[list[int]] = []

    def note_ids(model: Any) -> None:
        embed = model.embed_input_ids

        def embed_input_ids(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
            ids.append(input_ids.tolist())
            return embed(input_ids, *args, **kwargs)

        model.embed_input_ids = embed_input_ids

    llm.apply_model(note_ids)

    outputs = llm.chat(chats(), SamplingParams(max_tokens=3, temperature=0), use_tqdm=False)
    assert len(ids) == len(masks)
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionBackend

    patched = "is_multimodal" in ForwardContext.__dataclass_fields__
    assert patched == hasattr(AttentionBackend, "customize_layer_spec")
    return {
        "v2": llm.llm_engine.vllm_config.use_v2_model_runner,
        "hooked": not patched,
        "layers": layers,
        "idle": idle,
        "steps": list(zip(ids, masks, strict=True)),
        "outputs": [list(output.outputs[0].token_ids) for output in outputs],
    }


if __name__ == "__main__":
    print(json.dumps(main()))
