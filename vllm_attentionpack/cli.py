"""The `attentionpack` command. One function per command; the work is done elsewhere.

Imports of the work stay inside the commands: `attentionpack --help` must not wait for vLLM.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_attentionpack import __version__
from vllm_attentionpack.calibrate.settings import (
    DEFAULT_ANCHOR_SPAN,
    DEFAULT_SINKS,
    DEFAULT_WINDOW,
    PRE_ROPE_ANCHOR_SPAN,
    PRE_ROPE_TURN,
)
from vllm_attentionpack.errors import AttentionPackError, ConfigError

#: Exit code of a calibration whose pack was written but lost more than it may.
_FAILED_VALIDATION = 3

app = typer.Typer(
    help="Serve models in vLLM from a compacted KV cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point: our errors are one line on stderr and exit code 2."""
    try:
        app()
    except AttentionPackError as error:
        print(f"attentionpack: {error}", file=sys.stderr)
        sys.exit(2)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


bench = typer.Typer(help="Measure speed beside vLLM's dense cache.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    """Serve models in vLLM from a compacted KV cache."""


@app.command()
def calibrate(
    model: Annotated[str | None, typer.Argument(help="Model name or folder.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="JSON lines of chats or texts, or a .txt file.")
    ] = None,
    ratio: Annotated[
        str | None,
        typer.Option(
            show_default="8",
            help="Compression against bfloat16, or auto: the most that --max-kl allows.",
        ),
    ] = None,
    validate: Annotated[
        bool | None,
        typer.Option("--validate", help="Measure the pack on held-out items; exit 3 if it fails."),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(show_default="0.05", help="Loss allowed on held-out items, nats per token."),
    ] = None,
    group_size: Annotated[
        str | None, typer.Option(show_default="auto", help="KV heads coded jointly, or auto.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(show_default="all data", help="Stop after this many tokens.")
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(
            show_default="the engine's max_model_len", help="Longest context to be served."
        ),
    ] = None,
    anchor_span: Annotated[
        int | None,
        typer.Option(
            show_default=f"{DEFAULT_ANCHOR_SPAN}, or {PRE_ROPE_ANCHOR_SPAN} with --pre-rope",
            help="Tokens whose keys are coded relative to the first of them; 0 for as they come.",
        ),
    ] = None,
    pre_rope: Annotated[
        bool | None,
        typer.Option(
            "--pre-rope",
            help="Code what RoPE turns far within a span as it was before: less loss, more work.",
        ),
    ] = None,
    pre_rope_turn: Annotated[
        float | None,
        typer.Option(
            show_default=f"{PRE_ROPE_TURN:g}",
            help="Radians within a span from which on --pre-rope takes a plane.",
        ),
    ] = None,
    joint_kv: Annotated[
        bool | None,
        typer.Option(
            "--joint-kv", help="Code keys and values by one latent for both: less loss, more work."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(show_default="0", help="Order of the data.")] = None,
    modalities: Annotated[
        str | None,
        typer.Option(show_default="auto", help="1: all tokens alike, 2: visual apart, or auto."),
    ] = None,
    sinks: Annotated[
        int | None,
        typer.Option(show_default=str(DEFAULT_SINKS), help="First tokens to keep exact."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(show_default=str(DEFAULT_WINDOW), help="Last tokens to keep exact."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", show_default="MODEL-RATIOx.pack.safetensors", help="The pack."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of these settings; flags win.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="As vLLM's --dtype.")] = None,
    quantization: Annotated[str | None, typer.Option(help="As vLLM's --quantization.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="As vLLM's --max-model-len.")] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="As vLLM's --trust-remote-code.")
    ] = None,
) -> None:
    """Gather statistics of MODEL on DATA and write a pack to serve it from."""
    from vllm_attentionpack.calibrate.settings import make_settings, read_settings_file

    values: dict[str, Any] = {} if config is None else read_settings_file(config)
    engine = values.get("engine") or {}
    if not isinstance(engine, dict):
        raise ConfigError(
            f"'engine' in '{config}' is {engine!r}; expected arguments of vllm.LLM, such as "
            "'dtype: bfloat16'."
        )
    values["engine"] = engine | _given(
        dtype=dtype,
        quantization=quantization,
        max_model_len=max_model_len,
        trust_remote_code=trust_remote_code,
    )
    values |= _given(
        model=model,
        data=data,
        ratio=_number(ratio),
        validate_pack=validate,
        max_kl=max_kl,
        group_size=_number(group_size),
        max_tokens=max_tokens,
        max_context=max_context,
        anchor_span=anchor_span,
        pre_rope=pre_rope,
        pre_rope_turn=pre_rope_turn,
        joint_kv=joint_kv,
        seed=seed,
        modalities=_number(modalities),
        sinks=sinks,
        window=window,
        output=output,
    )
    source = "the command line" if config is None else f"'{config}' with the command line"
    settings = make_settings(values, source)
    if max_kl is not None and not settings.validates:
        raise ConfigError(
            f"--max-kl is {max_kl:g}, but nothing is held to it. Add --validate, or --ratio auto."
        )
    if settings.output is None:
        ratio_name = "auto" if settings.ratio == "auto" else f"{settings.ratio:g}x"
        name = f"{Path(settings.model).resolve().name}-{ratio_name}.pack.safetensors"
        settings = settings.model_copy(update={"output": Path(name)})

    from vllm_attentionpack.calibrate.run import run_calibration

    pack = run_calibration(settings)
    header = pack.header
    print(
        f"{settings.output}: {header.compression_ratio:.2f}x, {header.bytes_per_token} of "
        f"{header.dense_bytes_per_token} bytes per token, from {header.provenance.tokens} tokens "
        f"({header.provenance.visual_tokens} visual)"
    )
    if header.validation is not None:
        from vllm_attentionpack.report.inspect import validation_text

        print(f"validation {validation_text(header.validation)}")
        if not header.validation.passed:
            raise typer.Exit(_FAILED_VALIDATION)


@app.command()
def inspect(
    pack: Annotated[Path, typer.Argument(help="A pack file.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what PACK holds: ranks, bits and bytes per layer and head group."""
    from vllm_attentionpack.packfile import load_pack
    from vllm_attentionpack.report.inspect import pack_facts, pack_tables

    header = load_pack(pack).header
    if json:
        from json import dumps

        print(dumps(pack_facts(header), indent=2))
    else:
        from rich.console import Console

        Console().print(pack_tables(header))


@app.command()
def report(
    packs: Annotated[list[Path], typer.Argument(help="Pack files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    results: Annotated[
        list[Path] | None,
        typer.Option(help="JSON of scripts/measure_codecs.py: the Pareto front of a model."),
    ] = None,
) -> None:
    """Write one HTML page about PACKS: bytes, ranks, bits, spectra, and measured quality."""
    from vllm_attentionpack.report.html import write_report

    write_report(packs, results or [], output)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


@app.command()
def eval(
    model: Annotated[str, typer.Argument(help="Model name or folder.")],
    pack: Annotated[Path, typer.Option(help="A pack of this model.")],
    data: Annotated[Path, typer.Option(help="Held-out data, as for calibrate.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dtype: Annotated[str | None, typer.Option(help="As vLLM's --dtype.")] = None,
    quantization: Annotated[str | None, typer.Option(help="As vLLM's --quantization.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="As vLLM's --max-model-len.")] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(help="As vLLM's --tensor-parallel-size.")
    ] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="As vLLM's --trust-remote-code.")
    ] = None,
) -> None:
    """Compare MODEL served densely and from PACK: answers, divergence, perplexity."""
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"  # standard output is for the figures
    from vllm_attentionpack.evaluate.run import evaluate

    engine = _given(
        dtype=dtype,
        quantization=quantization,
        max_model_len=max_model_len,
        tensor_parallel_size=tensor_parallel_size,
        trust_remote_code=trust_remote_code,
    )
    result = evaluate(model, pack, data, engine)
    if json:
        print(result.to_json())
    else:
        from rich.console import Console

        from vllm_attentionpack.report.evaluation import evaluation_table

        Console().print(evaluation_table(result))


_Device = Annotated[str, typer.Option(help="Where to run: cpu.")]


def _check_device(device: str) -> None:
    if device != "cpu":
        raise ConfigError(f"--device is '{device}'; this benchmark runs on: cpu.")


@bench.command("ops")
def bench_ops(
    device: _Device = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object per row.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Alternating runs of each row.")] = 9,
    threads: Annotated[
        int | None, typer.Option(min=1, show_default="PyTorch's", help="Threads of either op.")
    ] = None,
) -> None:
    """Attention on codes and encoding, each beside vLLM's dense op on the same shapes."""
    _check_device(device)
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"  # standard output is for the figures
    from vllm_attentionpack.report.bench import print_ops

    print_ops(repeats, threads, json)


@bench.command("engine")
def bench_engine(
    device: _Device = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    layers: Annotated[int, typer.Option(min=1, help="Of the model with random weights.")] = 4,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompts, all but one.")] = 8192,
    batch: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    new_tokens: Annotated[int, typer.Option(min=2, help="Decoded per request.")] = 16,
    ratio: Annotated[float, typer.Option(help="Compression.")] = 8.0,
    group: Annotated[int, typer.Option(min=1, help="KV heads coded jointly.")] = 2,
    sinks: Annotated[
        int, typer.Option(min=0, help="First tokens that stay exact.")
    ] = DEFAULT_SINKS,
    window: Annotated[
        int, typer.Option(min=0, help="Last tokens that stay exact.")
    ] = DEFAULT_WINDOW,
    anchor_span: Annotated[
        int, typer.Option(min=0, help="Tokens whose keys share an anchor; 0 for none.")
    ] = DEFAULT_ANCHOR_SPAN,
    pre_rope: Annotated[bool, typer.Option("--pre-rope", help="As calibrate's.")] = False,
    joint_kv: Annotated[bool, typer.Option("--joint-kv", help="As calibrate's.")] = False,
) -> None:
    """vLLM from end to end, dense and compacted, on a model with random weights."""
    _check_device(device)
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
    from vllm_attentionpack.bench.cpu_engine import Setup
    from vllm_attentionpack.report.bench import print_engine

    setup = Setup(
        layers=layers,
        context=context,
        batch=batch,
        new_tokens=new_tokens,
        ratio=ratio,
        group=group,
        sinks=sinks,
        window=window,
        anchor_span=anchor_span,
        pre_rope=pre_rope,
        joint_kv=joint_kv,
    )
    print_engine(setup, json)


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given; the others keep what the file or the defaults say."""
    return {name: value for name, value in options.items() if value is not None}


def _number(text: str | None) -> int | float | str | None:
    """Options that take a number or a word."""
    if text is None or text.isdecimal():
        return text if text is None else int(text)
    try:
        return float(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
