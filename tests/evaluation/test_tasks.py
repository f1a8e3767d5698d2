"""Zero-shot and retrieval against the figures written out by hand from the model's own features."""

import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import TOWER, add_member
from transformers import AutoTokenizer

from flipscale.data.decode import decode_box
from flipscale.data.sources.tar_source import TarSource
from flipscale.evaluation import retrieval, zero_shot
from flipscale.evaluation.embedding import Embedder, sample_numbers
from flipscale.evaluation.suite import run_suite
from flipscale.evaluation.templates import TEMPLATES
from flipscale.model import FlipConfig, FlipModel


@pytest.fixture(scope="module")
def embedder(tokenizer_dir: Path) -> Embedder:
    torch.manual_seed(0)
    config = FlipConfig(
        vision_config={**TOWER, "image_size": 32, "patch_size": 8},
        text_config={**TOWER, "vocab_size": 16, "max_position_embeddings": 8},
        projection_dim=16,
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return Embedder(FlipModel(config).eval(), tokenizer, Accelerator(cpu=True), batch_size=7)


def image_features(embedder: Embedder, shards: Path) -> torch.Tensor:
    """Every image one at a time, from pixel values."""
    source, vision = TarSource(str(shards)), embedder.model.config.vision_config
    rows = []
    for shard, number in sample_numbers(source):
        pixels = torch.from_numpy(decode_box(source.read(shard, number).image, None, 32, (1.0, 1.0)).astype(np.float32))
        pixels = (pixels / 255 - torch.tensor(vision.image_mean)) / torch.tensor(vision.image_std)
        features = embedder.model.get_image_features(pixels.permute(2, 0, 1)[None]).pooler_output
        rows.append(features / features.norm())
    return torch.cat(rows).detach()


def text_features(embedder: Embedder, texts: list[str]) -> torch.Tensor:
    tokens = embedder.tokenizer(texts, padding="max_length", max_length=8, return_tensors="pt")["input_ids"]
    features = embedder.model.get_text_features(tokens).pooler_output
    return (features / features.norm(dim=1, keepdim=True)).detach()


def test_zero_shot(embedder: Embedder, shards: Path) -> None:
    names = (shards / "classnames.txt").read_text().split("\n")[:-1]
    classes = torch.stack([text_features(embedder, [f"a {n}", f"the {n}"]).mean(0) for n in names])
    scores = image_features(embedder, shards) @ (classes / classes.norm(dim=1, keepdim=True)).T
    source = TarSource(str(shards))
    labels = [source.read(*where).label for where in sample_numbers(source)]
    ranks = [(row > row[label]).sum().item() for row, label in zip(scores, labels, strict=True)]
    found = zero_shot.run(embedder, str(shards))
    assert found["top1"] == pytest.approx(100 * np.mean([r < 1 for r in ranks]), abs=1.1)
    assert found["top5"] == pytest.approx(100 * np.mean([r < 5 for r in ranks]), abs=1.1)
    assert found["chance"] == 100 / 16


def test_retrieval(embedder: Embedder, shards: Path) -> None:
    source = TarSource(str(shards))
    captions = [source.read(*where).caption.decode() for where in sample_numbers(source)]
    scores = text_features(embedder, captions) @ image_features(embedder, shards).T
    found = retrieval.run(embedder, str(shards))
    for k in (1, 5, 10):
        for way, matrix in (("text_to_image", scores), ("image_to_text", scores.T)):
            nearest = matrix.topk(k).indices.tolist()
            hits = [any(captions[i] == captions[q] for i in row) for q, row in enumerate(nearest)]
            assert found[f"{way}_r{k}"] == pytest.approx(100 * np.mean(hits), abs=2.2)


def test_images_of_several_captions(embedder: Embedder, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, colour in enumerate(((0, 0, 255), (255, 0, 0), (0, 255, 0))):
            image = np.full((32, 32, 3), colour, np.uint8)
            add_member(tar, f"{number}.png", cv2.imencode(".png", image)[1].tobytes())
            add_member(tar, f"{number}.txt", f"a red\nthe blue {number}\n\n".encode())
    found = retrieval.run(embedder, str(tmp_path))
    # All three share their first caption, so every image is right for every text.
    assert found["text_to_image_r1"] == found["image_to_text_r1"] == 100.0


def test_suite_names_its_metrics(embedder: Embedder, shards: Path) -> None:
    found = run_suite(embedder, str(shards), str(shards))
    assert {"zero_shot/top1", "zero_shot/chance", "retrieval/text_to_image_r10"} <= found.keys()
    assert run_suite(embedder, None, None) == {}


def test_clip_s_templates() -> None:
    assert len(TEMPLATES["imagenet7"]) == 7
    assert len(set(TEMPLATES["imagenet80"])) == 80
    assert set(TEMPLATES["imagenet7"]) < set(TEMPLATES["imagenet80"])
    assert all(t.count("{c}") == 1 for t in TEMPLATES["imagenet80"])


def test_what_is_missing_is_named(embedder: Embedder, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"classnames.txt is missing; it lists the class names, one a line"):
        zero_shot.run(embedder, str(tmp_path))
    with pytest.raises(ValueError, match="templates 'imagenet9' are unknown; use one of imagenet7, imagenet80"):
        zero_shot.run(embedder, str(shards), "imagenet9")
    for file in shards.iterdir():
        if not file.name.endswith(".npy"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "classnames.txt").write_text("only one\n")
    with pytest.raises(ValueError, match=r"00000.tar#0 has class \d+; 1 names are listed"):
        zero_shot.run(embedder, str(tmp_path))
