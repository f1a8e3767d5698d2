"""Batches are a pure function of (recipe, step), and hold what the model can take."""

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TOWERS
from data.conftest import SHAPE, assert_equal, crops_of, pair_dataset

from flipscale.data import loader
from flipscale.data.columns.tokens import caption_ids
from flipscale.data.decode import visible_patches
from flipscale.data.loader import PackedBatch, StepSampler, build_loader, check_shared_memory
from flipscale.data.pairs import PairDataset
from flipscale.model import FlipConfig, FlipModel
from flipscale.objectives.sigmoid import Sigmoid
from flipscale.recipe.augment import AugmentRecipe, ColorJitterRecipe

COLORS = AugmentRecipe(color_jitter=ColorJitterRecipe(0.3, 0.2, 0.4, 0.1, 0.8))


def batches(data: PairDataset, world_size: int, first_step: int = 0) -> list[dict[str, torch.Tensor]]:
    """Global batches of five steps, put together from every rank's part."""
    loaders = [build_loader(data, first_step, 5, rank, world_size) for rank in range(world_size)]
    return [
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in zip(*loaders, strict=True)
    ]


@pytest.fixture(scope="module")
def whole(shards: Path, tokenizer_dir: Path) -> list[dict[str, torch.Tensor]]:
    """The five batches of one process without workers: an epoch of 96 samples in four, and the first of the next."""
    return batches(pair_dataset(shards, tokenizer_dir, augment=COLORS), 1)


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (8, 0), (3, 4)])
def test_same_batches_at_any_world_size_with_any_workers_and_after_a_resume(
    shards: Path, tokenizer_dir: Path, whole: list[dict[str, torch.Tensor]], world_size: int, num_workers: int
) -> None:
    """All columns of the global batch, with changed colours; resumed at every step without workers, at one with."""
    data = pair_dataset(shards, tokenizer_dir, num_workers=num_workers, augment=COLORS)
    for first_step in range(5) if num_workers == 0 else [(world_size + num_workers) % 5]:
        assert_equal(whole[first_step:], batches(data, world_size, first_step))


def test_without_mirror_the_same_crops_are_as_they_were_taken(shards: Path, tokenizer_dir: Path) -> None:
    sets = (pair_dataset(shards, tokenizer_dir, 0.0, mirror=mirror) for mirror in (True, False))
    # Rows and columns of patches, then channels, rows and columns of pixels.
    either, plain = (data.__getitems__(list(range(24)))["patches"].view(24, 4, 4, 3, 8, 8) for data in sets)
    mirrored = (either != plain).flatten(1).any(dim=1)
    assert 0 < mirrored.sum() < 24
    assert torch.equal(either.flip(2, 5)[mirrored], plain[mirrored])


def test_caption_ids_are_of_the_tokens_before_their_mask(shards: Path, tokenizer_dir: Path) -> None:
    plain = pair_dataset(shards, tokenizer_dir, 0.0)
    equal_captions = Sigmoid(positives="equal_captions")
    masked = pair_dataset(shards, tokenizer_dir, 0.0, equal_captions.dataset, {"text_mask_ratio": 0.5})
    whole, batch = (data.__getitems__(list(range(96))) for data in (plain, masked))
    assert "caption_ids" not in whole
    ids, tokens = batch["caption_ids"], whole["input_ids"]
    equal = (tokens[:, None] == tokens).all(dim=2)
    assert 96 < equal.sum() < 96**2
    assert torch.equal(ids[:, None] == ids, equal)
    assert batch["input_ids"].shape[1] < tokens.shape[1]
    assert caption_ids(torch.tensor([[1, 2]])).tolist() == [-6_578_062_687_609_052_266], (
        "processes of other machines have others"
    )


def test_patches_equal_pixel_values(shards: Path, tokenizer_dir: Path) -> None:
    """What a worker sends gives the same embeddings as the whole images with the same patches kept."""
    model = FlipModel(FlipConfig(**TOWERS)).eval()
    data = pair_dataset(shards, tokenizer_dir)
    batch = data.__getitems__(list(range(100, 124)))
    assert batch["patches"].dtype == torch.uint8
    assert batch["patches"].shape == (24, 4, 3 * 64)
    assert batch["patch_index"].dtype == torch.int16

    pixels = torch.from_numpy(np.stack(crops_of(data, np.arange(100, 124)))).permute(0, 3, 1, 2).float() / 255
    vision = model.config.vision_config
    mean, std = (torch.tensor(value)[:, None, None] for value in (vision.image_mean, vision.image_std))
    pixel_values = (pixels - mean) / std
    sent = model.get_image_features(patches=batch["patches"], patch_index=batch["patch_index"]).pooler_output
    whole = model.get_image_features(pixel_values, patch_index=batch["patch_index"]).pooler_output
    assert (sent - whole).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (65536, 48, None),
            "global_batch_size 65536 is not divisible by 48 processes; use 32 or 64 .*65520",
        ),
        (
            (128, 2, 24),
            r"data.micro_batch_size 24 does not divide the 64 pairs .*128 over 2 .*; use 16 or 32$",
        ),
        ((128, 2, 0), r"data.micro_batch_size 0 .*; use 1$"),
    ],
)
def test_an_indivisible_batch_is_refused(sizes: tuple[int, int, int | None], message: str) -> None:
    batch, world_size, micro = sizes
    with pytest.raises(ValueError, match=message):
        StepSampler(0, 1, batch, 0, world_size, micro)


def test_micro_batches_are_the_process_s_part_in_order() -> None:
    parts = [list(StepSampler(2, 4, 12, rank, 2, micro_batch_size=2)) for rank in range(2)]
    in_order = parts[0][:3] + parts[1][:3] + parts[0][3:] + parts[1][3:]
    assert [position for part in in_order for position in part] == list(range(24, 48))
    assert len(StepSampler(2, 4, 12, 0, 2, micro_batch_size=2)) == 6
    whole = StepSampler(2, 4, 12, 0, 2, micro_batch_size=64)
    assert (whole.micro_batches, len(whole)) == (1, 2)


def test_images_of_a_size_of_their_own(shards: Path, tokenizer_dir: Path) -> None:
    """The same crops and captions as at the model's size, decoded at the stage's."""
    data, positions = pair_dataset(shards, tokenizer_dir, 0.5), np.arange(6)
    small = PairDataset(data.source, data.given.tokenizer, data.recipe, SHAPE.at(16), seed=5, mask_ratio=0.5)
    batch, large = small.__getitems__(positions.tolist()), data.__getitems__(positions.tolist())
    assert torch.equal(batch["input_ids"], large["input_ids"])
    assert batch["patches"].shape == (6, 2, 3 * 8 * 8)
    for row, crop in enumerate(crops_of(small, positions)):
        assert (batch["patches"][row].numpy() == visible_patches(crop, 8, batch["patch_index"][row].numpy())).all()


BATCH = {
    "pixels": torch.arange(12, dtype=torch.uint8).view(3, 4),
    "ids": torch.ones(3, dtype=torch.int64),
    "faults": [],
}


def test_a_batch_without_room_goes_through_a_pipe(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loader, "_pipe_warned", [])
    with monkeypatch.context() as worker:
        worker.setattr(loader.os, "posix_fallocate", full)
        worker.setattr(torch.utils.data, "get_worker_info", lambda: "a worker's")
        sent = pickle.dumps(PackedBatch.of(BATCH))
    for _ in range(2):
        received = pickle.loads(sent)
    assert all(torch.equal(received[name], BATCH[name]) for name in ("pixels", "ids"))
    (record,) = caplog.records
    assert "docker run --shm-size 8g" in record.getMessage()


def test_full_shared_memory_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(f_bavail=1, f_blocks=9, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda folder: full)
    check_shared_memory(0)
    with pytest.raises(OSError, match=r"/dev/shm is full \(4096 of 36864 bytes free\)"):
        check_shared_memory(2)
