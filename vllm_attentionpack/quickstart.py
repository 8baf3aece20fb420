"""The main job on the bundled model: calibrate, serve, ask, evaluate; the last line is JSON.

Usage: python -m vllm_attentionpack.quickstart [--ratio 8] [--group-size auto] [--output FOLDER]
"""

import base64
import json
import os
import shlex
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_attentionpack.report.evaluation import evaluation_table
from vllm_attentionpack.serving import serve

_EXAMPLE = Path(__file__).parents[1] / "examples" / "reference-vlm"
_MAX_MODEL_LEN = 2048
_QUESTIONS = 6

console = Console()


def main(
    ratio: Annotated[float, typer.Option(help="Compression against bfloat16.")] = 8.0,
    group_size: Annotated[str, typer.Option(help="KV heads coded jointly, or auto.")] = "auto",
    output: Annotated[Path, typer.Option(help="Where the pack and the log go.")] = Path(
        "quickstart"
    ),
) -> None:
    """Calibrate the bundled VLM, serve it from a compacted cache, ask it, evaluate it."""
    model = str(_EXAMPLE / "model")
    output.mkdir(parents=True, exist_ok=True)
    pack = output / f"reference-vlm-{ratio:g}x.pack.safetensors"
    length = ("--max-model-len", str(_MAX_MODEL_LEN))
    _run(
        *("calibrate", model, "--data", str(_EXAMPLE / "calibrate.jsonl")),
        *("--ratio", f"{ratio:g}", "--group-size", group_size, *length, "-o", str(pack)),
    )
    _ask(model, pack, output / "server.log", length)
    result = _run(
        *("eval", model, "--pack", str(pack), "--data", str(_EXAMPLE / "heldout.jsonl")),
        *(*length, "--json"),
    )
    _show(json.loads(result))


def _run(*arguments: str) -> str:
    """Runs one `attentionpack` command, its progress on the terminal; returns its output."""
    console.print(f"$ attentionpack {shlex.join(arguments)}", style="bold", soft_wrap=True)
    command = [sys.executable, "-m", "vllm_attentionpack.cli", *arguments]
    # eval sends vLLM's log to stderr, which is for the progress here
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", **os.environ}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        print(done.stdout)
        sys.exit(done.returncode)
    return done.stdout


def _ask(model: str, pack: Path, log: Path, options: tuple[str, ...]) -> None:
    """Asks the first multi-image questions of the held-out data over HTTP."""
    from openai import OpenAI

    console.print(
        f"$ vllm serve {model} --attention-backend ATTENTIONPACK "
        f'--additional-config \'{{"attentionpack": {{"pack": "{pack}"}}}}\'',
        style="bold",
        soft_wrap=True,
    )
    kv_cache = ("--kv-cache-memory-bytes", str(1 << 28), "--enforce-eager")
    lines = (_EXAMPLE / "heldout.jsonl").read_text().splitlines()
    items = (item for item in map(json.loads, lines) if item["modality"] == "visual")
    with serve(model, pack, log, (*options, *kv_cache)) as url:
        client = OpenAI(base_url=url, api_key="none")
        for item in islice(items, _QUESTIONS):
            messages: Any = [_with_data_urls(message) for message in item["messages"]]
            reply = client.chat.completions.create(
                model=model, messages=messages, temperature=0.0, max_tokens=32
            )
            answer = reply.choices[0].message.content
            images = sum(part["type"] == "image_url" for part in _parts(item["messages"]))
            question = item["messages"][-1]["content"]
            if not isinstance(question, str):
                question = question[-1]["text"]
            console.print(
                f"  {images} images, {question.strip()!r}: {answer!r} (expected {item['answer']!r})"
            )


def _parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        part
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
    ]


def _with_data_urls(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its image files inlined, as an HTTP client sends them."""
    if isinstance(message["content"], str):
        return message
    parts = []
    for part in message["content"]:
        if part["type"] == "image_url":
            data = (_EXAMPLE / part["image_url"]["url"]).read_bytes()
            url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
        else:
            parts.append(part)
    return {**message, "content": parts}


def _show(result: dict[str, Any]) -> None:
    from vllm_attentionpack.evaluate.run import Evaluation

    console.print(evaluation_table(Evaluation.from_json(result)))
    summary = {
        "ratio": result["ratio"],
        "bytes_per_token": result["bytes_per_token"],
        "kv_tokens": result["kv_tokens"],
        "accuracy": {"dense": result["accuracy_dense"], "packed": result["accuracy"]},
        "agreement": result["top1_agreement"],
        "kl": result["kl"],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    typer.run(main)
