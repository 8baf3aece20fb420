"""A patched vLLM beside the installed one: a tree of links with the patched files in place."""

from pathlib import Path

import apply_patches
from apply_patches import Patch

PATCHES = {file.stem: file for file in sorted(apply_patches.PATCHES.glob("vllm-0.32/*.patch"))}


def patched_vllm(root: Path, names: list[str]) -> Path:
    """Builds in `root` a directory for PYTHONPATH whose vLLM has the patches `names` applied."""
    for name in names:
        original = Patch.for_installed(PATCHES[name])
        for target in apply_patches.targets(PATCHES[name]):
            _own_copy(original.root, root, Path(target))
        patch = Patch(PATCHES[name], root)
        if not patch.is_applied():
            patch.apply()
    return root


def _own_copy(source: Path, root: Path, target: Path) -> None:
    """Makes `root/target` a copy, every directory above it real, everything beside it links."""
    for directory in reversed(target.parents[:-1]):
        here = root / directory
        if here.is_symlink():
            here.unlink()
        here.mkdir(parents=True, exist_ok=True)
        for entry in (source / directory).iterdir():
            if not (here / entry.name).exists() and entry.name != "__pycache__":
                (here / entry.name).symlink_to(entry)
    own = root / target
    if own.is_symlink():
        own.unlink()
        own.write_bytes((source / target).read_bytes())
