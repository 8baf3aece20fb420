"""The figures of the README, made from the result files so that they cannot go stale by hand."""

import json
import re
from pathlib import Path
from typing import Any


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


_TABLES = {"reference_vlm_packs": _packs}
