"""What a pack holds, for people (a table) and for programs (JSON)."""

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vllm_attentionpack.codec.layout import (
    KINDS,
    GroupLayout,
    LayerLayout,
    PlaneCounts,
    unit_name,
    units_of,
)
from vllm_attentionpack.kv_cache.pages import PageGeometry, page_geometry
from vllm_attentionpack.packfile.schema import PackHeader, Validation

#: Context lengths for which the inspection states what exact tokens cost.
_CONTEXTS = (2048, 32768)


def pack_facts(header: PackHeader) -> dict[str, Any]:
    """The header with what follows from it: bytes, ratios, mean bits per element."""
    return {
        **header.model_dump(mode="json", exclude={"layers"}),
        "bytes_per_token": header.bytes_per_token,
        "dense_bytes_per_token": header.dense_bytes_per_token,
        "compression_ratio": header.compression_ratio,
        "pages": asdict(pack_pages(header)),
        "layers": [
            {
                "name": layer.name,
                "bytes_per_token": layout.bytes_per_token,
                "padding_bytes_per_token": layout.bytes_per_token - layout.content_bytes_per_token,
                "compression_ratio": layout.compression_ratio,
                "groups": [_group_facts(layout, group) for group in layout.groups],
            }
            for layer, layout in zip(header.layers, header.layouts(), strict=True)
        ],
    }


def _group_facts(layout: LayerLayout, group: GroupLayout) -> dict[str, Any]:
    return {
        "bytes_per_token": group.bytes_per_token,
        "joint_kv": group.joint_kv,
        **{kind: _unit_facts(getattr(group, kind), layout.coded_dims) for kind in KINDS},
    }


def _unit_facts(counts: PlaneCounts, dims: int) -> dict[str, Any]:
    return {
        "rank": counts.rank,
        "dims": dims,
        "dims_by_bits": {str(bits): n for bits, n in counts.dims_by_bits.items()},
        "bits_per_element": counts.bytes_per_token * 8 / dims,
    }


def pack_tables(header: PackHeader) -> RenderableType:
    """The facts of `pack_facts` as two tables."""
    facts = pack_facts(header)
    return Group(_header_table(header, facts), _layer_table(facts))


def _header_table(header: PackHeader, facts: dict[str, Any]) -> Table:
    fingerprint, provenance = header.fingerprint, header.provenance
    table = Table(show_header=False, box=None)
    rows = {
        "model": f"{provenance.model} ({fingerprint.architecture})",
        "heads": f"{fingerprint.num_query_heads} query, {fingerprint.num_kv_heads} KV heads x "
        f"{fingerprint.head_size}, {header.heads_per_group} KV heads per group",
        "compression": f"{facts['compression_ratio']:.2f}x (asked for {header.ratio:g}x): "
        f"{header.bytes_per_token} of {header.dense_bytes_per_token} bytes per token",
        "modalities": "text and visual" if header.num_modalities == 2 else "all tokens alike",
        "exact tokens": _exact_tokens(header),
        "max context": f"{header.max_context:,} tokens",
        "anchors": _anchors(header),
        "keys and values": "joint" if header.joint_kv else "apart",
        "calibrated on": f"{provenance.tokens:,} tokens, {provenance.visual_tokens:,} visual "
        f"(data {provenance.data_sha256[:12]}, seed {provenance.seed})",
        "made by": f"vllm-attentionpack {provenance.attentionpack_version} with vLLM "
        f"{provenance.vllm_version}, pack format {header.format_version}",
    }
    if header.validation is not None:
        rows["validation"] = validation_text(header.validation)
    failed = header.validation is not None and not header.validation.passed
    for name, value in rows.items():
        # not a string: brackets in the name of a model are no markup
        style = "bold red" if failed and name == "validation" else ""
        table.add_row(name, Text(value, style))
    return table


def _anchors(header: PackHeader) -> str:
    if not header.anchor_span:
        return "none"
    text = f"every {header.anchor_span:,} tokens"
    planes = sorted({layer.rotary.pre_rope for layer in header.layers if layer.rotary} - {0})
    if planes:
        of = max(layer.rotary.planes for layer in header.layers if layer.rotary)
        text += f", {' or '.join(map(str, planes))} of {of} planes of a key coded pre-RoPE"
    return text


def validation_text(validation: Validation) -> str:
    """One line: whether it passed, what was measured, what was foretold."""
    foretold = (
        "" if validation.predicted_kl is None else f", foretold {validation.predicted_kl:.4f}"
    )
    return (
        f"{'passed' if validation.passed else 'FAILED'}: {validation.kl:.4f} nats per token"
        f"{foretold} (at most {validation.max_kl:g}), {validation.top1_agreement:.1%} of "
        f"{validation.tokens:,} held-out tokens with the same likeliest token"
    )


def _exact_tokens(header: PackHeader) -> str:
    if not header.sinks and header.window < 2:
        return "none"
    pages = pack_pages(header)
    ratios = ", ".join(
        f"{tokens * pages.exact_bytes_per_token / pages.request_bytes(tokens, *kept):.2f}x at "
        f"{tokens:,} tokens"
        for kept in [(header.sinks, header.window)]
        for tokens in _CONTEXTS
    )
    return (
        f"first {header.sinks}, last {header.window} (advice to the server): {ratios}; blocks of "
        f"{pages.block_size} and {pages.exact_block_size} tokens, padding {pages.padding:.1%} and "
        f"{pages.exact_padding:.1%}"
    )


def pack_pages(header: PackHeader) -> PageGeometry:
    """The blocks that a server of a bfloat16 model takes for this pack by default."""
    return page_geometry(header.bytes_per_token, header.dense_bytes_per_token)


def _layer_table(facts: dict[str, Any]) -> Table:
    units = [
        group[kind] for layer in facts["layers"] for group in layer["groups"] for kind in KINDS
    ]
    widths = sorted(
        {*"842"}.union(*(unit["dims_by_bits"] for unit in units)), key=int, reverse=True
    )
    table = Table(
        box=None,
        caption="rank: latent dims kept, and how many at so many bits; bits: per element; bytes: "
        "per token",
        caption_justify="left",
    )
    split = f"at {'/'.join(widths)} bits"
    for name in ("layer", "group", "", "rank", split, "bits", "bytes", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, layer in enumerate(facts["layers"]):
        for g, group in enumerate(layer["groups"]):
            for kinds in units_of(group["joint_kv"]):
                unit, first = group[kinds[0]], kinds[0] == KINDS[0]
                table.add_row(
                    str(number) if first and g == 0 else "",
                    str(g) if first else "",
                    unit_name(kinds),
                    f"{unit['rank']}/{unit['dims']}",
                    "/".join(str(unit["dims_by_bits"].get(bits, 0)) for bits in widths),
                    f"{unit['bits_per_element']:.2f}",
                    str(group["bytes_per_token"]) if first else "",
                    f"{layer['compression_ratio']:.2f}x" if first and g == 0 else "",
                )
    return table
