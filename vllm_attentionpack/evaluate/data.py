"""Calibration and evaluation data: files on disk to typed items, every check included.

Three forms are read, one item per line or file:

- `{"messages": [...], "answer": "..."}`: an OpenAI chat. Content is a string or a list of
  `{"type": "text", "text": ...}` and `{"type": "image_url", "image_url": {"url": ...}}` parts.
  Without `answer`, a last message by the assistant is the answer; without either there is none.
- `{"text": "..."}`: plain text, read from its first token on.
- a `.txt` file: one document, whatever blank lines it holds.

Image URLs are `file:` or `data:` URLs or paths relative to the data file. Every other key of a line
is kept with the item (`kind`, `modality`, ...).
"""

import base64
import binascii
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from vllm_attentionpack.errors import CalibrationDataError

if TYPE_CHECKING:
    from PIL.Image import Image

_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class ImageSource:
    """An image that was found readable; its pixels are decoded when asked for.

    Attributes:
        content: the path of the file, or the bytes of a `data:` URL.
        sha256: of the encoded bytes.
    """

    content: Path | bytes
    sha256: str

    def load(self) -> "Image":
        """The image in RGB."""
        from PIL import Image

        source = io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content
        with Image.open(source) as image:
            return image.convert("RGB")


@dataclass(frozen=True)
class ChatItem:
    """A chat, its last answer apart.

    Attributes:
        messages: `(role, content)`; content is a string or a tuple of strings and images.
        answer: what the assistant is to say next, None where only the prompt is of interest.
        extra: all other keys of the line.
        line: line number in the file, from 1.
    """

    messages: "tuple[tuple[str, str | tuple[str | ImageSource, ...]], ...]"
    answer: str | None
    extra: Mapping[str, Any]
    line: int

    @property
    def images(self) -> list[ImageSource]:
        """The images in the order of the messages."""
        parts = (part for _, content in self.messages for part in content)
        return [part for part in parts if isinstance(part, ImageSource)]


@dataclass(frozen=True)
class TextItem:
    """A plain text; see `ChatItem` for `extra` and `line`."""

    text: str
    extra: Mapping[str, Any]
    line: int


Item = ChatItem | TextItem


@dataclass(frozen=True)
class Dataset:
    """All items of a file."""

    path: Path
    items: tuple[Item, ...]
    file_sha256: str

    @cached_property
    def sha256(self) -> str:
        """Of the file and of every image that it names, in order."""
        digest = hashlib.sha256(self.file_sha256.encode())
        for item in self.items:
            for image in item.images if isinstance(item, ChatItem) else ():
                digest.update(image.sha256.encode())
        return digest.hexdigest()


def read_dataset(path: str | os.PathLike[str]) -> Dataset:
    """Reads and checks a data file and every image that it names.

    Args:
        path: a `.jsonl` (or `.json`) file of JSON lines, or a `.txt` file.

    Raises:
        CalibrationDataError: missing or empty file, a line that is not valid JSON or of no known
            form, an image that is missing or cannot be read; with the line number.
    """
    file = Path(path)
    if not os.path.isfile(file):  # `Path.is_file` raises where a name is too long
        raise CalibrationDataError(
            f"no data file at '{file}'. Give a .jsonl file of chats or texts, or a .txt file."
        )
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise CalibrationDataError(
            f"'{file}' cannot be read ({error}). Give a file that can be."
        ) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationDataError(
            f"'{file}' is not UTF-8 text ({error}). Save it as UTF-8."
        ) from error
    items: tuple[Item, ...]
    if file.suffix == ".txt":
        items = (TextItem(text, {}, 1),) if text.strip() else ()
    else:
        reader = _LineReader(file)
        # not splitlines(): JSON strings may hold characters that it takes for ends of lines
        lines = enumerate(text.split("\n"), start=1)
        items = tuple(reader.item(line, number) for number, line in lines if line.strip())
    if not items:
        raise CalibrationDataError(
            f"'{file}' holds no items. Give at least one line such as "
            '{"messages": [{"role": "user", "content": "Hello"}], "answer": "Hi"}.'
        )
    return Dataset(file, items, hashlib.sha256(raw).hexdigest())


class _LineReader:
    """Parses the lines of one file; images named more than once are checked once."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._images: dict[Path, ImageSource] = {}

    def item(self, text: str, line: int) -> Item:
        try:
            value = json.loads(text)
        # beside errors of syntax there are numbers too long for Python, and lists nested too deeply
        except (ValueError, RecursionError) as error:
            raise self._error(
                line, f"is not valid JSON ({error})", "Write one JSON object per line"
            ) from error
        if surrogate := _lone_surrogate(text, value):
            raise self._error(
                line,
                f"holds {surrogate}, half of a character that was cut in two",
                "Write the whole character, or remove the rest of it",
            )
        if not isinstance(value, dict) or ("messages" in value) == ("text" in value):
            raise self._error(
                line,
                f"is {_shorten(value)}",
                "Each line must be an object with either 'messages' or 'text'",
            )
        if "text" in value:
            return self._text(value, line)
        return self._chat(value, line)

    def _text(self, value: dict[str, Any], line: int) -> TextItem:
        text = value.pop("text")
        if not isinstance(text, str) or not text:
            raise self._error(
                line, f"has 'text' {_shorten(text)}", "It must be a string, not empty"
            )
        return TextItem(text, value, line)

    def _chat(self, value: dict[str, Any], line: int) -> ChatItem:
        raw = value.pop("messages")
        if not isinstance(raw, list) or not raw:
            raise self._error(
                line, f"has 'messages' {_shorten(raw)}", "It must be a list, not empty"
            )
        messages = [self._message(message, line) for message in raw]
        answer = value.pop("answer", None)
        if answer is None and messages[-1][0] == "assistant":
            answer = messages.pop()[1]
        if answer is not None and (not isinstance(answer, str) or not answer):
            raise self._error(
                line, f"has the answer {_shorten(answer)}", "It must be a string, not empty"
            )
        if not messages:
            raise self._error(line, "has an answer and nothing before it", "Add a user message")
        return ChatItem(tuple(messages), answer, value, line)

    def _message(
        self, message: Any, line: int
    ) -> "tuple[str, str | tuple[str | ImageSource, ...]]":
        if not isinstance(message, dict) or "content" not in message:
            raise self._error(
                line,
                f"has the message {_shorten(message)}",
                "A message must be an object with 'role' and 'content'",
            )
        if message.get("role") not in _ROLES:
            raise self._error(
                line, f"has the role {message.get('role')!r}", f"Allowed: {', '.join(_ROLES)}"
            )
        content = message["content"]
        if isinstance(content, str):
            return message["role"], content
        if not isinstance(content, Sequence):
            raise self._error(
                line,
                f"has the content {_shorten(content)}",
                "Content must be a string or a list of 'text' and 'image_url' parts",
            )
        parts = tuple(self._part(part, line) for part in content)
        if message["role"] == "assistant" and all(isinstance(part, str) for part in parts):
            return "assistant", "".join(part for part in parts if isinstance(part, str))
        return message["role"], parts

    def _part(self, part: Any, line: int) -> str | ImageSource:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return part["text"]
        if kind == "image_url":
            image_url = part.get("image_url")
            url = image_url.get("url") if isinstance(image_url, dict) else image_url
            if isinstance(url, str) and url:
                return self._image(url, line)
        if kind in ("video", "video_url", "audio", "audio_url", "input_audio"):
            raise self._error(
                line, f"has a content part of type '{kind}'", "Only text and images are supported"
            )
        raise self._error(
            line,
            f"has the content part {_shorten(part)}",
            "Allowed: {'type': 'text', 'text': ...} and "
            "{'type': 'image_url', 'image_url': {'url': ...}}",
        )

    def _image(self, url: str, line: int) -> ImageSource:
        if url.startswith("data:"):
            content = self._data_url(url, line)
            return self._readable(content, url[:40], line)
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise self._error(
                line,
                f"names the image '{_shorten(url)}', which is no URL ({error})",
                "Give a path or a file: URL",
            ) from error
        if parts.scheme not in ("", "file"):
            raise self._error(
                line,
                f"names the image '{_shorten(url)}'",
                "Images are not fetched: download them and give a path or a file: URL",
            )
        # a relative path may hold '#' or '?', which only mean something in URLs
        path = Path(unquote(parts.path)) if parts.scheme else self._file.parent / url
        if path not in self._images:
            if not os.path.isfile(path):  # `Path.is_file` raises where a name is too long
                raise self._error(
                    line,
                    f"names the image '{_shorten(str(path))}', which does not exist",
                    f"Paths are relative to '{self._file.parent}'; encoded images are written "
                    "data:image/png;base64,<data>",
                )
            self._images[path] = self._readable(path, str(path), line)
        return self._images[path]

    def _data_url(self, url: str, line: int) -> bytes:
        header, comma, data = url.partition(",")
        try:
            if not comma or not header.endswith(";base64"):
                raise ValueError("no ';base64,' in it")
            return base64.b64decode(data, validate=True)
        except (ValueError, binascii.Error) as error:
            raise self._error(
                line,
                f"has the image URL '{url[:40]}...', which cannot be decoded ({error})",
                "Write data:image/png;base64,<data>",
            ) from error

    def _readable(self, content: Path | bytes, name: str, line: int) -> ImageSource:
        try:
            encoded = content if isinstance(content, bytes) else content.read_bytes()
            image = ImageSource(content, hashlib.sha256(encoded).hexdigest())
            # decoded whole: `verify` takes a JPEG that was cut off for sound
            image.load()
        # Pillow's decoders raise whatever their parsing runs into
        except Exception as error:
            raise self._error(
                line, f"names the image '{name}', which cannot be read ({error})", "Replace it"
            ) from error
        return image

    def _error(self, line: int, problem: str, remedy: str) -> CalibrationDataError:
        return CalibrationDataError(f"line {line} of '{self._file}' {problem}. {remedy}.")


def _lone_surrogate(text: str, value: Any) -> str | None:
    """The first half of a surrogate pair that stands alone in `value`, which `text` is read as.

    JSON can spell it, UTF-8 cannot, and tokenizers fail on it.
    """
    if "\\u" not in text:
        return None
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):04x}"
    return None


def _shorten(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
