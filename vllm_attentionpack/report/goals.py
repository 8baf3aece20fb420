"""What the calibration is measured by, judged from a result of `scripts/measure_codecs.py`.

Rows of codes alone and rows with exact tokens beside them are judged apart: on short contexts the
exact tokens are most of the bytes.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_TURBOQUANT, _INT8 = "TurboQuant 4bit", "int8 per token-head"
#: How far above int8's a divergence may be, and how far below dense an accuracy.
_INT8_SLACK, _ACCURACY_SLACK = 1.1, 0.01
#: What exact tokens beside the codes may leave of the divergence.
_EXACT_SHARE = 1 / 3

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """One goal on one kind of items.

    Attributes:
        text: what is compared.
        group: of the items.
        value: what was measured.
        bound: what it may be.
        error: standard error of a measured divergence, over items; None for accuracy.
        items: how many were measured.
        passed: None where the goal is to report.
    """

    text: str
    group: str
    value: float
    bound: float
    error: float | None
    items: int
    passed: bool | None


def goals(result: Mapping[str, Any]) -> list[Goal]:
    """Every goal that the rows of `result` can answer."""
    rows = {row["name"]: row for row in result["rows"]}
    ours = [row for row in result["rows"] if row["family"].partition(",")[0] == "ours"]
    joint = [row for row in ours if "per group" not in row["family"]]
    found: list[Goal] = []
    for row in joint:
        codes = float(row["name"].partition("x")[0].rpartition(" ")[2])
        kind = "" if row["family"] == "ours" else f" codes,{row['family'].partition(',')[2]}"
        if codes == 8:
            name = f"KL at 8x{kind} <= {_TURBOQUANT} at {rows[_TURBOQUANT]['ratio']:.2f}x"
            found += _bounded(name, row, rows[_TURBOQUANT], 1.0)
        without = rows.get(_without_exact(row["name"]))
        if codes == 8 and without not in (None, row):
            name = f"KL at 8x{kind} <= a third of that without"
            found += _bounded(name, row, without, _EXACT_SHARE)
        if codes == 4:
            name = f"KL at 4x{kind} <= 1.1 times {_INT8} at {rows[_INT8]['ratio']:.2f}x"
            found += _bounded(name, row, rows[_INT8], _INT8_SLACK)
        if codes in (8, 12) or (codes == 16 and kind):
            name = f"accuracy at {codes:g}x{kind}"
            found += _accuracy(name, row, result["dense"], judged=codes != 12)
    return found


def breaking_ratios(result: Mapping[str, Any]) -> dict[str, float | None]:
    """For each kind the first ratio of codes alone whose accuracy is off by more than a point."""
    rows = sorted(
        (row for row in result["rows"] if row["family"] == "ours"), key=lambda row: row["ratio"]
    )
    found: dict[str, float | None] = {}
    for group, dense in result["dense"].items():
        if dense["accuracy"] is None:
            continue
        broken = (
            row["ratio"]
            for row in rows
            if row["groups"][group]["accuracy"] < dense["accuracy"] - _ACCURACY_SLACK
        )
        found[group] = next(broken, None)
    return found


def _without_exact(name: str) -> str:
    """The name of the same codec without exact tokens."""
    bare = re.sub(r", \d+ \+ \d+ exact", "", name)
    return bare.removesuffix(" codes")


def _bounded(text: str, row: Row, other: Row, slack: float) -> Iterator[Goal]:
    for group, cell in row["groups"].items():
        bound = slack * other["groups"][group]["kl"]
        passed = cell["kl"] <= bound
        yield Goal(text, group, cell["kl"], bound, cell["kl_error"], cell["items"], passed)


def _accuracy(text: str, row: Row, dense: Row, judged: bool) -> Iterator[Goal]:
    for group, cell in row["groups"].items():
        if cell["accuracy"] is None:
            continue
        bound = dense[group]["accuracy"] - _ACCURACY_SLACK
        passed = cell["accuracy"] >= bound if judged else None
        yield Goal(text, group, cell["accuracy"], bound, None, cell["items"], passed)
