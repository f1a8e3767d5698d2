"""The snippets of docs/using.md, run word for word on a tiny trained model and made-up pictures."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import COLOURS, SHAPES, draw, pretrain
from PIL import Image
from transformers import pipeline

import flipscale
from flipscale.cli import VERBS
from flipscale.evaluation.pictures import image_embeds, text_embeds
from flipscale.model import FlipForImageClassification, FlipModel, FlipProcessor

PAGE = (Path(flipscale.__file__).parents[1] / "docs" / "using.md").read_text()
SNIPPETS = dict(re.findall(r"\n## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture(scope="module")
def place(recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the trained model and the pictures that the page names."""
    folder = tmp_path_factory.mktemp("using")
    (folder / "demo.yaml").write_text(yaml.safe_dump({**recipe, "output_dir": str(folder / "runs/demo")}))
    done = pretrain(folder / "demo.yaml")
    assert done.returncode == 0, done.stderr
    rng = np.random.default_rng(0)
    places = [folder / f"pets/{part}/{colour}" for part in ("train", "test") for colour in COLOURS]
    for kind in [folder / "photos", *places]:
        kind.mkdir(parents=True)
        for number in range(8):
            colour = kind.name if kind.name in COLOURS else list(COLOURS)[number % 4]
            Image.fromarray(draw(colour, SHAPES[number % 4], rng)).save(kind / f"{number}.jpg")
    return folder


def run(heading: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Executes the snippet below `heading` as it stands; returns its names."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place / "cache")
    names: dict[str, Any] = {}
    exec(compile(SNIPPETS[heading], f"docs/using.md: {heading}", "exec"), names)
    return names


def test_zero_shot(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("Name what is in a picture", place, monkeypatch)
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert {re.sub(r"\d+% ", "", line) for line in lines} == {"red apple", "kick scooter"}


def test_search(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("Search a folder by words or by example", place, monkeypatch)
    assert names["index"].ntotal == 8
    assert (place / "photos.faiss").is_file()
    lines = capsys.readouterr().out.splitlines()[-10:]
    assert lines[5] == "1.000 photos/0.jpg", "a picture is its own nearest"
    by_text = [float(line.split()[0]) for line in lines[:5]]
    assert by_text == sorted(by_text, reverse=True)
    expected = text_embeds(names["model"], names["processor"], ["a red disc"]) @ names["index"].reconstruct_n(0, 8).T
    assert by_text[0] == pytest.approx(expected.max(), abs=1e-3)


def test_linear_probe(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("Probe it with a linear classifier", place, monkeypatch)
    assert names["train"].shape == (32, names["model"].config.projection_dim)
    assert float(re.search(r"top-1 ([\d.]+)%", capsys.readouterr().out)[1]) > 60.0  # chance is 25


def test_fine_tuning(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("Fine-tune it", place, monkeypatch)
    losses = [record["eval_loss"] for record in names["trainer"].state.log_history if "eval_loss" in record]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    tuned = FlipForImageClassification.from_pretrained(place / "runs/pets/model")
    assert sorted(tuned.config.id2label.values()) == sorted(COLOURS)
    classify = pipeline("image-classification", model=str(place / "runs/pets/model"))
    assert {guess["label"] for guess in classify(str(place / "photos/0.jpg"))} == set(COLOURS)


def test_commands_name_verbs_that_are_there() -> None:
    commands = re.findall(r"^flipscale (\S+) (\S+)", PAGE, re.MULTILINE)
    assert {verb for verb, _ in commands} <= VERBS.keys()
    assert [kind for verb, kind in commands if verb == "convert"] == ["open_clip", "onnx"]
    assert len(SNIPPETS) == 4


def test_what_cannot_be_embedded_is_named(place: Path) -> None:
    model = FlipModel.from_pretrained(place / "runs/demo/model")
    processor = FlipProcessor.from_pretrained(place / "runs/demo/model")
    with pytest.raises(ValueError, match=r"demo.yaml cannot be read as a picture \(cannot identify image file"):
        image_embeds(model, processor, [place / "demo.yaml"])
    with pytest.raises(ValueError, match="there are no pictures to embed; is the folder's name right"):
        image_embeds(model, processor, [])


def test_batches_and_files_make_no_difference(place: Path) -> None:
    model = FlipModel.from_pretrained(place / "runs/demo/model")
    processor = FlipProcessor.from_pretrained(place / "runs/demo/model")
    files = sorted((place / "photos").iterdir())
    by_three = image_embeds(model, processor, files, batch_size=3)
    assert np.allclose(by_three, image_embeds(model, processor, [Image.open(file) for file in files]), atol=1e-6)
    assert np.allclose(np.linalg.norm(by_three, axis=1), 1.0, atol=1e-6)
