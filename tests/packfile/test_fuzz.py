"""Whatever happens to a file, `load_pack` refuses it or returns the same pack."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.packfiles import (
    HEADER,
    PACK,
    assert_equal,
    rewrite,
)
from vllm_attentionpack.errors import PackFileError
from vllm_attentionpack.packfile import load_pack, read_header, save_pack

#: A busy disk is no failure.
patient = settings(deadline=None)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> tuple[Path, bytes]:
    """A file to overwrite, and its sound bytes."""
    file = tmp_path_factory.mktemp("fuzz") / "p"
    save_pack(PACK, file)
    return file, file.read_bytes()


def refused_or_equal(file: Path) -> None:
    try:
        found = load_pack(file)
    except PackFileError as error:
        assert str(file) in str(error)
    else:
        assert_equal(found, PACK)


#: Bytes in front of the tensors: where a flipped byte can do anything but spoil a number.
HEADER_BYTES = 4800
flips = st.lists(
    st.tuples(
        st.one_of(st.integers(0, HEADER_BYTES), st.integers(0, 1 << 16)), st.integers(1, 255)
    ),
    min_size=1,
    max_size=4,
)


@patient
@given(flips)
@example([(0, 1)])  # a header length that is off by one
@example([(7, 128)])  # ... and by 2**63
def test_flipped_bytes(sound, changes):
    file, original = sound
    assert int.from_bytes(original[:8], "little") > HEADER_BYTES
    data = bytearray(original)
    for position, mask in changes:
        data[position % len(data)] ^= mask
    file.write_bytes(data)
    refused_or_equal(file)


@patient
@given(
    st.integers(0, 1 << 16),
    st.integers(0, 1 << 16),
    st.one_of(st.binary(max_size=40), st.sampled_from([b"{}", b"[", b'"', b"\\ud800", b"NaN"])),
)
def test_replaced_stretches(sound, start, length, filling):
    file, original = sound
    start %= len(original)
    file.write_bytes(original[:start] + filling + original[start + length % 200 :])
    refused_or_equal(file)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, child in inner:
        found.append((*here, key))
        if isinstance(child, dict | list):
            found += places(child, (*here, key))
    return found


HEADER_JSON = PACK.header.model_dump(mode="json")


@patient
@given(st.sampled_from(places(HEADER_JSON)), json_values)
@example(("provenance", "model"), "\ud800")
@example(("layers", 0, "groups", 0, "key", "n8"), 4 * 10**30)
@example(("fingerprint", "head_size"), 10**30)
@example(("layers", 0, "bytes_per_token"), 28.0)
def test_any_value_anywhere_in_the_header(sound, place, value):
    """`load_pack` refuses, and what `read_header` lets pass can be used."""
    file, original = sound
    header = json.loads(json.dumps(HEADER_JSON))
    parent = header
    for key in place[:-1]:
        parent = parent[key]
    unchanged = parent[place[-1]] == value and type(parent[place[-1]]) is type(value)
    parent[place[-1]] = value
    file.write_bytes(original)
    rewrite(file, metadata=lambda m: m.update({HEADER: json.dumps(header)}))
    try:
        found = read_header(file)
    except PackFileError as error:
        assert str(file) in str(error)
    else:
        assert (found == PACK.header) == unchanged
        assert math.isfinite(found.compression_ratio)
        assert found.bytes_per_token > 0
    # other white space alone breaks the checksum
    with pytest.raises(PackFileError):
        load_pack(file)
