"""The `attentionpack` command: what it prints, and that mistakes are one line and exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.cases import random_codec
from tests.support.packs import pack_of
from vllm_attentionpack import __version__, cli
from vllm_attentionpack.codec.layout import PlaneCounts
from vllm_attentionpack.packfile import Fingerprint, save_pack

COMMANDS = ("calibrate", "inspect", "eval")


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    """Two layers of two heads x 16, coded jointly: 24 and 28 of 128 bytes per token."""
    fingerprint = Fingerprint(
        architecture="TestForCausalLM",
        num_layers=2,
        num_query_heads=4,
        num_kv_heads=2,
        head_size=16,
        rope="{}",
    )
    made = pack_of(
        lambda i: random_codec(
            2, 2, 16, 2, PlaneCounts(n8=4, n4=8), PlaneCounts(n4=8, n2=16), 6 + 4 * i
        ),
        fingerprint,
        ["layers.0.attn", "layers.1.attn"],
    )
    path = tmp_path_factory.mktemp("cli") / "a.pack.safetensors"
    save_pack(made, path)
    return path


def run(*arguments: str | Path) -> str:
    """The output of a command that succeeds."""
    result = CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def fail(monkeypatch, capsys, *arguments: str | Path) -> str:
    """The one line that a command says on stderr before it exits with 2."""
    monkeypatch.setattr(sys, "argv", ["attentionpack", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("attentionpack: ")
    return line


def test_help_names_every_command():
    text = run("--help")
    assert "compacted KV cache" in text
    for command in COMMANDS:
        assert command in text
        assert f"Usage: root {command}" in run(command, "--help")


def test_help_names_defaults():
    """In the text of an option, rich would take them for markup and drop them."""
    text = " ".join(run("calibrate", "--help").replace("│", " ").split())
    for default in ("8", "0.05", "auto", "all data", "4", "64", "MODEL-RATIOx.pack.safetensors"):
        assert f"[default: ({default})]" in text
    assert "[default: (PyTorch's)]" in run("bench", "ops", "--help")


def test_version():
    assert run("--version") == f"{__version__}\n"


def test_the_installed_command_needs_no_engine():
    """Help must not wait for torch or vLLM."""
    code = (
        "import sys; from vllm_attentionpack.cli import main\n"
        "sys.argv = ['attentionpack', '--version']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print([name for name in ('torch', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [__version__, "[]"]


def test_inspect_shows_what_the_pack_holds(pack):
    lines = [line.split() for line in run("inspect", pack).splitlines()]
    text = [" ".join(line) for line in lines]
    assert "model none (TestForCausalLM)" in text
    assert "heads 4 query, 2 KV heads x 16, 2 KV heads per group" in text
    assert "compression 4.92x (asked for 1x): 52 of 256 bytes per token" in text
    assert "modalities text and visual" in text
    assert ["0", "0", "K", "12/32", "4/8/0", "2.00", "18", "5.33x"] in lines
    assert ["V", "24/32", "0/8/16", "2.00"] in lines
    assert ["1", "0", "K", "12/32", "4/8/0", "2.00", "18", "4.57x"] in lines


def test_inspect_as_json(pack):
    facts = json.loads(run("inspect", pack, "--json"))
    assert facts["fingerprint"]["architecture"] == "TestForCausalLM"
    assert (facts["bytes_per_token"], facts["dense_bytes_per_token"]) == (52, 256)
    assert facts["compression_ratio"] == 256 / 52
    assert [layer["name"] for layer in facts["layers"]] == ["layers.0.attn", "layers.1.attn"]
    assert [layer["padding_bytes_per_token"] for layer in facts["layers"]] == [6, 10]
    (group,) = facts["layers"][0]["groups"]
    assert group["key"] == {
        "rank": 12,
        "dims": 32,
        "dims_by_bits": {"8": 4, "4": 8},
        "bits_per_element": 2.0,
    }
    assert group["value"]["dims_by_bits"] == {"4": 8, "2": 16}


def test_inspect_of_a_missing_file(monkeypatch, capsys, tmp_path):
    line = fail(monkeypatch, capsys, "inspect", tmp_path / "none")
    assert f"no pack file at '{tmp_path / 'none'}'" in line


def test_inspect_of_a_damaged_file(monkeypatch, capsys, pack, tmp_path):
    damaged = tmp_path / "damaged"
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    assert "do not match its checksum" in fail(monkeypatch, capsys, "inspect", damaged)


def test_calibrate_says_what_is_missing(monkeypatch, capsys):
    line = fail(monkeypatch, capsys, "calibrate", "model")
    assert "the command line cannot be used: 'data' is missing" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ratio", "0"], "'ratio"),
        (["--group-size", "two"], "'group_size"),
        (["--modalities", "3"], "'modalities"),
        (["--max-tokens", "-5"], "'max_tokens' is -5"),
        (["--config", "no.yaml"], "'no.yaml' cannot be read"),
        (["--validate", "--max-kl", "inf"], "'max_kl' is inf"),
        (["--max-kl", "0.01"], "--max-kl is 0.01, but nothing is held to it. Add --validate"),
    ],
)
def test_calibrate_refuses_settings(monkeypatch, capsys, options, said):
    line = fail(monkeypatch, capsys, "calibrate", "model", "--data", "items.jsonl", *options)
    assert said in line


def test_calibrate_on_missing_data(monkeypatch, capsys, tmp_path):
    line = fail(monkeypatch, capsys, "calibrate", "model", "--data", tmp_path / "items.jsonl")
    assert f"no data file at '{tmp_path / 'items.jsonl'}'" in line


def test_eval_checks_the_pack_before_it_starts_an_engine(monkeypatch, capsys, tmp_path):
    data = tmp_path / "items.jsonl"
    data.write_text('{"text": "a"}\n')
    missing = tmp_path / "none"
    line = fail(monkeypatch, capsys, "eval", "model", "--pack", missing, "--data", data)
    assert f"no pack file at '{missing}'" in line


def test_the_real_command_gives_no_traceback(tmp_path):
    command = [sys.executable, "-m", "vllm_attentionpack.cli", "inspect", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"attentionpack: no pack file at '{tmp_path / 'none'}'")


def test_unknown_commands_and_options_are_usage_errors():
    for arguments in (["serve"], ["inspect", "--yaml", "a"], ["inspect"]):
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 2
        assert "Usage:" in result.output
        assert "Traceback" not in result.output
