"""One self-contained HTML page about packs: nothing is fetched when it is opened."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from vllm_attentionpack.codec.layout import units_of
from vllm_attentionpack.errors import ConfigError
from vllm_attentionpack.packfile import load_pack
from vllm_attentionpack.packfile.schema import Pack
from vllm_attentionpack.report.inspect import pack_facts, validation_text

_MODALITIES = ("text", "visual")


def write_report(packs: Sequence[Path], results: Sequence[Path], output: Path) -> None:
    """Writes the page.

    Args:
        packs: pack files.
        results: JSON files of `scripts/measure_codecs.py`.
        output: the page.

    Raises:
        PackFileError: a pack cannot be read.
        ConfigError: a result file cannot be used, the page cannot be written, or the packages of
            the `report` extra are missing.
    """
    try:
        import jinja2
        import plotly
        from plotly.offline import get_plotlyjs

        from vllm_attentionpack.report import figures
    except ImportError as error:
        raise ConfigError(
            f"the report needs packages that are not installed ({error}). "
            "Install them: pip install 'vllm-attentionpack[report]'."
        ) from error

    def drawn(figure: Any) -> str:
        return plotly.io.to_html(figure, full_html=False, include_plotlyjs=False)

    measured = [
        {
            "name": path.stem,
            **result,
            "pareto": drawn(figures.pareto(result)),
            "table": _rows(result),
        }
        for path, result in ((path, _read_result(path)) for path in results)
    ]
    shown = []
    for path in packs:
        pack = load_pack(path)
        header = pack.header
        shown.append(
            {
                "name": path.name,
                "header": header,
                "facts": pack_facts(header),
                "validation": header.validation and validation_text(header.validation),
                "modalities": _modality_rows(pack),
                "heat_maps": drawn(figures.heat_maps(pack)),
                "spectra": drawn(figures.spectra(pack)),
                "byte_bars": drawn(figures.byte_bars(pack)),
            }
        )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        packs=shown, measured=measured, plotly=get_plotlyjs()
    )
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the report cannot be written to '{output}' ({error}). Give a path that can be."
        ) from error


def _read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = result["rows"]
        if not rows or not all({"name", "family", "groups"} <= row.keys() for row in rows):
            raise KeyError("rows")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"'{path}' is no result of scripts/measure_codecs.py ({error!r}). Give its JSON file."
        ) from error
    return result


def _rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(result["rows"], key=lambda row: -row["bytes_per_token"])


def _modality_rows(pack: Pack) -> list[dict[str, Any]]:
    """Per modality and K or V, over all layers: share of the error energy that the codes keep."""
    rows = []
    for m in range(pack.header.num_modalities):
        for kinds in units_of(pack.header.joint_kv):
            kind = kinds[0]
            kept = total = 0.0
            half: list[int] = []
            for layer, header in zip(pack.layers, pack.header.layers, strict=True):
                for group, variance in zip(header.groups, layer.variance, strict=True):
                    spectrum = variance[kind][m].double()
                    rank = getattr(group, kind).counts().rank
                    kept += float(spectrum[:rank].sum())
                    total += float(spectrum.sum())
                    part = spectrum.cumsum(0) / spectrum.sum().clamp_min(1e-30)
                    half.append(int((part < 0.9).sum()) + 1)
            rows.append(
                {
                    "modality": _MODALITIES[m] if pack.header.num_modalities == 2 else "all",
                    "kind": " and ".join(f"{kind}s" for kind in kinds),
                    "kept": kept / max(total, 1e-30),
                    "dims": f"{min(half)} to {max(half)}",
                }
            )
    return rows
