"""Validation: which items are held out, which ratio is chosen, what the command says."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.cases import random_codec
from tests.support.packs import pack_of
from tests.support.reference import CALIBRATION_DATA, MODEL
from vllm_attentionpack.calibrate import validate
from vllm_attentionpack.calibrate.assemble import Budget
from vllm_attentionpack.calibrate.validate import Candidate, Validator, split_items
from vllm_attentionpack.errors import CalibrationDataError
from vllm_attentionpack.evaluate.data import Dataset, TextItem, read_dataset
from vllm_attentionpack.packfile import Fingerprint, load_pack, read_header, save_pack
from vllm_attentionpack.packfile.schema import Pack, Validation

FINGERPRINT = Fingerprint(
    architecture="TestForCausalLM",
    num_layers=1,
    num_query_heads=4,
    num_kv_heads=2,
    head_size=16,
    rope="{}",
)


def texts(n: int) -> Dataset:
    return Dataset(Path("d.jsonl"), tuple(TextItem(f"text {i}", {}, i + 1) for i in range(n)), "0")


def test_held_out_items_are_drawn_by_the_seed_and_apart_from_the_others() -> None:
    fitted, held_out = split_items(texts(50), 0.2, 0)
    assert (len(fitted), len(held_out)) == (40, 10)
    assert sorted(item.line for item in fitted + held_out) == list(range(1, 51))
    assert (fitted, held_out) == split_items(texts(50), 0.2, 0)
    assert held_out != split_items(texts(50), 0.2, 1)[1]
    assert [item.line for item in fitted] == sorted(item.line for item in fitted)


def test_nothing_to_hold_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationDataError, match="holds 1 items, too few"):
        split_items(texts(1), 0.2, 0)
    file = tmp_path / "asked.jsonl"
    line = json.dumps({"messages": [{"role": "user", "content": "Hello"}]})
    file.write_text(f"{line}\n{line}\n")
    with pytest.raises(
        CalibrationDataError, match=r"none of the 1 items .* has an answer to score"
    ):
        split_items(read_dataset(file), 0.2, 0)


class Measured:
    """A validator whose packs lose `loss(ratio)`."""

    def __init__(self, loss: Any, max_kl: float) -> None:
        self.loss, self.max_kl = loss, max_kl
        self.asked: list[float] = []

    def candidate(self, ratio: float) -> Candidate:
        pack = pack_of(lambda i: random_codec(2, 2, 16), FINGERPRINT, ["layers.0.attn"])
        return Candidate(Pack(pack.header.model_copy(update={"ratio": ratio}), pack.layers), None)

    def marked(self, candidate: Candidate) -> Pack:
        header = candidate.pack.header
        self.asked.append(header.ratio)
        found = Validation(
            kl=self.loss(header.ratio),
            predicted_kl=None,
            top1_agreement=1,
            max_kl=self.max_kl,
            tokens=5,
        )
        return Pack(header.model_copy(update={"validation": found}), candidate.pack.layers)

    def smallest(self) -> Pack:
        budget = Budget(num_layers=1, num_kv_heads=2, head_size=16, heads_per_group=2)
        self.range = budget.ratio_range()
        return Validator.smallest(self, self.candidate, budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [0.02, 0.05, 0.08])
def test_auto_finds_the_largest_ratio_that_passes(limit: float) -> None:
    measured = Measured(lambda ratio: ratio / 100, limit)
    header = measured.smallest().header
    assert header.validation is not None and header.validation.passed
    tolerance = validate._RATIO_TOLERANCE
    assert limit * 100 / tolerance <= header.ratio <= limit * 100
    assert len(measured.asked) < 12


def test_auto_takes_the_range_where_all_pass_or_none() -> None:
    measured = Measured(lambda ratio: 0.001, 0.01)
    assert measured.smallest().header.ratio == measured.range[1]
    measured = Measured(lambda ratio: 0.5, 0.01)
    header = measured.smallest().header
    assert header.ratio == measured.range[0]
    assert header.validation is not None and not header.validation.passed


def test_validation_survives_the_file(tmp_path: Path) -> None:
    measured = Measured(lambda ratio: 0.02, 0.05)
    pack = measured.marked(measured.candidate(3.0))
    save_pack(pack, tmp_path / "a.pack.safetensors")
    assert load_pack(tmp_path / "a.pack.safetensors").header == pack.header


@pytest.mark.engine
@pytest.mark.usefixtures("no_engine")
def test_the_command_marks_a_pack_that_loses_too_much(tmp_path: Path) -> None:
    path = tmp_path / "12x.pack.safetensors"
    command = [sys.executable, "-m", "vllm_attentionpack.cli", "calibrate", str(MODEL)]
    command += ["--data", str(CALIBRATION_DATA), "--ratio", "12", "--max-tokens", "4000"]
    command += ["--max-model-len", "1024", "--dtype", "float32", "--output", str(path)]
    result = subprocess.run(
        [*command, "--validate", "--max-kl", "0.0001"], capture_output=True, text=True
    )
    assert result.returncode == 3, result.stderr[-2000:]
    assert re.search(
        r"validation FAILED: 0\.\d{4} nats per token, foretold 0\.\d{4}", result.stdout
    )
    found = read_header(path).validation
    assert found is not None and not found.passed and found.max_kl == 0.0001
    assert found.predicted_kl is not None
    # foretold from calibration prompts and as if errors acted one by one: an order of magnitude
    assert found.kl / 10 < found.predicted_kl < found.kl * 10
    shown = subprocess.run(
        [sys.executable, "-m", "vllm_attentionpack.cli", "inspect", str(path)],
        capture_output=True,
        text=True,
    )
    assert "FAILED" in shown.stdout
