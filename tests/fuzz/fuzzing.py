"""One target of the fuzzer: what it is given, and the limits within which libFuzzer runs it.

A target is a module of this folder with two functions:

* `seeds() -> list[bytes]`: good inputs, of which libFuzzer makes bad ones.
* `attack(data: bytes, folder: Path) -> None`: gives `data` to flipscale's own code. It catches the errors that the
  command line turns into one sentence; whatever else it raises is a finding, as is taking too long or too much memory.
  The folder is empty.
"""

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).parent
TARGETS = sorted(file.stem for file in HERE.glob("*.py") if file.stem not in ("fuzzing", "test_fuzz", "__main__"))
# Of one input; beside other work everything takes longer.
SECONDS, MEGABYTES = 20, 3000


def run(target: str, options: Sequence[str], findings: Path) -> NoReturn:
    """Run libFuzzer on a target in this process, which it ends: with 0, or with another code after a finding.

    Args:
        options: of libFuzzer, such as `-seed=1`.
        findings: the folder that gets an input that was too much.
    """
    import atheris

    folder, corpus = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    # Python code that is imported here tells libFuzzer which of its branches an input took. Some is imported by the
    # first input only, which is not a part of that input's time.
    with atheris.instrument_imports(include=["flipscale", "fuzz"], enable_loader_override=False):
        module = importlib.import_module(f"fuzz.{target}")
        seeds = module.seeds()
        module.attack(seeds[0], folder)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    limits = [f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", "-print_final_stats=1"]
    # All seeds are of use, however few branches of Python tell them apart, and inputs may be long from the start.
    limits += ["-keep_seed=1", "-len_control=0"]
    findings.mkdir(parents=True, exist_ok=True)

    def one(data: bytes) -> None:
        _empty(folder)
        module.attack(data, folder)

    atheris.instrument_func(one)
    atheris.Setup([target, *limits, *options, f"-artifact_prefix={findings}/{target}-", str(corpus)], one)
    atheris.Fuzz()
    sys.exit("libFuzzer came back")


def again(target: str, file: Path) -> None:
    """Give one input to a target, such as a finding, with its traceback."""
    module: Any = importlib.import_module(f"fuzz.{target}")
    with tempfile.TemporaryDirectory() as folder:
        module.attack(file.read_bytes(), Path(folder))


def _empty(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
