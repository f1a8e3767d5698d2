"""`flipscale prepare embed`: embed the images and texts of shards once, and store their features.

A process claims a shard by a lock, writes its files aside and renames them. The bytes depend only on the samples and
the model. So a killed run resumes with the shards that are missing, and any number of processes share them.
"""

import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from filelock import FileLock, Timeout
from torch.utils.data import Dataset

from flipscale.data.captions import UntokenizableCaption, choose_caption
from flipscale.data.decode import UndecodableImage
from flipscale.data.features import ABOUT, PROBE, TeacherCrops, read_about, shard_fault, shard_file, shard_record
from flipscale.data.loader import PackedBatch
from flipscale.data.pairs import InputShape
from flipscale.data.samples import BadSample, SampleNumbers, Source, evenly, wrap_errors
from flipscale.data.sources.manifest import in_windows
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder, Features
from flipscale.evaluation.foreign_models import TRANSFORMERS, check_embedded, load_transformers
from flipscale.evaluation.whole_images import GREY, Decoder, decoded_batches, dummy_batch, packed
from flipscale.io.atomic import atomic_write, sync, unique_partial_path, write_text
from flipscale.io.digests import weights_digest
from flipscale.io.errors import UserError
from flipscale.io.model_folder import read_object, texts_digest
from flipscale.io.paths import check_disk_space
from flipscale.io.progress import Progress
from flipscale.recipe.data import PRECOMPUTED_TOWERS
from flipscale.recipe.recipe import Recipe

# In place of a caption that cannot be used.
_NO_CAPTION = "a"
# Names and places, which may change between starts.
_FREE = ("model", "shards")
# Number of shards at URLs that are compared before a training.
_MOST_ASKED = 256

_log = logging.getLogger(__name__)


def precompute_features(
    embedder: Embedder,
    source: TarSource,
    out_dir: Path,
    towers: Sequence[str],
    features: Features,
    crops: TeacherCrops | None = None,
) -> Counter[str]:
    """Collective. Write the features of all shards that no other process writes.

    Args:
        towers: `images`, `texts` or both. A sample's text is its first caption that is not blank.
        features: `embeds`, projected and of unit length; or `pooled`, before the projection, as the tower gives them.
        crops: crops of each image; None embeds the whole image.

    Returns:
        Counts of all processes that torchrun started: `shards`, `samples`, and `bad images` and `bad texts`.

    Raises:
        UserError: the model has no such tower, its numbers exceed float16, or `out_dir` has other features or files.
        OSError: a shard cannot be read, a worker died, or the disk is full.
    """
    about = _describe(embedder, source, towers, features, crops)
    _begin(out_dir, about)
    where, sizes, per_sample = SampleNumbers(source), source.shard_sizes, (crops.count,) if crops else ()
    size = max(1, embedder.share(len(source)).size // math.prod(per_sample))
    decode = embedder.decoder() if "images" in towers else None
    if decode and crops:
        decode = partial(_decoded_crops, decode, crops, where, embedder.image_size)
    claims = _Claims(out_dir, towers, source)
    counts = Counter({"shards": 0, "samples": 0, "bad images": 0, "bad texts": 0})
    done = sum(count for shard, count in enumerate(sizes) if claims.is_finished(shard))
    widths = [about[tower]["width"] * math.prod(per_sample if tower == "images" else ()) for tower in towers]
    check_disk_space(out_dir, 2 * sum(widths) * (len(where) - done), "embed fewer --towers")

    def empty(shard: int) -> dict[str, np.ndarray]:
        shapes = {"images": (sizes[shard], *per_sample), "texts": (sizes[shard],)}
        return {tower: np.empty((*shapes[tower], about[tower]["width"]), np.float16) for tower in towers}

    with Progress(len(where), "embedding", "images", initial=done) as bar:

        def batches() -> Iterator[range]:
            for shard, end in enumerate(itertools.accumulate(sizes)):
                if claims.take(shard):
                    if not sizes[shard]:
                        claims.write(shard, empty(shard))
                    for row in range(end - sizes[shard], end, size):
                        yield range(row, min(row + size, end))

        arrays: dict[str, np.ndarray] = {}
        workers = embedder.num_workers if len(where) > size else 0
        for batch in decoded_batches(_Samples(source, decode, "texts" in towers), batches(), workers):
            shard, first = where[batch.row]
            if not first:
                arrays = empty(shard)
            for tower, found in _computed(embedder, batch, features, has_crops=crops is not None).items():
                rows = found.reshape(-1, *arrays[tower].shape[1:])
                rows[batch.bad[tower]] = np.nan
                counts[f"bad {tower}"] += len(batch.bad[tower])
                arrays[tower][first : first + len(rows)] = rows
            bar.update(len(rows))
            counts["samples"] += len(rows)
            if first + len(rows) == sizes[shard]:
                claims.write(shard, arrays)
                counts["shards"] += 1
    return Counter(dict(zip(counts, embedder.total(list(counts.values())), strict=True)))


class _Batch(NamedTuple):
    """The columns of images, and the captions, of consecutive rows from `row` on; places of `bad` ones by tower."""

    row: int
    images: PackedBatch | None
    texts: list[str]
    bad: dict[str, list[int]]


class _Samples(Dataset):
    """Batches of consecutive samples. A grey image and a word stand for those that cannot be used."""

    def __init__(self, source: TarSource, decode: Decoder | None, reads_texts: bool):
        self.source, self.decode, self.reads_texts = source, decode, reads_texts
        self.where = SampleNumbers(source)

    def __getitems__(self, rows: Sequence[int]) -> _Batch:
        batch = _Batch(rows[0], None, [], {"images": [], "texts": []})
        decoded = (self._decoded(batch, place, row) for place, row in enumerate(rows))
        if self.decode is not None:
            return batch._replace(images=packed(decoded, len(rows)))
        list(decoded)  # reads the captions
        return batch

    def _decoded(self, batch: _Batch, place: int, row: int) -> dict[str, np.ndarray]:
        """Return the columns of an image, if images are decoded, and add the caption to the batch."""
        captions: tuple[bytes, ...] = ()
        try:
            if self.decode is None:
                captions = self.source.read_captions(*self.where[row])
                return {}
            sample = self.source.read(*self.where[row])
            captions = sample.captions
            with wrap_errors(UndecodableImage):
                return self.decode(sample.image, row)
        except BadSample:
            batch.bad["images"].append(place)
            return self.decode(GREY, row) if self.decode else {}
        finally:
            if self.reads_texts:
                try:
                    batch.texts.append(choose_caption(captions, 0.0))
                except BadSample:
                    batch.texts.append(_NO_CAPTION)
                    batch.bad["texts"].append(place)


def _decoded_crops(
    decode: Decoder, crops: TeacherCrops, places: SampleNumbers, image_size: int, encoded: bytes, row: int
) -> dict[str, np.ndarray]:
    """Return the columns of all crops of an image, each with an axis of crops. A model's own decoder takes a crop as a
    file of the model's size."""
    cut = (crops.decode(encoded, places[row], number, image_size).fitted(image_size) for number in range(crops.count))
    images = [decode(_file(pixels), row) for pixels in cut]
    return {name: np.stack([image[name] for image in images]) for name in images[0]}


def _file(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".bmp", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()


def _cuts_borders(decode: Decoder, image_size: int) -> bool:
    """Return whether a decoder cuts something off an image of the model's own size, as a crop after a resize does."""
    plain = np.full((image_size, image_size, 3), 255, np.uint8)
    framed = cv2.rectangle(plain.copy(), (0, 0), (image_size - 1, image_size - 1), (0, 0, 0))
    first, second = decode(_file(plain), 0), decode(_file(framed), 0)
    return all(np.array_equal(first[name], second[name]) for name in first)


def _computed(embedder: Embedder, batch: _Batch, features: Features, has_crops: bool = False) -> dict[str, np.ndarray]:
    """Return the features of a batch by tower, float16 `(rows, width)`, with a row for each crop."""
    device, raw = embedder.accelerator.device, dict[str, torch.Tensor]()
    with torch.no_grad(), embedder.accelerator.autocast():
        if batch.images is not None:
            of_images = embedder.image_features if features == "embeds" else embedder.pooled_features
            images = batch.images.to(device)
            images.update({name: column.flatten(0, 1) for name, column in images.items() if has_crops})
            raw["images"] = of_images(**images.with_image_size(embedder.pixels))
        if batch.texts:
            of_texts = embedder.text_features if features == "embeds" else embedder.pooled_text_features
            raw["texts"] = of_texts(_tokens(embedder, batch).to(device))
    found = {}
    for tower, rows in raw.items():
        found[tower] = (embedder.unit_embeds(rows) if features == "embeds" else rows).to(torch.float16).cpu().numpy()
        if not np.isfinite(found[tower]).all():
            raise UserError(
                f"{embedder.name!r} gives features of {tower} as large as {rows.abs().max():g}, which float16 cannot "
                "hold; use --features embeds, or another model"
            )
    return found


def _tokens(embedder: Embedder, batch: _Batch) -> Any:
    """Return the tokens of a batch's captions. Another word replaces a caption that has none."""
    try:
        return embedder.tokens(batch.texts)
    except UntokenizableCaption:
        for place, text in enumerate(batch.texts):
            try:
                embedder.tokens([text])
            except UntokenizableCaption:
                batch.texts[place] = _NO_CAPTION
                batch.bad["texts"].append(place)
        return embedder.tokens(batch.texts)


class _Claims:
    """The shards that this process writes."""

    def __init__(self, folder: Path, towers: Sequence[str], source: TarSource):
        self._folder, self._towers, self._source = folder, towers, source
        self._held = dict[int, tuple[FileLock, list[int | str]]]()  # with the shard's state before it is read

    def is_finished(self, shard: int) -> bool:
        """Return whether a shard has features, perhaps of what it was before."""
        return all(shard_file(self._folder, tower, shard).is_file() for tower in self._towers)

    def take(self, shard: int) -> bool:
        """Return whether this process now has to write a shard. A killed process has no claims."""
        lock = FileLock(self._folder / f".{shard:05d}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return False
        self._held[shard] = lock, self._source.shard_state(shard)
        if self.is_finished(shard) and not shard_fault(self._folder, self._source, shard):
            self._release(shard)
            return False
        shard_record(self._folder, shard).unlink(missing_ok=True)
        for tower in self._towers:
            for left in (self._folder / tower).glob(f".{shard:05d}.npy.partial*"):
                left.unlink(missing_ok=True)
        return True

    def write(self, shard: int, arrays: dict[str, np.ndarray]) -> None:
        for tower, rows in arrays.items():
            path = shard_file(self._folder, tower, shard)
            with atomic_write(path, unique_partial_path(path)) as written:
                with open(written, "wb") as file:
                    np.save(file, rows)
                sync(written)
        if self._source.shard_sizes[shard]:
            content = {"state": self._held[shard][1], "digest": self._source.shard_digest(shard)}
            if self._source.shard_state(shard) != content["state"]:
                raise UserError(f"shard {self._source.shard_name(shard)} changed while it was embedded; start again")
            write_text(shard_record(self._folder, shard), json.dumps(content))
        self._release(shard)

    def _release(self, shard: int) -> None:
        lock, _ = self._held.pop(shard)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _describe(
    embedder: Embedder, source: TarSource, towers: Sequence[str], features: Features, crops: TeacherCrops | None
) -> dict[str, Any]:
    """Return the content of `features.json`."""
    model = embedder.model
    if crops and (features != "embeds" or "images" not in towers):
        raise UserError(
            f"--crops is {crops.count} with --features {features} and --towers {' '.join(towers)}; it is for embeds of "
            "images, which teach another model"
        )
    if crops and _cuts_borders(embedder.decoder(), embedder.image_size):
        raise UserError(
            f"--crops is {crops.count} and the image processor of {embedder.name!r} cuts borders off, so teacher and "
            "student would see different windows; set the size of its resize to that of its crop, or leave --crops out"
        )
    if "texts" in towers and "texts" not in embedder.gives:
        raise UserError(f"--model {embedder.name!r} embeds no texts; use --towers images")
    images = dummy_batch(embedder.decoder()) if "images" in towers else None
    tried = _Batch(0, images, [_NO_CAPTION] * ("texts" in towers), {})
    widths = {tower: rows.shape[1] for tower, rows in _computed(embedder, tried, features).items()}
    about: dict[str, Any] = {
        **{"model": embedder.name, "model_digest": weights_digest(model.parameters()), "features": features},
        **{"files_digest": embedder.files, "shards": source.list.shards, "samples": len(source)},
        "shards_digest": source.contents_digest(in_order=True),
        **({"logit_scale": scale} if (scale := _logit_scale(model)) is not None else {}),
        **{"dtype": "float16", "computed_in": embedder.accelerator.mixed_precision},
    }
    for tower in towers:
        weights = getattr(model, PRECOMPUTED_TOWERS[tower], model).parameters()
        about[tower] = {"width": widths[tower], "weights_digest": weights_digest(weights)}
    if "images" in towers:
        resize = "by its own processor"
        if embedder.side("images").is_ours:
            resize = "to a square" if InputShape.of(model.config).squashes else "short side, then the centre"
        about["images"] |= {"image_size": embedder.image_size, "resize": resize}
        if crops:
            about["images"]["crops"] = {**asdict(crops), "scale": [*crops.scale]}
    if "texts" in towers and embedder.side("texts").is_ours:
        about["texts"]["tokens_digest"] = weights_digest([embedder.tokens([PROBE])])
    return about


def _logit_scale(model: Any) -> float | None:
    """Return the factor of a model's cosines in its loss, or None if it is unknown."""
    if hasattr(model, "loss_values"):
        return model.loss_values()["logit_scale"].item()
    scale = getattr(model, "logit_scale", None)
    return scale.detach().float().exp().item() if isinstance(scale, torch.Tensor) else None


def _begin(folder: Path, about: dict[str, Any]) -> None:
    """Write `features.json`, or compare it with `about`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ABOUT
    if any(not path.name.startswith(".") for path in folder.iterdir()) and not file.is_file():
        raise UserError(f"{folder} holds something that `prepare embed` did not write; name a new folder")
    if not file.is_file():
        with atomic_write(file, unique_partial_path(file)) as written:
            written.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    begun = read_object(file)
    for name in sorted((begun.keys() | about.keys()) - {*_FREE}):
        if begun.get(name) != about.get(name):
            raise UserError(
                f"{folder} was begun with {name} {begun.get(name)} by the model {begun.get('model')!r}, now "
                f"{about.get(name)}; use the same model, shards and options, or name a new folder"
            )
    for name in ("shards", *(about.keys() & PRECOMPUTED_TOWERS.keys())):
        (folder / name).mkdir(exist_ok=True)


def check_stored(recipe: Recipe, source: Source) -> None:
    """Raise UserError if a shard, or a tower of another library, has changed since its features were stored. Warn if
    that is unknown."""
    assert isinstance(source, TarSource), "`open_setup` refuses others"
    count = len(source.shard_sizes)
    shards = evenly(count, _MOST_ASKED if "://" in source.list.shards else count)
    for folder in map(Path, sorted({*recipe.data.stored.values(), *recipe.data.teachers})):
        if not (folder / "shards").is_dir():
            _log.warning("%s has no digests of its shards, so changes are not noticed; embed in a new folder", folder)
            continue
        faults = in_windows(partial(shard_fault, folder, source), shards, partial(ThreadPoolExecutor, 16))
        if changed := [*filter(None, faults)]:
            raise UserError(f"{len(changed)} of {len(shards)} shards have changed: {changed[0]}")
    for tower, name in recipe.model.embedded.items():
        about = read_about(Path(recipe.data.stored[tower]))
        try:
            place, model = load_transformers(name.removeprefix(TRANSFORMERS))
        except (UserError, OSError) as error:
            _log.warning("the exported model will have no copy of a tower: %s", error)
            continue
        check_embedded(model, name, PRECOMPUTED_TOWERS[tower], {"model": name, **about[tower]})
        if about.get("files_digest", files := texts_digest(place)) != files:
            other = "has another configuration, processor or tokenizer than when its features were stored"
            raise UserError(f"{name} {other}; use that model, or embed again in a new folder")
