"""Reconstruction of masked patches: a second loss, which leaves nothing in the export."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TOWERS, metrics
from safetensors.torch import load_file

from flipscale.cli import main
from flipscale.data.masks import keep_patches
from flipscale.engines.checkpoint import CheckpointReader
from flipscale.engines.first_weights import build_weights, fresh_weights
from flipscale.model import FlipConfig, FlipModel, FlipVisionConfig
from flipscale.model.patches import complement, take_patches
from flipscale.objectives.reconstruction import ReconstructingFlipModel, ReconstructionDecoder, pixel_loss

CONFIG = FlipConfig(**TOWERS)


def build(kind: type[FlipModel]) -> FlipModel:
    return build_weights(CONFIG, lambda _: None, fresh_weights(0), lambda _: None, kind)


def batch() -> dict[str, torch.Tensor]:
    """Six images of smooth colour gradients, half of each masked."""
    generator = torch.Generator().manual_seed(0)
    base, slope = (torch.rand(6, size, 3, 1, generator=generator) for size in (16, 1))
    whole = (base * 100 + torch.arange(64) * slope).to(torch.uint8).flatten(2)
    index = keep_patches(torch.rand(6, 4, 4, generator=generator), 0.5)[:, 0]
    return {
        "patches": take_patches(whole, index),
        "patch_index": index.to(torch.int16),
        "masked_patches": take_patches(whole, complement(index, 16)),
        "input_ids": torch.randint(1, 16, (6, 8), generator=generator),
    }


def test_complement() -> None:
    index = keep_patches(torch.rand(20, 6, 6), 0.6)[:, 0]
    absent = complement(index, 36)
    assert (absent.diff(dim=1) > 0).all()
    assert (torch.cat([index, absent], dim=1).sort(dim=1).values == torch.arange(36)).all()
    assert complement(torch.arange(4)[None], 4).shape == (1, 0)


def test_the_decoder_does_not_change_the_model() -> None:
    plain, training = build(FlipModel), build(ReconstructingFlipModel)
    state = training.state_dict()
    assert {n for n in state if not n.startswith("reconstruction.")} == plain.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    inputs = {name: value for name, value in batch().items() if name != "masked_patches"}
    ours = training.eval()(**inputs | {"masked_patches": batch()["masked_patches"]}, return_logits=False)
    assert torch.equal(ours.image_embeds, plain.eval()(**inputs).image_embeds)


def test_pixel_loss_normalises_patches() -> None:
    pixels = torch.randint(0, 256, (2, 3, 192), generator=torch.Generator().manual_seed(0))
    centred = pixels.double() - pixels.double().mean(dim=2, keepdim=True)
    target = centred / centred.square().mean(dim=2, keepdim=True).sqrt()
    assert pixel_loss(target, pixels).item() < 1e-9
    assert pixel_loss(torch.zeros(2, 3, 192), pixels).item() == pytest.approx(1.0)
    assert pixel_loss(torch.zeros(2, 0, 192), pixels[:, :0]).item() == 0.0


def test_the_decoder_has_any_width_that_positions_have() -> None:
    for width, heads in ((448, 7), (64, 2)):
        tower = FlipVisionConfig(hidden_size=width, num_attention_heads=heads, num_hidden_layers=1, image_size=32)
        decoder = ReconstructionDecoder.for_tower(tower)
        tokens, places = torch.zeros(1, 3, width), torch.arange(4)[None]
        assert decoder(tokens, places[:, :2], places[:, 2:]).shape == (1, 2, 768)
    with pytest.raises(ValueError, match="hidden_size is 68"):
        ReconstructionDecoder.for_tower(FlipVisionConfig(hidden_size=68, num_attention_heads=2))


def test_the_decoder_learns_and_trains_the_image_tower() -> None:
    model = build(ReconstructingFlipModel)
    inputs = batch()
    first = model(**inputs, return_logits=False).second_losses
    first.backward()
    for name, parameter in model.named_parameters():
        trained = name.startswith(("vision_model.", "reconstruction."))
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, name
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**inputs, return_logits=False).second_losses
        loss.backward()
        optimizer.step()
    assert first.item() > 1.0
    assert loss.item() < 0.8, "a constant prediction has 1"


def test_without_mask_gradients_are_zero() -> None:
    model = build(ReconstructingFlipModel)
    patches = torch.randint(0, 256, (2, 16, 192), dtype=torch.uint8)
    output = model(patches=patches, input_ids=torch.ones(2, 8).long(), return_logits=False)
    assert output.second_losses.item() == 0.0
    output.second_losses.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("reconstruction."):
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_a_run_leaves_nothing_in_the_export(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    stages = [{"name": "masked", "samples": 96, "mask_ratio": 0.5, "base_lr": 0.012}, {"name": "whole", "samples": 32}]
    main(["pretrain", "--config", str(write_recipe(tmp_path, stages=stages, loss={"reconstruction_weight": 2.0}))])
    losses, pixels = ([r[name] for r in metrics(tmp_path) if "loss" in r] for name in ("loss", "reconstruction_loss"))
    assert pixels[0] == pytest.approx(1.1, abs=0.3)
    assert pixels[-2:] == [0.0, 0.0]
    # ln 16 for the pairs, and 2 x about 1.1 for the pixels; the last two steps have no mask.
    assert losses[0] == pytest.approx(2.77 + 2.3, abs=0.6)
    assert losses[-1] < 3.2
    exported = load_file(tmp_path / "model/model.safetensors")
    assert exported.keys() == FlipModel(CONFIG).state_dict().keys()
    saved = CheckpointReader(tmp_path / "checkpoints/step-00000008")
    assert saved.tensor("weight", "reconstruction.mask_token").shape == (16,)
    assert all(torch.equal(saved.tensor("weight", name), tensor) for name, tensor in exported.items())
    assert '"FlipModel"' in (tmp_path / "model/config.json").read_text()
