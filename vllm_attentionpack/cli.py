"""The `attentionpack` command. One function per command; the work is done elsewhere.

Imports of the work stay inside the commands: `attentionpack --help` must not wait for vLLM.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_attentionpack import __version__
from vllm_attentionpack.errors import AttentionPackError, ConfigError

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
        float | None, typer.Option(help="Compression against bfloat16. [default: 8]")
    ] = None,
    group_size: Annotated[
        str | None, typer.Option(help="KV heads coded jointly, or auto. [default: auto]")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Stop after this many tokens. [default: all data]")
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(help="Longest context to be served. [default: the engine's max_model_len]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Order of the data. [default: 0]")] = None,
    modalities: Annotated[
        str | None,
        typer.Option(help="1: all tokens alike, 2: visual apart, or auto. [default: auto]"),
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(help="First tokens to keep exact. [default: 4]")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Last tokens to keep exact. [default: 32]")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The pack. [default: MODEL-RATIOx.pack.safetensors]"),
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
        ratio=ratio,
        group_size=_number(group_size),
        max_tokens=max_tokens,
        max_context=max_context,
        seed=seed,
        modalities=_number(modalities),
        sinks=sinks,
        window=window,
        output=output,
    )
    source = "the command line" if config is None else f"'{config}' with the command line"
    settings = make_settings(values, source)
    if settings.output is None:
        name = f"{Path(settings.model).resolve().name}-{settings.ratio:g}x.pack.safetensors"
        settings = settings.model_copy(update={"output": Path(name)})

    from vllm_attentionpack.calibrate.run import run_calibration

    pack = run_calibration(settings)
    header = pack.header
    print(
        f"{settings.output}: {header.compression_ratio:.2f}x, {header.bytes_per_token} of "
        f"{header.dense_bytes_per_token} bytes per token, from {header.provenance.tokens} tokens "
        f"({header.provenance.visual_tokens} visual)"
    )


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


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given; the others keep what the file or the defaults say."""
    return {name: value for name, value in options.items() if value is not None}


def _number(text: str | None) -> int | str | None:
    """Options that take a number or a word."""
    return int(text) if text is not None and text.isdecimal() else text


if __name__ == "__main__":
    main()
