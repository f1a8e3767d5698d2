"""transformers' common tests, downloaded once with its source distribution because its wheel lacks them."""

import importlib
import subprocess
import sys
import tarfile
import tempfile
import types
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

CACHE = Path.home() / ".cache" / "flipscale"
PACKAGE = "transformers_common_tests"

# Modules that the source distribution lacks too: export and generation tests, and a table of configuration fields.
STAND_INS = {
    "exporters.test_export": "class ExportTesterMixin: ...\nclass ExportGenerateTesterMixin(ExportTesterMixin): ...",
    "generation.test_utils": "class GenerationTesterMixin: ...",
    "utils.test_configuration_utils": "config_common_kwargs = {'output_hidden_states': True, 'dtype': 'float16'}",
}


def fetch(requirement: str) -> Path:
    """Return the `tests` folder of a source distribution `NAME==VERSION`, downloaded if it is not there yet."""
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE / requirement.replace("==", "-")
    with FileLock(f"{folder}.lock"), tempfile.TemporaryDirectory(dir=CACHE) as partial:
        if not folder.is_dir():
            name = requirement.split("==")[0]
            # pip builds nothing.
            command = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name, requirement]
            subprocess.run([sys.executable, *command, "--dest", partial], check=True)
            (archive,) = Path(partial).glob("*.tar.gz")
            with tarfile.open(archive) as tar:
                members = [member for member in tar.getmembers() if member.name.startswith(f"{folder.name}/tests/")]
                tar.extractall(partial, members, filter="data")
            # The tests import their own package, whose first file is missing too.
            (Path(partial) / folder.name / "tests" / "__init__.py").touch()
            (Path(partial) / folder.name).rename(folder)
    return folder / "tests"


def load() -> tuple[types.ModuleType, types.ModuleType]:
    """Return `test_modeling_common` and `test_configuration_common` of the installed version of transformers."""
    folder = fetch(f"transformers=={version('transformers')}")
    sys.modules[PACKAGE] = package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    for name, source in STAND_INS.items():
        if not (folder / f"{name.replace('.', '/')}.py").exists():
            sys.modules[f"{PACKAGE}.{name}"] = module = types.ModuleType(f"{PACKAGE}.{name}")
            exec(source, vars(module))
    # The generation tests import these by their name in transformers' repository.
    sys.modules["tests.exporters.test_export"] = importlib.import_module(f"{PACKAGE}.exporters.test_export")
    return (
        importlib.import_module(f"{PACKAGE}.test_modeling_common"),
        importlib.import_module(f"{PACKAGE}.test_configuration_common"),
    )


def generation_mixin() -> type:
    """Return `GenerationTesterMixin`; it is empty unless `tests/generation/test_utils.py` is in `fetch`'s folder."""
    return importlib.import_module(f"{PACKAGE}.generation.test_utils").GenerationTesterMixin
