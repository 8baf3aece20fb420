"""What the measuring scripts ask for alike: the subject, its data, and how much of it."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calibration_study.setting import EXAMPLE, Setting
from vllm_attentionpack.calibrate.settings import SENSITIVITY_TOKENS

RESULTS = EXAMPLE.parents[1] / "docs" / "results"


def subject_parser(description: str | None) -> argparse.ArgumentParser:
    """Without further arguments, the reference VLM."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--name", default="reference_vlm", help="of the result file")
    parser.add_argument("--model", type=Path, default=EXAMPLE / "model")
    parser.add_argument("--data", type=Path, default=EXAMPLE / "calibrate.jsonl")
    parser.add_argument("--heldout", type=Path, default=EXAMPLE / "heldout.jsonl")
    parser.add_argument("--calibration-tokens", type=int, help="stop gathering after so many")
    parser.add_argument("--sensitivity-tokens", type=int, default=SENSITIVITY_TOKENS)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-context", type=int, default=512)
    parser.add_argument("--anchor-span", type=int, help="[default: calibrate's]")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


def simulation_parser(description: str | None) -> argparse.ArgumentParser:
    """The same for what runs in one engine, which need not take all items."""
    parser = subject_parser(description)
    parser.add_argument("--heldout-tokens", type=int, help="use whole items up to so many")
    return parser


@contextmanager
def started(options: argparse.Namespace) -> Iterator[Setting]:
    """The running engine on what `simulation_parser` read."""
    with Setting.start(
        options.model, options.data, options.max_model_len, options.calibration_tokens
    ) as setting:
        setting.sensitivity_tokens = options.sensitivity_tokens
        if options.anchor_span is not None:
            setting.anchor_span = options.anchor_span
        yield setting
