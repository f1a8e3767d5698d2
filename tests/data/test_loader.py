"""Batches are a pure function of (recipe, step), and hold what the model can take."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOWERS, write_shards
from transformers import AutoTokenizer

from flipscale.data import loader
from flipscale.data.decode import DRAWS_PER_CROP, decode_box, visible_patches
from flipscale.data.loader import PackedBatch, StepSampler, build_loader, check_shared_memory
from flipscale.data.pairs import InputShape, PairDataset, caption_ids
from flipscale.data.randomness import keyed_uniform
from flipscale.data.sources.tar import TarSource
from flipscale.model import FlipConfig, FlipModel
from flipscale.recipe.augment import AugmentRecipe, ColorJitterRecipe
from flipscale.recipe.data import DataRecipe

SHAPE = InputShape(image_size=32, patch_size=8, max_tokens=8)
COLORS = AugmentRecipe(color_jitter=ColorJitterRecipe(0.3, 0.2, 0.4, 0.1, 0.8))


def dataset(shards: Path, tokenizer_dir: Path, mask_ratio: float, **fields: object) -> PairDataset:
    recipe = DataRecipe(shards=str(shards), global_batch_size=24, shards_per_block=2, **{"num_workers": 0, **fields})
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return PairDataset(TarSource(str(shards)), tokenizer, recipe, SHAPE, seed=5, mask_ratio=mask_ratio)


def batches(data: PairDataset, world_size: int, first_step: int = 0) -> list[dict[str, torch.Tensor]]:
    """Global batches of five steps, put together from every rank's part."""
    loaders = [build_loader(data, first_step, 5, rank, world_size) for rank in range(world_size)]
    return [
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in zip(*loaders, strict=True)
    ]


def assert_equal(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(shards: Path, tokenizer_dir: Path) -> list[dict[str, torch.Tensor]]:
    """The five batches of one process without workers: an epoch of 96 samples in four, and the first of the next."""
    return batches(dataset(shards, tokenizer_dir, 0.75, augment=COLORS), 1)


@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("num_workers", [0, 4])
def test_same_batches_at_any_world_size_with_any_workers_and_after_a_resume(
    shards: Path, tokenizer_dir: Path, whole: list[dict[str, torch.Tensor]], world_size: int, num_workers: int
) -> None:
    """All columns of the global batch, with changed colours; resumed at every step without workers, at one with."""
    data = dataset(shards, tokenizer_dir, 0.75, num_workers=num_workers, augment=COLORS)
    for first_step in range(5) if num_workers == 0 else [(world_size + num_workers) % 5]:
        assert_equal(whole[first_step:], batches(data, world_size, first_step))


def test_without_mirror_the_same_crops_are_as_they_were_taken(shards: Path, tokenizer_dir: Path) -> None:
    either, plain = (
        [torch.from_numpy(image.copy()) for image in images_of(dataset(shards, tokenizer_dir, 0.0, mirror=mirror))]
        for mirror in (True, False)
    )
    mirrored = [not torch.equal(a, b) for a, b in zip(either, plain, strict=True)]
    assert 0 < sum(mirrored) < len(mirrored)
    assert all(torch.equal(a.flip(1), b) for a, b, turned in zip(either, plain, mirrored, strict=True) if turned)


def test_caption_ids_are_of_the_tokens_before_their_mask(shards: Path, tokenizer_dir: Path) -> None:
    plain, masked = (dataset(shards, tokenizer_dir, 0.0) for _ in range(2))
    masked.sends_caption_ids, masked.text_mask_ratio = True, 0.5
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


def images_of(data: PairDataset) -> list[np.ndarray]:
    """The crops of the first 24 samples."""
    return [crop.fitted(SHAPE.image_size) for crop, _, _ in data._pairs(np.arange(24))]


def test_what_a_batch_costs_to_read(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One read a sample, and as many open files as a block has shards."""
    write_shards(tmp_path, [12] * 8)
    data = dataset(tmp_path, tokenizer_dir, 0.75, lanes=1)
    files: list[int] = []
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda file, *where: (files.append(file), read(file, *where))[1])
    for first in range(0, 96, 24):  # a block each
        files.clear()
        data.__getitems__(list(range(first, first + 24)))
        # The others are of the manifest, whose rows are read one by one.
        of_shards = [file for file in files if os.readlink(f"/proc/self/fd/{file}").endswith(".tar")]
        assert len(of_shards) == 24
        assert len(set(of_shards)) == 2


def test_patches_equal_pixel_values(shards: Path, tokenizer_dir: Path) -> None:
    """What a worker sends gives the same embeddings as the whole images with the same patches kept."""
    model = FlipModel(FlipConfig(**TOWERS)).eval()
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
    vision = model.config.vision_config
    mean, std = (torch.tensor(value)[:, None, None] for value in (vision.image_mean, vision.image_std))
    pixel_values = (pixels - mean) / std
    sent = model.get_image_features(patches=batch["patches"], patch_index=batch["patch_index"]).pooler_output
    whole = model.get_image_features(pixel_values, patch_index=batch["patch_index"]).pooler_output
    assert (sent - whole).abs().max() < 1e-6


@pytest.mark.parametrize(("world_size", "fix"), [(48, "use 32 or 64 processes, or 65520"), (3, "use 2 or 4 processes")])
def test_an_indivisible_batch_is_refused(world_size: int, fix: str) -> None:
    with pytest.raises(ValueError, match=f"global_batch_size 65536 is not divisible by {world_size} processes; {fix}"):
        StepSampler(0, 1, 65536, 0, world_size)


def test_micro_batches_are_the_process_s_part_in_order() -> None:
    parts = [list(StepSampler(2, 4, 12, rank, 2, micro_batch_size=2)) for rank in range(2)]
    in_order = parts[0][:3] + parts[1][:3] + parts[0][3:] + parts[1][3:]
    assert [position for part in in_order for position in part] == list(range(24, 48))
    assert len(StepSampler(2, 4, 12, 0, 2, micro_batch_size=2)) == 6
    whole = StepSampler(2, 4, 12, 0, 2, micro_batch_size=64)
    assert (whole.micro_batches, len(whole)) == (1, 2)


@pytest.mark.parametrize(("micro", "fix"), [(24, "16 or 32"), (0, "1")])
def test_a_micro_batch_that_does_not_divide_is_refused(micro: int, fix: str) -> None:
    message = (
        rf"data.micro_batch_size {micro} does not divide the 64 pairs of a process \(global_batch_size 128 over 2 "
    )
    with pytest.raises(ValueError, match=message + rf"processes\); use {fix}$"):
        StepSampler(0, 1, 128, 0, 2, micro)


@pytest.mark.parametrize(("mask_ratio", "kept"), [(0.0, 4), (0.5, 2)])
def test_images_of_a_size_of_their_own(shards: Path, tokenizer_dir: Path, mask_ratio: float, kept: int) -> None:
    """The same crops and captions as at the model's size, decoded at the stage's."""
    data, positions = dataset(shards, tokenizer_dir, mask_ratio), np.arange(6)
    small = PairDataset(data.source, data.tokenizer, data.recipe, SHAPE.at(16), seed=5, mask_ratio=mask_ratio)
    batch, large = small.__getitems__(positions.tolist()), data.__getitems__(positions.tolist())
    assert torch.equal(batch["input_ids"], large["input_ids"])
    assert batch["patches"].shape == (6, kept, 3 * 8 * 8)
    draws = keyed_uniform(5, "crop", positions, DRAWS_PER_CROP)
    for row, (shard, number) in enumerate(zip(*small.order.locate(positions), strict=True)):
        crop = decode_box(data.source.read(shard, number).image, draws[row], 16, data.recipe.crop_scale)
        index = batch["patch_index"][row].numpy() if mask_ratio else None
        assert (batch["patches"][row].numpy() == visible_patches(crop, 8, index)).all()
    if mask_ratio:
        assert set(batch["patch_index"].flatten().tolist()) == {0, 1, 2, 3}
    assert SHAPE.at(None) is SHAPE


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


def test_full_shared_memory_is_told_before_training(tmp_path: Path) -> None:
    code = f"""
import subprocess
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "{tmp_path}"], check=True)
from flipscale.data.loader import check_shared_memory
check_shared_memory(0, "{tmp_path}")
check_shared_memory(2, "{tmp_path}")
"""
    done = subprocess.run(["unshare", "-m", sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "CalledProcessError" in done.stderr or "unshare" in done.stderr:
        pytest.skip("a file system of its own needs root")
    assert "is full (65536 of 65536 bytes free), and loader workers need it; free it" in done.stderr
    check_shared_memory(2)
