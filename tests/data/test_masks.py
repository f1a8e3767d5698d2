"""Masks in the loader: keyed by sample, several views of one decoded crop, shorter captions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOWERS, changed_recipe
from data.conftest import pair_dataset

from flipscale.data.columns import pixels
from flipscale.data.decode import Crop, decode_crop
from flipscale.data.masks import keyed_patches, mask_tokens, removed_patches
from flipscale.data.pairs import PairDataset
from flipscale.data.randomness import keyed_uniform
from flipscale.model import FlipConfig, FlipModel
from flipscale.objectives.contrastive import Contrastive
from flipscale.objectives.reconstruction import WithReconstruction
from flipscale.recipe.data import MaskRecipe


def dataset(shards: Path, tokenizer_dir: Path, ratio: float, text_ratio: float = 0.0, **mask: object) -> PairDataset:
    options = {"mask": MaskRecipe(**mask), "text_mask_ratio": text_ratio}
    return pair_dataset(shards, tokenizer_dir, ratio, options=options)


def build_model(**text: object) -> FlipModel:
    torch.manual_seed(0)
    return FlipModel(FlipConfig(**changed_recipe(TOWERS, {"text_config": text}))).eval()


@pytest.mark.parametrize("kind", ["random", "grid", "block", "centre"])
def test_a_mask_is_a_function_of_seed_and_position(kind: str) -> None:
    index = keyed_patches(3, np.arange(100, 140), 8, 0.75, kind)
    assert index.dtype == np.int16
    assert index.shape == (40, 1, 16)
    alone = keyed_patches(3, np.array([117, 104]), 8, 0.75, kind)
    assert (alone == index[[17, 4]]).all()
    assert (keyed_patches(4, np.arange(100, 140), 8, 0.75, kind) != index).any()
    assert len({row.tobytes() for row in index[:, 0]}) > 10


@pytest.mark.parametrize("kept", [1, 16, 63])
def test_the_default_mask_is_the_smallest_of_the_sample_s_noise(kept: int) -> None:
    """The rule that the batches of every run so far were made by."""
    noise = keyed_uniform(0, "mask", np.arange(500), 64)
    expected = np.sort(np.argsort(noise, axis=1)[:, :kept], axis=1)
    assert (keyed_patches(0, np.arange(500), 8, 1 - kept / 64)[:, 0] == expected).all()


def test_two_views_of_half_are_the_whole_of_one_crop(
    shards: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions, decoded = list(range(100, 124)), []

    def counting(*arguments: object) -> Crop:
        decoded.append(arguments)
        return decode_crop(*arguments)

    monkeypatch.setattr(pixels, "decode_crop", counting)
    batch = dataset(shards, tokenizer_dir, 0.5, views=2).__getitems__(positions)
    assert len(decoded) == 24, "each image is decoded once"
    assert batch["patches"].shape == (24, 2, 8, 3 * 64)
    assert batch["patches"].dtype == torch.uint8
    assert batch["patch_index"].dtype == torch.int16
    assert batch["input_ids"].shape == (24, 8)
    index = batch["patch_index"].flatten(1).long()
    order = index.argsort(dim=1)
    assert (index.gather(1, order) == torch.arange(16)).all(), "no patch twice, and all of them"
    whole = dataset(shards, tokenizer_dir, 0.0).__getitems__(positions)["patches"]
    together = batch["patches"].flatten(1, 2).gather(1, order[:, :, None].expand(-1, -1, 3 * 64))
    assert torch.equal(together, whole)


def test_views_are_seen_whole_once_where_nothing_is_masked(shards: Path, tokenizer_dir: Path) -> None:
    batch = dataset(shards, tokenizer_dir, 0.0, views=2, kind="grid").__getitems__([0, 1])
    assert "patch_index" not in batch
    assert batch["patches"].shape == (2, 16, 3 * 64)


def test_captions_keep_their_words_and_say_where_they_stood(shards: Path, tokenizer_dir: Path) -> None:
    positions = list(range(24))
    whole = dataset(shards, tokenizer_dir, 0.5).__getitems__(positions)
    masked = dataset(shards, tokenizer_dir, 0.5, 0.5).__getitems__(positions)
    assert torch.equal(masked["patches"], whole["patches"])
    assert masked["input_ids"].shape == masked["position_ids"].shape == (24, 4)
    assert torch.equal(masked["input_ids"], whole["input_ids"].gather(1, masked["position_ids"]))
    assert (masked["attention_mask"].sum(dim=1) == 3).all(), "captions of three words lose padding only"
    assert torch.equal(masked["position_ids"][:, :3], torch.arange(3).expand(24, -1))
    fewer = dataset(shards, tokenizer_dir, 0.5, 0.5, text_kind="random").__getitems__(positions)
    assert (fewer["attention_mask"].sum(dim=1) < 3).any()


def test_a_token_mask_is_a_function_of_seed_and_position() -> None:
    tokens = {name: torch.arange(10 * 32).view(10, 32) for name in ("input_ids", "attention_mask")}
    for kind in ("random", "padding_first"):
        masked = mask_tokens(tokens, 1, np.arange(10), 0.5, kind)
        alone = mask_tokens({n: v[3:4] for n, v in tokens.items()}, 1, np.array([3]), 0.5, kind)
        assert all(torch.equal(alone[name], masked[name][3:4]) for name in alone)
        assert len({tuple(row) for row in masked["position_ids"].tolist()}) > 5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("text", [{}, {"attend_to_padding": False, "pooling": "mean"}], ids=["faithful", "clean"])
def test_masked_captions_are_embedded_without_what_was_removed(
    shards: Path, tokenizer_dir: Path, text: dict, attention: str
) -> None:
    model = build_model(**text)
    model.set_attn_implementation(attention)
    words = ("input_ids", "attention_mask", "position_ids")
    batch = dataset(shards, tokenizer_dir, 0.5, 0.5).__getitems__(list(range(24)))
    masked = model.get_text_features(**{name: batch[name] for name in words}).pooler_output
    whole = dataset(shards, tokenizer_dir, 0.5).__getitems__(list(range(24)))
    full = model.get_text_features(**{name: whole[name] for name in words[:2]}).pooler_output
    # Where padding takes no part, removing it changes nothing; where it does, its share of the attention falls.
    assert torch.allclose(masked, full, atol=1e-5) == bool(text)
    # Of a caption of one word, a random mask may leave none.
    bare = dataset(shards, tokenizer_dir, 0.5, 0.75, text_kind="random").__getitems__(list(range(24)))
    assert (bare["attention_mask"].sum(dim=1) == 0).any()
    assert model.get_text_features(**{name: bare[name] for name in words}).pooler_output.isfinite().all()


def test_the_masked_patches_are_sent_on_request(shards: Path, tokenizer_dir: Path) -> None:
    assert "masked_patches" not in dataset(shards, tokenizer_dir, 0.75).__getitems__([3, 4])
    reconstruction = WithReconstruction(other=Contrastive(), weight=1.0)
    batch = pair_dataset(shards, tokenizer_dir, 0.75, reconstruction.dataset).__getitems__([3, 4])
    assert batch["masked_patches"].shape == (2, 12, 3 * 64)
    assert batch["masked_patches"].dtype == torch.uint8
    whole = dataset(shards, tokenizer_dir, 0.0).__getitems__([3, 4])["patches"]
    places = removed_patches(batch["patch_index"].numpy(), 16)
    for row in range(2):
        assert torch.equal(batch["masked_patches"][row], whole[row, places[row]])
    data = pair_dataset(shards, tokenizer_dir, 0.0, reconstruction.dataset)
    assert "masked_patches" not in data.__getitems__([3, 4]), "nothing is masked"
