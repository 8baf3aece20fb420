"""Settings from flags and files: every shipped example is valid, every mistake is named."""

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_attentionpack.calibrate.settings import (
    DEFAULT_ANCHOR_SPAN,
    PRE_ROPE_ANCHOR_SPAN,
    CalibrateSettings,
    make_settings,
    read_settings_file,
)
from vllm_attentionpack.errors import ConfigError

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "configs/calibrate").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_shipped_examples_are_valid(path: Path) -> None:
    settings = make_settings(read_settings_file(path), str(path))
    assert (ROOT / settings.data).is_file()
    assert (ROOT / settings.model).is_dir()


def test_default_example_states_the_defaults() -> None:
    values = read_settings_file(ROOT / "configs/calibrate/default.yaml")
    assert set(CalibrateSettings.model_fields) - set(values) == {"output"}
    plain = make_settings({key: values[key] for key in ("model", "data")}, "test")
    assert make_settings(values, "test") == plain


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "d"}, "'model' is missing"),
        ({"model": "m", "data": "d", "rato": 8}, "the key 'rato' is unknown.*Allowed keys: model"),
        ({"model": "m", "data": "d", "ratio": -1}, "'ratio.*' is -1: .*greater than 0"),
        ({"model": "m", "data": "d", "group_size": "all"}, "'group_size.*' is 'all'"),
        ({"model": "m", "data": "d", "modalities": 3}, "'modalities' is 3"),
        ({"model": "m", "data": "d", "max_tokens": 0}, "'max_tokens' is 0"),
    ],
)
def test_mistakes_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"the file cannot be used: .*{message}"):
        make_settings(values, "the file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("ratio: [", "is not valid YAML"),
        ("- 8\n", "holds list, expected keys and values"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "settings.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=f"settings.yaml.* {message}"):
        read_settings_file(path)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_attentionpack.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_command_reports_our_errors_in_one_line(tmp_path: Path) -> None:
    result = command("calibrate", "model", "--data", str(tmp_path / "none.jsonl"))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("attentionpack: no data file at")
    assert result.stderr.count("\n") == 1


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model: m\ndata: from-file.jsonl\n")
    from_file = command("calibrate", "--config", str(config))
    assert "no data file at 'from-file.jsonl'" in from_file.stderr
    from_flag = command("calibrate", "--config", str(config), "--data", "from-flag.jsonl")
    assert "no data file at 'from-flag.jsonl'" in from_flag.stderr


def test_engine_section_must_be_a_mapping(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model: m\ndata: d\nengine: fast\n")
    result = command("calibrate", "--config", str(config))
    assert result.returncode == 2
    assert "'engine'" in result.stderr and "'fast'" in result.stderr


def test_a_bound_for_planes_that_are_not_coded_pre_rope_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pre_rope_turn is 0\.5, and no plane .*--pre-rope"):
        make_settings({"model": "m", "data": "d", "pre_rope_turn": 0.5}, "a test")
    values = {"model": "m", "data": "d", "pre_rope": True, "pre_rope_turn": 0.5}
    assert make_settings(values, "a test").pre_rope_turn == 0.5


def test_pre_rope_planes_want_anchors() -> None:
    with pytest.raises(ConfigError, match="anchor_span is 0: give a span") as refused:
        make_settings({"model": "m", "data": "d", "pre_rope": True, "anchor_span": 0}, "a test")
    assert "'' is" not in str(refused.value)
    spans = [
        make_settings({"model": "m", "data": "d", **given}, "a test").span
        for given in ({}, {"pre_rope": True}, {"pre_rope": True, "anchor_span": 256})
    ]
    assert spans == [DEFAULT_ANCHOR_SPAN, PRE_ROPE_ANCHOR_SPAN, 256]
