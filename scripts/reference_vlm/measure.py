"""Dense accuracy of the reference model on an item file, through vLLM without any plugin."""

import json
import math
import os
from collections import defaultdict
from pathlib import Path

from vllm_attentionpack.report.machine import describe_machine

MAX_MODEL_LEN = 2048
MAX_IMAGES = 16
LENGTHS = (256, 512, 1024, 2048, 4096)  # upper bounds of the prompt lengths in "by_length", tokens


def read_items(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def measure(
    folder: Path, name: str, max_model_len: int = MAX_MODEL_LEN, limit: int | None = None
) -> dict:
    """Exact match of the whole answer, greedy bf16, on the first items of `folder`/`name`.jsonl."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_PLUGINS"] = ""  # none: an installed plugin could change the cache
    from vllm import LLM, SamplingParams

    items = read_items(folder / f"{name}.jsonl")[:limit]
    chats = [item for item in items if item["kind"] != "text"]
    texts = [item["text"] for item in items if item["kind"] == "text"]
    llm = LLM(
        str(folder / "model"),
        dtype="bfloat16",
        max_model_len=max_model_len,
        enforce_eager=True,
        limit_mm_per_prompt={"image": MAX_IMAGES, "video": 0},
    )
    answers = llm.chat(
        [_with_images(item["messages"], folder) for item in chats],
        SamplingParams(max_tokens=40, temperature=0),
    )
    scored = llm.generate(texts, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
    right = [a.outputs[0].text == item["answer"] for item, a in zip(chats, answers, strict=True)]
    lengths = [len(a.prompt_token_ids) for a in answers]
    return {
        "file": f"{name}.jsonl",
        "settings": {
            "dtype": "bfloat16",
            "decoding": "greedy",
            "score": "exact match of the whole answer",
            "max_model_len": max_model_len,
        },
        "machine": describe_machine(),
        "items": len(items),
        "prompt_tokens": _spread(lengths),
        "overall": _rates({"all": list(range(len(chats)))}, right)["all"],
        "by_modality": _rates(_group(chats, lambda i: i["modality"]), right),
        "by_kind": _rates(_group(chats, lambda i: i["kind"]), right),
        "by_cell": _rates(_group(chats, _cell), right),
        "by_length": _rates(_by_length(chats, lengths), right),
        "text": _text_loss(texts, scored),
    }


def _by_length(items: list[dict], lengths: list[int]) -> dict[str, list[int]]:
    """Items by kind and by the first of LENGTHS that holds their prompt."""
    groups = defaultdict(list)
    for i, (item, length) in enumerate(zip(items, lengths, strict=True)):
        bound = next((bound for bound in LENGTHS if length <= bound), None)
        if bound is None:
            raise ValueError(f"a prompt of {length} tokens is longer than the last of {LENGTHS}")
        groups[item["kind"], bound].append(i)
    return {f"{kind}, up to {bound} tokens": groups[kind, bound] for kind, bound in sorted(groups)}


def table(result: dict) -> str:
    """The measurement as a Markdown table."""
    rows = {**result["by_kind"], "all with an answer": result["overall"]}
    lines = ["| kind | items | right | accuracy |", "|---|---|---|---|"]
    for kind, cell in rows.items():
        lines.append(f"| {kind} | {cell['items']} | {cell['right']} | {cell['accuracy']:.3f} |")
    text = result["text"]
    lines.append(f"| text | {text['items']} | | {text['bits_per_byte']:.2f} bits per byte |")
    machine = result["machine"]
    lines += ["", f"Measured with vLLM {machine['vllm']}, torch {machine['torch']}, bf16, greedy."]
    return "\n".join(lines)


def length_table(result: dict) -> str:
    """Right answers of all items by kind and prompt length as a Markdown table."""
    found = {tuple(name.split(", up to ")): cell for name, cell in result["by_length"].items()}
    kinds = sorted({kind for kind, _ in found})
    lines = [
        "| kind | " + " | ".join(f"up to {bound} tokens" for bound in LENGTHS) + " |",
        "|---|" + "---|" * len(LENGTHS),
    ]
    for kind in kinds:
        cells = [found.get((kind, f"{bound} tokens")) for bound in LENGTHS]
        shown = [f"{cell['right']} of {cell['items']}" if cell else "" for cell in cells]
        lines.append(f"| {kind} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _with_images(messages: list[dict], folder: Path) -> list[dict]:
    """The messages with every image URL replaced by the loaded image."""
    from PIL import Image

    def load(part: dict) -> dict:
        if part["type"] != "image_url":
            return part
        with Image.open(folder / part["image_url"]["url"]) as image:
            return {"type": "image_pil", "image_pil": image.convert("RGB")}

    first, *rest = messages
    if isinstance(first["content"], str):
        return messages
    return [{"role": "user", "content": [load(part) for part in first["content"]]}, *rest]


def _cell(item: dict) -> str:
    first, *rest = item["messages"]
    if item["kind"] == "recall":
        size = f"{first['content'].count(':')} pairs"
    elif item["kind"] == "passage":
        size = f"{math.ceil(len(first['content']) / 1000)}000 characters"
    else:
        size = f"{sum(part['type'] == 'image_url' for part in first['content'])} images"
    return f"{item['kind']}, {size}, {'dialogue' if rest else 'one turn'}"


def _group(items: list[dict], key) -> dict[str, list[int]]:
    groups = defaultdict(list)
    for i, item in enumerate(items):
        groups[key(item)].append(i)
    return dict(sorted(groups.items()))


def _rates(groups: dict[str, list[int]], right: list[bool]) -> dict[str, dict]:
    found = {}
    for name, members in groups.items():
        hits = sum(right[i] for i in members)
        found[name] = {
            "items": len(members),
            "right": hits,
            "accuracy": round(hits / len(members), 4),
        }
    return found


def _text_loss(texts: list[str], outputs: list) -> dict:
    """Bits per byte over all tokens but each piece's first, which nothing predicts."""
    nats = 0.0
    for output in outputs:
        for token, choices in zip(
            output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
        ):
            nats -= choices[token].logprob
    size = sum(len(text.encode()) for text in texts)
    return {
        "items": len(texts),
        "bytes": size,
        "bits_per_byte": round(nats / size / math.log(2), 4),
    }


def _spread(lengths: list[int]) -> dict[str, int]:
    return {"min": min(lengths), "median": sorted(lengths)[len(lengths) // 2], "max": max(lengths)}
