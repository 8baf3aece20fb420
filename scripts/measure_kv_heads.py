#!/usr/bin/env python3
"""Measure how alike a model's KV heads are and what each contributes; store it as JSON.

Data are fresh samples of the training tasks (reference_vlm/heads.py).
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from reference_vlm.batch import Batcher
from reference_vlm.corpus import held_out_text
from reference_vlm.heads import KEPT, batches, contributions, loss_without, spectra
from reference_vlm.tasks import Sampler
from reference_vlm.widen import trained_heads
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=2000, help="about this many per task")
    parser.add_argument("--seed", type=int, default=990_001)
    parser.add_argument(
        "--widened",
        type=int,
        nargs=2,
        metavar=("SEED", "HEADS"),
        help="seed and KV heads that widen.py started from: also the loss without either kind",
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    batcher = Batcher(AutoTokenizer.from_pretrained(options.model), "cpu")
    model = Qwen2VLForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
    data = batches(Sampler(batcher, "cpu", options.seed, held_out_text(1, 2)), options.tokens)
    loss, added = contributions(model, data)
    result = {
        "tokens": sum(batch.ids.numel() for batch in data),
        "kept": KEPT,
        "layers": spectra(model, data),
        "loss": loss,
        "loss_added_without_head": added,
    }
    if options.widened:
        seed, narrow = options.widened
        old = trained_heads(seed, len(added), narrow, len(added[0]))
        new = [[h for h in range(len(added[0])) if h not in heads] for heads in old]
        for name, silent in (("trained", old), ("fresh", new)):
            later = {layer: heads for layer, heads in enumerate(silent) if layer}
            result[f"loss_without_{name}_heads"] = loss_without(model, data, later)
    for i, row in enumerate(result["layers"]):
        print(f"layer {i}:", " ".join(f"{name} {value:.3f}" for name, value in row.items()))
        print("  without head:", " ".join(f"{value:+.3f}" for value in added[i]))
    print(f"loss {loss:.3f} nats per supervised token")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
