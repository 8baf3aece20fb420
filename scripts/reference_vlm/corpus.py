"""Text that every Debian machine with Python has: the standard library, documentation, licences."""

import glob
import hashlib
import os
import random
import sysconfig

LIMIT_BYTES = 24 << 20
MAX_FILE_BYTES = 200_000
MIN_FILE_BYTES = 600
HELD_OUT = 8 / 256  # share of files that training never reads


def load_corpus() -> str:
    """The training text.  It depends on what the machine has installed."""
    texts, total = [], 0
    for path in _files():
        with open(path, "rb") as file:
            raw = file.read(MAX_FILE_BYTES)
        if b"\0" in raw or len(raw) < MIN_FILE_BYTES:
            continue
        text = raw.decode("utf-8", "ignore")
        if hashlib.md5(path.encode()).digest()[0] >= HELD_OUT * 256:
            texts.append(text)
        total += len(text)
        if total > LIMIT_BYTES:
            break
    return "\n".join(texts)


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
