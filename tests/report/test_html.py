"""The HTML page: complete, self-contained, safe against names, clear about bad inputs."""

import json
import re
from pathlib import Path

import pytest

from tests.support.cases import random_codec
from tests.support.packs import pack_of
from vllm_attentionpack.errors import ConfigError, PackFileError
from vllm_attentionpack.packfile import Fingerprint, save_pack
from vllm_attentionpack.packfile.schema import Pack, Validation
from vllm_attentionpack.report.goals import breaking_ratios, goals
from vllm_attentionpack.report.html import write_report

pytest.importorskip("plotly")


def cell(kl: float, accuracy: float | None) -> dict[str, float | None]:
    return {"kl": kl, "kl_error": kl / 10, "top1": 0.9, "accuracy": accuracy, "items": 40}


def row(name: str, family: str, ratio: float, kl: float, accuracy: float = 0.9) -> dict:
    groups = {"modality=visual": cell(kl, accuracy), "kind=text": cell(kl, None)}
    size = 1000 / ratio
    return {
        "name": name,
        "family": family,
        "ratio": ratio,
        "bytes_per_token": size,
        "groups": groups,
    }


RESULT = {
    "subject": {"name": "tiny"},
    "note": "Measured <b>carefully</b>.",
    "dense": {"modality=visual": cell(0, 0.9), "kind=text": cell(0, None)},
    "rows": [
        row("int8 per token-head", "int8", 1.9, 0.001),
        row("TurboQuant 4bit", "TurboQuant", 3.7, 0.02),
        row("ours 4x", "ours", 4.0, 0.00109),
        row("ours 8x", "ours", 8.0, 0.03, 0.895),
        row("ours 8x codes, 4 + 64 exact", "ours, 4 + 64 exact", 7.5, 0.02),
        row("ours 12x", "ours", 12.0, 0.2, 0.5),
        row("ours 16x codes, 4 + 64 exact", "ours, 4 + 64 exact", 14.0, 0.2, 0.88),
    ],
}


@pytest.fixture(params=[False, True], ids=["apart", "joint"])
def pack(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    fingerprint = Fingerprint(
        architecture="TestForCausalLM",
        num_layers=2,
        num_query_heads=4,
        num_kv_heads=2,
        head_size=16,
        rope="{}",
    )
    made = pack_of(
        lambda i: random_codec(2, 2, 16, 2, padding=4, joint_kv=request.param),
        fingerprint,
        ["a.0.attn", "a.1.attn"],
    )
    lost = Validation(kl=0.2, predicted_kl=0.1, top1_agreement=0.8, max_kl=0.05, tokens=10)
    header = made.header.model_copy(update={"validation": lost})
    path = tmp_path / "<i>x</i>.pack.safetensors".replace("/", "_")
    save_pack(Pack(header, made.layers), path)
    return path


def test_page_shows_packs_and_results_and_fetches_nothing(pack: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    result.write_text(json.dumps(RESULT))
    page_file = tmp_path / "report.html"
    write_report([pack], [result], page_file)
    page = page_file.read_text()
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)\s*=\s*['\"]?https?:", page)
    assert "<i>x" not in page and "&lt;i&gt;x" in page
    assert "<b>carefully" not in page
    for shown in ("ours 8x codes, 4 + 64 exact", "FAILED: 0.2000", "foretold 0.1000", "padding"):
        assert shown in page, shown
    # three plots of the pack and one of the results
    assert page.count('class="plotly-graph-div"') == 4


def test_page_without_results(pack: Path, tmp_path: Path) -> None:
    write_report([pack], [], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count('class="plotly-graph-div"') == 3


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}', '{"rows": [{"name": 1}]}'])
def test_results_of_another_kind_are_refused(pack: Path, tmp_path: Path, text: str) -> None:
    result = tmp_path / "result.json"
    result.write_text(text)
    with pytest.raises(ConfigError, match="is no result of scripts/measure_codecs"):
        write_report([pack], [result], tmp_path / "report.html")
    with pytest.raises(PackFileError):
        write_report([tmp_path / "missing"], [], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_goals_are_judged_by_the_rows() -> None:
    found = {(goal.text, goal.group): goal.passed for goal in goals(RESULT)}
    codes = "KL at 8x <= TurboQuant 4bit at 3.70x"
    exact = "KL at 8x codes, 4 + 64 exact <= TurboQuant 4bit at 3.70x"
    assert found[codes, "kind=text"] is False
    assert found[exact, "kind=text"] is True
    assert found["KL at 4x <= 1.1 times int8 per token-head at 1.90x", "modality=visual"] is True
    assert found["accuracy at 8x", "modality=visual"] is True
    assert found["accuracy at 12x", "modality=visual"] is None
    assert found["KL at 8x codes, 4 + 64 exact <= a third of that without", "kind=text"] is False
    assert found["accuracy at 16x codes, 4 + 64 exact", "modality=visual"] is False
    assert ("accuracy at 8x", "kind=text") not in found
    assert breaking_ratios(RESULT) == {"modality=visual": 12.0}
