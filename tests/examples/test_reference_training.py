"""The training recipe at toy size: its fast forward pass, its data, its curriculum."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

pytest.importorskip("transformers")

from reference_vlm import images, wording
from reference_vlm.batch import Batcher
from reference_vlm.check import check
from reference_vlm.corpus import frequent_words
from reference_vlm.curriculum import MIN_UPDATES, Level
from reference_vlm.fast_forward import FastForward
from reference_vlm.heads import contributions, spectra, table
from reference_vlm.mix import TaskMix
from reference_vlm.model import build_model
from reference_vlm.options import Options, parse_options
from reference_vlm.tasks import Sampler
from reference_vlm.tokenizer import build_tokenizer, vocab_size
from reference_vlm.widen import trained_heads

DOCS = Path(__file__).resolve().parents[2] / "docs"
TOY = Options(hidden=64, heads=2, kv_heads=1, head_dim=32, layers=2, inter=96, vis_dim=32)
WIDE = replace(TOY, hidden=192, heads=6, kv_heads=3, seed=2)
CORPUS = "The quick brown fox jumps over the lazy dog. <|im_end|> " * 20
LINES = "The quick brown fox\n\njumps over the lazy dog.\n" * 200


def make_sampler(seed: int = 3, corpus: str = CORPUS) -> Sampler:
    return Sampler(Batcher(build_tokenizer(), "cpu"), "cpu", seed, corpus)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A saved toy model whose norms and biases are not at their start, and its folder."""
    model = build_model(TOY, build_tokenizer())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1 and "layers.0.self_attn" not in name:
                weight.add_(0.2 * torch.randn(weight.shape, generator=torch.manual_seed(5)))
    folder = tmp_path_factory.mktemp("narrow")
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return model, folder


def silence_fresh_heads(wide) -> None:
    """Zero what all heads but the narrow model's write to the stream."""
    slots = trained_heads(WIDE.seed, WIDE.layers, TOY.kv_heads, WIDE.kv_heads)
    size = TOY.heads // TOY.kv_heads * TOY.head_dim
    for layer, kept in zip(wide.model.language_model.layers, slots, strict=True):
        for head in set(range(WIDE.kv_heads)) - set(kept):
            layer.self_attn.o_proj.weight.data[:, head * size : (head + 1) * size] = 0


def test_fast_forward_equals_transformers(capsys):
    model = build_model(TOY, build_tokenizer())
    check(model, FastForward(model), make_sampler())
    assert capsys.readouterr().out.count("logits by") == 3


def test_widened_model_computes_what_the_narrow_one_does(narrow, monkeypatch):
    monkeypatch.setattr("reference_vlm.widen.OUTSIDE", 0.0)
    wide = build_model(replace(WIDE, widen=str(narrow[1])), build_tokenizer())
    batch = make_sampler().image_chat(2, 2, 56)
    expected, _ = FastForward(narrow[0]).logits_at(batch)
    with_fresh, _ = FastForward(wide).logits_at(batch)
    silence_fresh_heads(wide)
    found, _ = FastForward(wide).logits_at(batch)
    tokens = len(build_tokenizer())  # further rows stand for no token
    # The norms' epsilon counts for more where the mean is over more numbers.
    torch.testing.assert_close(found[:, :tokens], expected[:, :tokens], rtol=0, atol=1e-3)
    assert (with_fresh - expected).abs().max() > 0.01


def test_widened_heads_are_no_copies(narrow):
    wide = build_model(replace(WIDE, widen=str(narrow[1])), build_tokenizer())
    for layer in wide.model.language_model.layers:
        for weight in (layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight):
            assert torch.linalg.matrix_rank(weight) == len(weight)


def test_widening_needs_equal_head_size(narrow):
    other = replace(WIDE, hidden=384, head_dim=64, widen=str(narrow[1]))
    with pytest.raises(ValueError, match="head size is 64, the start has 32"):
        build_model(other, build_tokenizer())


def test_theta_reaches_the_rotation():
    model = build_model(replace(TOY, theta=1e6), build_tokenizer())
    slowest = model.model.language_model.rotary_emb.inv_freq[-1].item()
    assert slowest == pytest.approx(1e6 ** (-15 / 16), rel=1e-4)


def test_passage_keeps_its_lines_and_holds_every_pair_once():
    text = "one\n\ntwo\nthree"
    found = wording.passage(text, {"ab": "07", "cd": "41"}, Random(1)).split("\n")
    assert sorted(found) == ["ab: 07", "cd: 41", "one", "three", "two"]
    assert [line for line in found if ":" not in line] == ["one", "two", "three"]


def test_passage_chat_supervises_the_values_it_asks_for():
    batch = make_sampler(corpus=LINES).passage_recall(2, 3, 400)
    tokenizer = build_tokenizer()
    for ids, labels in zip(batch.ids, batch.labels, strict=True):
        answers = tokenizer.decode(labels[labels >= 0]).split("<|im_end|>")[:-1]
        assert len(answers) == 3
        text = tokenizer.decode(ids)
        for answer in answers:
            assert f": {answer}\n" in text


def test_long_samples_grow_to_the_context():
    options = Options(boot=0, flat=0, context=1024, long_share=1.0, tokens=(100, 100, 100))
    mix = TaskMix(options, make_sampler(corpus=LINES))

    def longest(progress: float) -> int:
        return max(m.batch.ids.shape[1] for _ in range(12) for m in mix.draw(progress))

    assert longest(0.0) < 512
    assert 700 < longest(1.0) < 1400


def test_no_long_samples_without_a_context():
    options = Options(boot=0, flat=0, tokens=(100, 100, 100))
    mix = TaskMix(options, make_sampler(corpus=LINES))
    tasks = {micro.task for _ in range(20) for micro in mix.draw(0.9)}
    assert "recall chat" in tasks
    assert not tasks & {"long images", "passage recall", "long text"}


@pytest.mark.parametrize(("tokens", "side"), [(3, 56), (4, 56), (35, 140), (36, 168), (999, 448)])
def test_largest_image_of_a_token_count(tokens, side):
    assert images.largest_size(tokens) == side


def test_spectra_see_copied_heads_and_contributions_see_dead_ones():
    model = build_model(replace(WIDE, hidden=192), build_tokenizer())
    data = [make_sampler(corpus=LINES).text(4, 300)]
    first, second = model.model.language_model.layers
    attention = first.self_attn
    attention.v_proj.weight.data[32:64] = attention.v_proj.weight.data[:32]
    attention.v_proj.weight.data[64:] = attention.v_proj.weight.data[:32]
    second.self_attn.o_proj.weight.data[:, 64:128] = 0
    rows = spectra(model, data)
    # Copies add no dimension: a quarter of 96 dimensions holds most of 32, a quarter of 32 less.
    assert rows[0]["v rank"] <= 32
    assert rows[0]["v joint"] > rows[0]["v alone"]
    assert rows[1]["v rank"] > rows[0]["v rank"]
    base, added = contributions(model, data)
    assert base > 0
    assert added[1][1] == 0
    assert added[1][0] != 0


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("reference_vlm", [[0, 1]] * 4),
        ("wide_vlm", trained_heads(seed=1, layers=4, narrow=2, wide=8)),
    ],
)
def test_subjects_document_shows_the_stored_heads(name, trained):
    result = json.loads((DOCS / "results" / f"{name}_heads.json").read_text())
    assert table(result, trained) in (DOCS / "subjects.md").read_text()


def test_check_notices_a_wrong_forward():
    model = build_model(TOY, build_tokenizer())
    forward = FastForward(model)
    forward.sections = forward.sections[::-1]
    with pytest.raises(ValueError, match="is off"):
        check(model, forward, make_sampler())


def test_answers_are_supervised_and_questions_are_not():
    batch = make_sampler().recall_chat(4, 6)
    text = build_tokenizer().decode(batch.labels[0][batch.labels[0] >= 0])
    assert text.replace("<|im_end|>", " ").replace(" ", "").isdigit()
    assert (batch.labels[batch.labels >= 0] == batch.ids[batch.labels >= 0]).all()


def test_text_holds_no_special_tokens_but_the_first():
    batcher = Batcher(build_tokenizer(), "cpu")
    ids = make_sampler().text(2, 200).ids
    assert (ids[:, 0] == batcher.end_of_text).all()
    im_end = build_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert not (ids == im_end).any()


def test_same_seed_same_batches():
    def drawn(seed: int) -> list[torch.Tensor]:
        options = Options(boot=0, seed=seed, flat=0, tokens=(100, 100, 100))
        mix = TaskMix(options, make_sampler(seed))
        return [micro.batch.ids for _ in range(3) for micro in mix.draw(0.5)]

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_level_opens_after_enough_good_results():
    level = Level((1, 2), Random(0))
    opened = [level.update(0, 1.0) for _ in range(40)]
    assert opened.count(True) == 1
    assert opened.index(True) >= MIN_UPDATES
    assert level.value == 2
    assert not level.update(1, 1.0)


def test_options_are_checked(capsys):
    assert parse_options("", ["--sizes", "56", "112"]).sizes == (56, 112)
    with pytest.raises(SystemExit):
        parse_options("", ["--hidden", "128"])
    assert "heads x head-dim is 256" in capsys.readouterr().err
    with pytest.raises(ValueError, match="context 300"):
        Options(context=300)


def test_frequent_words_become_tokens_and_keys_stay_letters():
    words = frequent_words(CORPUS, 4)
    assert words == [" brown", " dog", " fox", " jumps"]
    tokenizer = build_tokenizer(words)
    text = "A dog: ax 41\n jumpsuit"
    pieces = [tokenizer.decode([i]) for i in tokenizer(text).input_ids]
    assert "".join(pieces) == text
    assert pieces == ["A", " dog", ":", " a", "x", " 4", "1", "\n", " ", *"jumpsuit"]
    assert vocab_size(build_tokenizer()) == 384


def test_widening_keeps_what_the_narrow_model_computes_beside_new_tokens(narrow, monkeypatch):
    monkeypatch.setattr("reference_vlm.widen.OUTSIDE", 0.0)
    tokenizer = build_tokenizer(["quick", " brown"])
    wide = build_model(replace(WIDE, widen=str(narrow[1])), tokenizer)
    silence_fresh_heads(wide)
    known = build_tokenizer().get_vocab()
    rows = {tokenizer.get_vocab()[token]: row for token, row in known.items()}
    batch = make_sampler(corpus=LINES).recall_chat(2, 4)
    expected, _ = FastForward(narrow[0]).logits_at(batch)
    renamed = {row: new for new, row in rows.items()}
    ids = batch.ids.apply_(renamed.__getitem__)
    found, _ = FastForward(wide).logits_at(replace(batch, ids=ids))
    torch.testing.assert_close(
        found[:, list(rows)], expected[:, list(rows.values())], rtol=0, atol=1e-3
    )
