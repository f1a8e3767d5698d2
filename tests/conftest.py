"""A made-up data set of coloured pictures, a tokenizer for its captions, and a recipe that trains in a second."""

import functools
import gc
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# Threads of small operations wait for each other in loops, ten times as long beside other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import cv2
import numpy as np
import processes
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Files that take long come first, so that the processes of pytest-xdist, which take whole files, end together.
LONG_FILES = ("slurm", "distributed", "planning", "loop", "start", "objectives", "model", "hub")


def pytest_configure(config: pytest.Config) -> None:
    """Choose whether long tests run, and forget the cluster job in which the tests may run.

    A command that names tests runs the long ones among them. The processes of pytest-xdist inherit the choice.
    """
    names_tests = config.args_source is config.ArgsSource.ARGS
    os.environ.setdefault("FLIPSCALE_LONG", "all" if names_tests else "none")
    for name in list(os.environ):
        if name.startswith(("SLURM_", "ACCELERATE_", "TORCHELASTIC_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]
    # Under nohup, or in the background of a script, child processes would ignore these signals.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long tests unless FLIPSCALE_LONG says otherwise, and put the files that take long first."""
    long = [item for item in items if item.get_closest_marker("long")]
    if os.environ["FLIPSCALE_LONG"] != "all" and long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in set(long)]
    tests = Path(__file__).parent
    places = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.relative_to(tests).parts[0], len(places)))


@pytest.fixture(autouse=True)
def no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test must not depend on the counters of this machine."""
    monkeypatch.setattr("flipscale.records.energy_meter.POWERCAP", Path("/nowhere"))


@pytest.fixture
def real_figures() -> None:
    """Requested by tests that look at figures."""


@pytest.fixture(autouse=True)
def quick_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write one pixel in place of each figure, because drawing takes a quarter of a short run."""
    if "real_figures" not in request.fixturenames:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", processes.save_pixel)


@pytest.fixture(scope="session", autouse=True)
def quick_parser() -> None:
    """Build the parser of recipes once, because that takes half of the time of each parse."""
    from flipscale.recipe import recipe

    recipe.build_parser = functools.cache(recipe.build_parser)


# Longest time for the end of a thread.
ENDING_SECONDS = 20.0
# Logger before any command in this process configures it.
LOGGER = logging.getLogger("flipscale")
LOGS = {name: getattr(LOGGER, name) for name in ("handlers", "level", "propagate")}


@pytest.fixture(scope="session", autouse=True)
def exception_hooks() -> tuple[Callable, Callable]:
    """pytest's hooks, which report failures in threads."""
    return threading.excepthook, sys.unraisablehook


@pytest.fixture(autouse=True)
def nothing_outlives(exception_hooks: tuple[Callable, Callable]) -> Iterator[None]:
    """Hide the leftovers of other tests: a configured logger, exception hooks, and threads."""
    vars(LOGGER).update(LOGS)
    LOGGER.setLevel(LOGGER.level)  # clears the levels that its child loggers have cached
    threads = set(threading.enumerate())
    yield
    threading.excepthook, sys.unraisablehook = exception_hooks
    left = [thread for thread in set(threading.enumerate()) - threads if _is_ours(thread)]
    if left:
        gc.collect()  # because some end with the object that started them
    deadline = time.monotonic() + ENDING_SECONDS
    for thread in left:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), f"the thread {thread.name!r} lives on after the test that began it"


def _is_ours(thread: threading.Thread) -> bool:
    """Return whether a thread runs a function of flipscale."""
    return str(getattr(getattr(thread, "_target", None), "__module__", "")).startswith("flipscale.")


COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 210), "grey": (128, 128, 128)}
SHAPES = ("disc", "bar", "ring", "cross")


def draw(colour: str, shape: str, rng: np.random.Generator) -> np.ndarray:
    """Return a picture of `shape` in `colour` on a noisy ground, uint8 RGB of a random size."""
    height, width = (int(n) for n in rng.integers(36, 60, 2))
    image = rng.integers(200, 256, (height, width, 3)).astype(np.uint8)
    centre, radius, ink = (width // 2, height // 2), int(rng.integers(9, 15)), COLOURS[colour]
    if shape in ("disc", "ring"):
        cv2.circle(image, centre, radius, ink, -1 if shape == "disc" else 4)
    if shape in ("bar", "cross"):
        cv2.line(image, (centre[0] - radius, centre[1]), (centre[0] + radius, centre[1]), ink, 5)
    if shape == "cross":
        cv2.line(image, (centre[0], centre[1] - radius), (centre[0], centre[1] + radius), ink, 5)
    return image


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a file to a shard."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tar(path: Path, samples: Iterable[dict[str, bytes]]) -> None:
    """Write a shard of samples, each the content of its files by their endings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, files in enumerate(samples):
            for ending, content in files.items():
                add_member(tar, f"{number:03}.{ending}", content)


def write_shards(folder: Path, sizes: list[int], seed: int = 0) -> None:
    """Write shards of JPEG and PNG pictures with captions and class numbers, and the class names next to them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for _ in range(size):
                label = int(rng.integers(len(names)))
                image = cv2.cvtColor(draw(*names[label].split(), rng), cv2.COLOR_RGB2BGR)
                extension = ("jpg", "png")[number % 2]
                add_member(tar, f"{number:06d}.{extension}", cv2.imencode(f".{extension}", image)[1].tobytes())
                add_member(tar, f"{number:06d}.txt", f"a {names[label]}".encode())
                add_member(tar, f"{number:06d}.cls", str(label).encode())
                number += 1
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}\n")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 pairs in four unequal shards."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [30, 17, 1, 48])
    return folder


def write_tokenizer(folder: Path, **special: str) -> Path:
    """Write a word-level fast tokenizer of at most eight tokens, with further `special` tokens by role."""
    words = ["<pad>", "<unk>", "a", "the", *COLOURS, *SHAPES, *special.values()]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", model_max_length=8,
        model_input_names=["input_ids", "attention_mask"], **special,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer for the captions of `write_shards`."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def caption_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that tokenizer with tokens for the beginning and the end of a caption, 12 and 13."""
    return write_tokenizer(tmp_path_factory.mktemp("caption_tokenizer"), bos_token="<s>", eos_token="</s>")


TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
# Of pictures of 4 x 4 patches and captions of 8 of the tokenizer's tokens. `changed_recipe` replaces fields.
TOWERS = {
    "vision_config": {**TOWER, "image_size": 32, "patch_size": 8},
    "text_config": {**TOWER, "vocab_size": 16, "max_position_embeddings": 8},
}


def tiny_recipe(shards: Path, tokenizer_dir: Path) -> dict:
    """Return a recipe of 40 steps of 16 pairs, 24 at mask 0.75 and 16 unmasked, on two small towers."""
    return {
        "model": {"size": "b16", **TOWERS},
        "data": {
            "shards": str(shards),
            "tokenizer": str(tokenizer_dir),
            "global_batch_size": 16,
            "num_workers": 0,
            "shards_per_block": 2,
        },
        "stages": [
            {"name": "masked", "samples": 384, "mask_ratio": 0.75, "base_lr": 0.012, "warmup_samples": 64},
            {"name": "unmasked", "samples": 256, "base_lr": 0.006},
        ],
        "log": {"every_samples": 16, "report_to": []},
    }


@pytest.fixture(scope="session")
def recipe(shards: Path, tokenizer_dir: Path) -> dict:
    """The tiny recipe on the made-up data set."""
    return tiny_recipe(shards, tokenizer_dir)


def changed_recipe(recipe: dict, changes: dict) -> dict:
    """Return a recipe with replaced fields of its sections."""
    changed = dict(recipe)
    for section, fields in changes.items():
        changed[section] = {**changed.get(section, {}), **fields} if isinstance(fields, dict) else fields
    return changed


@pytest.fixture
def write_recipe(recipe: dict, tmp_path: Path) -> Callable[..., Path]:
    """Writes the recipe with replaced fields and this run directory; returns the file."""

    def write(output_dir: Path, **changes: object) -> Path:
        file = tmp_path / f"{output_dir.name}.yaml"
        file.write_text(yaml.safe_dump(changed_recipe({**recipe, "output_dir": str(output_dir)}, changes)))
        return file

    return write


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with exit code 2; returns its error, the last line and the only one of its kind."""

    def run(*words: object) -> str:
        from flipscale.cli import main

        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        *others, error = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 2
        assert error.startswith("flipscale: error: ")
        assert not any(line.startswith("flipscale: error: ") for line in others)
        return error

    return run


@pytest.fixture(scope="session")
def trained_run(recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four masked steps, which tests read only: its `model/` can be exported or fine-tuned."""
    folder = tmp_path_factory.mktemp("trained")
    stages = [{"name": "masked", "samples": 64, "mask_ratio": 0.5, "base_lr": 0.01}]
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**recipe, "stages": stages, "output_dir": str(folder / "run")}))
    trained(file)
    return folder / "run"


def launch(command: list[str], cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Run a command to its end, with one thread per process and captured output."""
    everything = {**os.environ, **processes.QUIET, **environment}
    return subprocess.run(command, cwd=cwd, env=everything, capture_output=True, text=True, timeout=300)


def check_start(recipe: Any) -> None:
    """Check a recipe, its test sets and its data, as a start of its run does."""
    from flipscale.checks.start import check_recipe
    from flipscale.engines.launch import launch_of
    from flipscale.start.evaluations import check_tasks
    from flipscale.start.setup import open_setup

    check_recipe(recipe, launch_of(os.environ))
    check_tasks(recipe)
    open_setup(recipe)


def pretrain(recipe_file: Path, world: int = 1, *flags: str) -> subprocess.CompletedProcess:
    """Run `python -m flipscale.pretrain` in `world` processes as under torchrun, and return its end."""
    return processes.run("flipscale.pretrain", ["--config", str(recipe_file), *flags], world)


def trained(recipe_file: Path, world: int = 1) -> subprocess.CompletedProcess:
    """Run it to its end, without an error."""
    done = pretrain(recipe_file, world)
    assert done.returncode == 0, done.stderr
    return done


def flipscale(*arguments: str | Path) -> subprocess.CompletedProcess:
    """Run `flipscale ARGUMENTS` in its own process, and return its end."""
    return processes.run("flipscale.cli", [str(argument) for argument in arguments])


def metrics(run_dir: Path) -> list[dict]:
    """Return the records of a run."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    """Return the loss of each record of a run's steps."""
    return [record["loss"] for record in metrics(run_dir) if "loss" in record]


@pytest.fixture
def assert_evaluated_alike(shards: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], None]:
    """Checks that `flipscale evaluate` finds what a run with a task `zero_shot` found at its end."""

    def check(run_dir: Path) -> None:
        from flipscale.cli import main

        capsys.readouterr()
        main(["evaluate", str(run_dir), "--zero_shot", str(shards), "--json"])
        found = json.loads(capsys.readouterr().out)["zero_shot/top1"]
        assert found == [record["zero_shot/top1"] for record in metrics(run_dir) if "zero_shot/top1" in record][-1]

    return check


def cut(run_dir: Path, copy: Path, step: int) -> None:
    """Copy a finished run as of the checkpoint of `step`, with the metrics of later steps."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "model")
    (copy / "DONE").unlink()
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name > f"step-{step:08d}":
            shutil.rmtree(checkpoint)


@pytest.fixture(scope="module")
def crowds():
    """Processes that train together, by their number, for all tests of a file."""
    from distributed.crowd import Crowds  # takes seconds to import

    started = Crowds()
    yield started
    started.end()
