"""The simulated cache against the real backend, token by token."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.engines import Engines, compacted
from tests.support.reference import CALIBRATION_DATA, HELD_OUT_DATA, MODEL
from vllm_attentionpack.calibrate.collector import Collector
from vllm_attentionpack.calibrate.engine import statistics_engine
from vllm_attentionpack.calibrate.run import calibrate
from vllm_attentionpack.evaluate.data import read_dataset
from vllm_attentionpack.evaluate.prompts import PromptRenderer
from vllm_attentionpack.evaluate.simulate.codec import CacheShape, DenseCodec, PackCodec
from vllm_attentionpack.evaluate.simulate.measure import Simulator, grouped
from vllm_attentionpack.packfile import load_pack

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("no_engine")]

ENGINE = {"dtype": "float32", "max_model_len": 1024}
ITEMS = 24


#: Every token from its code, by the ops whose sums the simulation shares.
SECTION = {"exact_prefill": False, "sinks": 0, "window": 0, "ops": "reference"}


KEYS = {
    "as-they-come": {"anchor_span": 0},
    "anchors": {"anchor_span": 48},
    "un-rotated": {"anchor_span": 1},
    "pre-rope": {"anchor_span": 48, "pre_rope": True},
}


@pytest.fixture(scope="module", params=list(KEYS))
def pack(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    path = tmp_path_factory.mktemp("simulate") / "8x.pack.safetensors"
    options = {"sensitivity": "uniform", "max_tokens": 4000, **KEYS[request.param], **ENGINE}
    calibrate(str(MODEL), CALIBRATION_DATA, 8, path, sinks=0, window=0, **options)
    return path


@pytest.fixture(scope="module")
def served(engines: Engines, pack: Path) -> list[np.ndarray]:
    """Log-probabilities of the scored tokens when the real backend reads everything from codes."""
    from vllm import SamplingParams

    try:
        engine = engines.get(
            MODEL,
            block_size=32,
            **ENGINE,
            **compacted(pack, exact_prefill=False, sinks=0, window=0),
        )
        renderer = PromptRenderer(engine.llm)
        items = read_dataset(HELD_OUT_DATA).items[:ITEMS]
        prompts = [prompt for item in items for prompt in renderer.render(item)]
        asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = engine.generate([prompt.prompt for prompt in prompts], asked)
    finally:
        engines.close()
    return [
        np.array(
            [
                given[token].logprob
                for token, given in list(
                    zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
                )[-prompt.num_scored_tokens :]
            ]
        )
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def test_simulated_pack_equals_the_served_one(pack: Path, served: list[np.ndarray]) -> None:
    items = read_dataset(HELD_OUT_DATA).items[:ITEMS]
    loaded = load_pack(pack)
    found = loaded.header.fingerprint
    shape = CacheShape(
        tuple(layer.name for layer in loaded.header.layers),
        found.num_query_heads,
        found.num_kv_heads,
        found.head_size,
    )
    with statistics_engine(str(MODEL), 0, ENGINE) as llm:
        simulator = Simulator(llm, shape, items)
        codec = PackCodec.of(shape, loaded, simulator.device)
        simulated = simulator.target_logprobs(codec)
        dense = simulator.target_logprobs(DenseCodec(shape))
        scores = simulator.measure(codec)
        none = simulator.measure(DenseCodec(shape))
        assert simulator.bytes_per_token(codec) == loaded.header.bytes_per_token

    assert [len(x) for x in simulated] == [len(x) for x in served]
    # float32 on both sides: what is left is the order of sums, and codes that fall the other way
    by_kind = grouped(items)
    for kind in ("modality=visual", "modality=text"):
        error, loss = (
            np.concatenate([np.abs(other[i] - served[i]) for i in by_kind[kind]])
            for other in (simulated, dense)
        )
        assert np.median(error) < 1e-5, kind
        assert error.mean() < 0.02 * loss.mean(), kind

    assert none.kl.max() < 1e-9 and (none.same == none.tokens).all()
    assert scores.mean_kl() > 1e-4
    assert sum(len(v) for k, v in by_kind.items() if k.startswith("modality")) == ITEMS
    figures = scores.figures(items, range(ITEMS))
    assert figures.kl == pytest.approx(scores.kl.sum() / scores.tokens.sum())
    assert figures.tokens == sum(len(x) for x in served)


def test_observers_see_what_the_layers_are_given() -> None:
    """Un-simulated layers and the collector agree on the number of tokens."""
    items = read_dataset(HELD_OUT_DATA).items[:4]
    with statistics_engine(str(MODEL), 0, ENGINE) as llm:
        (collector,) = llm.apply_model(lambda model: Collector.install(model, 2))
        layers = [recorder.layer for recorder in collector.recorders]
        collector.remove()
        names = tuple(layer.layer_name for layer in layers)
        shape = CacheShape(names, layers[0].num_heads, layers[0].num_kv_heads, layers[0].head_size)
        simulator = Simulator(llm, shape, items)
        seen: dict[int, int] = {}
        simulator.observe(lambda i, q, k, v: seen.update({i: seen.get(i, 0) + len(k)}))
        assert seen == dict.fromkeys(range(len(names)), simulator.tokens)
