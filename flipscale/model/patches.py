"""Patches of an image: the number and choice of visible patches, and their pixels."""

import torch


def num_kept(num_tokens: int, mask_ratio: float, what: str = "patches") -> int:
    """Return the number of tokens left at `mask_ratio`: int(num_tokens * (1 - mask_ratio)), as in the original. Raise a
    ValueError, which calls them `what`, if `mask_ratio` is outside of [0, 1), or no token is left."""
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio is {mask_ratio}; it must be in [0, 1): the fraction of {what} removed")
    kept = int(num_tokens * (1.0 - mask_ratio))
    if kept < 1:
        raise ValueError(f"mask_ratio {mask_ratio} leaves none of {num_tokens} {what}; use a lower ratio")
    return kept


def keep_lowest(scores: torch.Tensor, kept: int, views: int = 1) -> torch.Tensor:
    """Return the row-major positions of each image's patches with the lowest scores: int64 `(batch, views, kept)`.

    Positions are ascending. Uniform noise as scores gives a uniform subset.

    Args:
        scores: `(batch, rows, columns)`.
        views: number of disjoint subsets: the first has the `kept` lowest scores, the second the next `kept`.
    """
    first = scores.flatten(1).topk(views * kept, dim=1, largest=False, sorted=views > 1).indices
    return first.unflatten(1, (views, kept)).sort(dim=2).values


def complement(patch_index: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Return the patches not in `patch_index` `(batch, kept)`, ascending: int64 `(batch, num_patches - kept)`."""
    absent = torch.ones(len(patch_index), num_patches, dtype=torch.uint8, device=patch_index.device)
    absent.scatter_(1, patch_index.long(), 0)
    return absent.argsort(dim=1, descending=True, stable=True)[:, : num_patches - patch_index.shape[1]]


def patchify(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images `(batch, channels, height, width)` into patches, row by row: `(batch, patches, channels * p * p)`."""
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    grid = pixel_values.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)


def take_patches(patches: torch.Tensor, patch_index: torch.Tensor) -> torch.Tensor:
    """Return rows `patch_index` `(batch, kept)` of `patches` `(batch, num_patches, width)`."""
    return patches.gather(1, patch_index.long()[:, :, None].expand(-1, -1, patches.shape[2]))
