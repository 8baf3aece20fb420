"""An evaluation as a table."""

from rich.table import Table
from rich.text import Text

from vllm_attentionpack.evaluate.compare import Comparison
from vllm_attentionpack.evaluate.run import Evaluation


def evaluation_table(evaluation: Evaluation) -> Table:
    """Sizes and capacity first, then one row per group of items."""
    sizes, capacity = evaluation.bytes_per_token, evaluation.kv_tokens
    table = Table(
        title=(
            f"{evaluation.ratio:.2f}x: {sizes['dense']:,} -> {sizes['packed']:,} bytes per token, "
            f"{capacity['dense']:,} -> {capacity['packed']:,} tokens of KV cache"
        ),
        caption=(
            "KL: nats per scored token; right, same: generated answers equal to the given one, to "
            "the dense one. Compacted: every token, prompts included, attends to codes."
        ),
    )
    for name in ("items", "n", "KL", "top-1", "ppl", "(dense)", "right", "(dense)", "same"):
        table.add_column(name, justify="left" if name == "items" else "right", no_wrap=True)
    for name, row in [("all", evaluation.overall), *evaluation.groups.items()]:
        # not a string: brackets in the name of a group are no markup
        table.add_row(Text(name.partition("=")[2] or name), *_cells(row))
    return table


def _cells(row: Comparison) -> list[str]:
    return [
        str(row.n),
        _number(row.kl, "{:.4f}"),
        _number(row.top1_agreement, "{:.1%}"),
        _number(row.ppl, "{:.3f}"),
        _number(row.ppl_dense, "{:.3f}"),
        _number(row.accuracy, "{:.1%}"),
        _number(row.accuracy_dense, "{:.1%}"),
        _number(row.answer_agreement, "{:.1%}"),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
