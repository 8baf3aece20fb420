"""What a calibration can be told, by flags, a YAML file or keyword arguments."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from vllm_attentionpack.errors import ConfigError

#: Measured (docs/log.md): the least that brings most of what exact tokens bring.
DEFAULT_SINKS = 4
DEFAULT_WINDOW = 64
#: Likewise: spans of a quarter halve the loss of long averages once more, for a third more time of
#: attention on CPUs. With planes coded pre-RoPE, of which longer spans have more.
DEFAULT_ANCHOR_SPAN, PRE_ROPE_ANCHOR_SPAN = 1024, 64
#: Radians. Likewise: of keys that are coded apart from values, a smaller bound takes more planes
#: and hardly gains.
PRE_ROPE_TURN = 8.0
#: Likewise: text gains from as many as there are.
SENSITIVITY_TOKENS = 32768


class CalibrateSettings(BaseModel):
    """Everything that decides what comes out of a calibration.

    Attributes:
        model: name or path of the model, as vLLM takes it.
        data: JSON lines or text file (`evaluate.data`).
        ratio: dense bfloat16 bytes over stored bytes per token; met or exceeded. `auto`: the
            largest ratio whose loss on held-out items stays within `max_kl`.
        validate_pack: measure the pack on held-out items and mark it where it exceeds `max_kl`.
        max_kl: largest divergence from the dense cache on held-out items, in nats per token.
        validation_share: fraction of the items that is held out of the statistics for it.
        output: where the pack is written; None keeps it in memory.
        group_size: KV heads coded jointly, a divisor of their number. More heads compress better,
            cost more arithmetic and allow fewer tensor-parallel ranks. `auto`: the largest with at
            most `moments.MAX_AUTO_GROUP_DIMS` joint dims, or `positions.PRE_ROPE_GROUP_DIMS` with
            `pre_rope`.
        max_tokens: stop after this many tokens; None uses all data.
        max_context: positions over which the statistics of keys and queries are averaged; None
            takes the engine's `max_model_len`.
        anchor_span: tokens whose keys are coded relative to the position of the first of them
            (`codec.positions.Anchors`), so that their statistics are averaged over so many
            positions only. Shorter spans lose less and cost more arithmetic, none for contexts
            within the first span. 0 codes keys as they come; None takes `DEFAULT_ANCHOR_SPAN`, or
            `PRE_ROPE_ANCHOR_SPAN` with `pre_rope`.
        pre_rope: code those planes of keys that RoPE turns far within a span as they were before
            it (`codec.positions.Anchors`). Loses several times less at the same bytes; reading
            rebuilds them, which costs arithmetic.
        pre_rope_turn: radians that a plane turns within a span, beyond which `pre_rope` takes it.
            Fewer radians take more planes, lose less and cost more arithmetic.
        joint_kv: code the keys and values of a head group by one latent for both, as in multi-head
            latent attention. Loses less at the same bytes, since both come of the same hidden
            states; what is read is multiplied with queries and with weights both, which costs
            arithmetic. `auto` groups half as many heads then.
        seed: of the order in which items are taken from the data.
        modalities: 1 codes all tokens by one basis, 2 visual tokens by their own; `auto` takes 2
            when at least `run.MIN_VISUAL_TOKENS` were seen.
        regularization: see `codec.transform.principal_basis`.
        sensitivity: what errors in keys and values cost, found out on `sensitivity_tokens` of the
            calibration data. `gradients`: by Fisher information in every direction, which takes
            some backwards through the model (`calibrate.gradients`); loses least. `measured`: layer
            by layer, keys and values apart, which takes two forwards per layer. `uniform`: by the
            energy they add to their layer's output, which takes nothing. `auto`: gradients, or
            measured with a warning where the model has none (quantised weights, on GPUs fused
            experts).
        sensitivity_tokens: at most this many, and `max_tokens`; whole prompts.
        layer_weights: price of each layer's relative distortion; None prices all alike.
        sinks: tokens at the start of a request to keep exact, a recommendation to the server.
        window: tokens at its end to keep exact, the newest included; likewise. Errors are priced
            beside them.
        engine: further arguments of `vllm.LLM`.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    model: str
    data: Path
    ratio: PositiveFloat | Literal["auto"] = 8.0
    validate_pack: bool = False
    max_kl: PositiveFloat = 0.05
    validation_share: float = Field(default=0.2, gt=0, lt=1)
    output: Path | None = None
    group_size: PositiveInt | Literal["auto"] = "auto"
    max_tokens: PositiveInt | None = None
    max_context: PositiveInt | None = None
    anchor_span: int | None = Field(default=None, ge=0)
    pre_rope: bool = False
    pre_rope_turn: PositiveFloat = PRE_ROPE_TURN
    joint_kv: bool = False
    seed: int = Field(default=0, ge=0, lt=2**32)
    modalities: Literal["auto", 1, 2] = "auto"
    regularization: PositiveFloat = 1e-2
    sensitivity: Literal["auto", "gradients", "measured", "uniform"] = "auto"
    sensitivity_tokens: PositiveInt = SENSITIVITY_TOKENS
    layer_weights: tuple[PositiveFloat, ...] | None = None
    sinks: int = Field(default=DEFAULT_SINKS, ge=0)
    window: int = Field(default=DEFAULT_WINDOW, ge=0)
    engine: dict[str, Any] = {}

    @model_validator(mode="after")
    def _has_anchors(self) -> "CalibrateSettings":
        if self.pre_rope and self.anchor_span == 0:
            raise ValueError(
                "pre_rope codes the other planes relative to anchors, and anchor_span is 0: give "
                f"a span, such as {PRE_ROPE_ANCHOR_SPAN}"
            )
        return self

    @model_validator(mode="after")
    def _turns_are_used(self) -> "CalibrateSettings":
        if self.pre_rope_turn != PRE_ROPE_TURN and not self.pre_rope:
            raise ValueError(
                f"pre_rope_turn is {self.pre_rope_turn:g}, and no plane is coded pre-RoPE: set "
                "pre_rope (--pre-rope) as well"
            )
        return self

    @property
    def span(self) -> int:
        """`anchor_span`, or its default."""
        if self.anchor_span is not None:
            return self.anchor_span
        return PRE_ROPE_ANCHOR_SPAN if self.pre_rope else DEFAULT_ANCHOR_SPAN

    @property
    def validates(self) -> bool:
        """Whether items are held out."""
        return self.validate_pack or self.ratio == "auto"


def make_settings(values: Mapping[str, Any], source: str) -> CalibrateSettings:
    """Validates settings.

    Args:
        values: by field name.
        source: where they come from, for the message.

    Raises:
        ConfigError: an unknown key, a missing or an invalid value.
    """
    try:
        return CalibrateSettings.model_validate(dict(values))
    except ValidationError as error:
        problems = "; ".join(_problem(entry) for entry in error.errors())
        raise ConfigError(
            f"{source} cannot be used: {problems}. "
            f"Allowed keys: {', '.join(CalibrateSettings.model_fields)}."
        ) from error


def _problem(entry: Any) -> str:
    if not entry["loc"]:  # of fields that do not go together
        return str(entry["ctx"]["error"])
    key = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "missing":
        return f"'{key}' is missing"
    if entry["type"] == "extra_forbidden":
        return f"the key '{key}' is unknown"
    return f"'{key}' is {entry['input']!r}: {entry['msg']}"


def read_settings_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping that a YAML file of settings holds, not validated.

    Raises:
        ConfigError: missing file, invalid YAML, not a mapping.
    """
    import yaml

    file = Path(path)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the configuration file '{file}' cannot be read ({error}). Give the path of a YAML "
            "file such as those under configs/calibrate/."
        ) from error
    except yaml.YAMLError as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"'{file}' is not valid YAML ({told}). Correct it.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"'{file}' holds {type(values).__name__}, expected keys and values such as 'ratio: 8'."
        )
    return values
