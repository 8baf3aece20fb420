"""What the cache of an engine really takes, against every place that states it."""

import json
import re

import pytest
from typer.testing import CliRunner

from tests.support.engines import compacted
from tests.support.reference import MODEL
from vllm_attentionpack.cli import app
from vllm_attentionpack.packfile import read_header

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=["eightfold", "largest"])
def pack(request, calibrated):
    return getattr(calibrated, request.param)


@pytest.fixture
def engine(engines, dense, pack):
    return engines.get(MODEL, **compacted(pack))


def test_allocated_bytes_are_the_stated_ones(engine, pack):
    header = read_header(pack)
    cache = engine.cache_config
    inspected = json.loads(CliRunner().invoke(app, ["inspect", str(pack), "--json"]).stdout)
    tokens = cache.num_gpu_blocks * cache.block_size

    assert engine.allocated_bytes == header.bytes_per_token * tokens
    assert engine.allocated_bytes == inspected["bytes_per_token"] * tokens
    # layer by layer: what vLLM declares, what its view spans, what the file says
    (group,) = engine.scheduler.kv_cache_config.kv_cache_groups
    assert set(group.layer_names) == {layer.name for layer in header.layers}
    for layer, shown in zip(header.layers, inspected["layers"], strict=True):
        view = engine.kv_caches[layer.name]
        page = layer.bytes_per_token * cache.block_size
        assert shown["bytes_per_token"] == layer.bytes_per_token
        assert tuple(view.shape) == (
            cache.num_gpu_blocks,
            1,
            cache.block_size,
            layer.bytes_per_token,
        )
        assert engine.declared_page_bytes[layer.name] == page
        assert view.nbytes == page * cache.num_gpu_blocks


def test_capacity_grows_by_the_ratio(engine, dense, pack):
    """Fails when compression is off: the ratio is at least 1.98."""
    header, cache = read_header(pack), engine.cache_config
    ratio = header.compression_ratio
    assert ratio > 1.98

    # Both round down to whole blocks: by less than one block here, by less than one block of the
    # dense cache there, which holds `ratio` times as many tokens when compacted.
    assert abs(cache.kv_cache_size_tokens - ratio * dense.kv_tokens) < ratio * cache.block_size
    # The budget was the same and no more than it was taken.
    assert engine.allocated_bytes <= dense.kv_bytes
    assert dense.kv_bytes == header.dense_bytes_per_token * dense.kv_tokens


def test_start_says_what_fits(engine, pack):
    header, cache = read_header(pack), engine.cache_config
    (line,) = [text for text in engine.messages if "compacted KV cache" in text]

    ratio, dense_bytes, stored, tokens, blocks, block_size = map(float, re.findall(r"[\d.]+", line))
    assert ratio == pytest.approx(header.compression_ratio, abs=0.005)
    assert (dense_bytes, stored) == (header.dense_bytes_per_token, header.bytes_per_token)
    assert tokens == cache.kv_cache_size_tokens
    assert (blocks, block_size) == (cache.num_gpu_blocks, cache.block_size)
