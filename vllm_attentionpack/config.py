"""Serving configuration: what `--additional-config` and the environment may say."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_attentionpack.errors import ConfigError

if TYPE_CHECKING:
    from vllm_attentionpack.packfile import PackHeader

#: The key of `--additional-config` that is ours.
SECTION = "attentionpack"
#: Path of the pack, when the section does not name one.
PACK_VARIABLE = "ATTENTIONPACK_PACK"
#: `1` keeps the plugin from registering anything.
DISABLE_VARIABLE = "ATTENTIONPACK_DISABLE"


class ServeConfig(BaseModel):
    """The `attentionpack` section of vLLM's `--additional-config`.

    Attributes:
        pack: path of the pack file; `~` is the home folder.
        exact_prefill: True (default) lets the fresh tokens of a step attend to each other exactly
            and reads only what was cached before from the codes. False reads everything from the
            codes: slower to become exact, needed to measure the codec by teacher forcing.
        sinks: tokens at the start of a request that stay exact; None takes the pack's advice.
        window: tokens at the end of a request that stay exact, the newest included; None takes the
            pack's advice. With `sinks` and `window` 0 no memory goes to exact tokens.
        ops: the implementation of attention on compacted pages; `auto` takes the fastest that can
            run (`ops.select.IMPLEMENTATIONS`).
        prefill: the library for exact attention among the new tokens of a step: on a GPU
            `flash_attn` (vLLM's), `xformers` or `sdpa` (PyTorch's), on a CPU `dense` (vLLM's own
            op, over a decompressed context, too) or `sdpa`; `auto` takes the first that can run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pack: Path
    exact_prefill: bool = True
    sinks: int | None = Field(default=None, ge=0)
    window: int | None = Field(default=None, ge=0)
    ops: str = "auto"
    prefill: str = "auto"

    def exact_tokens(self, header: "PackHeader") -> tuple[int, int]:
        """`sinks` and `window` in force with a pack that has `header`."""
        sinks = header.sinks if self.sinks is None else self.sinks
        window = header.window if self.window is None else self.window
        return sinks, window

    def keeps_exact(self, header: "PackHeader") -> bool:
        """Whether any cached token stays exact: a window of 1 is the query's own token."""
        sinks, window = self.exact_tokens(header)
        return sinks > 0 or window > 1

    @field_validator("pack")
    @classmethod
    def _expand(cls, pack: Path) -> Path:
        return pack.expanduser()


def serve_config(
    additional_config: Any, environment: Mapping[str, str] = os.environ
) -> ServeConfig:
    """Merges `--additional-config` with the environment; the flag wins.

    Raises:
        ConfigError: no pack, unknown keys, wrong types.
    """
    section = additional_config.get(SECTION, {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"additional-config '{SECTION}' is {section!r}; expected an object such as "
            '{"attentionpack": {"pack": "model.pack.safetensors"}}.'
        )
    values = dict(section)
    if "pack" not in values and environment.get(PACK_VARIABLE):
        values["pack"] = environment[PACK_VARIABLE]
    if "pack" not in values:
        raise ConfigError(
            "the attention backend ATTENTIONPACK needs a pack and none is configured. Pass "
            '--additional-config \'{"attentionpack": {"pack": "model.pack.safetensors"}}\' or set '
            f"{PACK_VARIABLE}; make a pack with 'attentionpack calibrate'."
        )
    try:
        return ServeConfig.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"'{'.'.join(map(str, e['loc']))}' = {e['input']!r}: {e['msg']}" for e in error.errors()
        )
        raise ConfigError(
            f"additional-config '{SECTION}' cannot be used: {problems}. "
            f"Allowed keys: {', '.join(ServeConfig.model_fields)}."
        ) from error
