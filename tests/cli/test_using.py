"""The Python of docs/using.md and the README, run word for word on a tiny trained model and made-up pictures."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli.pages import ROOT
from conftest import COLOURS
from PIL import Image
from transformers import pipeline

from flipscale.evaluation.embedding import image_embeds, text_embeds
from flipscale.io.json_lines import read_metrics
from flipscale.model import FlipForImageClassification, FlipModel, FlipProcessor

SNIPPETS = dict(
    re.findall(r"\n## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", (ROOT / "docs/using.md").read_text(), re.DOTALL)
)


def run(heading: str) -> dict[str, Any]:
    """Executes the snippet below `heading` of docs/using.md in the working directory; returns its names."""
    names: dict[str, Any] = {}
    exec(compile(SNIPPETS[heading], f"docs/using.md: {heading}", "exec"), names)
    return names


def test_the_readme_s_snippets(in_site: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(compile(snippet.replace("your_picture.jpg", "photos/0.jpg"), "README.md", "exec"), {})


def test_zero_shot(in_site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("Name what is in a picture")
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert {re.sub(r"\d+% ", "", line) for line in lines} == {"red apple", "kick scooter"}


def test_a_transparent_picture_is_seen_on_white(in_site: Path) -> None:
    clear = Image.open(in_site / "photos/0.jpg").convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(in_site / "clear.png")
    snippet = SNIPPETS["Name what is in a transparent picture"].replace("photos/0.jpg", "clear.png")
    exec(compile(snippet, "using.md", "exec"), names := {})
    model, processor = (kind.from_pretrained(in_site / "runs/demo/model") for kind in (FlipModel, FlipProcessor))
    with torch.no_grad():
        logits = model(**processor(text=["red apple", "kick scooter"], images=clear, return_tensors="pt"))
    expected = dict(zip(("red apple", "kick scooter"), logits.logits_per_image.softmax(dim=1)[0].tolist(), strict=True))
    assert {guess["label"]: guess["score"] for guess in names["guesses"]} == pytest.approx(expected, abs=0.02)


def test_search(in_site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("Search a folder by words or by example")
    assert names["index"].ntotal == 8
    lines = capsys.readouterr().out.splitlines()[-10:]
    assert lines[5] == "1.000 photos/0.jpg", "a picture is its own nearest"
    expected = text_embeds(names["model"], names["processor"], ["a red disc"]) @ names["index"].reconstruct_n(0, 8).T
    assert float(lines[0].split()[0]) == pytest.approx(expected.max(), abs=1e-3)


def test_where(in_site: Path) -> None:
    heat = run("See where in a picture the words are")["heat"]
    assert heat.shape[0] == heat.shape[1] > 1


def test_features(in_site: Path) -> None:
    embedding = np.array(run("Take its features")["embedding"])
    model, processor = (kind.from_pretrained(in_site / "runs/demo/model") for kind in (FlipModel, FlipProcessor))
    photo = image_embeds(model, processor, ["photos/0.jpg"])[0]
    # Another backend of images may differ by a grey level.
    assert embedding @ photo > 0.999 * np.linalg.norm(embedding)


def test_low_rank_fine_tuning(in_site: Path) -> None:
    pytest.importorskip("peft")
    names = run("Fine-tune a small part of it")
    again = names["model"](pixel_values=names["pixels"]).logits
    assert (again.argmax(dim=1) == names["labels"]).float().mean() > 0.5  # chance is 0.25
    kept = sum(file.stat().st_size for file in (in_site / "runs/pets_lora").glob("*.safetensors"))
    assert 0 < kept < (in_site / "runs/demo/model/model.safetensors").stat().st_size


def test_linear_probe(in_site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("Probe it with a linear classifier")
    assert float(re.search(r"top-1 ([\d.]+)%", capsys.readouterr().out)[1]) > 60.0  # chance is 25


@pytest.mark.long  # tests/start/test_api.py has shorter runs
def test_training(in_site: Path) -> None:
    names = run("Train and evaluate from Python")
    (*_, last) = read_metrics(in_site / "runs/from_python")
    assert last["trained_seconds"] > 0.5 * 60 * names["recipe"].budget_minutes  # longer if a step is slow
    assert (in_site / "runs/from_python/report.html").is_file()
    top1 = next(result for result in names["results"] if result.metric == "top1")
    assert top1.low < top1.value < top1.high


def test_fine_tuning(in_site: Path) -> None:
    names = run("Fine-tune it")
    losses = [record["eval_loss"] for record in names["trainer"].state.log_history if "eval_loss" in record]
    assert losses[-1] < losses[0]
    tuned = FlipForImageClassification.from_pretrained(in_site / "runs/pets/model")
    assert sorted(tuned.config.id2label.values()) == sorted(COLOURS)
    classify = pipeline("image-classification", model=str(in_site / "runs/pets/model"))
    assert {guess["label"] for guess in classify(str(in_site / "photos/0.jpg"))} == set(COLOURS)


def test_own_loop(in_site: Path) -> None:
    losses = run("Train in your own loop")["losses"]
    assert len(losses) == 20
    assert sum(losses[-5:]) < sum(losses[:5])


def test_trainer_of_pairs(in_site: Path) -> None:
    names = run("Train in transformers' Trainer")
    before, after = (FlipModel.from_pretrained(in_site / run) for run in ("runs/demo/model", "runs/pairs/model"))
    assert names["trainer"].state.global_step == 20
    assert not torch.equal(before.logit_scale, after.logit_scale)


def test_every_snippet_is_run() -> None:
    assert (ROOT / "docs/using.md").read_text().count("```python") == len(SNIPPETS) == 11


def test_embedding_files(in_site: Path) -> None:
    """Batches make no difference, and a file that is not a picture is named."""
    model, processor = (kind.from_pretrained(in_site / "runs/demo/model") for kind in (FlipModel, FlipProcessor))
    files = sorted((in_site / "photos").iterdir())
    by_three = image_embeds(model, processor, files, batch_size=3)
    assert np.allclose(by_three, image_embeds(model, processor, [Image.open(file) for file in files]), atol=1e-6)
    assert np.allclose(np.linalg.norm(by_three, axis=1), 1.0, atol=1e-6)
    for unusable, message in (([in_site / "demo.yaml"], "demo.yaml cannot be read as a picture"), ([], "no pictures")):
        with pytest.raises(ValueError, match=message):
            image_embeds(model, processor, unusable)
