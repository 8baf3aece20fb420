"""Command line of the training run."""

import argparse
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

MAX_POSITIONS = 8192


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Options:
    out: str = _option("model", "folder of the checkpoint; the training state goes to OUT.state.pt")
    init: str = _option("", "training state to resume weights, optimizer and curriculum from")
    widen: str = _option("", "checkpoint folder of a narrower model to start from (widen.py)")
    device: str = _option("cpu", "cpu or cuda (cuda: bf16 autocast)")
    bf16: bool = _option(False, "bf16 autocast on a CPU too: four times faster products on some")
    threads: int = _option(1, "CPU threads")
    seed: int = _option(1, "fixes weights and data for a machine and thread count")
    steps: int = _option(6000, "optimizer steps")
    until: int = _option(0, "stop after this step, whatever the schedule says (0 = follow it)")
    minutes: float = _option(0.0, "wall-clock limit, 0 = none; the schedule then follows the clock")
    batch: int = _option(1, "multiplies the token budget of the micro-batches")
    tokens: tuple[int, ...] = _option((700, 600, 400), "tokens per image/recall/text micro-batch")
    lr: float = _option(1e-3, "peak learning rate")
    warmup: int = _option(150, "steps of linear warm-up of the rate")
    decay: float = _option(0.3, "last fraction of the run, with cosine decay of the rate to 2 %%")
    boot: float = _option(0.85, "plain induction only, until its accuracy passes this (0 = off)")
    flat: float = _option(0.6, "progress from which all curriculum levels are drawn uniformly")
    context: int = _option(
        0, "from --flat on, ever longer samples of up to about this many tokens join (0 = none)"
    )
    long_share: float = _option(0.35, "share of those samples among the micro-batches")
    sizes: tuple[int, ...] = _option((56, 84, 112), "image sizes in px, in curriculum order")
    words: int = _option(0, "most frequent words of the text that become tokens of their own")
    hidden: int = _option(256, "text width, must be heads x head-dim")
    layers: int = _option(4, "text layers")
    heads: int = _option(4, "query heads")
    kv_heads: int = _option(2, "key/value heads")
    head_dim: int = _option(64, "head size")
    theta: float = _option(1e4, "RoPE base of the text layers")
    positional_score: float = _option(
        24.0, "start of the positional heads: score at their distance; 32 is as sharp at theta 1e6"
    )
    positional_spread: bool = _option(
        False, "a positional query head for every KV head of layer 0, not only for the first ones"
    )
    silent_heads: float = _option(
        0.0, "share of samples in which half of the KV heads of every layer are silent (DropHead)"
    )
    inter: int = _option(640, "MLP width of the text layers")
    vis_dim: int = _option(96, "vision width, a multiple of 32")
    vis_depth: int = _option(2, "vision blocks")
    vis_mlp: int = _option(2, "MLP width of a vision block / vis-dim")
    log: int = _option(50, "steps between log lines")
    save_min: float = _option(4.0, "minutes between checkpoints")
    check: bool = _option(False, "only compare the fast forward pass with transformers")

    def __post_init__(self):
        if self.heads * self.head_dim != self.hidden:
            raise ValueError(
                f"hidden is {self.hidden}, heads x head-dim is {self.heads * self.head_dim}: "
                "Qwen2-VL needs them equal"
            )
        if self.context and not 512 < self.context <= MAX_POSITIONS:
            raise ValueError(f"context {self.context} is not 0 and not within 513..{MAX_POSITIONS}")
        if len(self.tokens) != 3:
            raise ValueError(f"tokens has {len(self.tokens)} numbers, expected 3")
        if not 0 <= self.silent_heads <= 1:
            raise ValueError(f"silent-heads is {self.silent_heads}, a share is within 0..1")
        if odd := [size for size in self.sizes if size < 56 or size % 28]:
            raise ValueError(f"sizes {odd} are not multiples of 28 px from 56 px on")


def parse_options(description: str, argv: Sequence[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for entry in fields(Options):
        parser.add_argument("--" + entry.name.replace("_", "-"), **_argument(entry))
    values = vars(parser.parse_args(argv))
    try:
        return Options(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except ValueError as error:
        parser.error(str(error))


def _argument(entry: Field) -> dict[str, Any]:
    text, default = entry.metadata["help"], entry.default
    if isinstance(default, bool):
        return {"action": "store_true", "help": text}
    shown = {"default": default, "help": f"{text} (default: %(default)s)"}
    if isinstance(default, tuple):
        return {"type": type(default[0]), "nargs": "+", **shown}
    return {"type": type(default), **shown}
