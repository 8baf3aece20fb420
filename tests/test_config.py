"""What `--additional-config` and the environment may say, and how a mistake is told."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from vllm_attentionpack.config import PACK_VARIABLE, SECTION, ServeConfig, serve_config
from vllm_attentionpack.errors import ConfigError

KEYS = "Allowed keys: pack, exact_prefill, sinks, window, ops, prefill."


def refusal(additional_config: object, environment: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        serve_config(additional_config, environment or {})
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_flag():
    config = serve_config({SECTION: {"pack": "a.safetensors"}}, {})
    assert config == ServeConfig(pack=Path("a.safetensors"), exact_prefill=True)


@pytest.mark.parametrize("other", [{}, {"another_plugin": {"pack": "b"}}, None])
def test_the_environment_names_the_pack_where_the_flag_does_not(other):
    assert serve_config(other, {PACK_VARIABLE: "/packs/a"}).pack == Path("/packs/a")


def test_the_flag_wins_over_the_environment():
    config = serve_config({SECTION: {"pack": "flag"}}, {PACK_VARIABLE: "environment"})
    assert config.pack == Path("flag")


def test_the_environment_completes_a_section_without_pack():
    config = serve_config({SECTION: {"exact_prefill": False}}, {PACK_VARIABLE: "a"})
    assert config == ServeConfig(pack=Path("a"), exact_prefill=False)


def test_the_environment_of_the_process_is_the_default(monkeypatch):
    monkeypatch.setenv(PACK_VARIABLE, "mine")
    assert serve_config({}).pack == Path("mine")
    monkeypatch.delenv(PACK_VARIABLE)
    with pytest.raises(ConfigError, match="none is configured"):
        serve_config({})


@pytest.mark.parametrize("environment", [{}, {PACK_VARIABLE: ""}])
@pytest.mark.parametrize("given", [{}, {SECTION: {}}, {SECTION: {"exact_prefill": False}}, None])
def test_no_pack_says_how_to_name_and_how_to_make_one(given, environment):
    message = refusal(given, environment)
    assert "needs a pack and none is configured" in message
    assert (
        '--additional-config \'{"attentionpack": {"pack": "model.pack.safetensors"}}\'' in message
    )
    assert PACK_VARIABLE in message
    assert "'attentionpack calibrate'" in message


@pytest.mark.parametrize("section", ["a.safetensors", ["a"], 3, True])
def test_a_section_that_is_no_object(section):
    message = refusal({SECTION: section}, {PACK_VARIABLE: "a"})
    assert f"'{SECTION}' is {section!r}; expected an object" in message


def test_unknown_keys():
    message = refusal({SECTION: {"pack": "a", "ratio": 8}})
    assert "'ratio' = 8" in message
    assert message.endswith(KEYS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pack", 3),
        ("pack", None),
        ("pack", ["a"]),
        ("exact_prefill", "perhaps"),
        ("exact_prefill", 2),
    ],
)
def test_wrong_types(key, value):
    message = refusal({SECTION: {"pack": "a", key: value}})
    assert f"'{key}' = {value!r}" in message
    assert message.endswith(KEYS)


def test_every_problem_is_told_at_once():
    message = refusal({SECTION: {"pack": 3, "exact_prefill": "perhaps", "x": 1}})
    assert all(f"'{key}' = " in message for key in ("pack", "exact_prefill", "x"))


@pytest.mark.parametrize("value", [True, False])
def test_exact_prefill(value):
    config = serve_config({SECTION: {"pack": "a", "exact_prefill": value}}, {})
    assert config.exact_prefill is value


def test_the_configuration_cannot_be_changed():
    config = serve_config({SECTION: {"pack": "a"}}, {})
    with pytest.raises(ValidationError, match="frozen"):
        config.pack = Path("b")


def test_the_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    config = serve_config({"attentionpack": {"pack": "~/x.pack.safetensors"}}, {})
    assert str(config.pack) == "/somewhere/x.pack.safetensors"
