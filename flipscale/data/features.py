"""Features that `flipscale prepare embed` stored, of samples and of teachers.

A folder has the features of every sample of some shards by one model. `images/NNNNN.npy` and `texts/NNNNN.npy` hold
those of shard NNNNN of the manifest, float16 `(samples, width)`, in the order of its samples. The row of a sample that
cannot be used is NaN. `features.json` names the model and the shards. `shards/NNNNN.json` has the digest of a shard's
bytes and the state of its file, so that a changed shard is noticed.

For teachers, `prepare embed --crops` stores several random crops of each image: `images/NNNNN.npy` is `(samples, crops,
width)`. Training draws one of these crops for each position, so that student and teacher see the same window.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flipscale.data.decode import DRAWS_PER_CROP, Crop, decode_crop
from flipscale.data.order import by_value
from flipscale.data.randomness import keyed_uniform
from flipscale.data.samples import BadSample, one_line_reason
from flipscale.data.sources.tar import TarSource
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.io.model_folder import read_object
from flipscale.io.options import Count, Positive, SamplesOrZero, Seed, check_entries

ABOUT = "features.json"
_REMEDY = "remove it and run the same `flipscale prepare embed` again"
# Number of mapped files, a limit of the system.
_MOST_MAPPED = 4096
# Entries of `features.json`, of each tower in it, and of a tower's crops.
_ENTRIES = {"features": str, "model_digest": str, "shards": str, "samples": SamplesOrZero, "shards_digest": str}
_OF_TOWER = {"width": Count, "weights_digest": str}
_OF_CROPS = {"count": Count, "scale": list, "mirror": bool, "seed": Seed}
# A caption whose tokens tell tokenizers and lengths apart.
PROBE = "A photo of two Dogs, 3 ünïcödé birds & a red fire-engine (1998)"
# Size for the square in place of a teacher's crop that does not fit, so that the window depends on no model.
_FALLBACK_SIZE = 224


def shard_file(folder: Path, tower: str, shard: int) -> Path:
    return folder / tower / f"{shard:05d}.npy"


def shard_record(folder: Path, shard: int) -> Path:
    return folder / "shards" / f"{shard:05d}.json"


def shard_fault(folder: Path, source: TarSource, shard: int) -> str:
    """Return how a shard differs from the one whose features a folder has; an empty text if it does not.

    The bytes are compared only if the file has another state, such as a copy's. The new state is then kept.
    """
    if not source.shard_sizes[shard]:
        return ""
    file, state = shard_record(folder, shard), source.shard_state(shard)
    stored = read_object(file, _REMEDY) if file.is_file() else {}
    if stored.get("state") == state:
        return ""
    if (digest := source.shard_digest(shard, anew=True)) != (had := stored.get("digest")):
        fault = f"shard {source.shard_name(shard)} has the digest {digest:.12}; expected {had!s:.12}, that of the shard"
        return f"{fault} whose features are in {folder}. Fix: run the same `flipscale prepare embed` again"
    with suppress(OSError):
        write_text(file, json.dumps({"state": state, "digest": digest}))
    return ""


def read_about(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's `features.json`, or {} without one. Raise UserError if an entry is damaged."""
    if not (file := folder / ABOUT).is_file():
        return {}
    about = read_object(file, _REMEDY)
    check_entries(about, {**_ENTRIES, **({"logit_scale": Positive} if "logit_scale" in about else {})}, file, _REMEDY)
    for tower in about.keys() & {"images", "texts"}:
        check_entries(about[tower], _OF_TOWER, file, _REMEDY)
        if "crops" in about[tower]:
            check_entries(about[tower]["crops"], _OF_CROPS, file, _REMEDY)
    return about


def stored_sizes(folder: Path, tower: str = "images") -> list[int]:
    """Return the numbers of samples of a folder's shards. Raise UserError if a tower's features of some are missing."""
    about, sizes = read_about(folder), list[int]()
    while (file := shard_file(folder, tower, len(sizes))).is_file():
        sizes.append(len(np.atleast_1d(_mapped(file))))
    if sum(sizes) != about.get("samples"):
        missing = f"{folder} has {tower} of {sum(sizes):,} of its {about.get('samples', 0):,} samples"
        raise UserError(f"{missing}; run the same `flipscale prepare embed` again")
    return sizes


def _mapped(file: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Return a file of features, mapped to memory. Raise UserError if it is damaged or has another shape."""
    try:
        array = np.lib.format.open_memmap(file, mode="r")
        if array.dtype != np.float16 or array.shape != (shape or array.shape):
            raise UserError(f"{array.dtype} {array.shape}, not float16 {shape}")
        return array
    except OSError:
        raise
    except Exception as error:  # numpy raises many kinds for a damaged header
        raise UserError(f"{file} is damaged ({one_line_reason(error)}); {_REMEDY}") from error


class PrecomputedFeatures:
    """The stored features of a tower, `images` or `texts`, of shards with these `sizes`, mapped shard by shard. Raise
    UserError if `prepare embed` has not written them there, or not all of them."""

    def __init__(self, folder: Path, tower: str, sizes: Sequence[int]):
        self.folder, self.tower, self._sizes = folder, tower, sizes
        self.about = read_about(folder)
        if tower not in self.about:
            raise UserError(f"{folder} has no features of {tower}; write them by `flipscale prepare embed`")
        self.width, self.digest = self.about[tower]["width"], self.about[tower]["weights_digest"]
        self._crops = (self.about[tower]["crops"]["count"],) if "crops" in self.about[tower] else ()
        lacking = [shard for shard in range(len(sizes)) if not shard_file(folder, tower, shard).is_file()]
        if lacking:
            raise UserError(
                f"{shard_file(folder, tower, lacking[0])} and {len(lacking) - 1} others are missing; run the same "
                "`flipscale prepare embed` again"
            )
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()

    def rows(self, shards: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Return the features of samples, float16 `(samples, width)`. Rows of NaN are of samples that are bad. Raise
        UserError if other rows are not finite."""
        stored_rows = np.empty((len(shards), self.width), np.float16)
        for shard, places in by_value(shards):
            stored_rows[places] = self._checked(shard, numbers[places])
        return stored_rows

    def row(self, place: tuple[int, int]) -> np.ndarray:
        """Return the features of a sample, float16 `(width,)` or `(crops, width)`, or raise BadSample. Raises as
        `rows` too."""
        shard, number = place
        (row,) = self._checked(shard, np.array([number]))
        if np.isnan(row.flat[0]):
            file = shard_file(self.folder, self.tower, shard)
            raise BadSample(f"{file} has none in row {number}: it could not be embedded", "missing_features")
        return row

    def _checked(self, shard: int, numbers: np.ndarray) -> np.ndarray:
        """Return rows of a shard that are finite, or all NaN."""
        rows = self._mapped(shard)[numbers]
        for place in np.flatnonzero(~np.isfinite(rows).reshape(len(rows), -1).all(1)):
            if not np.isnan(rows[place]).all():
                file = shard_file(self.folder, self.tower, shard)
                raise UserError(f"{file}: row {numbers[place]} has numbers that are NaN or infinite; {_REMEDY}")
        return rows

    def _mapped(self, shard: int) -> np.ndarray:
        if shard not in self._open:
            shape = (self._sizes[shard], *self._crops, self.width)
            self._open[shard] = _mapped(shard_file(self.folder, self.tower, shard), shape)
            if len(self._open) > _MOST_MAPPED:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}


@dataclass(frozen=True)
class TeacherCrops:
    """Random crops of each sample, a function of (seed, crop number, shard, sample). `scale` is the least and the most
    area of a crop as fractions of the image's."""

    count: int
    scale: tuple[float, float]
    mirror: bool
    seed: int

    def number(self, crop_draw: np.ndarray) -> int:
        """Return the number of the crop that the draws of a position's crop choose."""
        return int(crop_draw[0] * self.count)

    def decode(self, encoded: bytes, place: tuple[int, int], number: int, image_size: int) -> Crop:
        """Return crop `number` of the sample (shard, number) at `place`, see `decode_crop`."""
        purpose, position = f"crop {number} of shard {place[0]}", np.array([place[1]])
        draws = keyed_uniform(self.seed, purpose, position, DRAWS_PER_CROP)[0]
        if not self.mirror:
            draws[-1] = 1.0
        return decode_crop(encoded, draws, image_size, self.scale, fallback_size=_FALLBACK_SIZE)


@dataclass(frozen=True)
class Teacher:
    """The stored embeddings of a teacher.

    Args:
        images: embeddings of each sample's crops, `(crops, width)`.
        texts: embedding of each sample's first caption, `(width,)`.
        logit_scale: factor of the cosine of an image and a text.
    """

    images: PrecomputedFeatures
    texts: PrecomputedFeatures
    crops: TeacherCrops
    logit_scale: float

    @property
    def digest(self) -> int:
        content = json.dumps([self.images.about["model_digest"], asdict(self.crops)])
        return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")

    def logit_sides(self, place: tuple[int, int], number: int) -> np.ndarray:
        """Return two vectors of a sample, fp32 `(2, width)`, or raise BadSample. The logit of an image and a text
        is their product."""
        sides = np.stack([self.images.row(place)[number], self.texts.row(place)]).astype(np.float32)
        sides[0] *= self.logit_scale
        return sides
