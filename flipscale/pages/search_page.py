"""A page of searches: for each query, words or a picture, the nearest of many pictures."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flipscale.data.decode import decode_small
from flipscale.data.faults import BadSample
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.reports.record import weights_digest
from flipscale.io.atomic import atomic_write, write_text
from flipscale.io.errors import UserError
from flipscale.pages.embedded import Embedded, embed_pictures, unit
from flipscale.pages.library import FolderPictures, Pictures
from flipscale.pages.page import Picture, rendered, shortened, thumbnail
from flipscale.preparation.lists.files import IMAGE_SUFFIXES
from flipscale.preparation.lists.folder_list import FileList

MOST_BYTES = 5_000_000
# The longer side of a thumbnail; the first at which the page is small enough.
_SIDES = (144, 112, 80, 56, 40)
_MOST_LIKE = 8
_MOST_LETTERS = 70
# What the file of embeddings has beside its key.
_EMBEDDED = ("rows", "embeds", "faults")


@dataclass(frozen=True)
class Hit:
    """A picture that was found.

    Args:
        number: of the picture.
        similarity: its cosine with the query.
    """

    number: int
    similarity: float


@dataclass(frozen=True)
class Search:
    """A query with what it found, the nearest first. `is_picture`: the query is a picture file, not words."""

    query: str
    hits: list[Hit]
    is_picture: bool = False


def embedded_pictures(embedder: Embedder, pictures: Pictures, cache: Path) -> Embedded:
    """Return the embeddings of all pictures: those that the file `cache` holds, if it is of this model and these
    pictures as they are now, else new ones, which are written there.

    Raises:
        ValueError: no picture can be decoded, or what lies at `cache` is somebody's.
        OSError: the disk is full or not writable.
    """
    _refuse_others(cache)
    weights = embedder.model.state_dict()
    about = [embedder.name.split("/")[-1], embedder.accelerator.mixed_precision, pictures.state()]
    key = hashlib.sha256(json.dumps([weights_digest(weights, weights.__getitem__), about]).encode()).hexdigest()
    stored = _stored(cache, key)
    if stored is not None:
        return stored
    found = _embed(embedder, pictures, range(len(pictures)))
    if not len(found.rows):
        raise UserError(f"none of the {len(pictures)} pictures can be read, the first: {found.faults[0]}")
    with atomic_write(cache) as partial, open(partial, "wb") as file:
        np.savez(file, key=np.array(key), rows=found.rows, embeds=found.embeds, faults=np.array(found.faults, "U"))
    return found


def searches(embedder: Embedder, found: Embedded, queries: Sequence[str], top: int) -> list[Search]:
    """Return what each query finds among embedded pictures. A query that names a picture file asks for pictures like
    it.

    Raises:
        ValueError: the model takes no words, or a file is no picture.
    """
    files = [query for query in queries if _is_picture(query)]
    words = [query for query in queries if query not in files]
    if words and embedder.tokenizer is None:
        raise UserError(f"{embedder.name} takes no words, only pictures, and {words[0]!r:.60} names no picture file")
    asked = dict(zip(words, embedder.texts(words).numpy(), strict=True)) if words else {}
    for file in files:
        one = _embed(embedder, _single(file), [0])
        if one.faults:
            raise UserError(f"the query {file} cannot be read as a picture ({one.faults[0].split(': ', 1)[1]})")
        asked[file] = one.embeds[0]
    results = []
    for query in queries:
        cosines = found.embeds @ asked[query]
        best = np.argsort(-cosines, kind="stable")[:top].tolist()
        hits = [Hit(int(found.rows[place]), float(cosines[place])) for place in best]
        results.append(Search(query, hits, query in files))
    return results


def write_search_page(
    path: Path, pictures: Pictures, found: Embedded, results: Sequence[Search], model: str, place: str
) -> int:
    """Write the page of searches and return its bytes.

    Args:
        model, place: what the page calls the model and the pictures.

    Raises:
        ValueError: it would have more than 5 MB at the smallest thumbnails.
        OSError: the disk is full or not writable, or a picture cannot be read any more.
    """
    numbers = sorted({hit.number for search in results for hit in search.hits})
    like = _likenesses(found, numbers)
    size = 0
    for side in _SIDES:
        shown = {number: _thumbnail(pictures, number, side) for number in numbers}
        asked = {s.query: _thumbnail(_single(s.query), 0, side) for s in results if s.is_picture}
        text = rendered(
            "search.html",
            searches=results,
            shown=shown,
            asked=asked,
            like=like,
            names={number: pictures.name(number) for number in numbers},
            model=model,
            place=place,
            num_pictures=len(found.rows),
            num_damaged=len(found.faults),
        )
        size = len(text.encode())
        if size <= MOST_BYTES:
            write_text(path, text)
            return size
    raise UserError(
        f"the page of {len(results)} queries would have {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f} MB; give "
        "fewer queries, or a smaller --top"
    )


def _embed(embedder: Embedder, pictures: Pictures, rows: Sequence[int]) -> Embedded:
    device = embedder.accelerator.device

    def features(columns: dict[str, torch.Tensor]) -> torch.Tensor:
        with embedder.accelerator.autocast():
            return unit(embedder.image_features(**{name: column.to(device) for name, column in columns.items()}))

    return embed_pictures(pictures, rows, embedder.decoder(), features)


def _refuse_others(cache: Path) -> None:
    """Raise if there is something that no search wrote where the embeddings will be."""
    if not cache.exists() and not cache.is_symlink():
        return
    with suppress(Exception):  # numpy, zipfile and zlib raise what they like
        if cache.is_file() and not cache.is_symlink():
            with np.load(cache, allow_pickle=False) as file:
                if set(file.files) == {"key", *_EMBEDDED}:
                    return
    raise UserError(f"{cache} is there, and no search wrote it; name another page with --out, or move it away")


def _stored(cache: Path, key: str) -> Embedded | None:
    """Return what a cache holds under a key; None if it is another's, damaged or not there."""
    try:
        with np.load(cache, allow_pickle=False) as file:
            if str(file["key"]) != key:
                return None
            rows, embeds, faults = (file[name] for name in _EMBEDDED)
            return Embedded(rows, embeds, faults.tolist())
    except Exception:  # as above, of a damaged file
        return None


def _likenesses(found: Embedded, numbers: Sequence[int]) -> dict[int, list[int]]:
    """Return for each of these pictures those of them that are most like it."""
    places = np.searchsorted(found.rows, numbers)
    cosines = found.embeds[places] @ found.embeds[places].T
    np.fill_diagonal(cosines, -np.inf)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : min(_MOST_LIKE, len(numbers) - 1)]
    return {number: [numbers[place] for place in row] for number, row in zip(numbers, nearest.tolist(), strict=True)}


def _thumbnail(pictures: Pictures, number: int, side: int) -> Picture:
    """Raises: OSError: the picture cannot be read any more."""
    label = shortened(pictures.label(number), _MOST_LETTERS)
    try:
        return thumbnail(decode_small(pictures.image(number), side), label, side)
    except BadSample as error:
        raise OSError(f"{pictures.name(number)} has changed since it was embedded ({error}); run this again") from error


def _is_picture(query: str) -> bool:
    return query.lower().endswith(IMAGE_SUFFIXES) and Path(query).is_file()


def _single(file: str) -> Pictures:
    return FolderPictures(FileList(Path(file).parent, [Path(file).name], 0, allow_outside=True))


def as_lines(results: Sequence[Search], pictures: Pictures) -> Iterator[str]:
    """Return what was found as lines of text: a query, and its nearest pictures with their cosines."""
    for search in results:
        hits = [f"{_called(pictures, hit.number)} {hit.similarity:.2f}" for hit in search.hits[:3]]
        yield f"{shortened(search.query, 60)}: {', '.join(hits)}"


def _called(pictures: Pictures, number: int) -> str:
    label, name = shortened(pictures.label(number), 40), pictures.name(number)
    return name if label == name else f"{label} ({name})"
