"""What the data reader keeps, and one error per way in which data can be wrong."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vllm_attentionpack.errors import CalibrationDataError
from vllm_attentionpack.evaluate.data import ChatItem, TextItem, read_dataset


def write(folder: Path, *lines: Any) -> Path:
    file = folder / "data.jsonl"
    file.write_text(
        "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines),
        encoding="utf-8",
    )
    return file


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red #1.png"
    Image.new("RGBA", (3, 2), (255, 0, 0, 255)).save(path)
    return path


def test_chat_keeps_answer_extra_keys_and_line(tmp_path: Path) -> None:
    line = {"messages": [{"role": "user", "content": "Hi"}], "answer": "Ho", "kind": "greeting"}
    (item,) = read_dataset(write(tmp_path, "", line)).items
    assert item == ChatItem((("user", "Hi"),), "Ho", {"kind": "greeting"}, 2)


def test_last_assistant_message_is_the_answer(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (item,) = read_dataset(write(tmp_path, {"messages": messages})).items
    assert isinstance(item, ChatItem)
    assert (item.messages, item.answer) == ((("user", "Hi"),), "Ho")


def test_text_line_and_text_file(tmp_path: Path) -> None:
    # U+2028 is no end of line in JSON
    (item,) = read_dataset(write(tmp_path, '{"text": "a\u2028b", "kind": "t"}')).items
    assert item == TextItem("a\u2028b", {"kind": "t"}, 1)
    file = tmp_path / "doc.txt"
    file.write_text("one\n\ntwo\n")
    (item,) = read_dataset(file).items
    assert item == TextItem("one\n\ntwo\n", {}, 1)


def test_images_by_path_file_url_and_data_url(tmp_path: Path, picture: Path) -> None:
    encoded = base64.b64encode(picture.read_bytes()).decode()
    urls = [picture.name, picture.as_uri(), f"data:image/png;base64,{encoded}"]
    parts = [image_part(url) for url in urls]
    (item,) = read_dataset(write(tmp_path, {"messages": [user(*parts)]})).items
    assert isinstance(item, ChatItem)
    assert [image.sha256 for image in item.images] == [
        hashlib.sha256(picture.read_bytes()).hexdigest()
    ] * 3
    for image in item.images:
        loaded = image.load()
        assert (loaded.mode, loaded.size, loaded.getpixel((0, 0))) == ("RGB", (3, 2), (255, 0, 0))


def test_whole_characters_may_be_escaped(tmp_path: Path) -> None:
    (item,) = read_dataset(write(tmp_path, r'{"text": "\ud83d\ude00 \u00e9"}')).items
    assert item == TextItem("\U0001f600 \u00e9", {}, 1)


def test_digest_depends_on_file_and_images(tmp_path: Path, picture: Path) -> None:
    file = write(tmp_path, {"messages": [user(image_part(picture.name))]})
    before = read_dataset(file).sha256
    assert before == read_dataset(file).sha256
    Image.new("RGB", (3, 2), (0, 255, 0)).save(picture)
    repainted = read_dataset(file).sha256
    file.write_text(file.read_text() + "\n")
    assert len({before, repainted, read_dataset(file).sha256}) == 3


OK = {"text": "fine"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", "line 2 .* is not valid JSON .*one JSON object per line"),
        ([1, 2], r"line 2 .* is \[1, 2\]. Each line must be an object"),
        ({"prompt": "x"}, "line 2 .*either 'messages' or 'text'"),
        ({"text": "x", "messages": []}, "line 2 .*either 'messages' or 'text'"),
        ({"text": ""}, "line 2 .* has 'text' "),
        ({"messages": []}, r"line 2 .* has 'messages' \[\]"),
        ({"messages": ["x"]}, "line 2 .* has the message x. A message must be"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "line 2 .* role 'robot'. Allowed"),
        ({"messages": [{"role": "user", "content": 3}]}, "line 2 .* has the content 3"),
        ({"messages": [user("x")]}, "line 2 .* has the content part x. Allowed"),
        ({"messages": [user({"type": "text", "text": 1})]}, "line 2 .* has the content part"),
        (
            {"messages": [user({"type": "video_url", "video_url": {"url": "v.mp4"}})]},
            "line 2 .* type 'video_url'. Only text and images are supported",
        ),
        ({"messages": [{"role": "user", "content": "x"}], "answer": 5}, "line 2 .* answer 5"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "line 2 .* nothing before it"),
        ({"messages": [user(image_part("none.png"))]}, "line 2 .*none.png', which does not exist"),
        ({"messages": [user(image_part("bad.png"))]}, "line 2 .*bad.png', which cannot be read"),
        ({"messages": [user(image_part("https://a.b/c.png"))]}, "line 2 .* not fetched: download"),
        (
            {"messages": [user(image_part("data:image/png;base64,@@"))]},
            "line 2 .* cannot be decoded",
        ),
        ({"messages": [user(image_part("data:image/png,xx"))]}, "line 2 .* cannot be decoded"),
        ({"messages": [user(image_part("cut.jpg"))]}, "line 2 .*cut.jpg', which cannot be read"),
        ({"messages": [user(image_part("http://[a/b.png"))]}, "line 2 .* which is no URL"),
        # an encoded image without its `data:` is too long for a file name
        (
            {"messages": [user(image_part("iVBORw0KGgo" * 999))]},
            r"line 2 .*\.\.\.', which does not exist.*encoded images are written data:image",
        ),
        ('{"text": "a", "n": ' + "1" * 5000 + "}", "line 2 .* is not valid JSON"),
        ('{"text": "a", "n": ' + "[" * 99999 + "}", "line 2 .* is not valid JSON"),
        (r'{"text": "half \ud83d"}', r"line 2 .* holds \\ud83d, half of a character"),
    ],
)
def test_bad_lines_are_refused_with_their_number(tmp_path: Path, bad: Any, message: str) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    Image.effect_noise((200, 200), 50).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CalibrationDataError, match=message):
        read_dataset(write(tmp_path, OK, bad))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no data file at .*missing.jsonl"),
        ("long" * 99 + ".jsonl", None, "no data file at .*long.jsonl"),
        ("empty.jsonl", b"", "holds no items"),
        ("blank.txt", b"\n \n", "holds no items"),
        ("latin.jsonl", b'{"text": "\xe9"}', "is not UTF-8"),
    ],
)
def test_bad_files_are_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationDataError, match=message):
        read_dataset(tmp_path / name)
