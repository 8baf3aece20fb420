#!/usr/bin/env python3
"""Train a small Qwen2-VL from scratch on synthetic retrieval tasks.

Each optimizer step sees one micro-batch of each task: questions over several images, recall of
key/value pairs, and plain text.  In order of importance for retrieval to emerge within a few
million tokens: the positional start of three heads (reference_vlm/model.py), the induction phase
(--boot), the dense samples next to the chats (tasks.py), and the curriculum (mix.py).

One CPU core:  nice -n 5 python scripts/train_reference_vlm.py --out model
Continue:      python scripts/train_reference_vlm.py --init model.state.pt --boot 0 --flat 0 \\
                 --sizes 56 56 84 112 --tokens 1000 600 300 --decay 0.5 --minutes 60 \\
                 --steps 1000000 --out model2
Wider start:   --widen CHECKPOINT keeps what a trained narrow model computes and adds fresh heads;
               --context 4096 adds samples of thousands of tokens (commands in docs/subjects.md)
GPU, larger:   python scripts/train_reference_vlm.py --device cuda --hidden 512 --layers 8 \\
                 --heads 8 --inter 1408 --vis-dim 192 --batch 16 --steps 20000 --lr 6e-4 --out big
"""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from reference_vlm.options import parse_options
from reference_vlm.train import train


def main() -> int:
    train(parse_options(__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(main())
