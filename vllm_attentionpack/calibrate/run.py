"""Calibration from end to end: model and data in, pack out."""

import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vllm_attentionpack import __version__
from vllm_attentionpack.calibrate.assemble import Budget, check_weights
from vllm_attentionpack.calibrate.engine import Progress, feed, statistics_engine
from vllm_attentionpack.calibrate.moments import auto_group_dims
from vllm_attentionpack.calibrate.settings import CalibrateSettings, make_settings
from vllm_attentionpack.codec.positions import common_span
from vllm_attentionpack.errors import CalibrationDataError, UnsupportedModelError
from vllm_attentionpack.evaluate.data import ChatItem, Dataset, Item, read_dataset
from vllm_attentionpack.evaluate.simulate.codec import CacheShape, ExactTokens, PackCodec
from vllm_attentionpack.packfile import Pack, PackHeader, Provenance, check_target, save_pack
from vllm_attentionpack.packfile.schema import FORMAT_VERSION, Fingerprint

if TYPE_CHECKING:
    from vllm_attentionpack.calibrate.collector import Collector
    from vllm_attentionpack.calibrate.gradients import FisherGatherer
    from vllm_attentionpack.calibrate.metrics import FisherMetrics

logger = logging.getLogger("vllm.attentionpack")

#: With fewer visual tokens than this, `auto` codes them like text: their statistics are noise.
MIN_VISUAL_TOKENS = 64
#: With fewer tokens than this for each joint dim of a head group, calibration warns.
_TOKENS_PER_DIM = 4
#: Where sensitivities are measured when the ratio is yet to be found.
_SENSITIVITY_RATIO = 8.0


def calibrate(
    model: str, data: Any, ratio: float | Literal["auto"], output: Any = None, **options: Any
) -> Pack:
    """Calibrates a model and writes its pack.

    Args:
        model: name or path, as vLLM takes it.
        data: path of the calibration data (`evaluate.data`).
        ratio: compression to reach, against dense bfloat16; `auto` for the largest whose loss on
            held-out items stays within `max_kl`.
        output: path of the pack; None writes none.
        **options: fields of `CalibrateSettings`; every other keyword goes to `vllm.LLM`.

    Returns:
        The pack.

    Raises:
        AttentionPackError: see `run_calibration`.
    """
    settings = {key: options.pop(key) for key in CalibrateSettings.model_fields if key in options}
    settings["engine"] = {**settings.get("engine", {}), **options}
    values = {"model": model, "data": data, "ratio": ratio, "output": output, **settings}
    return run_calibration(make_settings(values, "the arguments of calibrate()"))


def run_calibration(settings: CalibrateSettings) -> Pack:
    """Starts the engine, gathers statistics, chooses bases and bits, writes the pack.

    The same settings, data, versions and machine give the same pack, header and tensors bit by bit.
    A pack that fails its validation is written like any other; its header says so, and serving
    warns.

    Raises:
        CalibrationDataError: the data cannot be used.
        ConfigError: the settings contradict the model.
        UnsupportedModelError: the model cannot be served from a compacted cache.
        BudgetError: the ratio cannot be met.
        PackFileError: the pack cannot be written where it is to go.
    """
    dataset = read_dataset(settings.data)
    # before the work, not after it
    if settings.output is not None:
        check_target(settings.output)
    check_data(dataset, settings)
    with statistics_engine(settings.model, settings.seed, settings.engine) as llm:
        pack = _calibrate(llm, dataset, settings)
    if settings.output is not None:
        save_pack(pack, settings.output)
    return pack


def check_data(dataset: Dataset, settings: CalibrateSettings) -> None:
    """Raises `CalibrationDataError` where the items cannot give what the settings ask for."""
    chats = [item for item in dataset.items if isinstance(item, ChatItem)]
    if settings.modalities == 2 and not any(item.images for item in chats):
        raise CalibrationDataError(
            f"modalities is 2, but '{dataset.path}' names no image. Give data with images and "
            "text, or set modalities to 1 or auto."
        )
    scored = len(chats) < len(dataset.items) or any(item.answer is not None for item in chats)
    if settings.sensitivity != "uniform" and not scored:
        raise CalibrationDataError(
            f"none of the {len(chats)} chats in '{dataset.path}' has an answer, and sensitivity is "
            "measured on answers and texts. Add answers or texts, or set 'sensitivity: uniform' in "
            "the --config file, which costs quality."
        )


def _calibrate(llm: Any, dataset: Dataset, settings: CalibrateSettings) -> Pack:
    from vllm_attentionpack.attention.fingerprint import fingerprint
    from vllm_attentionpack.calibrate.assemble import Assembler
    from vllm_attentionpack.calibrate.collector import Collector
    from vllm_attentionpack.calibrate.gradients import FisherGatherer
    from vllm_attentionpack.calibrate.sensitivity import measure_sensitivity
    from vllm_attentionpack.calibrate.validate import Candidate, Validator, split_items
    from vllm_attentionpack.codec.allocate import MAX_PAGE_SIZE_CLASSES
    from vllm_attentionpack.evaluate.simulate.measure import Simulator

    fitted: tuple[Item, ...] = dataset.items
    held_out: tuple[Item, ...] = ()
    if settings.validates:
        fitted, held_out = split_items(dataset, settings.validation_share, settings.seed)
    dims = auto_group_dims(settings.pre_rope, settings.joint_kv)
    (collector,) = llm.apply_model(
        lambda model: Collector.install(model, settings.group_size, dims, settings.joint_kv)
    )
    found = _fingerprint(llm, collector)
    try:
        budget = Budget(
            found.num_layers,
            found.num_kv_heads,
            found.head_size,
            collector.heads_per_group,
            settings.joint_kv,
        )
        if settings.ratio != "auto":
            budget.bytes_per_token(settings.ratio)
        check_weights(settings.layer_weights, found.num_layers)
        with _progress_bar() as progress:
            feed(
                llm,
                replace(dataset, items=fitted),
                lambda: collector.tokens,
                settings.max_tokens,
                settings.seed,
                progress,
            )
    finally:
        collector.remove()
    tokens, visual_tokens = collector.tokens, collector.visual_tokens
    _check_tokens(dataset.path, tokens, budget.coded_dims)
    modalities = _modalities(settings, tokens, visual_tokens)
    max_context = settings.max_context or llm.model_config.max_model_len
    logger.info(
        "Calibrated on %d tokens, %d of them visual; choosing ranks and bits.",
        tokens,
        visual_tokens,
    )
    shape = CacheShape(
        tuple(recorder.layer.layer_name for recorder in collector.recorders),
        found.num_query_heads,
        found.num_kv_heads,
        found.head_size,
    )
    simulator = None
    exact = ExactTokens(settings.sinks, settings.window)
    if settings.sensitivity != "uniform":
        items = _drawn(fitted, settings.seed)
        most = min(settings.sensitivity_tokens, settings.max_tokens or settings.sensitivity_tokens)
        simulator = Simulator(llm, shape, items, most)
        simulator.check_codes_are_read(exact)
    turned = collector.turned(
        max_context, settings.span, settings.pre_rope_turn if settings.pre_rope else None
    )
    fisher = None
    if simulator is not None and settings.sensitivity != "measured":
        gatherer = FisherGatherer(
            simulator,
            turned,
            exact,
            collector.heads_per_group,
            settings.joint_kv,
            settings.seed,
        )
        fisher = _gathered(gatherer, modalities, settings.sensitivity == "auto")
    assembler = Assembler(
        collector.statistics(turned, modalities, llm.model_config.dtype, fisher),
        collector.heads_per_group,
        settings.regularization,
    )

    # vLLM gives layers that share a pool with dense ones pages of one size
    mixed = found.num_layers < fingerprint(llm.model_config).num_layers
    max_page_sizes = 1 if mixed else MAX_PAGE_SIZE_CLASSES
    sensitivity = None
    if simulator is not None and fisher is None:
        start = settings.ratio if settings.ratio != "auto" else _SENSITIVITY_RATIO
        with _progress_bar("measuring sensitivity") as progress:
            assembled = assembler.at(start, settings.layer_weights)
            sensitivity = measure_sensitivity(
                simulator,
                PackCodec(shape, assembled.codecs(simulator.device), exact),
                assembled.distortion,
                lambda fraction: progress(fraction, simulator.tokens),
            )

    def candidate(ratio: float) -> Candidate:
        assembled = assembler.at(ratio, settings.layer_weights, sensitivity, max_page_sizes)
        header = PackHeader(
            format_version=FORMAT_VERSION,
            fingerprint=found,
            provenance=_provenance(settings, dataset, tokens, visual_tokens),
            heads_per_group=collector.heads_per_group,
            num_modalities=modalities,
            ratio=ratio,
            max_context=max_context,
            anchor_span=common_span(assembler.anchors),
            sinks=settings.sinks,
            window=settings.window,
            layers=assembled.headers,
        )
        priced = simulator is not None  # whichever way: the loss is in nats
        return Candidate(Pack(header, assembled.packs), assembled.loss if priced else None)

    if not settings.validates:
        assert settings.ratio != "auto"
        return candidate(settings.ratio).pack
    validator = Validator(llm, shape, held_out, settings.max_kl)
    if settings.ratio == "auto":
        return validator.smallest(candidate, budget)
    return validator.marked(candidate(settings.ratio))


def _gathered(
    gatherer: "FisherGatherer", modalities: int, may_lack: bool
) -> "Iterator[FisherMetrics] | None":
    """The metrics of all layers; None where the model has no gradients and need not have."""
    try:
        with _progress_bar("gathering gradients") as progress:
            gatherer.gather(lambda fraction: progress(fraction, gatherer.simulator.tokens))
    except UnsupportedModelError as error:
        if not may_lack:
            raise
        logger.warning("Sensitivity is measured part by part instead: %s", error)
        return None
    return gatherer.metrics(modalities)


def _drawn(items: Sequence[Item], seed: int) -> list[Item]:
    """In the order in which `feed` takes them."""
    order = list(items)
    random.Random(seed).shuffle(order)
    return order


def _fingerprint(llm: Any, collector: "Collector") -> Fingerprint:
    """A pack is about the layers that it covers; those with other attention are not among them."""
    from vllm_attentionpack.attention.fingerprint import fingerprint

    return fingerprint(llm.model_config).model_copy(update={"num_layers": len(collector.recorders)})


def _check_tokens(data: Path, tokens: int, dims: int) -> None:
    """Refuses statistics of fewer tokens than dims: what they leave out cannot be coded at all."""
    if not tokens:
        raise CalibrationDataError(
            f"'{data}' holds no text of two tokens or more and no chat. Give more."
        )
    if tokens < dims:
        raise CalibrationDataError(
            f"calibration saw {tokens} tokens, fewer than the {dims} dims of a head group, and "
            "knows nothing of most of them. Give more data (a few ten thousand tokens are a "
            "start), raise --max-tokens, or lower --group-size."
        )
    if tokens < _TOKENS_PER_DIM * dims:
        logger.warning(
            "Only %d tokens were seen, for bases of %d dims: what is served will lose more than "
            "it need. Give at least %d tokens, better ten times as many.",
            tokens,
            dims,
            _TOKENS_PER_DIM * dims,
        )


def _modalities(settings: CalibrateSettings, tokens: int, visual_tokens: int) -> int:
    if settings.modalities == "auto":
        return 2 if visual_tokens >= MIN_VISUAL_TOKENS and visual_tokens < tokens else 1
    if settings.modalities == 2 and not 0 < visual_tokens < tokens:
        raise CalibrationDataError(
            f"modalities is 2, but {visual_tokens} of the {tokens} calibration tokens are visual. "
            "Give data with images and text, or set modalities to 1 or auto."
        )
    return settings.modalities


def _provenance(
    settings: CalibrateSettings, dataset: Dataset, tokens: int, visual_tokens: int
) -> Provenance:
    import vllm

    return Provenance(
        model=settings.model,
        data_sha256=dataset.sha256,
        tokens=tokens,
        visual_tokens=visual_tokens,
        seed=settings.seed,
        vllm_version=vllm.__version__,
        attentionpack_version=__version__,
    )


@contextmanager
def _progress_bar(what: str = "calibrating") -> Iterator[Progress]:
    """A bar on stderr with tokens, tokens per second and the time that is left."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn(what),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[tokens]:,} tokens, {task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=1.0, tokens=0, speed=0.0)
        start = time.monotonic()

        def update(fraction: float, tokens: int) -> None:
            speed = tokens / max(time.monotonic() - start, 1e-9)
            bar.update(task, completed=fraction, tokens=tokens, speed=speed)

        yield update
