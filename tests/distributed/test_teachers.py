"""Training with stored teachers: the student's crop is the teacher's, and every engine learns what one process does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import losses, write_shards
from distributed.crowd import Crowds
from distributed.test_engines import Trainings, assert_learned_alike
from distributed.test_stored_features import change_caption, embed, export_tiny
from torch import nn

from flipscale.cli import main
from flipscale.hub.loading import open_embedder
from flipscale.start.complete_recipe import parse_recipe
from flipscale.start.setup import open_setup

CROPS = ("--crops", "3", "--crop_scale", "0.3", "1.0", "--seed", "5")
# The case, and what it changes.
CASES: dict[str, dict] = {
    "one teacher": {"data": {"teachers": ["a"]}},
    "two teachers, micro-batches": {"data": {"teachers": ["a", "b"], "micro_batch_size": 4}},
    "views": {"mask": {"views": 2}, "loss": {"teacher_temperature": 0.2}},
    "reconstruction too": {"loss": {"reconstruction_weight": 0.5, "teacher_weight": 1.0}},
}


@pytest.fixture(scope="module")
def folder(shards: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models A and B and their embeddings of three crops of each image."""
    folder = tmp_path_factory.mktemp("teachers")
    for seed, name in ((1, "A"), (2, "B")):
        export_tiny(folder / name, tokenizer_dir, seed)
        embed(shards, folder / name.lower(), folder / name, *CROPS)
    return folder


@pytest.fixture(scope="module")
def trainings(recipe: dict, folder: Path, crowds: Crowds) -> Trainings:
    data = {**recipe["data"], "crop_scale": [0.3, 1.0], "teachers": [str(folder / "a")]}
    for case in CASES.values():
        if "data" in case:
            case["data"]["teachers"] = [str(folder / Path(name).name) for name in case["data"]["teachers"]]
    return Trainings(folder, {**recipe, "data": data}, crowds)


def test_the_teacher_saw_the_student_s_crop(trainings: Trainings, folder: Path, shards: Path) -> None:
    """The teacher, run on the student's whole crops and captions, gives the stored rows, of JPEGs and PNGs."""
    file = trainings.file(folder / "crops", stages=[{"name": "whole", "samples": 96, "base_lr": 0.01}])
    plan = open_setup(parse_recipe(["--config", str(file)]))
    (dataset,) = plan.datasets.values()
    columns = dataset.__getitems__(list(range(192)))
    rows = columns["teacher_embeds"]
    assert rows.shape == (192, 1, 2, 16)
    embedder = open_embedder(str(folder / "A"), Accelerator(cpu=True))
    with torch.no_grad():
        images = embedder.image_features(patches=columns["patches"])
        texts = embedder.text_features(columns["input_ids"].long())
    scale = json.loads((folder / "a/features.json").read_text())["logit_scale"]
    assert scale == embedder.model.loss_values()["logit_scale"].item()
    for ours, stored in ((scale * nn.functional.normalize(images), rows[:, 0, 0]), (texts, rows[:, 0, 1])):
        apart = nn.functional.cosine_similarity(ours, stored)
        assert apart.min() > 1 - 1e-5
    assert torch.allclose(rows[:, 0, 0].norm(dim=1), torch.tensor(scale), rtol=1e-3)
    stored = np.concatenate([np.load(path).reshape(-1, 3, 16) for path in sorted((folder / "a/images").glob("*.npy"))])
    assert stored.shape == (96, 3, 16)
    assert np.abs(stored[:, 0] - stored[:, 1]).max(axis=1).min() > 1e-3, "crops of an image are alike"
    drawn = {tuple(row) for row in (rows[:, 0, 0] / scale).half().tolist()}
    assert 96 < len(drawn) < 192, "epochs draw other crops, out of three"


@pytest.mark.parametrize(
    ("case", "engine"),
    [
        ("one teacher", "ddp"),
        *(pytest.param(case, "ddp", marks=pytest.mark.long) for case in ("views", "reconstruction too")),
        *(pytest.param("two teachers, micro-batches", engine, marks=pytest.mark.long) for engine in ("fsdp2", "zero3")),
    ],
)
def test_two_processes_learn_what_one_does(trainings: Trainings, case: str, engine: str) -> None:
    alone = {**CASES[case], "data": {**CASES[case].get("data", {}), "micro_batch_size": None}}
    one, many = trainings.run("ddp", 1, **alone), trainings.run(engine, 2, **CASES[case])
    assert_learned_alike(one, many, 0.02)


def test_a_resumed_run_ends_with_the_same_bits(trainings: Trainings) -> None:
    whole = trainings.run("ddp", 1, **CASES["one teacher"])
    trainings.assert_resumed_alike(whole, 10, "ddp", 1, **CASES["one teacher"])
    plain = trainings.run("ddp", 1, data={"teachers": []})
    assert losses(plain)[0] != losses(whole)[0]


def test_samples_without_embeddings_are_replaced(trainings: Trainings, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "a", tmp_path / "a")
    for tower, row in (("images", 5), ("texts", 6)):
        rows = np.load(tmp_path / f"a/{tower}/00003.npy")
        rows[row] = np.nan
        np.save(tmp_path / f"a/{tower}/00003.npy", rows)
    run_dir = tmp_path / "run"
    changes = {"data": {"teachers": [str(tmp_path / "a")], "max_bad_fraction": 0.5}}
    main(["pretrain", "--config", str(trainings.file(run_dir, **changes))])
    lines = [json.loads(line) for line in (run_dir / "bad_samples.jsonl").read_text().splitlines()]
    assert {(line["cause"], line["number"]) for line in lines} == {("missing_features", n) for n in (5, 6)}
    assert all(np.isfinite(losses(run_dir)))


def test_what_does_not_fit_is_refused(
    trainings: Trainings, folder: Path, shards: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    def line(*flags: object) -> str:
        return refused("pretrain", "--config", trainings.file(tmp_path / "run"), *flags)

    assert "crops have scale [0.3, 1.0], and data.crop_scale has [0.5" in line("--data.crop_scale", "[0.5, 1.0]")
    write_shards(tmp_path / "shards", [30, 17, 1, 48], seed=1)
    assert "in other shards" in line("--data.shards", tmp_path / "shards")
    shutil.copytree(shards, tmp_path / "changed")
    change_caption(tmp_path / "changed/00003.tar")
    assert "changed/00003.tar has the digest" in line("--data.shards", tmp_path / "changed")
    embed(shards, tmp_path / "whole", folder / "A")
    assert "no embeddings of crops; embed with" in line("--data.teachers", f"[{tmp_path / 'whole'}]")
    embed(shards, tmp_path / "seed", folder / "B", *CROPS[:-1], "6")
    both = f"[{folder / 'a'}, {tmp_path / 'seed'}]"
    assert f"crops have seed 6, and the teacher {str(folder / 'a')!r} has 5" in line("--data.teachers", both)
    shutil.copytree(folder / "a", tmp_path / "a")
    about = json.loads((tmp_path / "a/features.json").read_text())
    del about["logit_scale"]
    (tmp_path / "a/features.json").write_text(json.dumps(about))
    assert "set loss.teacher_temperature" in line("--data.teachers", f"[{tmp_path / 'a'}]")
    words = ("prepare", "embed", shards, tmp_path / "out", "--model", folder / "A")
    assert "--crops is 4 with --features pooled" in refused(*words, "--crops", 4, "--features", "pooled")
    assert "--crop_scale is 1 0.5; expected" in refused(*words, "--crops", 4, "--crop_scale", 1, 0.5)
