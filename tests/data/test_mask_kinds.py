"""The four masks of patches and the two of tokens: counts, geometry, marginals."""

import numpy as np
import pytest
import torch
from conftest import TOWER

from flipscale.data.masks import branch_scales, grid_cell, keep_patches, keep_tokens
from flipscale.model import FlipVisionConfig, FlipVisionModel
from flipscale.start.complete_recipe import parse_recipe


def noise(batch: int, *shape: int) -> torch.Tensor:
    return torch.rand(batch, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def as_pictures(index: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """bool `(batch, rows, columns)`: what is kept by the one view of `index`."""
    assert index.shape[1] == 1
    kept = torch.zeros(len(index), rows * columns, dtype=torch.bool)
    return kept.scatter(1, index[:, 0], True).view(-1, rows, columns)


@pytest.mark.parametrize("side", [4, 14])
@pytest.mark.parametrize(
    ("kind", "ratio"),
    [
        *((kind, ratio) for kind in ("random", "block", "centre") for ratio in (0.0, 0.3, 0.75, 0.9)),
        *(("grid", ratio) for ratio in (0.0, 0.5, 0.75)),
    ],
)
def test_every_mask_keeps_the_original_s_count_once_each_ascending(kind: str, ratio: float, side: int) -> None:
    index = keep_patches(noise(50, side, side), ratio, kind)
    assert index.dtype == torch.int64
    assert index.shape == (50, 1, int(side * side * (1 - ratio)))
    assert (index.diff(dim=2) > 0).all()
    assert index.min() >= 0
    assert index.max() < side * side


@pytest.mark.parametrize(
    ("rows", "columns", "ratio", "cell", "each"),
    [
        (14, 14, 0.5, (1, 2), 1),
        (14, 14, 0.75, (2, 2), 1),
        (16, 16, 0.75, (2, 2), 1),
        (16, 16, 0.875, (2, 4), 1),
        (16, 16, 0.25, (2, 2), 3),
        (12, 6, 1 / 3 - 1e-9, (1, 3), 2),
    ],
)
def test_a_grid_keeps_as_many_in_every_cell(
    rows: int, columns: int, ratio: float, cell: tuple[int, int], each: int
) -> None:
    kept = as_pictures(keep_patches(noise(2000, rows, columns), ratio, "grid"), rows, columns)
    assert grid_cell(rows, columns, int(kept[0].sum())) == cell
    height, width = cell
    counts = kept.view(-1, rows // height, height, columns // width, width).sum(dim=(2, 4))
    assert (counts == each).all()
    assert (kept.float().mean(dim=0) - each / (height * width)).abs().max() < 0.06


@pytest.mark.parametrize(("side", "ratio"), [(14, 0.5), (16, 0.9), (5, 0.2)])
def test_a_block_is_one_window_that_may_lie_anywhere(side: int, ratio: float) -> None:
    kept = as_pictures(keep_patches(noise(1500, side, side), ratio, "block"), side, side)
    tops, lefts = set(), set()
    for picture in kept:
        rows, columns = picture.any(dim=1).nonzero()[:, 0], picture.any(dim=0).nonzero()[:, 0]
        height, width = len(rows), len(columns)
        assert int(rows[-1] - rows[0]) + 1 == height
        assert int(columns[-1] - columns[0]) + 1 == width
        assert abs(height - width) <= 1 or side in (height, width)
        window = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].flatten()
        assert window[: int(picture.sum())].all(), "only the end of the last row is cut"
        tops.add(int(rows[0]))
        lefts.add(int(columns[0]))
    assert tops == set(range(side - height + 1))
    assert lefts == set(range(side - width + 1))


def test_one_patch_of_a_centre_mask_has_the_gaussian_s_odds() -> None:
    share = as_pictures(keep_patches(noise(40_000, 4, 4), 0.9, "centre"), 4, 4).float().mean(dim=0)
    place = (torch.arange(4) + 0.5) / 4 - 0.5
    odds = torch.exp(-(place[:, None] ** 2 + place[None, :] ** 2) / (2 * 0.2**2))
    assert (share - odds / odds.sum()).abs().max() < 0.01


@pytest.mark.parametrize("kind", ["random", "grid"])
@pytest.mark.parametrize(("views", "ratio"), [(2, 0.5), (3, 0.75)])
def test_views_share_no_patch_and_each_is_uniform(kind: str, views: int, ratio: float) -> None:
    index = keep_patches(noise(2000, 8, 8), ratio, kind, views)
    kept = int(64 * (1 - ratio))
    assert index.shape == (2000, views, kept)
    together = index.flatten(1).sort(dim=1).values
    assert (together.diff(dim=1) > 0).all(), "a patch is in two views"
    if views * kept == 64:
        assert (together == torch.arange(64)).all(), "the views are the whole image"
    for view in range(views):
        picture = as_pictures(index[:, view : view + 1], 8, 8)
        assert (picture.float().mean(dim=0) - kept / 64).abs().max() < 0.06


# Tokens


def caption_mask(*lengths: int) -> torch.Tensor:
    return (torch.arange(32) < torch.tensor(lengths)[:, None]).long()


def test_padding_goes_before_any_word() -> None:
    mask = caption_mask(3, 16, 30).repeat(1000, 1)
    index = keep_tokens(noise(3000, 32), mask, 0.5, "padding_first")
    assert index.shape == (3000, 16)
    kept_words = mask.gather(1, index).sum(dim=1)
    assert (kept_words == mask.sum(dim=1).clamp(max=16)).all()
    long = index[mask.sum(dim=1) == 30]
    assert (torch.bincount(long.flatten(), minlength=32)[:30] / 1000 - 16 / 30).abs().max() < 0.06


# What cannot be drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, "diagonal"), "mask.kind is 'diagonal'; use one of random, grid, block, centre"),
        (
            (0.5, "random", 3),
            "3 views of 98 patches .* more than the 196 .* use 2 or fewer views, or mask_ratio 0.667 or more",
        ),
        ((0.75, "block", 2), "views is 2, but block masks of one image overlap; use kind random or grid"),
        (
            (0.6, "grid"),
            "a grid mask cannot keep 78 of 14 x 14 patches.* mask_ratio such as 0, 0.5, 0.75, 0.8571, 0.9285$",
        ),
        ((1.0,), r"mask_ratio is 1.0; it must be in \[0, 1\): the fraction of patches removed"),
    ],
)
def test_an_impossible_mask_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keep_patches(noise(1, 14, 14), *arguments)


def test_a_recipe_s_kind_must_exist() -> None:
    for field in ("kind", "text_kind"):
        with pytest.raises(ValueError, match=f"mask.{field} is 'spiral'; use one of random"):
            parse_recipe([f"--mask.{field}=spiral"])


BLOCKS, RATE = 5, 0.4


def test_the_rate_grows_linearly_and_the_mean_is_one() -> None:
    scales = branch_scales(3, np.arange(20_000), 2, BLOCKS, RATE)
    assert (scales.shape, scales.dtype) == ((20_000, 2, BLOCKS, 2), np.float32)
    for block, rate in enumerate(np.linspace(0.0, RATE, BLOCKS)):
        of_block = scales[:, :, block]
        assert set(np.unique(of_block)) == ({1.0} if block == 0 else {0.0, np.float32(1 / (1 - rate))})
        assert (of_block == 0).mean() == pytest.approx(rate, abs=0.01)
        assert of_block.mean() == pytest.approx(1.0, abs=0.01)
    assert np.array_equal(branch_scales(3, np.arange(32, 64), 2, BLOCKS, RATE), scales[32:64])
    assert not np.array_equal(branch_scales(4, np.arange(64), 2, BLOCKS, RATE), scales[:64])
    last = scales[:, 0, -1] == 0
    assert np.corrcoef(last[:, 0], last[:, 1])[0, 1] == pytest.approx(0.0, abs=0.03), "attention and MLP"


def test_a_dropped_branch_leaves_the_tokens_as_they_are() -> None:
    torch.manual_seed(0)
    model = FlipVisionModel(FlipVisionConfig(**TOWER, image_size=32, patch_size=8))
    images = torch.randn(3, 3, 32, 32)
    whole = model(images, output_hidden_states=True)
    ones = torch.ones(3, 2, 2)
    assert torch.equal(model(images, branch_scales=ones).pooler_output, whole.pooler_output)

    dropped = ones.clone()
    dropped[1, 1] = 0.0  # of the second image, both branches of the last block
    found = model(images, branch_scales=dropped, output_hidden_states=True).hidden_states
    assert torch.equal(found[2][1], found[1][1])
    assert torch.equal(found[2][[0, 2]], whole.hidden_states[2][[0, 2]])

    doubled = ones.clone()
    doubled[0, 0, 1] = 2.0
    block, tokens = model.encoder.layers[0], whole.hidden_states[0]
    after_attention = tokens + block.self_attn(block.layer_norm1(tokens))[0]
    expected = after_attention + 2.0 * block.mlp(block.layer_norm2(after_attention))
    found = model(images, branch_scales=doubled, output_hidden_states=True).hidden_states
    assert torch.allclose(found[1][0], expected[0], atol=1e-6)


def test_the_views_of_an_image_have_each_their_own() -> None:
    torch.manual_seed(0)
    model = FlipVisionModel(FlipVisionConfig(**TOWER, image_size=32, patch_size=8))
    patches = torch.randint(0, 256, (2, 2, 8, 192), dtype=torch.uint8)
    index = torch.arange(16).view(1, 2, 8).expand(2, -1, -1)
    scales = torch.rand(2, 2, 2, 2)
    together = model(patches=patches, patch_index=index, branch_scales=scales).pooler_output
    for row in range(2):
        alone = model(patches=patches[row], patch_index=index[row], branch_scales=scales[row]).pooler_output
        assert torch.allclose(together[2 * row : 2 * row + 2], alone, atol=1e-6)
