"""The exact cache in vLLM's terms: its pages, and which tokens of a request have blocks in it.

A request's sinks keep their blocks for its life. Of the others the last `window` have blocks, which
go back to the pool as soon as the window has passed them. Every other place in the block table
holds the null block: attention reads those tokens from their codes. So a prefix-cache hit needs
compacted blocks only, and whatever this cache lacks costs accuracy, never correctness.

Importing this module registers spec and manager with vLLM; unpickling a spec in another process
imports it there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_attentionpack.kv_cache.pages import exact_blocks


@dataclass(frozen=True, kw_only=True)
class ExactWindowSpec(AttentionSpec):
    """The page of one layer's exact cache.

    Attributes:
        sinks: exact tokens at the start of a request.
        window: exact tokens at its end, the newest included.
        margin: tokens that have slots behind the processed ones of a request that decodes,
            rejected drafts included.
    """

    sinks: int
    window: int
    margin: int

    @property
    def prefix_cacheable(self) -> bool:
        return False

    @property
    def max_blocks_per_request(self) -> int:
        return exact_blocks(self.block_size, self.sinks, self.window, self.margin)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        longest = vllm_config.model_config.max_model_len
        blocks = exact_blocks(self.block_size, self.sinks, self.window, self.margin, longest)
        return blocks * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


class ExactWindowManager(SingleTypeKVCacheManager):
    """Hands out blocks for sinks and for the window, null blocks for what lies between."""

    kv_cache_spec: ExactWindowSpec

    def __init__(self, kv_cache_spec: ExactWindowSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._sink_blocks = -(-kv_cache_spec.sinks // self.block_size)
        self._prefill_end: dict[str, int] = {}

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        if apply_admission_cap:  # asked about the whole request: a prompt, or one to be resumed
            self._note_prefill_end(request_id, num_tokens)
        held = len(self.req_to_blocks.get(request_id, ()))
        first = held or -(-total_computed_tokens // self.block_size)
        return sum(self._wanted(request_id, first, num_tokens))

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        blocks = self.req_to_blocks[request_id]
        wanted = self._wanted(request_id, len(blocks), num_tokens)
        fresh = self.block_pool.get_new_blocks(sum(wanted))
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in fresh)
        taken = iter(fresh)
        new = [next(taken) if want else self._null_block for want in wanted]
        blocks.extend(new)
        return new

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        self._skip(request_id, num_local_computed_tokens)

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        self._skip(request_id, num_local_computed_tokens + num_external_computed_tokens)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        if num_prompt_tokens is not None:
            self._note_prefill_end(request_id, num_prompt_tokens)
        # The next query is the token after the processed ones; the window counts it.
        passed = processed_computed_tokens - (self.kv_cache_spec.window - 1)
        self._remove_blocks_in_range(
            request_id, self._sink_blocks, max(passed, 0) // self.block_size
        )

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._prefill_end.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def find_longest_cache_hit(cls, **_: Any) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        raise AssertionError("the exact cache takes no part in prefix caching")

    def _wanted(self, request_id: str, first: int, num_tokens: int) -> list[bool]:
        """Whether the blocks `first`, `first + 1`, ... up to `num_tokens` tokens are held.

        A prompt that comes in chunks gets a window only at its end: what earlier chunks would put
        there, later ones push out again.
        """
        spec = self.kv_cache_spec
        # The first query to come: of the last `margin` tokens some may be rejected, those of a
        # prompt stay, and the last of them may be a step of its own.
        query = max(num_tokens - spec.margin, self._prefill_end.get(request_id, 0) - 1)
        recent = max(query - (spec.window - 1), 0) // self.block_size
        return [
            index < self._sink_blocks or (spec.window > 1 and index >= recent)
            for index in range(first, -(-num_tokens // self.block_size))
        ]

    def _note_prefill_end(self, request_id: str, num_tokens: int) -> None:
        known = self._prefill_end.get(request_id, 0)
        self._prefill_end[request_id] = max(known, num_tokens)

    def _skip(self, request_id: str, num_tokens: int) -> None:
        """Leaves tokens out that were computed before; a block that they share with others too."""
        blocks = self.req_to_blocks[request_id]
        missing = -(-num_tokens // self.block_size) - len(blocks)
        blocks.extend([self._null_block] * missing)


# vLLM fills its registry only while it is empty: its own entries have to come first.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(ExactWindowSpec, ExactWindowManager)
