"""The dense engine's answers, packs of the reference VLM, and one engine at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import Engine, Engines, compacted
from tests.support.packs import identity_pack
from tests.support.reference import CALIBRATION_DATA, MODEL, Question, questions
from vllm_attentionpack.packfile import Fingerprint, save_pack

#: Every second held-out question: all kinds are among them.
STRIDE = 2
MAX_ANSWER_TOKENS = 24


@pytest.fixture(scope="session")
def greedy() -> Any:
    """Sampling parameters of an answer."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS, logprobs=5)


@dataclass(frozen=True)
class Dense:
    """What vLLM does with the reference VLM without us.

    Attributes:
        questions: the held-out ones that the tests ask.
        outputs: its greedy answers.
        fingerprint: of the model.
        layer_names: its attention layers.
        kv_tokens: capacity of its KV cache in tokens.
        kv_bytes: bytes of its KV cache.
    """

    questions: list[Question]
    outputs: list[Any]
    fingerprint: Fingerprint
    layer_names: list[str]
    kv_tokens: int
    kv_bytes: int

    @property
    def prompts(self) -> list[dict[str, Any]]:
        return [question.prompt for question in self.questions]


@pytest.fixture(scope="session")
def dense(engines: Engines, greedy: Any) -> Dense:
    from vllm_attentionpack.attention.fingerprint import fingerprint

    engine = engines.get(MODEL)
    asked = questions(engine.llm)[::STRIDE]
    return Dense(
        questions=asked,
        outputs=engine.generate([question.prompt for question in asked], greedy),
        fingerprint=fingerprint(engine.llm.model_config),
        layer_names=list(engine.kv_caches),
        kv_tokens=engine.cache_config.kv_cache_size_tokens,
        kv_bytes=engine.allocated_bytes,
    )


@pytest.fixture(scope="session")
def exact_pack(dense: Dense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps bfloat16 keys and values as they are."""
    path = tmp_path_factory.mktemp("packs") / "exact.safetensors"
    save_pack(identity_pack(dense.fingerprint, dense.layer_names), path)
    return path


@dataclass(frozen=True)
class CalibratedPacks:
    """Paths of packs from one calibration.

    Attributes:
        eightfold: 8x, no token exact.
        largest: a byte for every dim, codes of 12 bits among them, no token exact.
        windowed: 8x with the exact tokens that a calibration advises.
    """

    eightfold: Path
    largest: Path
    windowed: Path


@pytest.fixture(scope="session")
def joint_kv_pack(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8x with one latent for keys and values, anchors, pre-RoPE planes, priced as by default."""
    from vllm_attentionpack.calibrate.run import calibrate

    engines.close()
    path = tmp_path_factory.mktemp("joint") / "joint.safetensors"
    calibrate(
        str(MODEL),
        CALIBRATION_DATA,
        8.0,
        path,
        joint_kv=True,
        max_model_len=1024,
        anchor_span=128,
        pre_rope=True,
        sensitivity_tokens=1500,
    )
    return path


@pytest.fixture(scope="session")
def calibrated(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> CalibratedPacks:
    from tests.support.calibration import Wanted, calibrate_at, smallest_ratio
    from vllm_attentionpack.calibrate.settings import DEFAULT_SINKS, DEFAULT_WINDOW

    engines.close()
    least = smallest_ratio(num_kv_heads=2, head_size=64, heads_per_group=2)
    packs = calibrate_at(
        str(MODEL),
        CALIBRATION_DATA,
        [Wanted(8.0), Wanted(least), Wanted(8.0, DEFAULT_SINKS, DEFAULT_WINDOW)],
        group_size=2,
        max_model_len=1024,
        anchor_span=128,  # a third of the prompts reaches beyond it
        pre_rope=True,
        sensitivity="uniform",  # measured ones take minutes
    )
    folder = tmp_path_factory.mktemp("packs")
    names = ("eightfold", "largest", "windowed")
    paths = CalibratedPacks(*(folder / f"{name}.safetensors" for name in names))
    for pack, path in zip(packs, (paths.eightfold, paths.largest, paths.windowed), strict=True):
        save_pack(pack, path)
    return paths


@pytest.fixture
def from_codes(engines: Engines, calibrated: CalibratedPacks) -> Engine:
    """8x, every token read from its code: it makes no difference in which step it came.

    In float32: with bfloat16 logits, batches of other shapes round to other tokens, in stock vLLM
    too.
    """
    section = compacted(calibrated.eightfold, exact_prefill=False)
    return engines.get(MODEL, block_size=16, dtype="float32", **section)


@pytest.fixture
def small_blocks(engines: Engines, calibrated: CalibratedPacks) -> Engine:
    """8x as users run it, but for blocks of 16 tokens."""
    return engines.get(MODEL, block_size=16, **compacted(calibrated.eightfold))
