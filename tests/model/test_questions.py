"""FlipForQuestionAnswering: kernels, folders, views and errors."""

from pathlib import Path

import pytest
import torch
from conftest import TOWER

from flipscale.model import FlipConfig, FlipForQuestionAnswering, FlipModel

CONFIG = {
    "vision_config": {**TOWER, "image_size": 32, "patch_size": 8},
    "text_config": {**TOWER, "vocab_size": 16, "max_position_embeddings": 8, "attend_to_padding": False},
    "projection_dim": 16,
}
ANSWERS = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(**answers: object) -> FlipForQuestionAnswering:
    torch.manual_seed(0)
    return FlipForQuestionAnswering(FlipConfig(**CONFIG, answer_config={**ANSWERS, "num_answers": 5, **answers})).eval()


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 16, (6, 8), generator=generator) * (torch.arange(8) < torch.arange(1, 7)[:, None])
    return {"input_ids": ids, "pixel_values": torch.randn(6, 3, 32, 32, generator=generator)}


def test_towers_load_from_and_into_a_flip_model(tmp_path: Path) -> None:
    torch.manual_seed(1)
    towers = FlipModel(FlipConfig(**CONFIG))
    towers.save_pretrained(tmp_path / "towers")
    config = FlipConfig(**CONFIG, answer_config=ANSWERS)
    model = FlipForQuestionAnswering.from_pretrained(tmp_path / "towers", config=config)
    own = {name for name in model.state_dict() if name.startswith("fusion.")}
    assert model.state_dict().keys() - own == towers.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in towers.state_dict().items())
    model.save_pretrained(tmp_path / "answers")
    again = FlipForQuestionAnswering.from_pretrained(tmp_path / "answers").eval()
    assert torch.equal(again(**inputs()).logits, model.eval()(**inputs()).logits)
    back, report = FlipModel.from_pretrained(tmp_path / "answers", output_loading_info=True)
    assert not report["missing_keys"]
    assert all(torch.equal(back.state_dict()[name], weight) for name, weight in towers.state_dict().items())


def test_masks_and_views() -> None:
    model, asked = build(), inputs()
    patches = torch.randint(0, 256, (6, 2, 4, 192), dtype=torch.uint8)
    index = torch.rand(6, 16).argsort(dim=1)[:, :8].view(6, 2, 4)
    labels = torch.rand(6, 5)
    with torch.no_grad():
        both = model(asked["input_ids"], patches=patches, patch_index=index, labels=labels)
        first = model(asked["input_ids"], patches=patches[:, 0], patch_index=index[:, 0], labels=labels)
    assert torch.allclose(both.logits[::2], first.logits, atol=1e-6)
    assert torch.allclose(both.answer_losses[::2], first.answer_losses, atol=1e-5)


def test_long_questions_are_cut() -> None:
    model, asked = build(), inputs()
    longer = torch.nn.functional.pad(asked["input_ids"].clamp(min=1), (0, 3), value=3)
    asked["input_ids"] = longer[:, :8]
    assert torch.equal(model(**asked | {"input_ids": longer}).logits, model(**asked).logits)


def test_missing_parts_and_inputs() -> None:
    with pytest.raises(ValueError, match="the config has no answer_config"):
        FlipForQuestionAnswering(FlipConfig(**CONFIG))
    with pytest.raises(ValueError, match="input_ids is missing"):
        build()(pixel_values=torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="num_answers is 0"):
        build(num_answers=0)
