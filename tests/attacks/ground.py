"""Data, recipes and one trained run, which attacks copy and damage."""

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
    """Return a folder that is removed at the end of this process."""
    folder = tempfile.TemporaryDirectory(prefix="flipscale-attacks-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def _made() -> Path:
    """Return a folder with the data and a tokenizer, written once in this process."""
    folder = _folder()
    write_shards(folder / "data", [30, 17, 1, 48])
    write_tokenizer(folder / "tokenizer")
    return folder


def shards(folder: Path) -> Path:
    """Copy four shards of 96 good pairs, with `classnames.txt`, to `folder/data`."""
    return Path(shutil.copytree(_made() / "data", folder / "data"))


def tokenizer() -> Path:
    """Return the folder of a tokenizer, which is read only."""
    return _made() / "tokenizer"


def recipe(folder: Path, **changes: Any) -> Path:
    """Write a recipe of ten steps of 16 pairs on `folder/data`, with checkpoints at steps 4, 8 and 10.

    Args:
        folder: folder of the data, the recipe and the run.
        changes: fields of sections: `data={"num_workers": 1}`.
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
    """Return the command that trains `recipe(folder, **changes)`."""
    return ["pretrain", "--config", str(recipe(folder, **changes))]


@functools.cache
def _trained() -> Path:
    """Return a folder with the data and a finished run, trained once in this process."""
    folder = _folder()
    shards(folder)
    ended = processes.run("flipscale.cli", pretrain(folder))
    assert ended.returncode == 0, ended.stderr
    return folder


def run_of(folder: Path, up_to: int | None = None) -> Path:
    """Copy a trained run with its data to `folder/run` and `folder/data`; its command is `pretrain(folder)`.

    Args:
        folder: folder of the copies.
        up_to: last step, 4 or 8, of a stopped run; None for the finished run.
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
    """Return the folder of the trained model, which is read only."""
    return _trained() / "run/model"


@functools.cache
def _native(family: str) -> Path:
    """Return a folder with `model/`, a model of transformers' own class with random weights, or for `towers` a timm ViT
    and `text/`, a BERT."""
    from hub.native import export_native  # here, because the models take seconds to import

    folder = _folder()
    if family == "towers":
        import foreign_towers

        foreign_towers.save_timm("vit_tiny_patch16_224", folder / "model", **foreign_towers.SMALL_TIMM)
        foreign_towers.save_text("bert", folder / "text")
    else:
        export_native(family, folder)
    return folder


def native(folder: Path, family: str) -> Path:
    """Copy a model of another family than `flip` to `folder/model`, and a text tower to `folder/text`."""
    shutil.copytree(_native(family), folder, dirs_exist_ok=True)
    return folder / "model"


def model(folder: Path) -> Path:
    """Copy the trained model to `folder/model`."""
    return Path(shutil.copytree(trained_model(), folder / "model"))
