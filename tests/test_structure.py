"""Who may import whom: verbs -> benchmarks evaluation hub planning -> training data -> model."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flipscale

ROOT = Path(flipscale.__file__).parent
LEVELS = {"model": 0, "training": 1, "data": 1, "benchmarks": 2, "evaluation": 2, "hub": 2, "planning": 2}
FILES = sorted(ROOT.rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Absolute names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def level(parts: tuple[str, ...]) -> int:
    return LEVELS.get(parts[0], 3)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_to_the_right(file: Path) -> None:
    parts = file.relative_to(ROOT).with_suffix("").parts
    for name in imported(file):
        if name.startswith("flipscale."):
            target = tuple(name.split(".")[1:])
            assert level(target) <= level(parts), f"{'/'.join(parts)} imports {name}"
    if parts[0] == "model":
        foreign = {n.split(".")[0] for n in imported(file) if not n.startswith(".")}
        allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
        assert foreign <= allowed, f"{'/'.join(parts)} travels with the weights and imports {foreign - allowed}"


def test_no_module_is_a_drawer() -> None:
    assert not {file.stem for file in FILES} & {"utils", "common", "helpers", "misc"}


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, flipscale.cli\ntry: flipscale.cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pretrain" in done.stdout
