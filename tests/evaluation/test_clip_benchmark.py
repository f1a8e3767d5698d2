"""The figures of zero-shot and retrieval tasks are CLIP_benchmark's own, of one open_clip model and the same folders.

Their reader, preprocessing, texts and metrics do the other side, in fp32; nothing of ours takes part in it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import pytest
import torch
from accelerate import Accelerator
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from evaluation.made_up_sets import NAMES, npy, write_set
from PIL import Image
from safetensors.torch import save_file

from flipscale.evaluation.foreign_models import OpenClipEmbedder, open_clip_embedder
from flipscale.evaluation.results import as_metrics
from flipscale.evaluation.suite import build_tasks, evaluate_tasks

pytestmark = pytest.mark.long

# Their names of our metrics.
RECALLS = {"text_to_image": "image_retrieval_recall", "image_to_text": "text_retrieval_recall"}


class Sides(NamedTuple):
    ours: OpenClipEmbedder
    model: torch.nn.Module
    preprocess: Callable[[Image.Image], torch.Tensor]
    tokenizer: Callable[[list[str]], torch.Tensor]


@pytest.fixture(scope="module")
def sides(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    """A model of open_clip's with random weights, which tells images and classes well apart."""
    folder = tmp_path_factory.mktemp("oracle")
    text = {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 2}
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {**text, "hf_tokenizer_name": str(tokenizer_dir)},
    }
    (folder / "oracle-vit.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.CLIP(16, config["vision_cfg"], text)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "positional" not in name:
                weight.mul_(3)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "weights.safetensors")
    name = f"{folder / 'oracle-vit.json'},{folder / 'weights.safetensors'}"
    ours = open_clip_embedder(name, Accelerator(cpu=True), batch_size=13)
    loaded, _, preprocess = open_clip.create_model_and_transforms("oracle-vit", str(folder / "weights.safetensors"))
    return Sides(ours, loaded.eval(), preprocess, open_clip.get_tokenizer("oracle-vit"))


@pytest.fixture(autouse=True)
def _their_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their accuracy calls `float` of an array of one number, which numpy refuses since 2.5."""
    number = lambda value: float(value.item() if isinstance(value, np.ndarray) else value)  # noqa: E731
    monkeypatch.setattr(zeroshot_classification, "float", number, raising=False)


def theirs(sides: Sides, folder: Path, task: str) -> dict[str, float]:
    dataset = build_dataset("wds/set", root=str(folder), transform=sides.preprocess, split="test", task=task)
    loader = torch.utils.data.DataLoader(dataset.batched(7), batch_size=None, shuffle=False)
    common = {"device": "cpu", "amp": False}
    if task == "zeroshot_retrieval":
        found = zeroshot_retrieval.evaluate(sides.model, loader, sides.tokenizer, recall_k_list=[1, 5, 10], **common)
    else:
        named = (dataset.classes, dataset.templates)
        found = zeroshot_classification.evaluate(sides.model, loader, sides.tokenizer, *named, **common)
    return {name: 100 * value for name, value in found.items()}


def ours(sides: Sides, folder: Path, **task: object) -> dict[str, float]:
    found = as_metrics(evaluate_tasks(sides.ours, build_tasks([{"data": str(folder), **task}])))
    return {name.partition("/")[2]: value for name, value in found.items()}


def assert_same_classification(sides: Sides, folder: Path) -> None:
    found, expected = ours(sides, folder, kind="zero_shot"), theirs(sides, folder, "zeroshot_classification")
    assert 5 < expected["acc5"] < 95
    assert found["mean_per_class"] == pytest.approx(expected["mean_per_class_recall"], abs=1e-6)
    assert found["top1"] == pytest.approx(expected["acc1"], abs=1e-6)
    assert ("top5" in found) == (not np.isnan(expected["acc5"]))
    assert found.get("top5", 0.0) == pytest.approx(np.nan_to_num(expected["acc5"]), abs=1e-6)


def assert_same_retrieval(sides: Sides, folder: Path) -> None:
    found, expected = ours(sides, folder, kind="retrieval"), theirs(sides, folder, "zeroshot_retrieval")
    for way, name in RECALLS.items():
        for k in (1, 5, 10):
            assert found[f"{way}_r{k}"] == pytest.approx(expected[f"{name}@{k}"], abs=2e-5), (way, k)
    assert 5 < expected["image_retrieval_recall@10"] < 95


def in_their_layout(flat: Path, folder: Path, dataset_type: str) -> Path:
    (folder / "test").mkdir(parents=True)
    shards = sorted(flat.glob("*.tar"))
    for number, shard in enumerate(shards):
        (folder / "test" / f"{number}.tar").symlink_to(shard)
    for text in flat.glob("*.txt"):
        (folder / text.name).symlink_to(text)
    (folder / "test" / "nshards.txt").write_text(str(len(shards)))
    (folder / "dataset_type.txt").write_text(dataset_type)
    return folder


def test_a_set_in_the_demo_s_layout(sides: Sides, shards: Path, tmp_path: Path) -> None:
    """Of whose 96 captions most are those of other images too: theirs and ours break ties alike."""
    classes = in_their_layout(shards, tmp_path / "classes", "classification")
    assert_same_classification(sides, classes)
    assert ours(sides, shards, kind="zero_shot") == ours(sides, classes, kind="zero_shot")
    pairs = in_their_layout(shards, tmp_path / "pairs", "retrieval")
    assert_same_retrieval(sides, pairs)
    assert ours(sides, shards, kind="retrieval") == ours(sides, pairs, kind="retrieval")


def test_odd_images_names_and_labels_in_eleven_shards(sides: Sides, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", 11, 9, lambda number, label: {"cls": f"{label}\n".encode()})
    # Spaces at the end of a line are no part of the name.
    names = [f"{name}  " for name in NAMES]
    (folder / "classnames.txt").write_text("\n".join([*names, "the red"]) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n{c} \nthe {c}, a {c}.\n")
    assert_same_classification(sides, folder)


def test_fewer_than_five_classes_and_fewer_images_than_a_batch(sides: Sides, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", 1, 5, lambda number, label: {"cls": str(label % 3).encode()})
    (folder / "classnames.txt").write_text("red disc\nblue bar\ngrey ring\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    found, expected = ours(sides, folder, kind="zero_shot"), theirs(sides, folder, "zeroshot_classification")
    assert np.isnan(expected["acc5"])
    assert "top5" not in found
    assert found["top1"] == pytest.approx(expected["acc1"], abs=1e-6)
    assert found["mean_per_class"] == pytest.approx(expected["mean_per_class_recall"], abs=1e-6)


def test_several_captions_an_image(sides: Sides, tmp_path: Path) -> None:
    def captions(number: int, label: int) -> dict[str, bytes]:
        words = [*NAMES[label].split(), *NAMES[number % 16].split()]
        # One to five captions; some are blank, some are another image's too.
        lines = [f"a {words[0]} {words[1]}", f"the {words[2]} {words[1]} {words[3]}  ", "", f" {words[3]} a {words[0]}"]
        lines.append(" ".join(words[:: -1 if number % 2 else 1]))
        return {"txt": "\n".join(lines[: 1 + number % 5]).encode()}

    assert_same_retrieval(sides, write_set(tmp_path / "set", 11, 8, captions, "retrieval"))


def test_several_labels_an_image(sides: Sides, tmp_path: Path) -> None:
    def labels(number: int, label: int) -> dict[str, bytes]:
        # The last class has no image.
        array = (np.arange(17) == label) | (np.random.default_rng(number).random(17) < 0.1)
        array[16] = False
        return {"npy": npy(array.astype((np.uint8, np.int64, np.float32)[number % 3]))}

    folder = write_set(tmp_path / "set", 11, 9, labels, "multilabel")
    (folder / "classnames.txt").write_text("\n".join([*NAMES, "the red"]))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}\n")
    expected = theirs(sides, folder, "zeroshot_classification")
    found = ours(sides, folder, kind="zero_shot_multilabel", metric="map")
    assert 5 < expected["mean_average_precision"] < 95
    assert found["map"] == pytest.approx(expected["mean_average_precision"], abs=2e-5)
