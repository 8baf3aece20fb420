"""The plots of the HTML report, as plotly figures."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from vllm_attentionpack.codec.layout import unit_name, units_of
from vllm_attentionpack.packfile.schema import Pack

#: Colour-blind safe (Okabe and Ito); ours first.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555", "#999900")
_PLANE_COLOURS = {
    "8 bits": "#08519C",
    "4 bits": "#4292C6",
    "2 bits": "#9ECAE1",
    "16 bits": "#08306B",
    "scales": "#E69F00",
    "padding": "#BBBBBB",
}
_MODALITIES = ("text", "visual")


def _styled(figure: go.Figure, height: int, **layout: Any) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 20, "t": 50, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 13},
        **layout,
    )
    return figure


def pareto(result: Mapping[str, Any]) -> go.Figure:
    """Divergence, agreement and accuracy against bytes per token; one column per kind of item."""
    groups = list(result["rows"][0]["groups"])
    answered = [g for g in groups if result["rows"][0]["groups"][g]["accuracy"] is not None]
    metrics = (("kl", "KL, nats per token"), ("top1", "top-1 agreement"), ("accuracy", "accuracy"))
    figure = make_subplots(
        rows=3,
        cols=len(groups),
        shared_xaxes=True,
        vertical_spacing=0.06,
        subplot_titles=[g.partition("=")[2] for g in groups],
    )
    families: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        families.setdefault(row["family"], []).append(row)
    ordered = sorted(families.items(), key=lambda entry: not entry[0].startswith("ours"))
    for number, (family, rows) in enumerate(ordered):
        rows = sorted(rows, key=lambda row: row["bytes_per_token"])
        for column, group in enumerate(groups, start=1):
            for line, (metric, _) in enumerate(metrics, start=1):
                if metric == "accuracy" and group not in answered:
                    continue
                figure.add_trace(
                    go.Scatter(
                        x=[row["bytes_per_token"] for row in rows],
                        y=[_plotted(row["groups"][group][metric], metric) for row in rows],
                        text=[f"{row['name']} ({row['ratio']:.2f}x)" for row in rows],
                        hovertemplate="%{text}<br>%{x:.0f} bytes per token<br>%{y:.5g}",
                        name=family,
                        legendgroup=family,
                        showlegend=column == 1 and line == 1,
                        mode="lines+markers" if len(rows) > 1 else "markers",
                        line={"color": _COLOURS[number % len(_COLOURS)]},
                        marker={"size": 9 if number == 0 else 7, "symbol": number},
                    ),
                    row=line,
                    col=column,
                )
    for line, (metric, title) in enumerate(metrics, start=1):
        figure.update_yaxes(title_text=title, row=line, col=1)
        if metric == "kl":
            figure.update_yaxes(type="log", exponentformat="power", row=line)
    figure.update_xaxes(type="log", dtick=math.log10(2), tickformat=",.0f", tickangle=0)
    figure.update_xaxes(title_text="bytes per token", row=3)
    return _styled(figure, 900, legend={"orientation": "h", "y": -0.08}, hovermode="closest")


def _plotted(value: float | None, metric: str) -> float | None:
    """A divergence of zero has no place on a logarithmic axis: rounding is about 1e-6."""
    return max(value, 1e-6) if metric == "kl" and value is not None else value


def heat_maps(pack: Pack) -> go.Figure:
    """Retained rank and bits per element of every layer and head group."""
    header = pack.header
    layouts = header.layouts()
    dims, units = layouts[0].coded_dims, units_of(pack.header.joint_kv)
    columns = [
        f"{unit_name(kinds)} {g}" for kinds in units for g in range(len(header.layers[0].groups))
    ]
    ranks = np.zeros((len(header.layers), len(columns)))
    bits = np.zeros_like(ranks)
    for i, layer in enumerate(layouts):
        for k, kinds in enumerate(units):
            for g, group in enumerate(layer.groups):
                counts = getattr(group, kinds[0])
                ranks[i, k * len(layer.groups) + g] = counts.rank
                bits[i, k * len(layer.groups) + g] = counts.bytes_per_token * 8 / dims
    figure = make_subplots(
        rows=1,
        cols=2,
        subplot_titles=(f"rank, of {dims} dims", "bits per element"),
        horizontal_spacing=0.14,
    )
    for column, (values, form, scale, at) in enumerate(
        ((ranks, ".0f", "Blues", 0.43), (bits, ".2f", "Oranges", 1.0)), start=1
    ):
        figure.add_trace(
            go.Heatmap(
                z=values,
                x=columns,
                y=[str(i) for i in range(len(values))],
                texttemplate=f"%{{z:{form}}}" if values.size <= 256 else None,
                colorscale=scale,
                colorbar={"x": at, "thickness": 12},
                hovertemplate=f"layer %{{y}}, %{{x}}: %{{z:{form}}}<extra></extra>",
            ),
            row=1,
            col=column,
        )
    figure.update_yaxes(title_text="layer", autorange="reversed")
    figure.update_xaxes(title_text="K or V of head group")
    return _styled(figure, min(1000, 220 + 28 * len(header.layers)))


def spectra(pack: Pack) -> go.Figure:
    """The variance of every latent dim, relative to the first; what is cut off is dotted."""
    modalities = range(pack.header.num_modalities)
    units = units_of(pack.header.joint_kv)
    figure = make_subplots(
        rows=len(modalities),
        cols=len(units),
        shared_xaxes=True,
        shared_yaxes=True,
        subplot_titles=[
            " and ".join(f"{kind}s" for kind in kinds)
            + (f", {_MODALITIES[m]}" if len(modalities) == 2 else "")
            for m in modalities
            for kinds in units
        ],
    )
    layers = len(pack.layers)
    for i, (layer, header) in enumerate(zip(pack.layers, pack.header.layers, strict=True)):
        shade = 0.15 + 0.7 * i / max(layers - 1, 1)
        colour = (
            f"rgb({int(30 + 190 * shade)}, {int(90 * (1 - shade)) + 40}, {int(200 * (1 - shade))})"
        )
        for column, (kind, *_) in enumerate(units, start=1):
            variance = layer.variance[0][kind]
            rank = getattr(header.groups[0], kind).counts().rank
            for m in modalities:
                values = (variance[m] / variance[m].amax().clamp_min(1e-30)).clamp_min(1e-8).numpy()
                for part, dash, name in (
                    (slice(0, rank), "solid", f"layer {i}"),
                    (slice(rank - 1, None), "dot", f"layer {i}, cut off"),
                ):
                    figure.add_trace(
                        go.Scatter(
                            x=np.arange(len(values))[part],
                            y=values[part],
                            mode="lines",
                            line={"color": colour, "dash": dash, "width": 1.5},
                            name=name,
                            legendgroup=f"layer {i}",
                            showlegend=column == 1 and m == 0 and dash == "solid",
                            hovertemplate="dim %{x}: %{y:.2g}",
                        ),
                        row=m + 1,
                        col=column,
                    )
    figure.update_yaxes(type="log", exponentformat="power")
    figure.update_xaxes(title_text="latent dim (head group 0)", row=len(modalities))
    return _styled(figure, 320 * len(modalities))


def byte_bars(pack: Pack) -> go.Figure:
    """Bytes per token of every layer, by what they hold."""
    layouts = pack.header.layouts()
    units = units_of(pack.header.joint_kv)
    names = {kinds[0]: unit_name(kinds) for kinds in units}
    order = [(f"{bits} bits", name) for name in names.values() for bits in (16, 8, 4, 2)]
    order += [("scales", ""), ("padding", "")]
    table = {key: np.zeros(len(layouts)) for key in order}
    for i, layout in enumerate(layouts):
        for plane in layout.planes(16):
            if plane.kind not in names:  # joint: counted as the key's
                continue
            name = f"{plane.bits} bits" if plane.bits else "scales"
            table[name, names[plane.kind] if plane.bits else ""][i] += plane.bytes_per_token
        table["padding", ""][i] = layout.bytes_per_token - layout.content_bytes_per_token
    figure = go.Figure()
    for (name, kind), values in table.items():
        if values.any():
            figure.add_trace(
                go.Bar(
                    x=[str(i) for i in range(len(layouts))],
                    y=values,
                    name=f"{kind} {name}".strip(),
                    marker={
                        "color": _PLANE_COLOURS[name],
                        "pattern": {"shape": "/" if kind == "V" else ""},
                    },
                    hovertemplate="layer %{x}: %{y:.0f} bytes",
                )
            )
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="bytes per token")
    return _styled(figure, 360)
