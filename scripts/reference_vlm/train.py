"""The training loop."""

import math
import os
import time
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import wording
from .batch import Batcher
from .check import check
from .corpus import frequent_words, load_corpus
from .fast_forward import FastForward
from .mix import MicroBatch, TaskMix
from .model import build_model, save_model
from .options import Options
from .tasks import Sampler
from .tokenizer import build_tokenizer

WEIGHT_DECAY = 0.05
BETAS = (0.9, 0.95)
CLIP_NORM = 1.0
FINAL_RATE = 0.02  # of the peak, after the cosine decay


class Trainer:
    def __init__(self, options: Options):
        self.options = options
        corpus = load_corpus()
        self.tokenizer = build_tokenizer(frequent_words(corpus, options.words))
        self.model = build_model(options, self.tokenizer).to(options.device)
        self.forward = FastForward(self.model, options.silent_heads, options.seed)
        batcher = Batcher(self.tokenizer, options.device)
        self.sampler = Sampler(batcher, options.device, options.seed, corpus)
        self.mix = TaskMix(options, self.sampler)
        self.optimizer = _optimizer(self.model, options.lr)
        # Easy tokens that would hide whether an answer is right.
        self.scaffold = self.tokenizer.convert_tokens_to_ids([wording.IM_END, "\u0120"])
        self.first_step = self.step = 0
        self.sums: dict[str, list[float]] = defaultdict(list)
        self.tokens = 0
        if options.init:
            self._resume(options.init)

    def run(self) -> None:
        options, start = self.options, time.time()
        saved = logged = start
        while (progress := self._progress(time.time() - start)) < 1:
            rate = options.lr * _rate_factor(self.step - self.first_step, progress, options)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            for micro in self.mix.draw(progress):
                self._accumulate(micro)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            now = time.time()
            if self.step % options.log == 0:
                self._log(now - start, now - logged, float(norm), rate)
                logged = now
            if self.step == options.until:
                break
            if now - saved > options.save_min * 60:
                self.save()
                saved = now
        self.save()
        print(f"done: {self.step} steps, {time.time() - start:.0f} s", flush=True)

    def save(self) -> None:
        """Write the checkpoint and, beside it, what a later run needs to continue."""
        path = self.options.out.rstrip("/")
        save_model(self.model, self.tokenizer, path)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "levels": self.mix.levels(),
        }
        torch.save(state, path + ".state.pt.tmp")
        os.replace(path + ".state.pt.tmp", path + ".state.pt")

    def _resume(self, path: str) -> None:
        state = torch.load(path, map_location=self.options.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mix.restore(state["levels"])
        self.first_step = self.step = state["step"]
        self.sampler.reseed(self.options.seed + self.step)
        print(f"resumed {path} at step {self.step}: {self.mix}", flush=True)

    def _progress(self, seconds: float) -> float:
        """Share of the run that is over, by steps or by the clock, whichever is further."""
        options = self.options
        steps = max(1, options.steps - self.first_step)
        progress = (self.step - self.first_step) / steps if options.steps > self.first_step else 1.0
        return max(progress, seconds / 60 / options.minutes) if options.minutes else progress

    def _accumulate(self, micro: MicroBatch) -> None:
        """Add the gradients of one micro-batch and report its accuracy to the curriculum."""
        device = torch.device(self.options.device).type
        half = device == "cuda" or self.options.bf16
        with torch.autocast(device, torch.bfloat16, enabled=half):
            logits, targets = self.forward.logits_at(micro.batch)
            loss = F.cross_entropy(logits.float(), targets)
        (loss * micro.weight).backward()
        self.tokens += micro.batch.ids.numel()
        self.sums[f"{micro.task} loss"].append(loss.item())
        if micro.task == "text":
            return
        right = logits.argmax(-1) == targets
        accuracy = self._answer_accuracy(right, targets)
        self.sums[f"{micro.task} accuracy"].append(accuracy)
        digits = 0.0
        if micro.task == "image captions":  # three tokens each: digit, color, shape
            digits = right.view(-1, 3)[:, 0].float().mean().item()
        if self.mix.learn(micro, accuracy, digits):
            print(f"step {self.step} next level: {self.mix}", flush=True)

    def _answer_accuracy(self, right: Tensor, targets: Tensor) -> float:
        scaffold = torch.tensor(self.scaffold, device=targets.device)
        return right[~torch.isin(targets, scaffold)].float().mean().item()

    def _log(self, elapsed: float, since_last: float, norm: float, rate: float) -> None:
        means = " ".join(f"{k} {sum(v) / len(v):.3f}" for k, v in sorted(self.sums.items()))
        speed = self.tokens / max(since_last, 1e-9)
        print(
            f"step {self.step} {elapsed:.0f}s {means} | {self.mix} | "
            f"gradient norm {norm:.2f} rate {rate:.2e} {speed:.0f} tokens/s",
            flush=True,
        )
        self.sums.clear()
        self.tokens = 0


def train(options: Options) -> None:
    torch.set_num_threads(options.threads)
    trainer = Trainer(options)
    if options.check:
        check(trainer.model, trainer.forward, trainer.sampler)
        return
    total = sum(p.numel() for p in trainer.model.parameters())
    vision = sum(p.numel() for p in trainer.model.model.visual.parameters())
    corpus = len(trainer.sampler.corpus) / 1e6
    print(f"{total / 1e6:.2f} M parameters ({vision / 1e6:.2f} M vision), text {corpus:.1f} MB")
    print(options, flush=True)
    trainer.run()


def _optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW; no weight decay on norms, biases and embeddings."""
    decayed, plain = [], []
    for name, weight in model.named_parameters():
        keep = weight.dim() < 2 or "embed_tokens" in name
        (plain if keep else decayed).append(weight)
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=1e-8, fused=True)


def _rate_factor(step: int, progress: float, options: Options) -> float:
    """Linear warm-up, then constant, then cosine decay over the last `decay` of the run."""
    factor = min(1.0, (step + 1) / options.warmup)
    if progress > 1 - options.decay:
        phase = (progress - 1 + options.decay) / options.decay
        factor *= FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * phase))
    return factor
