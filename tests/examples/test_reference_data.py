"""The reference model's item files: complete, disjoint, in the training wording, reproducible."""

import hashlib
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

pytest.importorskip("transformers")

from PIL import Image
from reference_vlm import dataset, heads, measure, verify
from reference_vlm.tokenizer import build_tokenizer
from reference_vlm.widen import trained_heads
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "reference-vlm"
SPLITS = {split.name: split for split in dataset.SPLITS}
ITEMS = {name: measure.read_items(FOLDER / f"{name}.jsonl") for name in SPLITS}

each_split = pytest.mark.parametrize("name", SPLITS)


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(FOLDER / "model")


def image_urls(item: dict) -> list[str]:
    if item["kind"] == "text" or isinstance(item["messages"][0]["content"], str):
        return []
    content = item["messages"][0]["content"]
    return [part["image_url"]["url"] for part in content if part["type"] == "image_url"]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_heldout_is_large_enough_and_has_every_kind():
    heldout = ITEMS["heldout"]
    assert len(heldout) >= 260
    kinds = [item["kind"] for item in heldout]
    assert {k: kinds.count(k) >= 25 for k in set(kinds)} == dict.fromkeys(
        ("digit", "color", "shape", "list", "recall", "text"), True
    )
    assert sum(item["modality"] == "visual" for item in heldout) / len(heldout) > 0.55
    dialogues = [i for i in heldout if i["modality"] == "visual" and len(i["messages"]) > 1]
    assert len(dialogues) == 40
    assert {len(i["messages"]) for i in dialogues} == {5, 7, 9}


@each_split
def test_answers_and_texts_are_not_empty(name):
    for item in ITEMS[name]:
        if item["kind"] == "text":
            assert item.keys() == {"text", "kind", "modality"}
            assert 400 <= len(item["text"]) <= 1000
        else:
            assert item.keys() == {"messages", "answer", "kind", "modality"}
            assert item["answer"].strip()


@each_split
def test_images_exist_and_have_one_size_per_item(name):
    pool = (FOLDER / "images" / name).glob("*.png")
    sizes = {path: pixels(path).shape[:2] for path in pool}
    used = set()
    for item in ITEMS[name]:
        paths = [FOLDER / url for url in image_urls(item)]
        assert bool(paths) == (item["modality"] == "visual")
        assert len(set(paths)) == len(paths)
        assert len({sizes[path] for path in paths}) <= 1
        used.update(paths)
    assert len(used) >= 0.95 * len(sizes)


def test_no_image_is_in_both_pools():
    seen = {
        name: {
            hashlib.sha256(pixels(path).tobytes()).digest()
            for path in (FOLDER / "images" / name).glob("*.png")
        }
        for name in SPLITS
    }
    assert len(seen["calibrate"]) == len(seen["heldout"]) == 100
    assert not seen["calibrate"] & seen["heldout"]


def test_no_item_is_in_both_files_or_twice_in_one():
    lines = [json.dumps(item.get("messages", item)) for items in ITEMS.values() for item in items]
    assert len(set(lines)) == len(lines)


@each_split
def test_template_renders_the_training_wording(name, tokenizer):
    for item in ITEMS[name]:
        verify.check_item(item, tokenizer)


def test_training_wording_literally(tokenizer):
    def parts(*urls_and_texts):
        return [
            {"type": "image_url", "image_url": {"url": x}}
            if x.endswith(".png")
            else {"type": "text", "text": x}
            for x in urls_and_texts
        ]

    item = {
        "messages": [
            {
                "role": "user",
                "content": parts(
                    "Image 1:", "a.png", "\nImage 2:", "b.png", "\nWhat digit is in image 2?"
                ),
            },
            {"role": "assistant", "content": "7"},
            {"role": "user", "content": "List the colors."},
        ],
        "answer": "red blue",
        "kind": "list",
    }
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert verify.training_prompt(item) == (
        f"<|im_start|>user\nImage 1:{image}\nImage 2:{image}\nWhat digit is in image 2?<|im_end|>\n"
        "<|im_start|>assistant\n7<|im_end|>\n"
        "<|im_start|>user\nList the colors.<|im_end|>\n<|im_start|>assistant\n"
    )
    verify.check_item(item, tokenizer)
    item["messages"][0]["content"][0]["text"] = "Picture 1:"
    with pytest.raises(ValueError, match="Picture 1"):
        verify.check_item(item, tokenizer)


@each_split
def test_items_are_reproducible(name):
    text = (FOLDER / "text" / SPLITS[name].text_source).read_text()
    assert dataset.make_items(SPLITS[name], text) == ITEMS[name]


@each_split
def test_images_are_reproducible(name):
    split = SPLITS[name]
    for url, fresh in dataset.render_pool(split, dataset.make_pool(split)):
        stored = pixels(FOLDER / url)
        assert fresh.shape == stored.shape
        # Other CPUs may round a pixel on an edge or on a noise level to the other side.
        assert np.mean(fresh.numpy() != stored) < 1e-3, url


def test_writing_a_split_gives_the_stored_file(tmp_path):
    small = {"attribute": 3, "listing": 1, "visual_turns": 1, "recall": 2, "recall_turns": 1}
    split = dataset.Split("tiny", 5, **small, text=2, text_source="t.txt")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "t.txt").write_text("word " * 50)
    items = dataset.write_split(split, tmp_path)
    assert len(items) == 10
    assert measure.read_items(tmp_path / "tiny.jsonl") == items
    assert all((tmp_path / url).is_file() for item in items for url in image_urls(item))
    assert "".join(sorted(i["text"] for i in items if i["kind"] == "text")).count("word") == 50


def long_text(seed: int) -> str:
    rng = Random(seed)
    words = ["lorem", "ipsum", "dolor", "<|im_end|>", "sit"]
    return "".join(" ".join(rng.choices(words, k=9)) + "\n" for _ in range(6000))


@pytest.fixture(scope="module")
def long_items():
    return {split.name: dataset.make_items(split, long_text(3)) for split in dataset.LONG_SPLITS}


@pytest.mark.parametrize("split", dataset.LONG_SPLITS, ids=lambda split: split.name)
def test_long_items_keep_the_wording_and_fit_the_context(split, long_items, tokenizer):
    side = {m.url: size for size, pool in dataset.make_pool(split).items() for m in pool}
    lengths = []
    for item in long_items[split.name]:
        if item["kind"] == "text":
            lengths.append(len(tokenizer(item["text"])["input_ids"]))
            assert "<|" not in item["text"]
            continue
        verify.check_item(item, tokenizer)
        prompt = verify.training_prompt(item)
        tokens = len(tokenizer(prompt)["input_ids"])
        lengths.append(tokens + sum((side[url] // 28) ** 2 - 1 for url in image_urls(item)))
    assert 2500 < max(lengths) <= 4000
    assert sum(n > 1000 for n in lengths) > 0.2 * len(lengths)


def test_long_passages_hold_the_answer_once(long_items):
    passages = [i for i in long_items["heldout"] if i["kind"] == "passage"]
    assert {len(i["messages"]) > 1 for i in passages} == {True, False}
    for item in passages:
        key = item["messages"][-1]["content"].rsplit("\n", 1)[-1].removesuffix("?")
        lines = item["messages"][0]["content"].split("\n")
        assert lines.count(f"{key}: {item['answer']}") == 1
        assert sum(line.startswith(f"{key}:") for line in lines) == 1


def test_long_files_share_no_item(long_items):
    chats = [
        json.dumps(i["messages"])
        for items in long_items.values()
        for i in items[:-1]
        if i["kind"] != "text"
    ]
    assert len(set(chats)) == len(chats)


def test_a_text_source_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="ends after 90"):
        dataset.make_items(dataset.LONG_SPLITS[0], "123456789\n" * 9)


def test_model_folder_has_the_training_tokenizer(tokenizer):
    built = build_tokenizer()
    assert built.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert built.chat_template == tokenizer.chat_template


def test_model_card_shows_the_stored_measurement():
    result = json.loads((ROOT / "docs" / "results" / "reference_vlm_dense.json").read_text())
    assert measure.table(result) in (FOLDER / "README.md").read_text()
    assert 0.85 <= result["overall"]["accuracy"] <= 0.97
    assert result["items"] == len(ITEMS["heldout"])


def test_subjects_document_shows_the_stored_measurement():
    result = json.loads((ROOT / "docs" / "results" / "wide_vlm_heads.json").read_text())
    shown = (ROOT / "docs" / "subjects.md").read_text()
    assert heads.table(result, trained_heads(1, 4, 2, 8)) in shown
    for loss in ("loss", "loss_without_trained_heads", "loss_without_fresh_heads"):
        assert f"{result[loss]:.2f}" in shown


def test_files_stay_small():
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert max(sizes) < 10e6
    assert sum(sizes) < 12e6
