"""Blocks that a KV connector brings: exact tokens are missing then, and read from codes."""

import pytest

from tests.support.engines import compacted
from tests.support.outputs import agreement
from tests.support.reference import MODEL

pytestmark = pytest.mark.engine

BLOCK = 16


@pytest.mark.parametrize("exact", [{}, {"sinks": 4, "window": 64}], ids=["codes", "exact"])
def test_blocks_from_elsewhere(engines, exact_pack, dense, greedy, tmp_path, exact):
    engine = engines.get(
        MODEL,
        block_size=BLOCK,
        dtype="float32",
        kv_transfer_config={
            "kv_connector": "CompactedBlocks",
            "kv_connector_module_path": "tests.support.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
        },
        **compacted(exact_pack, **exact),
    )
    # Prompts that fit into one step: the example stores no chunks.
    prompts = [question.prompt for question in dense.questions if not question.visual][::4]
    cold = engine.generate(prompts, greedy)
    assert engine.llm.reset_prefix_cache()
    engine.poison_free_blocks()
    brought = engine.generate(prompts, greedy)
    # The example looks for the blocks before the last token but one, and stores those before the
    # last: it misses prompts that have just begun a block.
    lengths = [len(output.prompt_token_ids) for output in brought]
    found = [n for n, length in enumerate(lengths) if length % BLOCK != 1]
    hits = [brought[n].num_cached_tokens for n in found]
    assert hits == [(lengths[n] - 1) // BLOCK * BLOCK for n in found]
    assert sum(hits) > sum(output.num_cached_tokens for output in cold)
    same = agreement(cold, brought)
    # Cached keys are rounded to bfloat16, those that a cold prompt reads of itself are not.
    assert same.agreed == same.tokens > 0
    assert 0 < same.noise <= 0.2
    assert engine.used_blocks == 0
