"""Calibration inside the real engine: what it gathers is what the model computes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from vllm_attentionpack.calibrate import run
from vllm_attentionpack.calibrate.run import calibrate
from vllm_attentionpack.calibrate.settings import DEFAULT_ANCHOR_SPAN
from vllm_attentionpack.errors import BudgetError, CalibrationDataError, ConfigError
from vllm_attentionpack.evaluate.simulate.codec import (
    CacheShape,
    ExactTokens,
    TokenCodec,
    Tokens,
)
from vllm_attentionpack.packfile import load_pack
from vllm_attentionpack.packfile.schema import RotaryHeader

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("no_engine")]

ROOT = Path(__file__).parents[2]
VLM = ROOT / "examples/reference-vlm"

HEADS, KV_HEADS, D, LAYERS = 4, 2, 32, 2
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TEXTS = ["The quick brown fox jumps over the lazy dog. " * 6, "Pack my box with liquor jugs. " * 3]


def contents(file: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a pack file, digest included."""
    with safe_open(file, framework="pt") as opened:
        return opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def test_reference_vlm_twice_gives_the_same_pack(tmp_path: Path) -> None:
    files = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for file in files:
        calibrate(str(VLM / "model"), VLM / "calibrate.jsonl", 8, file, max_tokens=2000)
    # not the bytes of the files: safetensors writes metadata in random order
    first, second = (contents(file) for file in files)
    assert first[0] == second[0]
    assert first[1].keys() == second[1].keys()
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])

    header = load_pack(files[0]).header
    assert [layer.name for layer in header.layers] == [
        f"language_model.model.layers.{i}.self_attn.attn" for i in range(4)
    ]
    assert header.compression_ratio >= 8
    assert header.bytes_per_token <= 2048 / 8  # 4 layers x 2 heads x 64 dims x (K, V) x 2 bytes
    assert (header.heads_per_group, header.num_modalities, header.max_context) == (2, 2, 8192)
    assert header.anchor_span == DEFAULT_ANCHOR_SPAN < header.max_context
    assert all(layer.rotary == RotaryHeader(planes=32) for layer in header.layers)
    frequencies = 10000 ** (-torch.arange(32) / 32)
    rotary = load_pack(files[0]).codec(3).anchors.rotary
    torch.testing.assert_close(rotary.frequencies.float(), frequencies)
    # one wave (32 prompts) beyond the limit at most, and no token of start-up or generation
    assert 2000 <= header.provenance.tokens < 8000
    assert 64 <= header.provenance.visual_tokens < header.provenance.tokens / 2


def save_random(folder: Path, kind: str, **options: Any) -> Path:
    """A random model whose biases make every mean and covariance different from its neighbours."""
    import transformers

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(VLM / "model")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=D,
        max_position_embeddings=256,
        rope_parameters=ROPE,
        attention_bias=True,
        initializer_range=0.3,
        **options,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("llama"), "Llama")


def write_texts(file: Path, times: int = 1) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * times))
    return file


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data") / "texts.jsonl")


def projections(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Per layer, of all texts: queries, keys, values before rotation, by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for layer in model.model.layers:
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in ("q", "k", "v")}
        handles = [
            getattr(layer.self_attn, f"{name}_proj").register_forward_hook(
                lambda module, args, out, kept=kept: kept.append(out[0].view(-1, out.shape[-1]))
            )
            for name, kept in seen.items()
        ]
        with torch.inference_mode():
            for text in TEXTS:
                model(torch.tensor([tokenizer.encode(text)]))
        for handle in handles:
            handle.remove()
        gathered = {name: torch.cat(kept).double() for name, kept in seen.items()}
        gathered["o"] = layer.self_attn.o_proj.weight.detach().double()
        yield gathered


@pytest.mark.parametrize("kind", ["Llama", "Arcee"])
def test_statistics_are_what_the_model_computes(tmp_path: Path, texts: Path, kind: str) -> None:
    """Un-rotated moments and output projections against transformers; refusals on the way.

    Arcee is one of the models that vLLM takes from there.
    """
    from vllm_attentionpack.calibrate.collector import Collector
    from vllm_attentionpack.calibrate.engine import feed, statistics_engine
    from vllm_attentionpack.evaluate.data import read_dataset

    model = save_random(tmp_path / "model", kind)
    computed = list(projections(model))  # before vLLM changes the classes of transformers
    with statistics_engine(str(model), 0, {"dtype": "float32"}) as llm:
        with pytest.raises(ConfigError, match=r"group size is 3, .* allowed are 1, 2 and 'auto'"):
            llm.apply_model(lambda model: Collector.install(model, 3))
        (collector,) = llm.apply_model(lambda model: Collector.install(model, "auto"))
        feed(llm, read_dataset(texts), lambda: collector.tokens, None, 0, lambda *_: None)
        collector.remove()
        feed(llm, read_dataset(texts), lambda: collector.tokens, None, 0, lambda *_: None)
        tokens, visual_tokens = collector.tokens, collector.visual_tokens
        # averaged over one position only: as if keys had never been rotated
        layers = list(collector.statistics(collector.turned(1), 1, torch.float32))

    assert len(layers) == LAYERS
    for i, (layer, expected) in enumerate(zip(layers, computed, strict=True)):
        assert layer.name == f"model.layers.{i}.self_attn.attn"
        assert layer.scale == pytest.approx(D**-0.5)
        assert (tokens, visual_tokens) == (len(expected["k"]), 0)
        for moments, x in (
            (layer.moments.key, expected["k"]),
            (layer.moments.value, expected["v"]),
        ):
            torch.testing.assert_close(moments.second[0, 0], x.T @ x / len(x), rtol=1e-3, atol=1e-2)
            torch.testing.assert_close(moments.mean[0, 0], x.mean(0), rtol=1e-3, atol=1e-3)
        q = expected["q"].view(-1, HEADS, D)
        second = torch.einsum("tha,thb->hab", q, q) / len(q)
        torch.testing.assert_close(layer.moments.query, second, rtol=1e-3, atol=1e-2)
        rows = expected["o"].T.view(HEADS, D, -1)
        torch.testing.assert_close(layer.gram, rows @ rows.mT, rtol=1e-4, atol=1e-4)


def test_a_model_with_experts_has_gradients(tmp_path: Path) -> None:
    """Experts and routers included: derivatives are what differences are."""
    model = save_random(
        tmp_path / "model",
        "Qwen3Moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )
    texts = write_texts(tmp_path / "texts.jsonl", 6)
    pack = calibrate(str(model), texts, 6, sensitivity="gradients", sinks=0, window=0)
    assert pack.header.compression_ratio >= 6


class Noisy(TokenCodec):
    """White noise in every key and value, so large relative to them."""

    def __init__(self, shape: CacheShape, size: float) -> None:
        super().__init__(shape, 1)
        self.size = size
        self.drawn = torch.Generator().manual_seed(0)
        self.variance: dict[tuple[int, str], float] = {}

    def reconstruct(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, tokens: Tokens
    ) -> tuple[torch.Tensor, torch.Tensor]:
        read = []
        for kind, x in (("key", key), ("value", value)):
            scale = self.size * float(x.square().mean().sqrt())
            self.variance[layer, kind] = scale**2
            read.append(x + scale * torch.randn(x.shape, generator=self.drawn))
        return read[0], read[1]


def test_gradients_foretell_what_noise_costs(llama: Path, texts: Path) -> None:
    """Through rotary embeddings, norms, projections and attention; nothing of it stays changed."""
    from vllm_attentionpack.calibrate.collector import Collector
    from vllm_attentionpack.calibrate.engine import feed, statistics_engine
    from vllm_attentionpack.calibrate.gradients import FisherGatherer
    from vllm_attentionpack.evaluate.data import read_dataset
    from vllm_attentionpack.evaluate.simulate.measure import Simulator

    items = read_dataset(texts).items
    with statistics_engine(str(llama), 0, {"dtype": "float32"}) as llm:
        (model,) = llm.apply_model(lambda model: model)
        before = {name: set(vars(module)) for name, module in model.named_modules()}
        methods = {
            name: vars(module).get("_forward_method") for name, module in model.named_modules()
        }
        (collector,) = llm.apply_model(lambda model: Collector.install(model, KV_HEADS))
        feed(llm, read_dataset(texts), lambda: collector.tokens, None, 0, lambda *_: None)
        collector.remove()
        names = tuple(recorder.layer.layer_name for recorder in collector.recorders)
        shape = CacheShape(names, HEADS, KV_HEADS, D)
        simulator = Simulator(llm, shape, items)
        gatherer = FisherGatherer(
            simulator, collector.turned(64, 16, None), ExactTokens(), KV_HEADS, False
        )
        gatherer.gather(lambda fraction: None)
        metrics = list(gatherer.metrics(1))
        codec = Noisy(shape, 0.01)
        measured = sum(simulator.measure(codec).mean_kl() for _ in range(8)) / 8
        for name, module in model.named_modules():
            assert set(vars(module)) == before[name]
            assert vars(module).get("_forward_method") == methods[name]
    foretold = sum(
        codec.variance[i, kinds[0]] * float(metric[0, 0].trace())
        for i, layer in enumerate(metrics)
        for kinds, metric in layer.metric.items()
    )
    assert measured > 0
    assert foretold == pytest.approx(measured, rel=0.25)


def test_what_only_the_model_can_tell_is_refused_before_the_work(
    llama: Path, tmp_path: Path
) -> None:
    long, short = tmp_path / "long.jsonl", tmp_path / "short.jsonl"
    chat = {"messages": [{"role": "user", "content": "word " * 400}]}
    long.write_text(json.dumps({"text": TEXTS[0]}) + "\n" + json.dumps(chat) + "\n")
    short.write_text('{"text": "a"}\n')
    given: dict[str, Any] = {"dtype": "float32", "sensitivity": "uniform"}
    with pytest.raises(CalibrationDataError, match=r"item of line 2 .* maximum context length is"):
        calibrate(str(llama), long, 8, **given)
    with pytest.raises(CalibrationDataError, match=r"short.jsonl' holds no text of two tokens"):
        calibrate(str(llama), short, 8, **given)
    with pytest.raises(ConfigError, match=r"weights are \[1.0\]; expected 2 positive numbers"):
        calibrate(str(llama), short, 8, **given, layer_weights=[1.0])


def test_too_few_tokens_are_warned_of(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(run.logger, "warning", lambda text, *values: warnings.append(text % values))
    file = tmp_path / "one.txt"
    file.write_text(TEXTS[1])
    calibrate(str(llama), file, 8, dtype="float32", sensitivity="uniform")
    (warning,) = warnings
    assert "tokens were seen, for bases of 64 dims" in warning
    assert "Give at least 256 tokens" in warning


def test_unreachable_ratio_is_refused_before_the_work(llama: Path, texts: Path) -> None:
    # 2 layers x (2 units x (4 + 1)) = 20 bytes of 2 x 256 at the least
    with pytest.raises(BudgetError, match=r"smallest ratio is 1\.97 .* largest is 25\.60"):
        calibrate(str(llama), texts, 40, dtype="float32")
