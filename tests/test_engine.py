"""Engines that our tools start: what vLLM refuses is one error of ours."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.reference import MODEL
from vllm_attentionpack.calibrate.engine import statistics_engine
from vllm_attentionpack.config import DISABLE_VARIABLE
from vllm_attentionpack.engine import start
from vllm_attentionpack.errors import ConfigError

# Imports vLLM, which remembers its environment variables while an engine runs.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_engine")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": "./none"}, "no model at './none'"),
        ({"dtyp": "float32"}, "vLLM has no engine argument 'dtyp'"),
        ({"dtype": "float13"}, f"not start with the model '{MODEL}' .*dtype.*'float16'"),
        ({"max_model_len": 99999}, f"not start with the model '{MODEL}' .*max_model_len"),
    ],
)
def test_arguments_that_vllm_refuses(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        start({"model": str(MODEL), **arguments})
    assert "\n" not in str(caught.value)


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"not start with the model '{tmp_path}'"):
        start({"model": str(tmp_path)})


def test_a_disabled_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DISABLE_VARIABLE, "1")
    with (
        pytest.raises(ConfigError, match=r"ATTENTIONPACK_DISABLE is 1, .* Unset it"),
        statistics_engine(str(MODEL), 0, {}),
    ):
        pass


def test_the_engine_arguments_of_a_calibration_name_no_model() -> None:
    with (
        pytest.raises(ConfigError, match="name the model 'b', but the one to calibrate is 'a'"),
        statistics_engine("a", 0, {"model": "b"}),
    ):
        pass
