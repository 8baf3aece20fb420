"""The figures of documents, made from the result files so that they cannot go stale by hand."""

import json
import re
from pathlib import Path
from typing import Any

from vllm_attentionpack.calibrate.settings import DEFAULT_SINKS, DEFAULT_WINDOW
from vllm_attentionpack.report.goals import breaking_ratios, goals


def with_figures(text: str, results: Path) -> str:
    """`text` with what stands between `<!-- figures: NAME -->` and `<!-- end -->` made anew.

    NAME is a result file, SUBJECT_TABLE; `NAME default` shows its rows with default exact tokens,
    `NAME some` those with some windows.

    Raises:
        KeyError: a name that no table is known for.
    """

    def replace(match: "re.Match[str]") -> str:
        name, chosen = match.group(1), match.group(2) or ""
        result = json.loads((results / f"{name}.json").read_text())
        if chosen:
            shown = _CHOSEN[chosen.strip()]
            result["rows"] = [row for row in result["rows"] if _exact(row) in shown]
        table = _TABLES[name.rpartition("_")[2]](result)
        return f"<!-- figures: {name}{chosen} -->\n{table}\n<!-- end -->"

    marks = rf"<!-- figures: (\w+)( (?:{'|'.join(_CHOSEN)}))? -->.*?<!-- end -->"
    return re.sub(marks, replace, text, flags=re.DOTALL)


def _exact(row: dict[str, Any]) -> tuple[int, int]:
    return row["sinks"], row["window"]


def _packs(result: dict[str, Any]) -> str:
    """One row per pack: size, capacity, and quality on image questions, recall and text."""
    first = result["rows"][0]
    kinds = [kind for kind in _SHOWN_KINDS if kind in first["groups"]]
    answered = [kind for kind in kinds if first["groups"][kind]["accuracy"] is not None]
    names, asked = (
        " / ".join(kind.partition("=")[2] for kind in chosen) for chosen in (kinds, answered)
    )
    lines = [
        "| ratio | exact: first + last | bytes per token | tokens of KV cache in 1 GiB | "
        f"KL {names} | accuracy {asked} |",
        "|---|---|---|---|---|---|",
    ]
    lines.append(
        f"| dense bf16 | - | {first['bytes_per_token']['dense']:,} | "
        f"{first['kv_tokens']['dense']:,} | - | "
        + " / ".join(f"{first['groups'][k]['accuracy_dense']:.1%}" for k in answered)
        + " |"
    )
    for row in result["rows"]:
        groups = row["groups"]
        lines.append(
            f"| {row['ratio']:.2f}x | {row['sinks']} + {row['window']} | "
            f"{row['bytes_per_token']['packed']:,} | {row['kv_tokens']['packed']:,} | "
            + " / ".join(f"{groups[k]['kl']:.4f}" for k in kinds)
            + " | "
            + " / ".join(f"{groups[k]['accuracy']:.1%}" for k in answered)
            + " |"
        )
    machine = result["machine"]
    lines += [
        "",
        f"vLLM {machine['vllm']}, torch {machine['torch']}, bf16, {machine['cpu']}; "
        f"{first['overall']['n']} held-out items. KL in nats per token, teacher-forced; answers "
        "generated. Every token, prompts included, attends to codes but for the exact tokens. "
        f"Capacity by vLLM for requests of {result['engine']['max_model_len']:,} tokens.",
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
            + " / ".join(f"{row['groups'][g]['kl']:.6f}" for g in groups)
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
        "| goal | kind, items | measured | bound | |",
        "|---|---|---|---|---|",
    ]
    verdicts = {True: "met", False: "**missed**", None: "reported"}
    for goal in goals(result):
        form = "{:.1%}" if goal.text.startswith("accuracy") else "{:.7f}"
        value, bound = form.format(goal.value), form.format(goal.bound)
        if goal.error is not None:
            value += f" ± {goal.error:.7f}"
        kind = f"{goal.group.partition('=')[2]}, {goal.items}"
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
    for row in sorted(result["rows"], key=lambda row: float(row["family"].rstrip("x"))):
        lines.append(
            f"| {row['family']} | {row['sinks']} + {row['window']} | "
            + " / ".join(f"{row['groups'][g]['kl']:.5f}" for g in groups)
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


def _rotation(result: dict[str, Any]) -> str:
    """Keys as they come and relative to anchors, alone and beside exact tokens."""
    groups = list(result["dense"])
    names = " / ".join(group.partition("=")[2] for group in groups)
    rows = [row for row in result["rows"] if "span" in row]
    alone, beside = ([row for row in rows if row["exact"] is kept] for kept in (False, True))
    lines = [f"| keys | KL {names} | beside exact tokens | gain of keys, dB |", "|---|---|---|---|"]
    for row, other in zip(alone, beside, strict=True):
        cells = [
            " / ".join(f"{found['groups'][g]['kl']:.6f}" for g in groups) for found in (row, other)
        ]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['gain']:.1f} |")
    options, subject = result["options"], result["subject"]
    lines += [
        "",
        f"{float(options['ratio']):g}x; statistics of keys averaged over a span, or over "
        f"{int(options['max_context']):,} positions as they come; {subject['mean_context']:.0f} "
        f"tokens per prompt on average, {DEFAULT_SINKS} + {DEFAULT_WINDOW} exact. Gain: the "
        "energy of keys over what two bits per element would leave of it.",
    ]
    return "\n".join(lines)


_DEFAULT_EXACT = (DEFAULT_SINKS, DEFAULT_WINDOW)
#: Sinks and windows that a document may choose of those that a file holds.
_CHOSEN = {"default": (_DEFAULT_EXACT,), "some": ((0, 0), (4, 32), _DEFAULT_EXACT)}
_SHOWN_KINDS = ("modality=visual", "kind=passage", "kind=recall", "kind=text")

_TABLES = {"window": _window, "packs": _packs, "codecs": _codecs, "rotation": _rotation}
