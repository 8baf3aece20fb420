"""Evaluation from end to end: the same data through a dense and a compacted engine."""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_attentionpack.evaluate.answers import Answers, run_engine
from vllm_attentionpack.evaluate.compare import Comparison, compare
from vllm_attentionpack.evaluate.data import Dataset, read_dataset
from vllm_attentionpack.packfile import load_pack

#: Likeliest tokens per position that the divergence is computed from (see `kl_divergence`).
TOP_LOGPROBS = 64


class Evaluation(BaseModel):
    """What one pack costs and what it saves.

    Attributes:
        overall: figures over all items.
        groups: the same by the values of the items' `modality` and `kind` keys.
        ratio: compression ratio of the pack, scales and padding counted.
        bytes_per_token: dense bfloat16 and stored bytes over all layers.
        kv_tokens: KV-cache capacity of both engines in tokens, as vLLM reports it.
    """

    model_config = ConfigDict(frozen=True)

    overall: Comparison
    groups: dict[str, Comparison]
    ratio: float
    bytes_per_token: dict[str, int]
    kv_tokens: dict[str, int]

    def to_json(self) -> str:
        """One JSON object: the overall figures at the top, everything else beside them."""
        fields = self.model_dump()
        return json.dumps(fields.pop("overall") | fields)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Evaluation":
        """The inverse of `to_json`, of the parsed object."""
        own = {name: fields[name] for name in cls.model_fields if name != "overall"}
        overall = {name: fields[name] for name in Comparison.model_fields}
        return cls(overall=Comparison(**overall), **own)


def evaluate(
    model: str,
    pack: str | Path,
    data: str | Path,
    engine_args: Mapping[str, Any] | None = None,
    top_logprobs: int = TOP_LOGPROBS,
    dense: Answers | None = None,
) -> Evaluation:
    """Runs the data through both engines, one after the other, and compares.

    Args:
        model: name or path.
        pack: path of the pack.
        data: path of the data (`evaluate.data`).
        engine_args: further arguments of `vllm.LLM` for both engines.
        top_logprobs: see `TOP_LOGPROBS`.
        dense: answers of the dense engine to the same data, to save a run.

    Raises:
        AttentionPackError: the data, the pack or the configuration cannot be used.
    """
    dataset = read_dataset(data)
    header = load_pack(pack).header
    arguments = dict(engine_args or {})
    # first: a pack of another model is refused before the dense run, not after it
    compacted = run_engine(model, dataset.items, Path(pack), arguments, top_logprobs)
    if dense is None:
        dense = run_engine(model, dataset.items, None, arguments, top_logprobs)
    return Evaluation(
        overall=compare(dataset.items, dense, compacted, range(len(dataset.items))),
        groups={
            name: compare(dataset.items, dense, compacted, chosen)
            for name, chosen in _groups(dataset).items()
        },
        ratio=header.compression_ratio,
        bytes_per_token={"dense": header.dense_bytes_per_token, "packed": header.bytes_per_token},
        kv_tokens={"dense": dense.kv_tokens, "packed": compacted.kv_tokens},
    )


def _groups(dataset: Dataset) -> dict[str, list[int]]:
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for key in ("modality", "kind"):
        for i, item in enumerate(dataset.items):
            if value := item.extra.get(key):
                groups[f"{key}={value}"].append(i)
    return dict(groups)
