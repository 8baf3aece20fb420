"""The figures of the README, made from the result files so that they cannot go stale by hand."""

import json
import re
from pathlib import Path
from typing import Any

from vllm_attentionpack.report.goals import breaking_ratios, goals


def with_figures(text: str, results: Path) -> str:
    """`text` with what stands between `<!-- figures: NAME -->` and `<!-- end -->` made anew.

    Raises:
        KeyError: a name that no table is known for.
    """

    def replace(match: "re.Match[str]") -> str:
        name = match.group(1)
        result = json.loads((results / f"{name}.json").read_text())
        return f"<!-- figures: {name} -->\n{_TABLES[name](result)}\n<!-- end -->"

    return re.sub(r"<!-- figures: (\w+) -->.*?<!-- end -->", replace, text, flags=re.DOTALL)


def _packs(result: dict[str, Any]) -> str:
    """One row per pack: size, capacity, and quality on image questions, recall and text."""
    lines = [
        "| ratio | KV heads per group | bytes per token | tokens of KV cache in 1 GiB | "
        "KL image / recall / text | accuracy image / recall |",
        "|---|---|---|---|---|---|",
    ]
    first = result["rows"][0]
    kinds = ("modality=visual", "kind=recall", "kind=text")
    answered = kinds[:2]
    lines.append(
        f"| dense bf16 | - | {first['bytes_per_token']['dense']:,} | "
        f"{first['kv_tokens']['dense']:,} | - | "
        + " / ".join(f"{first['groups'][k]['accuracy_dense']:.1%}" for k in answered)
        + " |"
    )
    for row in result["rows"]:
        groups = row["groups"]
        lines.append(
            f"| {row['ratio']:.2f}x | {row['group_size']} | {row['bytes_per_token']['packed']:,} | "
            f"{row['kv_tokens']['packed']:,} | "
            + " / ".join(f"{groups[k]['kl']:.4f}" for k in kinds)
            + " | "
            + " / ".join(f"{groups[k]['accuracy']:.1%}" for k in answered)
            + " |"
        )
    machine = result["machine"]
    lines += [
        "",
        f"vLLM {machine['vllm']}, torch {machine['torch']}, bf16, {machine['cpu']}; "
        f"{first['overall']['n']} held-out items. KL in nats per token, teacher-forced; every "
        "token, prompts included, attends to codes.",
    ]
    return "\n".join(lines)


def _codecs(result: dict[str, Any]) -> str:
    """One row per codec, most bytes first, and the goals that they answer."""
    subject = result["subject"]
    groups = list(result["dense"])
    names = [group.partition("=")[2] for group in groups]
    answered = [g for g in groups if result["dense"][g]["accuracy"] is not None]
    lines = [
        f"| codec | ratio | KL {' / '.join(names)} | accuracy "
        + " / ".join(group.partition("=")[2] for group in answered)
        + " |",
        "|---|---|---|---|",
    ]
    for row in sorted(result["rows"], key=lambda row: row["ratio"]):
        name = f"**{row['name']}**" if row["family"] == "ours" else row["name"]
        lines.append(
            f"| {name} | {row['ratio']:.2f}x | "
            + " / ".join(f"{row['groups'][g]['kl']:.5f}" for g in groups)
            + " | "
            + " / ".join(f"{row['groups'][g]['accuracy']:.1%}" for g in answered)
            + " |"
        )
    dense = " / ".join(f"{result['dense'][g]['accuracy']:.1%}" for g in answered)
    machine = result["machine"]
    lines += [
        "",
        f"{subject['layers']} layers, {subject['query_heads']} query and {subject['kv_heads']} KV "
        f"heads x {subject['head_size']}, {subject['mean_context']:.0f} tokens per prompt on "
        f"average; dense accuracy {dense}. {result['note']} vLLM {machine['vllm']}, float32.",
        "",
        "| goal | kind | measured | bound | |",
        "|---|---|---|---|---|",
    ]
    verdicts = {True: "met", False: "**missed**", None: "reported"}
    for goal in goals(result):
        form = "{:.1%}" if goal.text.startswith("accuracy") else "{:.5f}"
        value, bound = form.format(goal.value), form.format(goal.bound)
        kind = goal.group.partition("=")[2]
        lines.append(f"| {goal.text} | {kind} | {value} | {bound} | {verdicts[goal.passed]} |")
    for group, ratio in breaking_ratios(result).items():
        where = "nowhere up to the last ratio" if ratio is None else f"at {ratio:.2f}x"
        kind = group.partition("=")[2]
        lines.append(f"| accuracy falls by more than a point | {kind} | {where} | | reported |")
    return "\n".join(lines)


def _window(result: dict[str, Any]) -> str:
    """Codes with and without exact tokens: quality, and how many more requests fit."""
    groups = list(result["dense"])
    answered = [g for g in groups if result["dense"][g]["accuracy"] is not None]
    names, asked = (
        " / ".join(group.partition("=")[2] for group in chosen) for chosen in (groups, answered)
    )
    lines = [
        f"| codes | exact: first + last | KL {names} | accuracy {asked} | "
        "requests that fit, to dense: 2k / 32k tokens |",
        "|---|---|---|---|---|",
    ]
    rows = [r for r in result["rows"] if (r["sinks"], r["window"]) in _SHOWN_WINDOWS]
    for row in sorted(rows, key=lambda row: float(row["family"].rstrip("x"))):
        lines.append(
            f"| {row['family']} | {row['sinks']} + {row['window']} | "
            + " / ".join(f"{row['groups'][g]['kl']:.4f}" for g in groups)
            + " | "
            + " / ".join(f"{row['groups'][g]['accuracy']:.1%}" for g in answered)
            + f" | {row['capacity_2048']:.1f}x / {row['capacity_32768']:.1f}x |"
        )
    dense = " / ".join(f"{result['dense'][g]['accuracy']:.1%}" for g in answered)
    mean = result["subject"]["mean_context"]
    lines += [
        "",
        f"Dense accuracy {dense}; {mean:.0f} tokens per prompt on average, of which a window takes "
        "a larger share than of long contexts. Teacher-forced, every token that is not exact read "
        "from its codes.",
    ]
    return "\n".join(lines)


#: Sinks and windows that the README shows; the result file holds the whole grid.
_SHOWN_WINDOWS = ((0, 0), (4, 32), (4, 64))

_TABLES = {
    "reference_vlm_window": _window,
    "reference_vlm_packs": _packs,
    "reference_vlm_codecs": _codecs,
    "wide_vlm_codecs": _codecs,
}
