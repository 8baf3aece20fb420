"""What a pack holds. The header is JSON in the safetensors metadata; the rest are tensors.

Tensors are named `layers.<i>.groups.<g>.<key|value>.<mean|encode|decode|weight>` (see
`codec.Basis`) and `layers.<i>.groups.<g>.<key|value>.variance` (float32 `[M, GD]`, the spectrum;
`[M, 2 GD]` and the same for both where keys and values are joint); a layer whose keys have anchors
also `layers.<i>.frequencies` (float64 `[P]`, see `codec.positions`).
"""

from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor

from vllm_attentionpack.codec.codec import Basis, LayerCodec
from vllm_attentionpack.codec.layout import (
    GroupLayout,
    Kind,
    LayerLayout,
    PlaneCounts,
    compression_ratio,
)
from vllm_attentionpack.codec.positions import Anchors

#: Raised by one whenever older code could misread a newer file.
FORMAT_VERSION = 5

Count = Annotated[int, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Fingerprint(_Frozen):
    """What a model must have in common with the one that was calibrated.

    `num_layers` counts the layers that are compacted: those with full attention.
    """

    architecture: str
    num_layers: PositiveInt
    num_query_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_size: PositiveInt
    #: The model's rotary parameters as its configuration states them, JSON text with sorted keys.
    rope: str


class Provenance(_Frozen):
    """Where a pack comes from; informative, never checked."""

    model: str
    data_sha256: str
    tokens: Count
    visual_tokens: Count
    seed: int
    vllm_version: str
    attentionpack_version: str


class Validation(_Frozen):
    """What a pack lost on data that its statistics had not seen; informative, never checked.

    Attributes:
        kl: nats per token against the dense cache, every token read from codes; the mean over
            items, so that long texts do not count more than short answers.
        predicted_kl: what the statistics had foretold.
        top1_agreement: share of tokens with the same likeliest token.
        max_kl: what `kl` was allowed to be.
        tokens: scored.
    """

    kl: Annotated[float, Field(ge=0)]
    predicted_kl: Annotated[float, Field(ge=0)] | None
    top1_agreement: Annotated[float, Field(ge=0, le=1)]
    max_kl: Annotated[float, Field(gt=0)]
    tokens: PositiveInt

    @property
    def passed(self) -> bool:
        return self.kl <= self.max_kl


class PlaneHeader(_Frozen):
    """Plane counts in the file (see `codec.layout.PlaneCounts`)."""

    n8: Count
    n4: Count
    n2: Count
    n16: Count = 0
    n12: Count = 0
    n10: Count = 0

    @classmethod
    def of(cls, counts: PlaneCounts) -> "PlaneHeader":
        return cls(**asdict(counts))

    def counts(self) -> PlaneCounts:
        return PlaneCounts(**self.model_dump())


class GroupHeader(_Frozen):
    """Plane counts of a head group in the file (see `codec.layout.GroupLayout`)."""

    key: PlaneHeader
    value: PlaneHeader
    joint_kv: bool = False

    @classmethod
    def of(cls, layout: GroupLayout) -> "GroupHeader":
        key, value = PlaneHeader.of(layout.key), PlaneHeader.of(layout.value)
        return cls(key=key, value=value, joint_kv=layout.joint_kv)

    def layout(self) -> GroupLayout:
        return GroupLayout(self.key.counts(), self.value.counts(), self.joint_kv)


class RotaryHeader(_Frozen):
    """How a layer turns its heads (see `codec.positions`); frequencies are a tensor."""

    planes: PositiveInt
    interleaved: bool = False
    pre_rope: Count = 0

    @classmethod
    def of(cls, anchors: Anchors | None) -> "RotaryHeader | None":
        if anchors is None:
            return None
        rotary = anchors.rotary
        return cls(
            planes=len(rotary.frequencies),
            interleaved=rotary.interleaved,
            pre_rope=anchors.pre_rope,
        )


class LayerHeader(_Frozen):
    """One attention layer.

    Attributes:
        name: in vLLM.
        bytes_per_token: stored.
        groups: its head groups.
        rotary: None where keys are coded as they come.
    """

    name: str
    bytes_per_token: PositiveInt
    groups: tuple[GroupHeader, ...]
    rotary: RotaryHeader | None = None

    def layout(self, heads_per_group: int, head_size: int) -> LayerLayout:
        """The byte layout."""
        return LayerLayout(
            groups=tuple(group.layout() for group in self.groups),
            heads_per_group=heads_per_group,
            head_size=head_size,
            bytes_per_token=self.bytes_per_token,
        )


class PackHeader(_Frozen):
    """Everything of a pack but its tensors.

    Attributes:
        format_version: see `FORMAT_VERSION`.
        fingerprint: the model that the pack belongs to.
        heads_per_group: `G`.
        num_modalities: 1 (all tokens alike) or 2 (text, visual).
        ratio: the compression ratio that was asked for.
        max_context: positions over which the rotated statistics were averaged; contexts beyond
            it are served with a warning.
        anchor_span: tokens whose keys share an anchor (`codec.positions.Anchors`); statistics of
            keys are averaged over as many positions only. 0 for keys as they come.
        sinks: tokens at the start of a request that are best kept exact (advice to the server).
        window: tokens at its end likewise, the newest included.
        layers: in the order of the model.
        validation: None where it was not asked for.
    """

    format_version: PositiveInt
    fingerprint: Fingerprint
    provenance: Provenance
    heads_per_group: PositiveInt
    num_modalities: Annotated[int, Field(ge=1, le=2)]
    ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    max_context: PositiveInt
    anchor_span: Count = 0
    sinks: Count = 0
    window: Count = 0
    layers: tuple[LayerHeader, ...]
    validation: Validation | None = None

    def layouts(self) -> list[LayerLayout]:
        """The byte layout of every layer."""
        return [
            layer.layout(self.heads_per_group, self.fingerprint.head_size) for layer in self.layers
        ]

    @property
    def joint_kv(self) -> bool:
        """Whether keys and values are joint, as calibration makes them in all layers or in none."""
        return self.layers[0].groups[0].joint_kv

    @property
    def bytes_per_token(self) -> int:
        """Stored bytes per token over all layers."""
        return sum(layer.bytes_per_token for layer in self.layers)

    @property
    def dense_bytes_per_token(self) -> int:
        """Bytes per token of a dense bfloat16 cache of the same layers."""
        return sum(layout.dense_bytes_per_token for layout in self.layouts())

    @property
    def compression_ratio(self) -> float:
        """The ratio that was reached; scales and padding count."""
        return compression_ratio(self.layouts())


@dataclass(frozen=True)
class LayerPack:
    """The bases and spectra of one layer.

    Attributes:
        bases: for each head group its key and its value basis.
        variance: for each head group the float32 `[M, GD]` spectra of keys and of values, or
            `[M, 2 GD]` that of both, twice.
        anchors: None where keys are coded as they come.
    """

    bases: "list[dict[Kind, Basis]]"
    variance: "list[dict[Kind, Tensor]]"
    anchors: Anchors | None = None


@dataclass(frozen=True)
class Pack:
    """A whole pack: header and tensors, layers in the order of the header."""

    header: PackHeader
    layers: list[LayerPack]

    def codec(self, layer: int) -> LayerCodec:
        """The codec of one layer over all its head groups."""
        of_layer = self.layers[layer]
        return LayerCodec(self.header.layouts()[layer], of_layer.bases, of_layer.anchors)
