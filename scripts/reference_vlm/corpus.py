"""Text that every Debian machine with Python has: the standard library, documentation, licences."""

import glob
import hashlib
import os
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator

LIMIT_BYTES = 24 << 20
MAX_FILE_BYTES = 200_000
MIN_FILE_BYTES = 600
HELD_OUT = 8  # of 256 buckets of files: training never reads them
EXCERPT_CHARACTERS = 30_000  # of a held-out file, so that items come from many files


def load_corpus() -> str:
    """The training text.  It depends on what the machine has installed."""
    return "\n".join(text for bucket, text in _texts() if bucket >= HELD_OUT)


def frequent_words(text: str, n: int) -> list[str]:
    """The `n` most frequent words of three letters and more, the space before them included.

    Shorter ones stay letters: the keys that recall asks for are two of them.
    """
    counts = Counter(re.findall(r" ?[A-Za-z]{3,}", text))
    return sorted(counts, key=lambda word: (-counts[word], word))[:n]


def held_out_text(part: int, parts: int) -> str:
    """Excerpts of held-out files; different `part`s of 0..parts-1 share no file."""
    found = (text for bucket, text in _texts() if bucket < HELD_OUT and bucket % parts == part)
    return "\n".join(text[:EXCERPT_CHARACTERS] for text in found)


def _texts() -> Iterator[tuple[int, str]]:
    """(bucket, text) of every file within the size limit; the bucket depends on the path only."""
    total = 0
    for path in _files():
        with open(path, "rb") as file:
            raw = file.read(MAX_FILE_BYTES)
        if b"\0" in raw or len(raw) < MIN_FILE_BYTES:
            continue
        text = raw.decode("utf-8", "ignore")
        yield hashlib.md5(path.encode()).digest()[0], text
        total += len(text)
        if total > LIMIT_BYTES:
            break


def _files() -> list[str]:
    """All candidates, in one fixed random order so that the size limit keeps a mix."""
    stdlib = sysconfig.get_paths()["stdlib"]
    found = glob.glob(f"{stdlib}/**/*.py", recursive=True)
    found += glob.glob("/usr/share/common-licenses/*")
    for suffix in ("txt", "md", "rst", "html"):
        found += glob.glob(f"/usr/share/doc/**/*.{suffix}", recursive=True)
    skipped = ("site-packages", "/test/")
    kept = sorted(f for f in found if not any(s in f for s in skipped) and os.path.isfile(f))
    random.Random(0).shuffle(kept)
    return kept
