"""The real engine on a GPU with weights of no meaning: ours beside vLLM's own attention.

Weights are vLLM's dummies and the pack is made without calibration, so that only speed and capacity
mean anything. Each engine runs in a process of its own; what fails is reported as such.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from vllm_attentionpack import plugin
from vllm_attentionpack.bench.shapes import LayerShape
from vllm_attentionpack.calibrate.settings import DEFAULT_SINKS, DEFAULT_WINDOW
from vllm_attentionpack.config import SECTION
from vllm_attentionpack.packfile import Fingerprint, save_pack
from vllm_attentionpack.packfile.uncalibrated import uncalibrated_pack


@dataclass(frozen=True)
class Model:
    """A Llama of random weights and how it is loaded with requests.

    Attributes:
        layer: heads and compression.
        layers: number of layers.
        hidden: hidden size.
        intermediate: of the feed-forward part.
        prompt: tokens of a prompt.
        batch: requests at a time.
        new_tokens: of each request.
        kv_bytes: budget of the cache.
    """

    layer: LayerShape
    layers: int
    hidden: int
    intermediate: int
    prompt: int = 8192
    batch: int = 16
    new_tokens: int = 64
    kv_bytes: int = 24 << 30


MODELS = {
    "8B, 32/8 heads": Model(LayerShape(32, 8, 128, 8, 8), 32, 4096, 14336),
    # A VLM of that size, LLaVA-1.5 say, without its vision tower.
    "7B, 32/32 heads": Model(
        LayerShape(32, 32, 128, 8, 8), 32, 4096, 11008, prompt=4096, batch=8, kv_bytes=40 << 30
    ),
}
TINY = Model(
    LayerShape(4, 2, 64, 2, 4), 2, 256, 512, prompt=64, batch=2, new_tokens=4, kv_bytes=64 << 20
)
#: Engine arguments of each way to attend; the first two run on every model before the others do.
ENGINES: dict[str, dict[str, Any]] = {
    "ATTENTIONPACK": {"attention_backend": "ATTENTIONPACK", "block_size": 128},
    "vLLM Triton": {"attention_backend": "TRITON_ATTN"},
    f"ATTENTIONPACK, {DEFAULT_SINKS} + {DEFAULT_WINDOW} exact": {
        "attention_backend": "ATTENTIONPACK",
        "additional_config": {SECTION: {"sinks": DEFAULT_SINKS, "window": DEFAULT_WINDOW}},
    },
    "vLLM Triton, fp8 cache": {"attention_backend": "TRITON_ATTN", "kv_cache_dtype": "fp8"},
    "vLLM FlashAttention": {"attention_backend": "FLASH_ATTN"},
    "TurboQuant 4 bits": {"kv_cache_dtype": "turboquant_4bit_nc"},
}


def write_model(model: Model, folder: Path) -> None:
    """A checkpoint folder without weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.layer.query_heads,
        "num_key_value_heads": model.layer.kv_heads,
        "head_dim": model.layer.head_size,
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_pack(model: Model, fingerprint: Fingerprint, path: Path) -> None:
    """A pack of random bases for every layer."""
    codec = model.layer.codec(torch.device("cpu"))
    names = [f"model.layers.{i}.self_attn.attn" for i in range(model.layers)]
    codecs = [codec] * model.layers
    ratio = codec.layout.compression_ratio
    save_pack(uncalibrated_pack(codecs, fingerprint, names, ratio, max_context=131072), path)


def engine_arguments(model: Model, arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What `LLM` is called with; `folder` is filled with the model and, for ours, its pack."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_attentionpack.attention.fingerprint import fingerprint

    write_model(model, folder)
    common: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "max_model_len": model.prompt + model.new_tokens + 16,
        "max_num_seqs": model.batch,
        "kv_cache_memory_bytes": model.kv_bytes,
        "enable_prefix_caching": False,
        "seed": 0,
    } | arguments
    if arguments.get("attention_backend") == "ATTENTIONPACK":
        config = EngineArgs(model=str(folder), skip_tokenizer_init=True).create_model_config()
        pack = folder / "random.pack.safetensors"
        write_pack(model, fingerprint(config), pack)
        section = common.get("additional_config", {}).get(SECTION, {})
        common["additional_config"] = {SECTION: section | {"pack": str(pack)}}
    return common


def run_engine(model: Model, arguments: dict[str, Any]) -> dict[str, float]:
    """Seconds and tokens of one engine, in this process."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as name:
        llm = LLM(**engine_arguments(model, arguments, Path(name)))

        def generate(requests: int, new_tokens: int) -> float:
            prompts = [
                {"prompt_token_ids": torch.randint(5, 30000, (model.prompt,)).tolist()}
                for _ in range(requests)
            ]
            sampling = SamplingParams(
                max_tokens=new_tokens, temperature=0, ignore_eos=True, detokenize=False
            )
            start = time.perf_counter()
            llm.generate(prompts, sampling, use_tqdm=False)
            return time.perf_counter() - start

        generate(1, 4)  # compiles what is compiled at first use
        generate(model.batch, 4)
        first = generate(1, 1)
        one = generate(1, model.new_tokens)
        all_first = generate(model.batch, 1)
        many = generate(model.batch, model.new_tokens)
        cache = llm.llm_engine.vllm_config.cache_config
        capacity = cache.kv_cache_size_tokens or 0  # exact tokens take blocks of the same pool
        steps = model.new_tokens - 1
        return {
            "ttft_seconds": first,
            "tpot_seconds": (one - first) / steps,
            "decode_tokens_per_second": model.batch * steps / (many - all_first),
            "cached_tokens": capacity,
            "largest_batch": capacity // (model.prompt + model.new_tokens),
        }


def environment(folder: Path) -> dict[str, str]:
    """Where an engine finds the plugin, by an entry point in `folder` if it is not installed.

    vLLM loads plugins by their entry points alone, which a checkout on `PYTHONPATH` has not.
    """
    found = dict(os.environ)
    group = "vllm.general_plugins"
    if not any(point.name == "attentionpack" for point in entry_points(group=group)):
        record = folder / "vllm_attentionpack-0.dist-info"
        record.mkdir()
        (record / "METADATA").write_text("Name: vllm_attentionpack\nVersion: 0\n")
        target = f"{plugin.__name__}:{plugin.register.__name__}"
        (record / "entry_points.txt").write_text(f"[{group}]\nattentionpack = {target}\n")
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), found.get("PYTHONPATH")]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=205, help="seconds for all engines")
    parser.add_argument("--tiny", action="store_true", help="a model that a CPU can run")
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "ENGINE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    models = {"tiny": TINY} if options.tiny else MODELS
    if options.child:
        model, engine = options.child
        print("RESULT " + json.dumps(run_engine(models[model], ENGINES[engine])))
        return 0
    deadline = time.monotonic() + options.budget
    result: dict[str, dict[str, Any]] = {}
    print("| model | engine | TTFT | TPOT | tokens/s | largest batch |\n|---|---|---|---|---|---|")
    options.out.mkdir(parents=True, exist_ok=True)
    # Time may not suffice for all: ours and vLLM's Triton attention come first, on every model.
    engines = list(ENGINES)
    runs = [(model, engine) for model in models for engine in engines[:2]]
    runs += [(model, engine) for engine in engines[2:] for model in models]
    plugins = tempfile.TemporaryDirectory()
    settings = environment(Path(plugins.name))
    for model, engine in runs:
        row = _child(model, engine, options.tiny, deadline - time.monotonic(), settings)
        result.setdefault(model, {})[engine] = row
        (options.out / "gpu_engine.json").write_text(json.dumps(result, indent=1) + "\n")
        if "error" in row:
            print(f"| {model} | {engine} | {row['error'][:80]} | | | |", flush=True)
            continue
        print(
            f"| {model} | {engine} | {row['ttft_seconds'] * 1e3:.0f} ms "
            f"| {row['tpot_seconds'] * 1e3:.2f} ms | {row['decode_tokens_per_second']:.0f} "
            f"| {row['largest_batch']} |",
            flush=True,
        )
    return 0


def _child(
    model: str, engine: str, tiny: bool, seconds: float, settings: dict[str, str]
) -> dict[str, Any]:
    if seconds < 30:
        return {"error": "out of time"}
    command = [sys.executable, "-m", "vllm_attentionpack.bench.gpu_engine", "--out", "."]
    command += ["--child", model, engine] + (["--tiny"] if tiny else [])
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=settings
    )
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # The engine's own processes too, which would keep their memory on the GPU.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"error": "out of time"}
    for line in stdout.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return found
    sys.stderr.write(stderr)
    lines = [line for line in stderr.splitlines() if "Error" in line]
    return {"error": lines[-1][-300:] if lines else f"exit status {process.returncode}"}


if __name__ == "__main__":
    sys.exit(main())
