"""Zero-shot and retrieval against figures by hand from the model's own features, and the tasks of a recipe."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.made_up_sets import png, write_samples
from evaluation.tiny_model import pixels_of

from flipscale.data.samples import SampleNumbers
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.results import as_metrics
from flipscale.evaluation.suite import build_tasks, planned_tasks, run_tasks
from flipscale.recipe.outputs import EvalRecipe


def evaluated(embedder: Embedder, **task: object) -> dict[str, float]:
    metrics = as_metrics(run_tasks(embedder, build_tasks([task])))
    return {name.partition("/")[2]: value for name, value in metrics.items()}


def image_features(embedder: Embedder, shards: Path) -> torch.Tensor:
    with torch.no_grad():
        features = embedder.model.get_image_features(pixels_of(embedder, shards)).pooler_output
    return features / features.norm(dim=1, keepdim=True)


def text_features(embedder: Embedder, texts: list[str]) -> torch.Tensor:
    tokens = embedder.tokenizer(texts, padding="max_length", max_length=8, return_tensors="pt")["input_ids"]
    features = embedder.model.get_text_features(tokens).pooler_output
    return (features / features.norm(dim=1, keepdim=True)).detach()


def test_retrieval(embedder: Embedder, shards: Path) -> None:
    source = TarSource(str(shards))
    captions = [source.read(*where).caption.decode() for where in SampleNumbers(source)]
    scores = text_features(embedder, captions) @ image_features(embedder, shards).T
    found = evaluated(embedder, kind="retrieval", data=str(shards), group_by_caption=True)
    for k in (1, 5, 10):
        for way, matrix in (("text_to_image", scores), ("image_to_text", scores.T)):
            nearest = matrix.topk(k).indices.tolist()
            hits = [any(captions[i] == captions[q] for i in row) for q, row in enumerate(nearest)]
            assert found[f"{way}_r{k}"] == pytest.approx(100 * np.mean(hits), abs=2.2)


def test_images_of_several_captions(embedder: Embedder, tmp_path: Path) -> None:
    images = (png(np.full((32, 32, 3), colour, np.uint8)) for colour in np.eye(3, dtype=np.uint8) * 255)
    captions = (f"a red\nthe blue {number}\n\n".encode() for number in range(3))
    write_samples(tmp_path, ({"png": image, "txt": text} for image, text in zip(images, captions, strict=True)))
    (own,) = run_tasks(embedder, build_tasks([{"kind": "retrieval", "data": str(tmp_path), "ks": [1]}]))[:1]
    assert own.n == 9, "a blank line is a caption too, as in CLIP_benchmark"
    assert own.chance == pytest.approx(100 / 3)
    # All three share their first caption, so every image is right for every text.
    grouped = evaluated(embedder, kind="retrieval", data=str(tmp_path), group_by_caption=True)
    assert grouped["text_to_image_r1"] == grouped["image_to_text_r1"] == grouped["chance"] == 100.0


def test_the_watch_hears_of_each_batch(embedder: Embedder, shards: Path) -> None:
    calls: list[int] = []
    evaluated(dataclasses.replace(embedder, alive=lambda: calls.append(1)), kind="zero_shot", data=str(shards))
    # The start, 96 labels, 96 images in batches of 6, and 16 classes of 2 prompts.
    assert len(calls) >= 1 + 96 + 16 + 16


def test_test_set_must_be_whole(embedder: Embedder, tmp_path: Path) -> None:
    def refused(message: str, kind: str) -> None:
        with pytest.raises(ValueError, match=message):
            evaluated(embedder, kind=kind, data=str(tmp_path))

    write_samples(tmp_path, [{"png": b"no picture", "txt": b"a red disc"}, {"png": b"no picture"}])
    refused(r"0.tar#1 has no caption", "retrieval")
    refused(r"classnames.txt is missing", "zero_shot")
    (tmp_path / "classnames.txt").write_text("one\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("{c}\n")
    refused(r"0.tar#0 has class None; 1 are listed", "zero_shot")
    with pytest.raises(ValueError, match=r"image 0.tar#0 cannot be decoded"):
        embedder.images(TarSource(str(tmp_path)))
    write_samples(tmp_path, [])
    refused(r"empty: 0 samples in 1 shards", "retrieval")


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([{"kind": "other", "data": "x"}], r"eval.tasks\[0\]: kind is 'other'; use one of zero_shot, "),
        ([{"kind": "retrieval"}], r"eval.tasks\[0\]: data is missing"),
        ([{"kind": "retrieval", "data": "x", "templates": "imagenet7"}], r"retrieval has no field 'templates'"),
        ([{"kind": "zero_shot", "data": "x"}] * 2, r"2 of eval.tasks are named 'zero_shot'"),
        ([{"kind": "zero_shot", "data": "x", "name": "a/b"}], r"name is 'a/b'"),
        ([{"kind": "zero_shot", "data": "x", "templates": ["a photo"]}], r"templates has the prompt 'a photo'"),
        ([{"kind": "retrieval", "data": "x", "ks": [0]}], r"eval.tasks\[0\].ks\[0\] is 0"),
    ],
)
def test_tasks_that_cannot_be(listed: list[dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_tasks(listed)


def test_short_forms_are_tasks() -> None:
    recipe = EvalRecipe(
        tasks=[{"kind": "zero_shot", "data": "a", "every_samples": 7}, {"kind": "zero_shot", "data": "b", "name": "n"}],
        every_samples=100, zero_shot="c", retrieval="d",
    )  # fmt: skip
    planned = [(task.name, task.data, task.every_samples) for task in planned_tasks(recipe)]
    assert planned == [("zero_shot", "c", 7), ("n", "b", 100), ("retrieval", "d", 100)]
    apart = recipe.every(1 / 3)
    assert (apart.every_share, {task.every_samples for task in planned_tasks(apart)}) == (1 / 3, {None})
