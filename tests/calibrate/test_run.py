"""What a calibration refuses before it starts an engine."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_attentionpack.calibrate import run
from vllm_attentionpack.errors import (
    AttentionPackError,
    CalibrationDataError,
    PackFileError,
    UnsupportedModelError,
)

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


class Underivable:
    """A gatherer whose model has no gradients."""

    simulator = SimpleNamespace(tokens=5)

    def gather(self, progress: Any) -> None:
        raise UnsupportedModelError("the model has no gradients. Do something else.")


def test_models_without_gradients_are_measured_and_said_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(run.logger, "warning", lambda text, *values: warnings.append(text % values))
    gatherer: Any = Underivable()
    assert run._gathered(gatherer, 2, may_lack=True) is None
    assert warnings == [
        "Sensitivity is measured part by part instead: the model has no gradients. Do something "
        "else."
    ]
    with pytest.raises(UnsupportedModelError, match="has no gradients"):
        run._gathered(gatherer, 2, may_lack=False)
