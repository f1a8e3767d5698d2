"""The structure of the package: who may import whom, no import cycles, and what `--help` may import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flipscale

ROOT = Path(flipscale.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A row may import the rows below it; rooms of one row do not know each other. Modules beside the rooms are the verbs.
ORDER = (
    ("cli",),
    ("verbs",),
    ("studies",),
    ("hub", "pages", "planning"),
    ("training",),
    ("objectives", "evaluation", "preparation"),
    ("data", "engines"),
    ("model", "io"),
)
ROW_OF = {room: row for row, rooms in enumerate(ORDER) for room in rooms}


def name_of(file: Path) -> str:
    return ".".join(("flipscale", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def room(module: str) -> str:
    """The room of a module such as flipscale.data.order; `verbs` for the modules beside the rooms."""
    first = module.split(".")[1] if "." in module else "flipscale"
    return first if first in ROW_OF else "verbs"


def imported(file: Path) -> set[str]:
    """Absolute names of the modules that a file imports, anywhere in it; relative ones begin with dots."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names.add(base)
            names |= {f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in MODULES}
    return names


MODULES = {name_of(file): file for file in FILES}


def imported_here(file: Path) -> set[str]:
    """The modules of this package that a file imports, relative imports resolved."""
    package = name_of(file) if file.name == "__init__.py" else name_of(file).rpartition(".")[0]
    found = set()
    for name in imported(file):
        level = len(name) - len(name.lstrip("."))
        base = package.split(".")[: len(package.split(".")) - (level - 1)] if level else []
        absolute = ".".join([*base, *filter(None, [name.lstrip(".")])])
        if absolute in MODULES:
            found.add(absolute)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file: Path) -> None:
    mine = name_of(file)
    for target in imported_here(file) - {"flipscale"}:
        if room(target) == room(mine) != "verbs":
            continue
        assert ROW_OF[room(target)] > ROW_OF[room(mine)], f"{mine} imports {target}; see ORDER"
    if room(mine) == "model":
        foreign = {name.split(".")[0] for name in imported(file) if not name.startswith(".")}
        allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
        assert foreign <= allowed, f"{mine} travels with the weights and imports {foreign - allowed}"


def test_no_module_imports_itself_by_a_detour() -> None:
    imports = {name: imported_here(file) - {name} for name, file in MODULES.items() if file.name != "__init__.py"}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "circle: " + " > ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in imports.get(name, ()):
                visit(target, (*path, name))
            done.add(name)

    for name in imports:
        visit(name, ())


def test_every_room_is_in_the_order() -> None:
    rooms = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    assert rooms == ROW_OF.keys() - {"cli", "verbs"}


# Each takes seconds to import, and a mistake in a recipe is told without them.
HEAVY = (
    "accelerate",
    "transformers.modeling_utils",
    "transformers.models.auto",
    "torch.distributed.tensor",
    "torch._dynamo",
    "deepspeed",
    "sympy",
    "scipy",
    "torchvision",
    "datasets",
    "matplotlib",
    "tensorboard",
)


def test_the_trainer_is_imported_without_what_only_training_needs() -> None:
    code = f"import sys, flipscale.pretrain\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_no_module_is_a_drawer() -> None:
    assert not {file.stem for file in FILES} & {"utils", "common", "helpers", "misc"}


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, flipscale.cli\ntry: flipscale.cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pretrain" in done.stdout


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_text_is_utf_8_whatever_the_locale(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(word.arg in ("encoding", None) for word in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        is_atomic = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "atomic"
        if name == "open" and isinstance(node.func, ast.Name):
            mode = [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "mode")]
            names_none = not mode or (isinstance(mode[0], ast.Constant) and "b" not in str(mode[0].value))
        else:
            given = len(node.args) + is_atomic
            names_none = (name, given) in (("read_text", 0), ("write_text", 1))
        assert not names_none, f"line {node.lineno}: {name} without an encoding takes the locale's"
