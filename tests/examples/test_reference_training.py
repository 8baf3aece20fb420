"""The training recipe at toy size: its fast forward pass, its data, its curriculum."""

from random import Random

import pytest
import torch

pytest.importorskip("transformers")

from reference_vlm.batch import Batcher
from reference_vlm.check import check
from reference_vlm.curriculum import MIN_UPDATES, Level
from reference_vlm.fast_forward import FastForward
from reference_vlm.mix import TaskMix
from reference_vlm.model import build_model
from reference_vlm.options import Options, parse_options
from reference_vlm.tasks import Sampler
from reference_vlm.tokenizer import build_tokenizer

TOY = Options(hidden=64, heads=2, kv_heads=1, head_dim=32, layers=2, inter=96, vis_dim=32)
CORPUS = "The quick brown fox jumps over the lazy dog. <|im_end|> " * 20


def make_sampler(seed: int = 3) -> Sampler:
    return Sampler(Batcher(build_tokenizer(), "cpu"), "cpu", seed, CORPUS)


def test_fast_forward_equals_transformers(capsys):
    model = build_model(TOY, build_tokenizer())
    check(model, FastForward(model), make_sampler())
    assert capsys.readouterr().out.count("logits by") == 3


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
