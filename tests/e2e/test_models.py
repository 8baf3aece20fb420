"""Other architectures, dtypes, block sizes and head counts: exact pages against stock vLLM.

The log-probabilities of random models are all alike, so they are compared as numbers. What an error
in attention would do to them is measured too: by a cache that gives zeros.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.engines import TOKEN_IDS_ONLY, Engine, compacted
from tests.support.models import forced, random_prompts, save_llava, save_text_model
from tests.support.outputs import agreement, prompt_logprobs
from tests.support.packs import pack_of
from tests.support.pages import visual_bits
from vllm_attentionpack.attention.fingerprint import fingerprint
from vllm_attentionpack.codec.codec import Basis, LayerCodec, identity_codec
from vllm_attentionpack.codec.layout import KINDS
from vllm_attentionpack.packfile import save_pack

pytestmark = pytest.mark.engine

LENGTHS = (5, 33, 70, 150)
CHUNK = 24
NEW_TOKENS = 16
#: Of LLaVA: the token that stands for an image, and tokens per image.
IMAGE, IMAGE_TOKENS = 311, 16


@dataclass(frozen=True)
class Case:
    """A model and how it is served; together the cases meet every value once."""

    kind: str
    query_heads: int
    kv_heads: int
    head_size: int
    dtype: str
    block_size: int
    heads_per_group: int
    exact_prefill: bool
    engine: dict[str, Any] = field(default_factory=lambda: TOKEN_IDS_ONLY)

    def save(self, folder: Path) -> Path:
        settings = {
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
        }
        if self.kind == "llava":
            return save_llava(folder, **settings)
        if self.kind == "qwen2":  # has no head_dim of its own
            settings["hidden_size"] = self.query_heads * self.head_size
        return save_text_model(folder, self.kind, **settings)

    def prompts(self) -> list[dict[str, Any]]:
        prompts = random_prompts(LENGTHS)
        if self.kind == "llava":
            pixels = np.random.default_rng(1).integers(0, 256, (2, 56, 56, 3), dtype=np.uint8)
            images = [Image.fromarray(image) for image in pixels]
            for prompt, chosen in zip(prompts[1:], (images[:1], images, images[1:]), strict=True):
                prompt["prompt_token_ids"][10:10] = [IMAGE] * len(chosen)
                prompt["multi_modal_data"] = {"image": chosen}
        return prompts


CASES = [
    Case("llama", 4, 4, 32, "float32", 16, heads_per_group=2, exact_prefill=True),
    Case("qwen2", 4, 2, 64, "float16", 64, heads_per_group=1, exact_prefill=False),
    Case("qwen3", 4, 1, 128, "bfloat16", 32, heads_per_group=1, exact_prefill=True),
    # vLLM takes this one from Transformers
    Case("olmo2", 4, 2, 32, "float32", 16, heads_per_group=1, exact_prefill=False),
    Case("llava", 4, 2, 64, "bfloat16", 128, heads_per_group=2, exact_prefill=False, engine={}),
]


def exact_codec(case: Case) -> LayerCodec:
    """Keeps bfloat16 values as they are, in both modalities alike."""
    codec = identity_codec(case.kv_heads, case.head_size, case.heads_per_group)
    twice = [
        {
            kind: Basis(*(x.repeat(2, *[1] * (x.ndim - 1)) for x in basis.tensors().values()))
            for kind, basis in ((kind, getattr(group, kind).basis) for kind in KINDS)
        }
        for group in codec.groups
    ]
    return LayerCodec(codec.layout, twice)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
def test_exact_pages_give_the_dense_distribution(engines, case, tmp_path):
    model, prompts, sampling = case.save(tmp_path / "model"), case.prompts(), forced(NEW_TOKENS)
    stock = engines.get(model, dtype=case.dtype, **case.engine)
    dense = stock.generate(prompts, sampling)
    codec = exact_codec(case)
    layers = list(stock.kv_caches)
    save_pack(
        pack_of(lambda _: codec, fingerprint(stock.llm.model_config), layers), tmp_path / "pack"
    )
    engine = engines.get(
        model,
        dtype=case.dtype,
        block_size=case.block_size,
        **case.engine,
        **compacted(tmp_path / "pack", exact_prefill=case.exact_prefill),
    )
    assert list(engine.codecs) == layers
    assert engine.cache_config.block_size == case.block_size

    with engine.at_most(CHUNK):
        outputs = engine.generate(prompts, sampling)
        with engine.forgetting():
            wrong = engine.generate(prompts, sampling)

    expected = prompt_logprobs(dense)
    assert len(expected) >= sum(LENGTHS) - len(LENGTHS)
    effect = np.abs(prompt_logprobs(wrong) - expected).mean()
    error = np.abs(prompt_logprobs(outputs) - expected)
    assert effect > 0.5
    # Keys and values are rounded to bfloat16 in the cache, in every dtype: 8 bits of 24 or 11.
    assert error.mean() < effect / 40
    assert error.max() < effect / 8
    # Generated tokens: the same but for near ties, after which contexts differ. Logits of random
    # weights in bfloat16 are in steps of a sixteenth, so ties come soon.
    found = agreement(dense, outputs)
    assert found.agreed >= NEW_TOKENS
    assert all(gap < effect / 8 for gap in found.gaps)
    assert found.noise < effect / 8
    if case.kind == "llava":
        assert_images_are_known(engine, prompts)


def assert_images_are_known(engine: Engine, prompts: list[dict[str, Any]]) -> None:
    assert engine.llm.reset_prefix_cache()
    request_id = engine.add(prompts[2], forced(2))
    with engine.at_most(CHUNK):
        while engine.request(request_id).num_output_tokens == 0:
            engine.step()
    request = engine.request(request_id)
    expected = torch.tensor(request.prompt_token_ids) == IMAGE
    assert expected.sum() == 2 * IMAGE_TOKENS
    stored = visual_bits(engine, engine.block_ids(request_id), len(expected))
    assert (stored == expected).all()
    engine.finish()
