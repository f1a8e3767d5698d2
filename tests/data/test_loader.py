"""Batches are a pure function of (recipe, step), and hold what the model can take."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from flipscale.data.decode import DRAWS_PER_CROP, decode_box
from flipscale.data.loader import DataRecipe, InputShape, PairDataset, StepSampler, build_loader
from flipscale.data.randomness import keyed_uniform
from flipscale.data.tar_source import TarSource
from flipscale.model import FlipConfig, FlipModel

SHAPE = InputShape(image_size=32, patch_size=8, max_tokens=8)


def dataset(shards: Path, tokenizer_dir: Path, mask_ratio: float, **fields: object) -> PairDataset:
    recipe = DataRecipe(shards=str(shards), global_batch_size=24, shards_per_block=2, **{"num_workers": 0, **fields})
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return PairDataset(TarSource(str(shards)), tokenizer, recipe, SHAPE, seed=5, mask_ratio=mask_ratio)


def batches(data: PairDataset, world_size: int, first_step: int = 0) -> list[dict[str, torch.Tensor]]:
    """Global batches of five steps, put together from every rank's part."""
    loaders = [build_loader(data, first_step, 5, rank, world_size, pin_memory=False) for rank in range(world_size)]
    return [
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in zip(*loaders, strict=True)
    ]


def assert_equal(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_same_batches_at_any_world_size(shards: Path, tokenizer_dir: Path, world_size: int) -> None:
    data = dataset(shards, tokenizer_dir, 0.75)
    assert_equal(batches(data, 1), batches(data, world_size))


@pytest.mark.parametrize("num_workers", [1, 3])
def test_same_batches_with_any_workers_and_after_a_resume(shards: Path, tokenizer_dir: Path, num_workers: int) -> None:
    data = dataset(shards, tokenizer_dir, 0.75)
    with_workers = dataset(shards, tokenizer_dir, 0.75, num_workers=num_workers)
    assert_equal(batches(data, 1)[3:], batches(with_workers, 1, first_step=3))


def test_patches_equal_pixel_values(shards: Path, tokenizer_dir: Path) -> None:
    """What a worker sends gives the same embeddings as the whole images with the same patches kept."""
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = FlipConfig(
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        text_config={**tower, "vocab_size": 16, "max_position_embeddings": 8},
    )
    model = FlipModel(config).eval()
    data = dataset(shards, tokenizer_dir, 0.75)
    batch = data.__getitems__(list(range(100, 124)))
    assert batch["patches"].dtype == torch.uint8
    assert batch["patches"].shape == (24, 4, 3 * 64)
    assert batch["patch_index"].dtype == torch.int16

    where = np.arange(100, 124)
    draws = keyed_uniform(5, "crop", where, DRAWS_PER_CROP)
    images = [
        decode_box(data.source.read(shard, number).image, draws[row], 32, (0.5, 1.0))
        for row, (shard, number) in enumerate(zip(*(n.tolist() for n in data.order.locate(where)), strict=True))
    ]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (config.vision_config.image_mean, config.vision_config.image_std)
    )
    pixel_values = (pixels - mean) / std
    sent = model.get_image_features(patches=batch["patches"], patch_index=batch["patch_index"]).pooler_output
    whole = model.get_image_features(pixel_values, patch_index=batch["patch_index"]).pooler_output
    assert (sent - whole).abs().max() < 1e-6


def test_unmasked_batches_have_every_patch(shards: Path, tokenizer_dir: Path) -> None:
    batch = dataset(shards, tokenizer_dir, 0.0).__getitems__([0, 1])
    assert "patch_index" not in batch
    assert batch["patches"].shape == (2, 16, 3 * 64)


def test_captions_are_cut_and_padded_to_the_model(shards: Path, tokenizer_dir: Path) -> None:
    batch = dataset(shards, tokenizer_dir, 0.0).__getitems__(list(range(24)))
    assert batch["input_ids"].shape == (24, 8)
    assert (batch["attention_mask"].sum(dim=1) == 3).all()


def test_steps_are_shared_out_without_gap_or_overlap() -> None:
    parts = [list(StepSampler(2, 4, 12, rank, 3)) for rank in range(3)]
    assert [parts[rank][0] for rank in range(3)] == [[24, 25, 26, 27], [28, 29, 30, 31], [32, 33, 34, 35]]
    assert len(StepSampler(2, 4, 12, 0, 3)) == 2


@pytest.mark.parametrize(("world_size", "fix"), [(48, "use 32 or 64 processes, or 65520"), (3, "use 2 or 4 processes")])
def test_an_indivisible_batch_is_refused(world_size: int, fix: str) -> None:
    with pytest.raises(ValueError, match=f"global_batch_size 65536 is not divisible by {world_size} processes; {fix}"):
        StepSampler(0, 1, 65536, 0, world_size)
