"""Fine-tuning of the image tower with a head: the loss, runs, and folders for transformers' pipeline."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import COLOURS, SHAPES, check_start, cut, losses, metrics, trained, write_shards, write_tar
from distributed.crowd import Crowds
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from flipscale.cli import main
from flipscale.hub.loading import load_dual_encoder
from flipscale.objectives.classify import Classify, ClassifyOutput
from flipscale.start.complete_recipe import parse_recipe

Write = Callable[..., Path]
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
STAGES = [
    {"name": "masked", "samples": 240, "mask_ratio": 0.5, "base_lr": 0.15, "warmup_samples": 32},
    {"name": "unmasked", "samples": 160},
]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled pictures as `prepare shards --labels --split` writes them, without captions or a tokenizer."""
    folder = tmp_path_factory.mktemp("labelled")
    write_shards(folder / "train", [40, 24])
    write_shards(folder / "test", [64])  # the same pictures, because these few steps do not generalise
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        shutil.move(folder / "train" / name, folder / name)
    return folder


@pytest.fixture
def write(write_recipe: Write, labelled: Path, trained_run: Path) -> Write:
    """Writes the recipe of a fine-tuning."""

    def write(run_dir: Path, **changes: dict | list) -> Path:
        sections = {
            "model": {"init_from": str(trained_run), "drop_path_rate": 0.2},
            "data": {"shards": str(labelled / "train"), "tokenizer": "no such folder"},
            "loss": {"kind": "classify", "options": {"num_classes": 16, "label_smoothing": 0.1}},
            "optim": {"layer_decay": 0.75},
            "stages": STAGES,
            "save": {"every_samples": 40, "total_limit": 20},
            "eval": {"tasks": [{"kind": "classification", "data": str(labelled)}], "num_workers": 0},
        }
        for section, fields in changes.items():
            known = sections.get(section)
            sections[section] = {**known, **fields} if isinstance(known, dict) else fields
        return write_recipe(run_dir, **sections)

    return write


def test_the_loss_is_the_smoothed_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5, dtype=torch.float64), torch.tensor([[4], [0], [2]])
    found = Classify(num_classes=5, label_smoothing=0.2).per_sample_loss(ClassifyOutput(logits=logits, labels=labels))
    expected = 0.0
    for row, label in enumerate((4, 4, 0, 0, 2, 2)):
        truth = torch.full((5,), 0.2 / 5)
        truth[label] += 0.8
        expected -= float((truth * logits[row].log_softmax(dim=0)).sum()) / 6
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.long
def test_a_run_learns_resumes_and_exports_a_classifier(
    write: Write, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    mixed = {"augment": {"mixup_alpha": 0.2}}
    trained(write(run_dir, data=mixed))
    assert losses(run_dir)[-1] < losses(run_dir)[0] - 0.3
    results = {name: value for record in metrics(run_dir) for name, value in record.items() if "/" in name}
    assert results["classification/top1"] > 2 * 100 / 16

    copy = tmp_path / "cut"
    cut(run_dir, copy, 15)
    trained(write(copy, data=mixed))
    assert losses(copy) == losses(run_dir)
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (copy, run_dir))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(name.startswith("text_") for name in ours)

    model = AutoModelForImageClassification.from_pretrained(run_dir / "model")
    assert list(model.config.id2label.values()) == NAMES
    assert model.config.label2id[NAMES[3]] == 3
    assert "pipeline_tag: image-classification" in (run_dir / "model/README.md").read_text()
    task = f"{{kind: classification, data: {labelled}}}"
    main(["evaluate", str(run_dir), "--task", task, "--num_workers", "0", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["classification/top1"] == pytest.approx(results["classification/top1"])
    with pytest.raises(SystemExit):
        main(["evaluate", str(run_dir), "--zero_shot", str(labelled), "--num_workers", "0"])
    assert "zero_shot" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is a FlipForImageClassification"):
        load_dual_encoder(str(run_dir / "model"))


@pytest.mark.parametrize("engine", ["ddp", *(pytest.param(e, marks=pytest.mark.long) for e in ("fsdp2", "zero3"))])
def test_two_processes_with_micro_batches(write: Write, tmp_path: Path, engine: str, crowds: Crowds) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    augment = {"rand_augment": "rand-m9-mstd0.5-inc1", "mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    assert crowds(1).run("train", "ddp", write(one, data={"augment": augment})) == ["done"]
    parts = {"augment": augment, "micro_batch_size": 4}
    assert crowds(2).run("train", engine, write(many, data=parts)) == ["done"] * 2
    apart = [abs(a - b) for a, b in zip(losses(one), losses(many), strict=True)]
    assert max(apart) < 1e-5
    last = [metrics(run_dir)[-1]["classification/top1"] for run_dir in (one, many)]
    assert last[0] == last[1]


def test_contradicting_recipes_are_refused(
    write: Write, labelled: Path, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    plain, other, unlabelled = (tmp_path / name for name in ("plain", "other", "unlabelled"))
    for folder in (plain, other):
        write_shards(folder, [8])
    (plain / "classnames.txt").unlink()
    (other / "classnames.txt").write_text("".join(f"{name}\n" for name in reversed(NAMES)))
    image = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    write_tar(unlabelled / "00000.tar", [{"png": image, "txt": b"a picture"}] * 8)
    (unlabelled / "classnames.txt").write_text("".join(f"{name}\n" for name in NAMES))
    pairs = {"loss": {"kind": "infonce", "options": {}}}

    def tasks(kind: str, data: Path) -> dict:
        return {"eval": {"tasks": [{"kind": kind, "data": str(data)}]}}

    cases = {
        "no names": ({"data": {"shards": str(plain)}}, f"{plain}/classnames.txt"),
        "another number": ({"loss": {"options": {"num_classes": 10}}}, "16 classes"),
        "no labels": ({"data": {"shards": str(unlabelled)}}, "00000.tar: 000 has no class number"),
        "texts": (tasks("zero_shot", labelled), "'classify' has no text tower"),
        "other classes": (tasks("classification", other), f"{other} has other class names"),
        "odd couples": ({"data": {"micro_batch_size": 1, "augment": {"mixup_alpha": 0.8}}}, "data.augment"),
        "a head for pairs": (pairs, "loss.kind 'infonce' has no head"),
    }
    for name, (changes, said) in cases.items():
        file = write(tmp_path / "refused", **changes)
        with subtests.test(name), pytest.raises(ValueError, match=re.escape(said)):
            check_start(parse_recipe(["--config", str(file)]))
