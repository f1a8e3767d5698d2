"""Facts about a process that may be unknown."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from flipscale.io.surroundings import own_commit, versions
from flipscale.records.run_directory import environment


def git(folder: Path, *arguments: str) -> str:
    own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", "-C", str(folder), *own, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def repository(folder: Path, *ignored: str, name: str = "made") -> Path:
    """Commit a folder with the package `made`, and return the package."""
    package = folder / "made"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (folder / "setup.cfg").write_text(f"[metadata]\nname = {name}\n")
    (folder / ".gitignore").write_text("\n".join(ignored))
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "begin")
    return package


def test_the_commit_is_that_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = repository(tmp_path / "own")
    head = git(package, "rev-parse", "HEAD")
    assert own_commit(package) == head
    # A hook of another repository sets this.
    monkeypatch.setenv("GIT_DIR", str(repository(tmp_path / "other").parent / ".git"))
    assert own_commit(package) == head


def test_a_repository_around_the_package_gives_no_commit(tmp_path: Path) -> None:
    assert own_commit(repository(tmp_path / "ignores", "made")) is None
    assert own_commit(repository(tmp_path / "tracks", name="theirs")) is None
    repository(tmp_path / "around", "lib")
    inner = tmp_path / "around/lib/made"
    inner.mkdir(parents=True)
    (inner / "__init__.py").touch()
    (inner.parent / "setup.cfg").write_text("[metadata]\nname = made\n")
    git(tmp_path / "around", "add", "--force", "lib")
    assert own_commit(inner) is None


def test_a_version_is_that_of_the_imported_module(monkeypatch: pytest.MonkeyPatch) -> None:
    vendored = ModuleType("cv2")
    monkeypatch.setitem(sys.modules, "cv2", vendored)
    assert "cv2" not in environment()
    vendored.__version__ = "4.9.9-vendored"  # type: ignore[attr-defined]
    assert environment()["cv2"] == "4.9.9-vendored"
    assert versions(["a_module_that_nobody_has"]) == {}
