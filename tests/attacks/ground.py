"""What attacks start from: data, recipes, and a run that was trained once and is copied."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import processes
import yaml
from conftest import changed_recipe, tiny_recipe, write_shards, write_tokenizer


def _folder() -> Path:
    """A folder that is there until this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="flipscale-attacks-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def _made() -> Path:
    """A folder with the data and a tokenizer, made once in this process of the tests."""
    folder = _folder()
    write_shards(folder / "data", [30, 17, 1, 48])
    write_tokenizer(folder / "tokenizer")
    return folder


def shards(folder: Path) -> Path:
    """Four shards of 96 good pairs, `classnames.txt` beside them, copied to `folder/data`."""
    return Path(shutil.copytree(_made() / "data", folder / "data"))


def tokenizer() -> Path:
    """The folder of a tokenizer; not to be written to."""
    return _made() / "tokenizer"


def recipe(folder: Path, **changes: Any) -> Path:
    """The file of a recipe of ten steps of 16 pairs on `folder/data`, with checkpoints at steps 4, 8 and 10.

    Args:
        changes: of whole sections' fields: `data={"num_workers": 1}`.
    """
    stages = [
        {"name": "masked", "samples": 96, "mask_ratio": 0.75, "base_lr": 0.012, "warmup_samples": 16},
        {"name": "unmasked", "samples": 64, "base_lr": 0.006},
    ]
    save = {"every_samples": 64, "total_limit": 3}
    shorter = {"stages": stages, "save": save, "output_dir": str(folder / "run")}
    content = changed_recipe({**tiny_recipe(folder / "data", tokenizer()), **shorter}, changes)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def pretrain(folder: Path, **changes: Any) -> list[str]:
    """The command that trains `recipe(folder, **changes)`."""
    return ["pretrain", "--config", str(recipe(folder, **changes))]


@functools.cache
def _trained() -> Path:
    """A folder with the data and a finished run, trained once in this process of the tests."""
    folder = _folder()
    shards(folder)
    ended = processes.run("flipscale.cli", pretrain(folder))
    assert ended.returncode == 0, ended.stderr
    return folder


def run_of(folder: Path, up_to: int | None = None) -> Path:
    """A copy of a trained run with its data, as `folder/run` and `folder/data`; its command is `pretrain(folder)`.

    Args:
        up_to: the run was stopped after the checkpoint of this step, 4 or 8; None if it is done.
    """
    shutil.copytree(_trained() / "data", folder / "data", copy_function=shutil.copy2)
    run = Path(shutil.copytree(_trained() / "run", folder / "run"))
    if up_to is not None:
        (run / "DONE").unlink()
        shutil.rmtree(run / "model")
        for checkpoint in (run / "checkpoints").iterdir():
            if checkpoint.name > f"step-{up_to:08d}":
                shutil.rmtree(checkpoint)
    return run


def trained_model() -> Path:
    """The folder of the trained model; not to be written to."""
    return _trained() / "run/model"


def model(folder: Path) -> Path:
    """A copy of the trained model, as `folder/model`."""
    return Path(shutil.copytree(trained_model(), folder / "model"))
