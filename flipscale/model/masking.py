"""Which patches the image encoder sees."""

import torch


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """The number of patches left at `mask_ratio`: int(num_patches * (1 - mask_ratio)), as the original counts.

    Raises:
        ValueError: `mask_ratio` outside [0, 1), or so high that no patch is left.
    """
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio is {mask_ratio}; it must be in [0, 1): the fraction of patches removed")
    kept = int(num_patches * (1.0 - mask_ratio))
    if kept < 1:
        raise ValueError(f"mask_ratio {mask_ratio} leaves none of {num_patches} patches; use a lower ratio")
    return kept


def random_patch_index(batch_size: int, num_patches: int, mask_ratio: float, device: torch.device) -> torch.Tensor:
    """A uniform random subset of patches for each image, from torch's generator of `device`.

    The training loader does not use this: its masks are keyed by sample (`flipscale.data.randomness`).

    Returns:
        int64 `(batch_size, num_kept)`, each row ascending.
    """
    noise = torch.rand(batch_size, num_patches, device=device)
    kept = noise.argsort(dim=1, stable=True)[:, : num_kept(num_patches, mask_ratio)]
    return kept.sort(dim=1).values


def patchify(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Images `(batch, channels, height, width)` as patches, row by row: `(batch, patches, channels * p * p)`."""
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    grid = pixel_values.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)


def take_patches(patches: torch.Tensor, patch_index: torch.Tensor) -> torch.Tensor:
    """Rows `patch_index` `(batch, kept)` of `patches` `(batch, num_patches, width)`."""
    return patches.gather(1, patch_index.long()[:, :, None].expand(-1, -1, patches.shape[2]))
