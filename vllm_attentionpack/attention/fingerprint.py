"""What a pack and a model must have in common, read from vLLM's configuration of the model."""

import json
from collections.abc import Mapping
from typing import Any

from vllm_attentionpack.errors import PackMismatchError
from vllm_attentionpack.packfile import Fingerprint

#: Where a text configuration may say something about its rotary embedding. vLLM gathers the older
#: spellings into `rope_parameters` (one dict, or one per layer type); the rest is for models whose
#: own code reads them.
_ROPE_KEYS = (
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "rotary_dim",
    "original_max_position_embeddings",
)
#: Models fill these in with their defaults while they are built, after start-up has looked.
_FILLED_IN = ("rope_theta",)


def fingerprint(model_config: Any) -> Fingerprint:
    """The fingerprint of a model.

    Args:
        model_config: vLLM's `ModelConfig`.

    Returns:
        All layers of the model and its heads over all tensor-parallel ranks. The same before and
        after the model is built, but for rotary defaults (see `check_fingerprint`).
    """
    architecture = model_config.model_arch_config
    return Fingerprint(
        architecture=model_config.architecture,
        num_layers=architecture.total_num_hidden_layers,
        num_query_heads=architecture.total_num_attention_heads,
        num_kv_heads=architecture.total_num_kv_heads,
        head_size=architecture.head_size,
        rope=rope_json(model_config.hf_text_config),
    )


def rope_json(text_config: Any) -> str:
    """The rotary parameters that a text configuration states, as JSON with sorted keys."""
    stated = {key: getattr(text_config, key, None) for key in _ROPE_KEYS}
    if stated["rope_parameters"]:
        # Spellings that `rope_parameters` has already absorbed.
        stated["rope_theta"] = stated["rope_scaling"] = stated["partial_rotary_factor"] = None
    return json.dumps(_canonical(stated), sort_keys=True)


def check_fingerprint(expected: Fingerprint, actual: Fingerprint, pack: str) -> None:
    """Checks a model against the pack `pack`, as far as a configuration can tell.

    The layers are compared by name when the model is built: a pack may cover only some of them
    (those with full attention). Rotary defaults that only one side states are not compared.

    Args:
        expected: of the pack.
        actual: of the model.
        pack: the path, for the message.

    Raises:
        PackMismatchError: names the first field that differs and both values.
    """
    for field in ("architecture", "num_query_heads", "num_kv_heads", "head_size"):
        if getattr(expected, field) != getattr(actual, field):
            raise _mismatch(pack, field, getattr(expected, field), getattr(actual, field))
    if expected.num_layers > actual.num_layers:
        raise _mismatch(pack, "num_layers", expected.num_layers, actual.num_layers)
    of_pack, of_model = json.loads(expected.rope), json.loads(actual.rope)
    if _without_defaults(of_pack, of_model) != _without_defaults(of_model, of_pack):
        raise _mismatch(pack, "rope", expected.rope, actual.rope)


def _mismatch(pack: str, field: str, expected: Any, actual: Any) -> PackMismatchError:
    return PackMismatchError(
        f"the pack '{pack}' was made for another model: {field} is {expected} in the pack and "
        f"{actual} in the model. Serve the model that was calibrated, with the same "
        "--hf-overrides, or calibrate this one with 'attentionpack calibrate'."
    )


def _canonical(value: Any) -> Any:
    """Without what is unset or says the same as its absence; whole numbers as integers."""
    if isinstance(value, Mapping):
        kept = {str(k): _canonical(v) for k, v in value.items() if k != "type" and v is not None}
        if kept.get("rope_type") == "default":
            del kept["rope_type"]
        return {k: v for k, v in kept.items() if v != {}}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _without_defaults(rope: Any, other: Any) -> Any:
    if not isinstance(rope, dict):
        return rope
    known: Mapping[str, Any] = other if isinstance(other, dict) else {}
    kept = {
        key: _without_defaults(value, known.get(key))
        for key, value in rope.items()
        if key in known or key not in _FILLED_IN
    }
    return {key: value for key, value in kept.items() if value != {}}
