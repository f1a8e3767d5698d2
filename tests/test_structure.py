"""The structure of the package: who may import whom, no circles, and the imports of `--help`."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flipscale

ROOT = Path(flipscale.__file__).parent
# The modules of the package by name.
MODULES = {
    ".".join(("flipscale", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(ROOT.rglob("*.py"))
}
# A row imports the rows below it; folders of one row do not know each other.
ORDER = (
    ("api",),
    ("cli",),
    ("pretrain",),
    ("studies", "checks"),
    ("hub", "pages", "planning"),
    ("start", "preparation"),
    ("evaluation", "loop"),
    ("records",),
    ("objectives",),
    ("data", "engines"),
    ("process", "recipe"),
    ("model", "io"),
)
ROW_OF = {folder: row for row, folders in enumerate(ORDER) for folder in folders}
# Scripts beside the package.
BESIDE = [file for folder in ("examples", "benchmarks") for file in sorted((ROOT.parent / folder).rglob("*.py"))]
# Packages that take seconds to import. A mistake in a recipe is printed without them.
HEAVY = (
    *("accelerate", "datasets", "deepspeed", "matplotlib", "scipy", "sympy", "tensorboard", "torchvision"),
    *("torch._dynamo", "torch.distributed.tensor", "transformers.modeling_utils", "transformers.models.auto"),
)

# Of them and others, the ones that no first step needs: transformers and accelerate import the rest themselves.
UNNEEDED = {
    *("datasets", "deepspeed", "fsspec", "matplotlib", "onnx", "open_clip", "pandas", "peft", "pyarrow", "sklearn"),
    *("tensorboard", "timm", "torch._inductor.compile_fx", "torch.utils.tensorboard", "transformers.pipelines"),
    *("flipscale.hub.export", "flipscale.pages.run_page", "flipscale.planning.dry_run", "flipscale.preparation.lists"),
}


def folder_of(module: str) -> str:
    """Return the folder of a module such as flipscale.data.order."""
    return module.split(".")[1] if "." in module else "cli"


def imports(file: Path, package: str = "") -> set[str]:
    """Return the names of the modules that a file imports, anywhere in it. Relative imports start at `package`."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            names |= {base, *(name for alias in node.names if (name := f"{base}.{alias.name}") in MODULES)}
    return names


def names_in_text(code: str) -> set[str]:
    """Return the modules of the package that code names as text, but for commands, where a flag is beside the name."""
    nodes = list(ast.walk(ast.parse(code)))
    texts = [node for node in nodes if isinstance(node, ast.Constant) and node.value in MODULES.keys() - {"flipscale"}]
    lists = [node.elts for node in nodes if isinstance(node, ast.List | ast.Tuple)]
    flags = [{at for at, one in enumerate(words) if str(getattr(one, "value", "")).startswith("-")} for words in lists]
    commands = [
        one for words, at in zip(lists, flags, strict=True) for i, one in enumerate(words) if {i - 1, i + 1} & at
    ]
    return {str(node.value) for node in texts if node not in commands}


def imports_of(module: str) -> set[str]:
    """Return the modules that a module of the package imports, or names as text for an import at run time."""
    file = MODULES[module]
    named = set() if folder_of(module) == "cli" else names_in_text(file.read_text(encoding="utf-8")) - {module}
    return named | imports(file, module if file.name == "__init__.py" else module.rpartition(".")[0])


def test_a_module_named_as_text_is_an_import() -> None:
    assert names_in_text("preload(['flipscale.pretrain', 'flipscale.io'])") == {"flipscale.pretrain", "flipscale.io"}
    assert not names_in_text(
        "run([python, '-m', 'flipscale.cli', verb], [*launcher, 'flipscale.pretrain', '--config'])"
    )


@pytest.mark.parametrize("module", MODULES)
def test_the_state_of_the_process_is_changed_in_one_module(module: str) -> None:
    code = MODULES[module].read_text(encoding="utf-8")
    if module != "flipscale.process.state":
        assert "gc" not in imports_of(module)
        assert not re.search(r"os\.environ(\[\S+\] = |\.(pop|setdefault|update|clear)\b)|del os\.environ", code)
        assert not re.search(r"sys\.std(out|err) = ", code)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    mine = folder_of(module)
    for target in imports_of(module) & MODULES.keys() - {"flipscale", "flipscale.cli"}:
        if folder_of(target) != mine or mine == "cli":  # verbs do not know each other
            assert ROW_OF[folder_of(target)] > ROW_OF[mine], f"{module} imports {target}; see ORDER"


def test_the_loop_reaches_no_hub_pages_planning_or_evaluation() -> None:
    todo, reached = ["flipscale.loop.loop"], set[str]()
    while todo:
        if (module := todo.pop()) not in reached:
            reached.add(module)
            todo += imports_of(module) & MODULES.keys() - {"flipscale"}
    rooms = {folder_of(module) for module in reached}
    assert rooms <= {"data", "engines", "io", "loop", "model", "objectives", "process", "recipe", "records"}
    assert {"flipscale.records.tracking", "flipscale.engines.checkpoint"} <= reached


def test_the_model_imports_what_a_stranger_has() -> None:
    for module in MODULES:
        if folder_of(module) == "model":
            foreign = {name.split(".")[0] for name in imports_of(module) if not name.startswith("flipscale.model")}
            allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
            assert foreign <= allowed, f"{module} travels with the weights and imports {foreign - allowed}"


def test_no_module_imports_itself_by_a_detour() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "circle: " + " > ".join([*path[path.index(module) :], module])
        if module not in done and MODULES[module].name != "__init__.py":
            for target in imports_of(module) & MODULES.keys() - {module}:
                visit(target, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_every_folder_is_in_the_order() -> None:
    assert {file.parent.name for file in ROOT.glob("*/__init__.py")} == ROW_OF.keys() - {"api", "pretrain"}


@pytest.mark.parametrize("file", BESIDE, ids=lambda file: str(file.relative_to(ROOT.parent)))
def test_scripts_beside_the_package_import_no_tests(file: Path) -> None:
    mine = file.relative_to(ROOT.parent).parts[0]
    others = {"examples", "benchmarks", "tests", "attacks", "cli", "conftest", "distributed", "processes", "simulated"}
    assert not {name.split(".")[0] for name in imports(file)} & (others - {mine})


def test_the_package_imports_nothing_beside_it() -> None:
    for module in MODULES:
        assert not {name.split(".")[0] for name in imports_of(module)} & {"examples", "benchmarks", "tests"}, module


def test_the_trainer_is_imported_without_heavy_packages() -> None:
    code = f"import sys, flipscale.pretrain\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# Prints the modules of a start at the end of its first step, and how often the collector has gone through all objects.
FIRST_STEP = """
import gc, os, runpy, sys
def look(event, arguments):
    if event == "open" and str(arguments[0]).endswith("/metrics.jsonl") and "a" in str(arguments[1]):
        os.write(1, " ".join([str(gc.get_stats()[2]["collections"]), *sys.modules]).encode())
        os._exit(0)
sys.addaudithook(look)
runpy.run_module("flipscale.pretrain", run_name="__main__", alter_sys=True)
"""


def test_a_start_imports_nothing_that_its_first_step_does_not_need(write_recipe, tmp_path: Path) -> None:
    arguments = ["--config", str(write_recipe(tmp_path / "run"))]
    done = subprocess.run([sys.executable, "-c", FIRST_STEP, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    collections, *modules = done.stdout.split()
    assert int(collections) == 1
    assert not UNNEEDED & set(modules)


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, flipscale.cli, flipscale.recipe.recipe\n"
    code += "try: flipscale.cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pretrain" in done.stdout
