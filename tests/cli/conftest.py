"""A folder in which the commands and snippets of the pages can be run: data, pictures, and a tiny model.

The model was trained on 300 pictures in folders, as a user has them, and is what the pages' examples are run with.
"""

import csv
import itertools
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from conftest import COLOURS, SHAPES, draw, write_shards
from hub.conftest import hub, logged_in  # noqa: F401 (fixtures)
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer

from flipscale import cli
from flipscale.evaluation.task_page import PREPARED

ROOT = Path(__file__).parents[2]
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 2, "pool_type": "first"},
}


@pytest.fixture(scope="session")
def site(recipe: dict, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has all files and folders that the pages name, small ones of each kind."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("ds_configs", "slurm"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "examples").symlink_to(ROOT / "examples")
    for name in ("train", "test"):
        write_shards(folder / "data/demo" / name, [30, 17, 1, 48])
    for part, seed in (("train", 1), ("test", 2)):
        write_shards(folder / "data/demo/groups" / part, [120], seed)
        names = folder / "data/demo/groups" / part / "classnames.txt"
        names.replace(folder / "data/demo/groups/classnames.txt")
    shutil.copytree(tokenizer_dir, folder / "data/demo/tokenizer")
    train_on_own_pictures(folder, recipe)
    for name in ("h14", "mine"):
        shutil.copytree(folder / "runs/demo", folder / "runs" / name)
    write_pictures(folder)
    write_peer(folder, tokenizer_dir)
    write_prepared(folder / "data/tasks/cars")
    study = {"base": "examples/demo/demo.yaml", "axes": {"mask": {"half": {"stages.masked.mask_ratio": 0.5}}}}
    (folder / "masks.yaml").write_text(yaml.safe_dump({**study, "design": "star", "seeds": [0]}))
    with tarfile.open(ROOT / "tests/fixtures/parity/t5x.tar.gz") as tar:
        tar.extractall(folder / "original", filter="data")
    with zipfile.ZipFile(folder / "flip_vit_large.zip", "w") as archive:
        for file in (folder / "original").rglob("*"):
            if file.is_file():
                archive.writestr(str(file.relative_to(folder / "original")), file.read_bytes())
    return folder


def train_on_own_pictures(folder: Path, recipe: dict) -> None:
    """Trains runs/demo from 300 pictures in a folder for each class, by the commands of docs/your_pictures.md."""
    rng, own = np.random.default_rng(3), folder / "pictures"
    names = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    for number in range(300):
        name = names[number % len(names)]
        (own / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(*name.split()[1:], rng)).save(own / name / f"{number}.jpg")
    data = folder / "data/own"
    cli.main(["prepare", "shards", str(own), str(data), "--labels", "folder", "--split", "0.1", "--num_workers", "1"])
    cli.main(["prepare", "tokenizer", str(data / "train"), str(data / "tokenizer")])
    vocab_size = len(AutoTokenizer.from_pretrained(data / "tokenizer"))
    # Embeddings narrower than the towers.
    towers = {tower: {**recipe["model"][tower], "projection_dim": 16} for tower in ("vision_config", "text_config")}
    towers["text_config"] |= {"vocab_size": vocab_size, "max_position_embeddings": 16}
    changed = {
        **recipe,
        "model": {**recipe["model"], **towers},
        "data": {**recipe["data"], "shards": str(data / "train"), "tokenizer": str(data / "tokenizer")},
        "output_dir": str(folder / "runs/demo"),
    }
    (folder / "demo.yaml").write_text(yaml.safe_dump(changed))
    cli.main(["pretrain", "--config", str(folder / "demo.yaml")])


def write_pictures(folder: Path) -> None:
    """An album with a text next to each picture, photos with a table of captions, and folders of pets by class."""
    rng = np.random.default_rng(0)
    (folder / "album").mkdir()
    for number, (colour, shape) in enumerate(10 * list(itertools.product(COLOURS, SHAPES))):
        Image.fromarray(draw(colour, shape, rng)).save(folder / f"album/{number}.jpg")
        (folder / f"album/{number}.txt").write_text(f"a {colour} {shape}")
    places = [folder / f"pets/{part}/{colour}" for part in ("train", "test") for colour in COLOURS]
    captions = {}
    for kind in [folder / "photos", *places]:
        kind.mkdir(parents=True)
        for number in range(8):
            colour = kind.name if kind.name in COLOURS else list(COLOURS)[number % 4]
            Image.fromarray(draw(colour, SHAPES[number % 4], rng)).save(kind / f"{number}.jpg")
            captions[f"photos/{number}.jpg"] = f"a {list(COLOURS)[number % 4]} {SHAPES[number % 4]}"
    with open(folder / "photos.csv", "w", newline="") as table:
        csv.writer(table).writerows([("filepath", "caption"), *captions.items()])


def write_peer(folder: Path, tokenizer_dir: Path) -> None:
    """Tiny models as open_clip stores them: peer.json and peer.safetensors, and bpe with CLIP's own tokenizer."""
    texts = {"peer": {"hf_tokenizer_name": str(tokenizer_dir)}, "bpe": {"vocab_size": 49408, "pool_type": "argmax"}}
    for name, fields in texts.items():
        config = {**OPEN_CLIP, "text_cfg": {**OPEN_CLIP["text_cfg"], **fields}}
        (folder / f"{name}.json").write_text(json.dumps(config))
        torch.manual_seed(0)
        weights = open_clip.CLIP(**config).state_dict()
        save_file({key: value.contiguous() for key, value in weights.items()}, folder / f"{name}.safetensors")


def write_prepared(folder: Path) -> None:
    """A test set as `flipscale prepare tasks` leaves it."""
    write_shards(folder / "test", [20])
    for text in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (folder / "test" / text).rename(folder / text)
    size = (folder / "test/00000.tar").stat().st_size
    (folder / PREPARED).write_text(json.dumps({"files": {"test/00000.tar": {"bytes": size}}, "revision": "main"}))


@pytest.fixture
def in_site(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The site as working directory, without what a command of an earlier test left in the environment."""
    monkeypatch.chdir(site)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", site / "cache")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return site
