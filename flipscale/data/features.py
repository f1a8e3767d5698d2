"""Stored features: a folder with the image or text features of every sample of some shards, by one model.

`images/NNNNN.npy` and `texts/NNNNN.npy` hold the features of shard NNNNN of the manifest, float16 `(samples, width)`,
in the order of its samples. The row of a sample that cannot be used is NaN. `features.json` names the model and the
shards.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
import xxhash

ABOUT = "features.json"
# A caption whose tokens tell tokenizers and lengths apart.
PROBE = "A photo of two Dogs, 3 ünïcödé birds & a red fire-engine (1998)"


def shard_file(folder: Path, tower: str, shard: int) -> Path:
    """Return the file of a shard's features of `images` or `texts`."""
    return folder / tower / f"{shard:05d}.npy"


def weights_digest(weights: Iterable[torch.Tensor]) -> str:
    """Return a digest of weights in fp32, whatever their names, order and files."""
    digests = [xxhash.xxh3_128(weight.detach().float().cpu().contiguous().numpy()).hexdigest() for weight in weights]
    return xxhash.xxh3_128("".join(sorted(digests))).hexdigest()


def tokens_digest(tokens: torch.Tensor) -> str:
    """Return a digest of the token ids of `PROBE`, padded to the model's length."""
    return xxhash.xxh3_128(tokens.long().cpu().contiguous().numpy()).hexdigest()
