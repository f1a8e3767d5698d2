"""Maps of where a text is: against formulas of each kind of model, and by pointing at parts of mosaics."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import COLOURS, SHAPES, TOWER, TOWERS, draw, write_shards
from evaluation.tiny_model import tiny_embedder
from foreign_towers import shaken
from torch.nn.functional import linear, normalize
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from examples.demo import pointing
from flipscale.api import explain
from flipscale.data.captions import tokenise
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.explain import patch_embeds
from flipscale.model import FlipConfig, FlipModel
from flipscale.objectives.contrastive import contrastive_loss


def model_of() -> FlipModel:
    return shaken(FlipModel(FlipConfig(**TOWERS, projection_dim=16)))


def embedder_of(model: Any, tokenizer: Any = None) -> Embedder:
    return Embedder(model, tokenizer, Accelerator(cpu=True), name="mine")


@pytest.mark.parametrize("dims", [None, 5])
def test_the_mean_over_tokens_is_the_cosine(dims: int | None) -> None:
    """The class token is in the mean, and no part of the map."""
    cut, pixels = replace(embedder_of(model_of()), dims=dims), torch.randn(3, 3, 32, 32)
    patches, model = patch_embeds(cut, pixel_values=pixels), cut.model
    assert patches.shape == (3, 4, 4, dims or 16)
    with torch.no_grad():
        features = cut.image_features(pixel_values=pixels)[:, :dims]
        token = model.image_projection(model.vision_model(pixels).last_hidden_state[:, 0])[:, :dims]
    token = token / features.norm(dim=1, keepdim=True)
    text = normalize(torch.randn(dims or 16), dim=0)
    mean = ((patches @ text).sum((1, 2)) + token @ text) / 17
    assert torch.allclose(mean, cut.unit_embeds(features) @ text, atol=1e-6)


def hooked(module: torch.nn.Module, found: list[torch.Tensor]) -> Any:
    return module.register_forward_hook(lambda _, inputs, output: found.append(output))


def test_clip_has_values_of_the_last_block() -> None:
    model, pixels = shaken(CLIPModel(CLIPConfig(**TOWERS, projection_dim=12))), torch.randn(2, 3, 32, 32)
    vision, found = model.vision_model, list[torch.Tensor]()
    with torch.no_grad(), hooked(vision.encoder.layers[1].layer_norm1, found):
        vision(pixels)
        attention = vision.encoder.layers[1].self_attn
        values = linear(found[0], attention.v_proj.weight, attention.v_proj.bias)
        states = vision.post_layernorm(linear(values, attention.out_proj.weight, attention.out_proj.bias))
        expected = normalize(model.visual_projection(states)[:, 1:], dim=-1).unflatten(1, (4, 4))
    assert torch.allclose(patch_embeds(embedder_of(model), pixel_values=pixels), expected, atol=1e-6)


def test_siglip_has_values_of_the_pooling_head() -> None:
    model, pixels = shaken(SiglipModel(SiglipConfig(**TOWERS))), torch.randn(2, 3, 32, 32)
    head, width = model.vision_model.head, TOWER["hidden_size"]
    with torch.no_grad():
        tokens = model.vision_model(pixels).last_hidden_state
        weights = head.attention.in_proj_weight[2 * width :], head.attention.in_proj_bias[2 * width :]
        values = head.attention.out_proj(linear(tokens, *weights))
        expected = normalize(values + head.mlp(head.layernorm(values)), dim=-1).unflatten(1, (4, 4))
    assert torch.allclose(patch_embeds(embedder_of(model), pixel_values=pixels), expected, atol=1e-6)


def test_other_models_are_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    other: Any = SimpleNamespace(vision_model=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="mine is a SimpleNamespace"):
        patch_embeds(embedder_of(other))
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png cannot be read as a picture"):
        explain(tiny_embedder(tokenizer_dir, batch_size=4), tmp_path / "a.png", "a red disc")
    texts: list[Any] = ["", " \n", "\ud800", 7, ["a", "b"]]
    for text in texts:
        with pytest.raises(ValueError, match=r"text is .*; expected words"):
            explain(tiny_embedder(tokenizer_dir, batch_size=4), tmp_path / "a.png", text)


@pytest.fixture(scope="module")
def learned(tokenizer_dir: Path) -> Embedder:
    """A model that has seen single pictures with captions such as `a red disc` for a hundred steps."""
    torch.manual_seed(0)
    tokenizer, rng = AutoTokenizer.from_pretrained(tokenizer_dir), np.random.default_rng(0)
    model = copy.deepcopy(model_of()).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    ids = tokenise(tokenizer, [f"a {colour} {shape}" for colour, shape in kinds], 8)["input_ids"]
    mean, std = (torch.tensor(getattr(model.config.vision_config, name)) for name in ("image_mean", "image_std"))
    for _ in range(100):
        images = np.stack([cv2.resize(draw(*kind, rng), (32, 32), interpolation=cv2.INTER_AREA) for kind in kinds])
        pixels = ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2)
        output = model(ids, pixels, return_logits=False)
        contrastive_loss(output.image_embeds, output.text_embeds, torch.tensor([10.0])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return embedder_of(model.eval(), tokenizer)


def test_pointing(learned: Embedder, tmp_path: Path) -> None:
    """The highest patch of a mosaic is in the picture that a caption names, far above chance."""
    write_shards(tmp_path, [80])
    pointed = list(pointing.points(learned, TarSource(str(tmp_path))))
    assert len(pointed) == 80
    assert {one.place for one in pointed} == {0, 1, 2, 3}
    share = sum(one.pointed == one.place for one in pointed) / 80
    assert share > 0.5, "chance is 0.25"
    pointing.draw(pointed[:3], tmp_path / "pointing.png")
    assert (tmp_path / "pointing.png").read_bytes().startswith(b"\x89PNG")
    assert np.array_equal(
        [one.pointed for one in pointing.points(learned, TarSource(str(tmp_path)))], [one.pointed for one in pointed]
    )


def test_explain_reads_a_file(learned: Embedder, tmp_path: Path) -> None:
    picture = np.full((32, 64, 3), 230, np.uint8)
    picture[8:24, 34:46] = COLOURS["red"]  # in the right half of the centred square
    cv2.imwrite(str(tmp_path / "a.png"), picture[..., ::-1])
    heat = explain(learned, tmp_path / "a.png", "a red disc")
    assert heat.shape == (4, 4)
    assert heat[:, 2:].max() > heat[:, :2].max()
