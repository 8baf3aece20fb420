"""What errors in keys and values cost: Fisher information, by gradients of the model's answers.

To second order the divergence of the answers is a quadratic form of the errors in what is cached,

    KL(p || p') = 1/2 sum over scored tokens of dᵀ (diag(p) - p pᵀ) d + ...,   d = sum_t Jₜ eₜ

with `Jₜ` the derivative of a scored token's logits by the keys and values of token `t`. Errors of
different tokens are taken as independent of each other (codes are), so each costs `eₜᵀ Fₜ eₜ`,
`Fₜ = 1/2 sum Jₜᵀ (diag(p) - p pᵀ) Jₜ`; averaged over the tokens of a modality, that is the metric
of its basis. FWSVD (Hsu et al., ICLR 2022) weights rows of weights so; here it is the directions of
keys and values, with what heads, and keys and values, have in common.

`diag(p) - p pᵀ` is the covariance of `v = (diag(√p) - p √pᵀ) z` for standard normal `z`. So the
gradient `g = sum over scored tokens Jₜᵀ v`, one backward for all tokens and layers, has the second
moment `E[g gᵀ] = 2 Fₜ`, and its products are summed like those of keys and values. Answers that are
nearly certain are seen, too, which gradients of sampled answers would miss.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_attentionpack.calibrate.metrics import FisherMetrics
from vllm_attentionpack.calibrate.moments import MomentAccumulator
from vllm_attentionpack.codec.positions import Anchors, Rotary
from vllm_attentionpack.compat.autograd import plain_operators, recomputed_layers
from vllm_attentionpack.errors import UnsupportedModelError
from vllm_attentionpack.evaluate.simulate.codec import CacheShape, DenseCodec, ExactTokens, Tokens
from vllm_attentionpack.evaluate.simulate.measure import (
    LOGIT_ROWS,
    REPLAY_TOLERANCE,
    Simulator,
    replay_error,
    tokens_of,
)
from vllm_attentionpack.evaluate.simulate.recording import Recorded

#: Draws of `z` for each prompt. Half of them price errors where the token stands, half wherever in
#: a span it could: contexts that are served are longer than those of calibration, and those of
#: calibration are not stood in for by an average alone (docs/log.md).
DRAWS = 8
#: Gradients of so many tokens are summed at once: a call for each draw of a short prompt is longer
#: than its products, and all draws of a long one would not find room.
_SUMMED_TOKENS = 1024
#: Tokens times layers of a prompt from which on layers are computed again on the way back: what a
#: layer keeps of a token is 0.2 MB in an 8B model.
_RECOMPUTED = 8192
#: Largest relative difference of a derivative and a difference of hidden states. A part without
#: derivative is beyond it at every step.
_TOLERANCE = 0.1
#: Scored tokens whose derivatives are compared.
_CHECKED = 8
#: Steps relative to keys and values, tried in turn: what a small one makes of hidden states may be
#: lost in their rounding to bfloat16, what a large one makes is no derivative any more.
_STEPS = (0.05, 0.1, 0.2, 0.4)


class _Shifted(DenseCodec):
    """The dense cache plus an error in every key and value, zero where none is given."""

    def __init__(
        self, shape: CacheShape, exact: ExactTokens, errors: "dict[int, list[Tensor]] | None" = None
    ) -> None:
        super().__init__(shape)
        self.exact = exact
        self.errors = {} if errors is None else errors
        #: Of each layer the root mean squares of keys and of values.
        self.sizes: dict[int, list[float]] = {}

    def reconstruct(
        self, layer: int, key: Tensor, value: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        if layer not in self.errors:
            self.errors[layer] = [torch.zeros_like(x, requires_grad=True) for x in (key, value)]
            self.sizes[layer] = [float(x.detach().square().mean().sqrt()) for x in (key, value)]
        of_key, of_value = self.errors[layer]
        return key + of_key, value + of_value


@dataclass(frozen=True)
class TurnedLayer:
    """How the keys of a layer are turned.

    Attributes:
        rotary: by the model; None for not at all.
        anchors: back, before they are coded.
        num_positions: that keys are coded at (`MomentAccumulator.finalize`).
    """

    rotary: Rotary | None
    anchors: Anchors | None
    num_positions: int

    def as_coded(self, key: Tensor, tokens: Tokens, drawn: torch.Generator | None) -> Tensor:
        """What belongs to keys `[T, Hk, D]` as it is where they are coded.

        Args:
            key: gradients turn like keys, since turns are orthogonal.
            tokens: of one prompt.
            drawn: gives each token a place of a span; None leaves it where it is.
        """
        if self.rotary is None:
            return key
        drift, places, offsets = self.rotary, self.num_positions, tokens.positions
        if self.anchors is not None:
            drift, places = self.anchors.drift, min(self.anchors.span, places)
            offsets = tokens.positions - tokens.anchors(self.anchors.span)
        if drawn is not None:
            offsets = torch.randint(
                places, offsets.shape, generator=drawn, device=drawn.device, dtype=offsets.dtype
            )
        return drift.turn(self.rotary.turn(key, -tokens.positions), offsets)


@dataclass
class FisherGatherer:
    """Gathers the metrics of all layers over the prompts of a simulator.

    Attributes:
        simulator: on calibration prompts.
        layers: how keys turn, in the order of the model.
        exact: tokens without errors.
        heads_per_group: `G`.
        joint_kv: whether keys and values are coded together.
        seed: of all draws; the same one gives the same metrics on the same machine.
    """

    simulator: Simulator
    layers: Sequence[TurnedLayer]
    exact: ExactTokens
    heads_per_group: int
    joint_kv: bool
    seed: int = 0
    _sums: list[MomentAccumulator] = field(default_factory=list)

    def gather(self, progress: Callable[[float], None]) -> None:
        """Goes through all prompts.

        Raises:
            UnsupportedModelError: some part of the model has no derivative, or there is no room.
        """
        shape, device = self.simulator.shape, self.simulator.device
        self._sums = [
            MomentAccumulator(
                0, shape.num_kv_heads, shape.head_size, self.heads_per_group, None, self.joint_kv
            )
            for _ in self.layers
        ]
        drawn = torch.Generator(device).manual_seed(self.seed)
        prompts = self.simulator.recorded
        scored = Counter[int]()
        for prompt in prompts:
            scored[prompt.owner] += len(prompt.targets)
        longest = max(prompts, key=lambda prompt: prompt.length)
        try:
            with plain_operators(self.simulator.model):
                self._check(longest, drawn)
                for done, prompt in enumerate(prompts, start=1):
                    # the mean over items of what each loses per token, half of it
                    weight = self.simulator.tokens / (2 * len(scored) * scored[prompt.owner])
                    self._add(prompt, weight, drawn)
                    progress(done / len(prompts))
        except torch.OutOfMemoryError as error:
            raise UnsupportedModelError(
                f"there is no room for gradients ({str(error).splitlines()[0]}). Lower "
                "--gpu-memory-utilization, give shorter items, or set 'sensitivity: measured' in "
                "the --config file."
            ) from error

    def metrics(self, num_modalities: int) -> Iterator[FisherMetrics]:
        """Of one layer after the other; each gives up its sums."""
        while self._sums:
            yield FisherMetrics.of(self._sums.pop(0), num_modalities, self.joint_kv)

    def _add(self, prompt: Recorded, weight: float, drawn: torch.Generator) -> None:
        tokens = tokens_of([prompt])
        waiting: list[tuple[list[tuple[Tensor, Tensor]], torch.Generator | None]] = []
        for draw, gradients in enumerate(self._gradients(prompt, drawn), start=1):
            waiting.append((gradients, None if draw % 2 else drawn))
            if draw < DRAWS and len(waiting) * prompt.length < _SUMMED_TOKENS:
                continue
            visual = prompt.visual.repeat(len(waiting))
            for i, (layer, sums) in enumerate(zip(self.layers, self._sums, strict=True)):
                keys = [layer.as_coded(found[i][0], tokens, place) for found, place in waiting]
                key = torch.cat(keys) * weight**0.5
                value = torch.cat([found[i][1] for found, _ in waiting]) * weight**0.5
                sums.add(key[:, :0], key, value, None, visual)
            waiting = []

    def _gradients(
        self, prompt: Recorded, drawn: torch.Generator
    ) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Of every draw the `g` of all layers' keys and values, `[T, Hk, D]` each."""
        codec = _Shifted(self.simulator.shape, self.exact)
        with self._differentiated(prompt, codec) as hidden:
            errors = [error for i in sorted(codec.errors) for error in codec.errors[i]]
            for left in reversed(range(DRAWS)):
                v = self._drawn(hidden.detach(), drawn)
                found = _backward(hidden, errors, v, retain_graph=left > 0)
                yield list(zip(found[::2], found[1::2], strict=True))

    @contextmanager
    def _differentiated(self, prompt: Recorded, codec: _Shifted) -> Iterator[Tensor]:
        simulator = self.simulator
        long = prompt.length * len(self.layers) > _RECOMPUTED
        with (
            recomputed_layers(simulator.model) if long else nullcontext(),
            simulator.differentiated(prompt, codec) as hidden,
        ):
            yield hidden

    def _drawn(self, hidden: Tensor, drawn: torch.Generator) -> Tensor:
        """`sum Jᵀ v` by the hidden states `[n, hidden]` that predict the scored tokens."""
        parts = []
        for rows in hidden.split(LOGIT_ROWS):
            rows = rows.clone().requires_grad_()
            logits = self.simulator.model.compute_logits(rows).float()
            p = logits.detach().softmax(-1)
            z = torch.randn(p.shape, generator=drawn, device=p.device) * p.sqrt()
            v = z - p * z.sum(-1, keepdim=True)
            parts += _backward(logits, [rows], v)
        return torch.cat(parts)

    def _check(self, prompt: Recorded, drawn: torch.Generator) -> None:
        """Compares plain operators with the engine's, and derivatives with differences."""
        codec = _Shifted(self.simulator.shape, self.exact)
        name = type(self.simulator.model).__name__
        found = []
        with self._differentiated(prompt, codec) as hidden:
            error = replay_error(prompt, hidden.detach())
            if not error <= REPLAY_TOLERANCE:
                raise UnsupportedModelError(
                    f"plain operators of {name} give hidden states {error:.0%} off (at most "
                    f"{REPLAY_TOLERANCE:.0%} is rounding): there are no gradients to be had. Set "
                    "'sensitivity: measured' in the --config file."
                )
            direction = {
                i: [
                    torch.randn(e.shape, generator=drawn, device=e.device) * size
                    for e, size in zip(errors, codec.sizes[i], strict=True)
                ]
                for i, errors in codec.errors.items()
            }
            for step in _STEPS:
                found.append(self._off(prompt, hidden, codec.errors, direction, step))
                if found[-1] <= _TOLERANCE:
                    return
        raise UnsupportedModelError(
            f"the gradients of {name} are {min(found):.0%} off (at most {_TOLERANCE:.0%} is "
            "rounding): some operator of it has no derivative. Set 'sensitivity: measured' in the "
            "--config file."
        )

    def _off(
        self,
        prompt: Recorded,
        hidden: Tensor,
        errors: dict[int, list[Tensor]],
        direction: dict[int, list[Tensor]],
        step: float,
    ) -> float:
        """How far off derivatives of hidden states along `direction` are from differences.

        Args:
            hidden: `[n, hidden]`.
            errors: leaves, of each layer's keys and values.
            direction: shaped as they are.
            step: of the difference, in units of `direction`.

        Returns:
            Relative, the median of some scored tokens: one that is routed to other experts jumps.
        """
        # Rounding to bfloat16 is as large as what small steps do. It differs from one length of
        # the step to another, so that products of two differences are nearly free of it.
        one, other = (self._difference(prompt, direction, step * by) for by in (1.0, 1.07))
        leaves = [e for i in direction for e in errors[i]]
        along = [d for of_layer in direction.values() for d in of_layer]
        found = []
        for row in torch.linspace(0, len(hidden) - 1, _CHECKED).long().unique().tolist():
            v = one[row].to(hidden.dtype)
            gradients = _backward(hidden[row], leaves, v, retain_graph=True)
            derived = sum(float((d * g).sum()) for d, g in zip(along, gradients, strict=True))
            expected = float((one[row] * other[row]).sum())
            if derived or expected:  # none for tokens that read exact ones only
                found.append(abs(derived - expected) / max(expected, 1e-30))
        return statistics.median(found) if found else math.inf

    def _difference(
        self, prompt: Recorded, direction: dict[int, list[Tensor]], step: float
    ) -> Tensor:
        """What `step` either way makes of the scored hidden states, over `2 step`."""
        ends = []
        for signed in (step, -step):
            errors = {i: [signed * d for d in of_layer] for i, of_layer in direction.items()}
            shifted = _Shifted(self.simulator.shape, self.exact, errors)
            ends.append(self.simulator.scored_hidden(prompt, shifted).float())
        return (ends[0] - ends[1]) / (2 * step)


def _backward(
    output: Tensor, inputs: Sequence[Tensor], v: Tensor, retain_graph: bool = False
) -> list[Tensor]:
    """`Jᵀ v` for every input.

    Raises:
        UnsupportedModelError: the output does not depend on them as far as autograd knows.
    """
    try:
        return list(torch.autograd.grad(output, inputs, v, retain_graph=retain_graph))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"the model has no gradients ({str(error).splitlines()[0]}). Set 'sensitivity: "
            "measured' in the --config file."
        ) from error
