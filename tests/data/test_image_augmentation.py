"""Colour changes of pictures: torchvision's, by draws of the seed and the position, before any mask."""

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from data.conftest import crops_of, pair_dataset

from flipscale.data.batches import BatchDataset
from flipscale.data.decode import visible_patches
from flipscale.data.image_augmentation import Augment, draw_colors, recolored
from flipscale.data.masks import keyed_patches, removed_patches
from flipscale.data.pairs import InputShape
from flipscale.data.randomness import keyed_uniform
from flipscale.data.sources.opening import open_source
from flipscale.objectives.classify import Classify
from flipscale.objectives.contrastive import Contrastive
from flipscale.objectives.reconstruction import WithReconstruction
from flipscale.recipe.augment import AugmentRecipe, ColorJitterRecipe
from flipscale.recipe.data import DataRecipe, MaskRecipe

COLOR = ColorJitterRecipe(0.3, 0.2, 0.4, 0.1, 0.8)
ALL = AugmentRecipe(color_jitter=COLOR)
PLACES = np.arange(2000)


@pytest.fixture
def picture() -> np.ndarray:
    noise = np.random.default_rng(0).integers(70, 180, (8, 8, 3), dtype=np.uint8)
    return cv2.resize(noise, (64, 64), interpolation=cv2.INTER_CUBIC)


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def test_colours_are_those_of_torchvision(picture: np.ndarray) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    changes = draw_colors(ColorJitterRecipe(0.2, 0.3, 0.4), 3, PLACES)
    planes = torch.from_numpy(picture).permute(2, 0, 1).contiguous()
    names = ("brightness", "contrast", "saturation")
    for row, draws in enumerate(keyed_uniform(3, "color", PLACES[:20], 5)):
        expected = planes
        for name, most, draw in zip(names, (0.2, 0.3, 0.4), draws[1:], strict=False):
            expected = getattr(functional, f"adjust_{name}")(expected, 1 + most * (2 * draw - 1))
        assert difference(recolored(picture, changes[row]), expected.permute(1, 2, 0).numpy()) <= 4


def test_a_change_of_hue_keeps_greys_and_turns_colours(picture: np.ndarray) -> None:
    changes = draw_colors(ColorJitterRecipe(hue=0.5), 3, PLACES)
    grey = np.repeat(picture[:, :, :1], 3, axis=2)
    luma, turns = np.array([0.299, 0.587, 0.114]), changes[:, :, :3]
    assert difference(recolored(grey, changes[0]), grey) <= 1
    assert np.abs(luma @ turns - luma).max() < 1e-9, "a picture stays as light"
    half = int(np.argmin(np.trace(turns, axis1=1, axis2=2)))  # the draw nearest to half of the circle
    red = np.full((1, 1, 3), (150, 100, 100), np.uint8)
    cyan = recolored(red, changes[half])[0, 0].astype(int)
    assert cyan[0] < cyan[1], cyan
    assert abs(cyan[1] - cyan[2]) < 10


def test_the_share_of_changed_pictures(picture: np.ndarray) -> None:
    same = [np.array_equal(recolored(picture, one), picture) for one in draw_colors(COLOR, 3, PLACES)]
    assert np.mean(same) == pytest.approx(0.2, abs=0.03)


def test_a_mask_hides_patches_of_the_changed_picture(shards: Path, tokenizer_dir: Path) -> None:
    """With views, with the removed patches of a reconstruction, and with the same captions as without changes."""
    where = np.arange(24)
    plain, whole = (pair_dataset(shards, tokenizer_dir, 0.0, augment=augment) for augment in (AugmentRecipe(), ALL))
    crops, colors = crops_of(plain, where), draw_colors(COLOR, 5, where)
    images = [recolored(*each) for each in zip(crops, colors, strict=True)]
    assert not np.array_equal(np.stack(images), np.stack(crops))
    batches = [data.__getitems__(where.tolist()) for data in (plain, whole)]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    for batch, shown in zip(batches, (crops, images), strict=True):
        assert np.array_equal(batch["patches"], [visible_patches(image, 8, None) for image in shown])
    reconstruction = WithReconstruction(other=Contrastive(), weight=1.0)
    for mask, objective in ((MaskRecipe(views=2), Contrastive()), (MaskRecipe(), reconstruction)):
        options = {"kind": objective.dataset, "options": {"mask": mask}, "augment": ALL}
        batch = pair_dataset(shards, tokenizer_dir, **options).__getitems__(where.tolist())
        index = keyed_patches(5, where, 4, 0.75, mask.kind, mask.views)
        index = index if mask.views > 1 else index[:, 0]
        assert np.array_equal(
            batch["patches"], [visible_patches(*each) for each in zip(images, [8] * 24, index, strict=True)]
        )
        if objective == reconstruction:
            removed = removed_patches(index, 16)
            shown = [visible_patches(image, 8, gone) for image, gone in zip(images, removed, strict=True)]
            assert np.array_equal(batch["masked_patches"], shown)


def test_classes_are_changed_before_rand_augment_and_mixup(shards: Path) -> None:
    def dataset(augment: AugmentRecipe) -> BatchDataset:
        recipe = DataRecipe(shards=str(shards), global_batch_size=16, num_workers=0, augment=augment)
        data = Classify(num_classes=16).dataset(open_source(recipe), None, recipe, InputShape(32, 8, 8), 5, 0.0)
        return pickle.loads(pickle.dumps(data))

    for policy, alpha in (("rand-m9-mstd0.5-inc1", 0.0), (None, 0.8)):
        both = AugmentRecipe(policy, alpha, color_jitter=COLOR)
        augment, crops = Augment(both, 5, 32), crops_of(dataset(both), np.arange(8))
        changed = [recolored(*each) for each in zip(crops, draw_colors(COLOR, 5, np.arange(8)), strict=True)]
        if policy:
            expected = [augment.varied(image, position) for position, image in enumerate(changed)]
        else:
            mixed = [augment.mixed(*changed[first : first + 2], first) for first in range(0, 8, 2)]
            expected = [image for one, other, _ in mixed for image in (one, other)]
        shown = dataset(both).__getitems__(list(range(8)))["patches"]
        assert np.array_equal(shown, [visible_patches(image, 8, None) for image in expected])
