"""What a calibration refuses before it starts an engine."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_attentionpack.calibrate import run
from vllm_attentionpack.errors import AttentionPackError, CalibrationDataError, PackFileError

ASKED = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(run, "statistics_engine", start)


def written(folder: Path, item: dict[str, Any]) -> Path:
    file = folder / "items.jsonl"
    file.write_text(json.dumps(item) + "\n")
    return file


@pytest.mark.parametrize(
    ("item", "options", "error", "said"),
    [
        (ASKED, {}, CalibrationDataError, "none of the 1 chats .* has an answer, .*: uniform'"),
        ({"text": "a b"}, {"modalities": 2}, CalibrationDataError, "'.*jsonl' names no image"),
        ({"text": "a b"}, {"output": "."}, PackFileError, "cannot be written to '.'"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(
    tmp_path: Path,
    item: dict[str, Any],
    options: dict[str, Any],
    error: type[AttentionPackError],
    said: str,
) -> None:
    with pytest.raises(error, match=said):
        run.calibrate("model", written(tmp_path, item), 8, **options)


def test_answers_are_not_needed_for_what_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="an engine was started"):
        run.calibrate("model", written(tmp_path, ASKED), 8, sensitivity="uniform")
