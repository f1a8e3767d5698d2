"""FlipForImageClassification, and its fine-tuning by transformers' Trainer from a FlipModel's folder."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS, SHAPES
from PIL import Image
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from flipscale.data.samples import SampleNumbers
from flipscale.data.sources.tar import TarSource
from flipscale.model import FlipForImageClassification, FlipModel


@pytest.fixture
def folder(model: FlipModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "flip")
    return tmp_path / "flip"


def test_keeps_the_image_tower_and_starts_a_head(folder: Path, model: FlipModel, images: torch.Tensor) -> None:
    loaded, report = FlipForImageClassification.from_pretrained(folder, num_labels=5, output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not report["unexpected_keys"]
    for name, value in model.vision_model.state_dict().items():
        assert torch.equal(loaded.vision_model.state_dict()[name], value), name
    with torch.no_grad():
        logits = loaded(images).logits
        pooled = model.vision_model(images).pooler_output
    assert logits.shape == (3, 5)
    assert torch.allclose(logits, pooled @ loaded.classifier.weight.T + loaded.classifier.bias, atol=1e-6)
    assert 0.01 < loaded.classifier.weight.std() < 0.03


def test_loss_is_cross_entropy_and_patches_may_be_masked(folder: Path, images: torch.Tensor) -> None:
    model = FlipForImageClassification.from_pretrained(folder, num_labels=5)
    labels = torch.tensor([0, 4, 2])
    output = model(images, labels=labels)
    assert output.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(output.logits, labels).item())
    index = torch.tensor([[0, 5], [3, 15], [7, 8]])
    masked = model(images, labels=labels, patch_index=index, output_hidden_states=True)
    assert masked.hidden_states[-1].shape == (3, 3, 32)


def test_the_kernel_of_a_tower_that_it_lacks_is_left_alone(
    folder: Path, images: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers warns of undefined behaviour where a configuration has no part of the model."""
    model = FlipForImageClassification.from_pretrained(folder, num_labels=5).eval()
    before = model.config.text_config._attn_implementation
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        expected = model(images).logits
        model.set_attn_implementation("eager")
        assert torch.allclose(model(images).logits, expected, atol=1e-5)
    assert model.config._attn_implementation == model.vision_model.config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == before != "eager"
    assert "undefined behavior" not in caplog.text


@pytest.mark.long
def test_transformers_trainer(folder: Path, shards: Path, tmp_path: Path) -> None:
    source = TarSource(str(shards))
    samples = [source.read(*where) for where in SampleNumbers(source)]

    def pixels(encoded: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(encoded)).convert("RGB").resize((32, 32))
        return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0

    data = [{"pixel_values": pixels(s.image), "labels": s.label // len(SHAPES)} for s in samples]
    labels = dict(enumerate(COLOURS))
    model = AutoModelForImageClassification.from_pretrained(
        folder, id2label=labels, label2id={name: number for number, name in labels.items()}
    )
    arguments = TrainingArguments(
        str(tmp_path / "out"), num_train_epochs=10, per_device_train_batch_size=32, learning_rate=3e-3,
        logging_steps=3, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.75 * before
    trainer.save_model(str(tmp_path / "tuned"))
    tuned = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned")
    assert tuned.config.id2label == labels
    assert torch.equal(tuned.classifier.weight, model.classifier.weight)
    assert (tmp_path / "tuned" / "modeling_flip.py").is_file()
