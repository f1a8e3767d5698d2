"""Attacks by stored features and sampling weights that are changed, cut short or of other shards."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from attacks import ground
from attacks.attack import Attack, Change, later, refused, survived, test_of
from attacks.changes import nothing, pipe, text
from conftest import write_shards

from flipscale.cli import main

IMAGES, ABOUT = "images/00003.npy", "features.json"


@functools.cache
def _made(kind: str) -> Path:
    """Return a folder with data, and in `stored` their features or weights, made once in this process."""
    folder = ground._folder()
    data = str(ground.shards(folder))
    model = ["--model", str(ground.trained_model()), "--num_workers", "0"]
    words = {
        "pooled": ["embed", *model, "--features", "pooled"],
        "embeds": ["embed", *model],
        "taught": ["embed", *model, "--crops", "2"],
        "weights": ["weights", "--caption_counts", "--num_workers", "1"],
    }[kind]
    main(["prepare", words[0], data, str(folder / "stored"), *words[1:]])
    return folder


@later
def stored(folder: Path, kind: str, *changes: Change, **data: Any) -> list[str]:
    """A run on stored features or weights that somebody has changed."""
    shutil.copytree(_made(kind), folder, dirs_exist_ok=True, copy_function=shutil.copy2)
    for change in changes:
        change(folder / "stored")
    names = {"pooled": ["image_features", "text_features"], "weights": ["weights"]}.get(kind, [])
    data |= dict.fromkeys(names, "stored") or {"teachers": ["stored"]}
    stages = [{"name": "one", "samples": 192, "base_lr": 0.01}]
    model = {"init_from": str(ground.trained_model())} if kind == "pooled" else {}
    return ground.pretrain(folder, data=data, stages=stages, model=model)


@later
def entry(folder: Path, value: Any, *path: str) -> None:
    """Give an entry of `features.json` another value; None removes it."""
    about = json.loads((folder / ABOUT).read_text())
    *sections, name = path
    place = functools.reduce(lambda outer, section: outer[section], sections, about)
    place.update({name: value}) if value is not None else place.pop(name)
    (folder / ABOUT).write_text(json.dumps(about))


@later
def rows(folder: Path, change: Callable[[np.ndarray], Any], name: str = IMAGES) -> None:
    """Change rows of the last shard, which has 48."""
    array = np.load(folder / name)
    change(array)
    np.save(folder / name, array)


def one_number(value: float, *places: int) -> Change:
    """Give one number of row 7 another value, not the first one."""
    return rows(lambda array: array.__setitem__((7, *places, -1), value))


def alike(folder: Path) -> None:
    """Put other shards of equal names and counts in the place of the data."""
    shutil.rmtree(folder.parent / "data")
    write_shards(folder.parent / "data", [30, 17, 1, 48], seed=1)


def spoiled(name: str, change: Change, *says: str, kind: str = "pooled") -> Attack:
    return refused(name, stored(kind, change), *says)


@later
def memory(folder: Path, change: Change, validation: str = "other") -> list[str]:
    """An evaluation with a memory of stored pairs that somebody has changed."""
    shutil.copytree(_made("embeds"), folder, dirs_exist_ok=True, copy_function=shutil.copy2)
    shutil.copytree(folder / "data", folder / "other")
    change(folder / "stored")
    words = ["evaluate", str(ground.trained_model()), "--zero_shot", "data", "--memory", "stored"]
    return [*words, "--validation", validation, "--num_workers", "0", "--output_dir", "results"]


def every_row(folder: Path, tower: str, value: float) -> None:
    for file in (folder / tower).iterdir():
        np.save(file, np.full_like(np.load(file), value))


ATTACKS: list[Attack] = [
    survived(
        "rows of samples without features", stored("pooled", rows(lambda a: a[5:7].fill(np.nan)), max_bad_fraction=0.5),
    ),
    spoiled("NaN inside a row of features", one_number(np.nan), IMAGES, "row 7"),
    spoiled("infinity inside a row of features", one_number(-np.inf), IMAGES, "row 7"),
    spoiled("NaN inside a crop's row of a teacher", one_number(np.nan, 1), IMAGES, "row 7", kind="taught"),
    refused(
        "infinity in a row that a worker reads", stored("pooled", one_number(np.inf), num_workers=1), IMAGES, "row 7",
        alone=True,
    ),
    spoiled("features without a line", text(IMAGES, ""), IMAGES),
    spoiled("features cut short", text(IMAGES, b"\x93NUMPY\x01\x00v\x00{'descr': '<f2', 'fort"), IMAGES),
    spoiled("features in a zip", text(IMAGES, b"PK\x05\x06" + bytes(18)), IMAGES),
    spoiled("features as a pipe", pipe(IMAGES), IMAGES),
    spoiled("features.json of nothing", text(ABOUT, ""), ABOUT),
    spoiled("features.json of no fields", text(ABOUT, "{}"), ABOUT, "features is None"),
    spoiled("features.json of deep lists", text(ABOUT, "[" * 20_000), ABOUT),
    spoiled("features.json without its shards", entry(None, "shards_digest"), ABOUT, "shards_digest is None"),
    spoiled("features.json without a width", entry(None, "images", "width"), ABOUT, "width is None"),
    spoiled("features of 10^12 numbers", entry(10**12, "texts", "width"), ABOUT, "width is 1000000000000"),
    spoiled("a tower of features that is a list", entry([], "images"), ABOUT, "width is None"),
    spoiled("a list as the image size of features", entry([32], "images", "image_size"), "image_size [32]"),
    spoiled("10^12 crops of a teacher", entry(10**12, "images", "crops", "count"), ABOUT, "count", kind="taught"),
    spoiled("a teacher's crops without a seed", entry(None, "images", "crops", "seed"), ABOUT, "seed", kind="taught"),
    spoiled("a teacher's temperature of NaN", entry(float("nan"), "logit_scale"), ABOUT, "logit_scale", kind="taught"),
    spoiled("features of other shards of equal names and counts", alike, "'stored'", "other shards"),
    spoiled("weights of other shards of equal names and counts", alike, "'stored'", "contents", kind="weights"),
    spoiled("weights of no fields", text("weights.json", "{}"), "'stored'", kind="weights"),
    spoiled("weights without a line", text("weights.npy", ""), "'stored'", kind="weights"),
    refused("a memory without a text", memory(lambda one: every_row(one, "texts", np.nan)), "memory stored", "no pair"),
    refused("the test images as validation", memory(nothing, "./data"), "validation is ./data", "test images"),
]  # fmt: skip

test_attack = test_of(ATTACKS)
