"""Inputs, positions, text, training and outputs of the models; `test_parity` compares them with the original."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flipscale.model import FlipModel, FlipVisionConfig
from flipscale.model.modeling_flip import sincos_positions
from flipscale.model.patches import keep_lowest, num_kept, patchify, take_patches

Small = Callable[..., FlipModel]


@pytest.mark.parametrize("kept", [1, 5, 16])
def test_patches_and_pixel_values_agree(model: FlipModel, images: torch.Tensor, kept: int) -> None:
    index = torch.stack([torch.randperm(16)[:kept] for _ in images])
    patches = take_patches(patchify(images, 8), index)
    whole = model.vision_model(pixel_values=images, patch_index=index)
    assert whole.last_hidden_state.shape == (3, kept + 1, 32)
    for integer in (torch.int64, torch.int32, torch.uint8):
        cut = model.vision_model(patches=patches, patch_index=index.to(integer))
        assert torch.equal(cut.last_hidden_state, whole.last_hidden_state)


def test_uint8_patches_are_normalised(model: FlipModel, images: torch.Tensor) -> None:
    pixels = (images * 255).round().to(torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    normalised = model.vision_model(pixel_values=(pixels / 255 - mean) / std).last_hidden_state
    index = torch.arange(16).expand(3, -1)
    for inputs in (
        {"patches": patchify(pixels, 8)},
        {"patches": patchify(pixels, 8), "patch_index": index},
        {"pixel_values": pixels},
    ):
        assert torch.allclose(model.vision_model(**inputs).last_hidden_state, normalised, atol=2e-6)


@pytest.mark.parametrize(("mask_ratio", "kept"), [(0.0, 16), (0.6, 6), (0.93, 1)])
def test_mask_ratio_is_the_fraction_removed(
    model: FlipModel, images: torch.Tensor, mask_ratio: float, kept: int
) -> None:
    output = model.vision_model(pixel_values=images, image_mask_ratio=mask_ratio, output_hidden_states=True)
    assert output.last_hidden_state.shape == (3, kept + 1, 32)
    assert [state.shape[1] for state in output.hidden_states] == [kept + 1] * 3
    assert num_kept(16, mask_ratio) == kept


def test_each_image_has_its_own_mask_from_the_global_generator(model: FlipModel, images: torch.Tensor) -> None:
    same = images[:1].expand(4, -1, -1, -1)
    torch.manual_seed(3)
    first = model(pixel_values=same, input_ids=torch.ones(1, 8).long(), image_mask_ratio=0.5).image_embeds
    torch.manual_seed(3)
    index = keep_lowest(torch.rand(4, 4, 4), 8)[:, 0]
    again = model.vision_model(pixel_values=same, patch_index=index).pooler_output
    assert torch.allclose(torch.nn.functional.normalize(model.image_projection(again)), first, atol=1e-6)
    assert len({tuple(row) for row in index.tolist()}) > 1
    assert all(row == sorted(set(row)) for row in index.tolist())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixel_values": torch.zeros(2, 3, 32, 32), "image_mask_ratio": -0.1}, "mask_ratio (is )?-0.1"),
        ({"pixel_values": torch.zeros(2, 3, 32, 32), "image_mask_ratio": 0.95}, "mask_ratio (is )?0.95"),
        ({}, "pixel_values and patches are both missing"),
        ({"patches": torch.zeros(2, 5, 192)}, "patches has 5 of 16 patches"),
        ({"patches": torch.zeros(2, 5, 64)}, r"patches has shape \(2, 5, 64\); expected \(batch, kept, 192\)"),
        (
            {"patches": torch.zeros(2, 5, 192), "patch_index": torch.zeros(2, 4).long()},
            r"patch_index has shape \(2, 4\); expected \(2, 5\)",
        ),
        (
            {"pixel_values": torch.zeros(2, 3, 32, 32), "patch_index": torch.zeros(1, 4).long()},
            r"patch_index has shape \(1, 4\); expected \(2, 4\)",
        ),
        (
            {"pixel_values": torch.zeros(2, 3, 32, 32), "patch_index": torch.zeros(2, 16).bool()},
            "patch_index is of torch.bool; expected integers",
        ),
        ({"pixel_values": torch.zeros(2, 1, 32, 32)}, r"shape \(2, 1, 32, 32\); expected \(batch, 3, height"),
        ({"pixel_values": torch.zeros(3, 32, 32)}, r"pixel_values has shape \(3, 32, 32\)"),
        ({"pixel_values": torch.zeros(2, 3, 40, 32)}, "pixel_values are 40x32; expected 32x32"),
        (
            {"pixel_values": torch.zeros(2, 3, 36, 40), "interpolate_pos_encoding": True},
            "pixel_values are 36x40; expected multiples of patch_size 8",
        ),
        ({"patches": torch.zeros(2, 4, 192), "image_size": 20}, "image_size 20 .*use 16 or 24"),
        ({"patches": torch.zeros(2, 16, 192), "image_size": 16}, "patches has 16 of 4 patches"),
        ({"pixel_values": torch.zeros(2, 3, 32, 32), "image_size": 16}, "pixel_values are 32x32; expected 16x16"),
    ],
)
def test_wrong_image_inputs(model: FlipModel, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.vision_model(**inputs)


def test_positions_encode_the_column_first_then_the_row() -> None:
    table = sincos_positions(8, rows=2, columns=3)
    step = torch.tensor([1.0, 0.01])
    for row in range(2):
        for column in range(3):
            parts = [(column * step).sin(), (column * step).cos(), (row * step).sin(), (row * step).cos()]
            assert torch.allclose(table[3 * row + column], torch.cat(parts), atol=1e-6)


def test_positions_of_another_size() -> None:
    """In the slowest frequencies, sines are the coordinates: a patch has the mean of the smaller patches it covers."""
    width, coarse, fine = 64, sincos_positions(64, 4, 4, side=8), sincos_positions(64, 8, 8)
    slowest = [width // 4 - 1, 3 * width // 4 - 1]  # sines of column and row
    covered = fine[:, slowest].view(4, 2, 4, 2, 2).mean(dim=(1, 3)).view(16, 2)
    assert torch.allclose(coarse[:, slowest], covered, rtol=1e-5, atol=0.0)
    assert not torch.allclose(fine.view(8, 8, width)[::2, ::2].reshape(16, width)[:, slowest], covered, rtol=1e-2)
    # As transformers and open_clip interpolate learned tables.
    table = fine.double().view(1, 8, 8, width).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(table, (16, 16), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    ours = sincos_positions(width, 16, 16, side=8).view(16, 16, width).double()
    assert (ours - resized)[4:-4, 4:-4].abs().max() < 0.04
    # At three times the size, the middle patch of three has the original position.
    assert torch.allclose(sincos_positions(width, 24, 24, side=8).view(24, 24, width)[1::3, 1::3].reshape(64, -1), fine)
    assert torch.equal(sincos_positions(width, 8, 8, side=8), fine)
    # A wide picture is centred.
    wide = sincos_positions(width, 4, 8, side=8)
    assert torch.allclose(wide, fine.view(8, 8, width)[2:6].reshape(32, width), atol=1e-6)


def test_images_of_another_size(model: FlipModel, images: torch.Tensor) -> None:
    tower, small = model.vision_model, nn.functional.interpolate(images, (16, 16))
    asked = tower(pixel_values=small, interpolate_pos_encoding=True).pooler_output
    assert torch.equal(tower(pixel_values=small, image_size=16).pooler_output, asked)
    patches = patchify(small, 8)
    assert torch.equal(tower(patches=patches, image_size=16).pooler_output, asked)
    index = torch.tensor([[3, 0, 1, 2]]).expand(len(patches), -1)
    shuffled = tower(patches=take_patches(patches, index), patch_index=index, image_size=16).pooler_output
    assert torch.allclose(shuffled, asked, atol=1e-6)
    assert not torch.allclose(tower(patches=patches, patch_index=index.sort().values).pooler_output, asked, atol=1e-3)
    wide = tower(pixel_values=torch.zeros(1, 3, 24, 48), interpolate_pos_encoding=True)
    assert wide.last_hidden_state.shape == (1, 3 * 6 + 1, 32)
    own = tower(pixel_values=images).pooler_output
    for same in ({"image_size": 32}, {"interpolate_pos_encoding": True}):
        assert torch.equal(tower(pixel_values=images, **same).pooler_output, own)


def test_position_size_keeps_the_trained_coordinates(model: FlipModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    large, pixels = {"image_size": 64, "position_size": 32}, torch.rand(2, 3, 64, 64)
    bigger = FlipModel.from_pretrained(tmp_path, vision_config=large).eval()
    asked = model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True).pooler_output
    assert torch.equal(bigger.vision_model(pixel_values=pixels).pooler_output, asked)
    small = torch.rand(2, 3, 16, 16)
    asked = model.vision_model(pixel_values=small, image_size=16).pooler_output
    assert torch.equal(bigger.vision_model(pixel_values=small, image_size=16).pooler_output, asked)
    bigger.save_pretrained(tmp_path / "bigger")
    content = json.loads((tmp_path / "bigger/config.json").read_text())
    assert (content["vision_config"]["model_format"], content["vision_config"]["position_size"]) == (2, 32)
    again = FlipModel.from_pretrained(tmp_path / "bigger")
    assert torch.equal(
        again.vision_model.embeddings.position_embedding, bigger.vision_model.embeddings.position_embedding
    )
    with pytest.raises(ValueError, match="position_size 30"):
        FlipVisionConfig(image_size=64, patch_size=8, position_size=30)


@pytest.mark.parametrize(
    ("attn_implementation", "attend_to_padding", "pooling"),
    [("eager", True, "mean"), ("sdpa", True, "first"), ("eager", False, "first"), ("sdpa", False, "mean")],
)
def test_padding_does_not_change_the_embedding(
    small: Small, captions: torch.Tensor, attend_to_padding: bool, pooling: str, attn_implementation: str
) -> None:
    text = {"attend_to_padding": attend_to_padding, "pooling": pooling}
    # In fp64 rounding is 1e-15, and what padding would change is not.
    model = small(text=text, attn_implementation=attn_implementation).text_model.double()
    full = model(captions)
    for caption, length, expected, states in zip(captions, (5, 2, 8), full.pooler_output, full[0], strict=True):
        for padded in range(length, 9):
            for mask in (None, (torch.arange(padded) < length).long()[None]):
                output = model(caption[None, :padded], attention_mask=mask)
                assert torch.allclose(output.pooler_output[0], expected, rtol=0.0, atol=1e-12)
                assert output.last_hidden_state.shape == (1, padded, 24)
                assert torch.allclose(output.last_hidden_state[0, :length], states[:length], rtol=0.0, atol=1e-12)
    # The host does not wait for a check of the padding: reading from tensors on the meta device is an error.
    assert model.to("meta")(captions.to("meta")).pooler_output.shape == (3, 24)


def test_hidden_states_and_attentions_without_padding(small: Small, captions: torch.Tensor) -> None:
    model = small(attn_implementation="eager").text_model
    output = model(captions[:, :5], output_hidden_states=True, output_attentions=True)
    full = model(captions, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(3, 5, 24)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 4, 5, 5)] * 2
    # Not the last caption, because it is longer than 5 tokens and cut here.
    for short, whole in zip(output.hidden_states, full.hidden_states, strict=True):
        assert torch.allclose(short[:2], whole[:2, :5], atol=1e-6)
    for short, whole in zip(output.attentions, full.attentions, strict=True):
        assert torch.allclose(short[:2], whole[:2, :, :5, :5], atol=1e-6)


def test_missing_and_long_captions(model: FlipModel, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="input_ids has 9 tokens"):
        model.text_model(torch.ones(1, 9).long(), position_ids=torch.zeros(1, 9).long())
    cut = model.text_model(torch.ones(1, 9).long())
    assert torch.equal(cut.pooler_output, model.text_model(torch.ones(1, 8).long()).pooler_output)
    for given in ({"attention_mask": torch.ones(len(images), 8).long()}, {"return_loss": True}):
        with pytest.raises(ValueError, match="input_ids is missing"):
            model(pixel_values=images, **given)
    alone, features = model(pixel_values=images), model.get_image_features(images)
    assert torch.equal(alone.pooler_output, features.pooler_output)
    assert torch.equal(alone[0], features.last_hidden_state)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_has_the_same_gradients(
    model: FlipModel, images: torch.Tensor, captions: torch.Tensor, use_reentrant: bool
) -> None:
    index = torch.stack([torch.randperm(16)[:6] for _ in images])
    inputs = {"pixel_values": images, "patch_index": index, "input_ids": captions[:, :6], "return_loss": True}
    gradients = []
    for recompute in (False, True):
        model.train().zero_grad()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model(**inputs).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
