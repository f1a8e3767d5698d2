"""A page of searches: for each query, words or a picture, the nearest of many pictures."""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from flipscale.data.decode import decode_small
from flipscale.data.samples import BadSample
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.reports.record import weights_digest
from flipscale.io.atomic import atomic_write, write_text
from flipscale.io.errors import UserError
from flipscale.pages.page import Picture, rendered, shortened, thumbnail
from flipscale.pages.pictures import Embedded, FolderPictures, Pictures, embed_pictures, unit
from flipscale.preparation.lists import IMAGE_SUFFIXES, FileList

MOST_BYTES = 5_000_000
# Longer sides of thumbnails; the first that makes the page small enough is used.
_SIDES = (144, 112, 80, 56, 40)
_MOST_LIKE = 8
_MOST_LETTERS = 70
_FIELDS = {"key", "rows", "embeds", "faults"}  # arrays in the file of embeddings


@dataclass(frozen=True)
class Hit:
    """A picture that a query finds, and its cosine with the query."""

    index: int
    similarity: float


class Search(NamedTuple):
    """A query with its hits, nearest first. `is_picture`: the query is a picture file, not words."""

    query: str
    hits: list[Hit]
    is_picture: bool = False


def embedded_pictures(embedder: Embedder, pictures: Pictures, cache: Path) -> Embedded:
    """Return the embeddings of all pictures, from the file `cache` if it fits this model and these pictures.

    New embeddings are written there.

    Raises:
        UserError: no picture can be decoded, or `cache` is another file.
    """
    stored = _load(cache)
    weights = embedder.model.state_dict()
    about = [embedder.name.split("/")[-1], embedder.accelerator.mixed_precision, pictures.state()]
    key = hashlib.sha256(json.dumps([weights_digest(weights, weights.__getitem__), about]).encode()).hexdigest()
    if str(stored.get("key")) == key:
        return Embedded(stored["rows"], stored["embeds"], stored["faults"].tolist())
    embedded = _embed(embedder, pictures, range(len(pictures)))
    if not len(embedded.rows):
        raise UserError(f"none of the {len(pictures)} pictures can be read, the first: {embedded.faults[0]}")
    faults = np.array(embedded.faults, "U")
    with atomic_write(cache) as partial, open(partial, "wb") as file:
        np.savez(file, key=np.array(key), rows=embedded.rows, embeds=embedded.embeds, faults=faults)
    return embedded


def _load(cache: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file of embeddings; none if there is no file.

    Raises:
        UserError: another file has this name.
    """
    if not cache.exists() and not cache.is_symlink():
        return {}
    # numpy raises these for files that are damaged or not its own.
    with suppress(OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
        if cache.is_file() and not cache.is_symlink():
            with np.load(cache, allow_pickle=False) as file:
                if set(file.files) == _FIELDS:
                    return {name: file[name] for name in _FIELDS}
    raise UserError(f"{cache} exists, and no search wrote it; name another page with --out, or move it away")


def searches(embedder: Embedder, embedded: Embedded, queries: Sequence[str], top: int) -> list[Search]:
    """Return the nearest `top` pictures to each query. A query that names a picture file finds similar pictures."""
    files = [query for query in queries if _is_picture(query)]
    words = [query for query in queries if query not in files]
    if words and embedder.tokenizer is None:
        raise UserError(f"{embedder.name} takes no words, only pictures, and {words[0]!r:.60} names no picture file")
    embeds = dict(zip(words, embedder.texts(words).numpy(), strict=True)) if words else {}
    for file in files:
        one = _embed(embedder, _single(file), [0])
        if one.faults:
            raise UserError(f"the query {file} cannot be read as a picture ({one.faults[0].split(': ', 1)[1]})")
        embeds[file] = one.embeds[0]
    results = []
    for query in queries:
        cosines = embedded.embeds @ embeds[query]
        best = np.argsort(-cosines, kind="stable")[:top].tolist()
        hits = [Hit(int(embedded.rows[place]), float(cosines[place])) for place in best]
        results.append(Search(query, hits, query in files))
    return results


def write_search_page(
    path: Path, pictures: Pictures, embedded: Embedded, results: Sequence[Search], model: str, place: str
) -> None:
    """Write the page of searches; `place` is the name of the pictures' folder.

    Raises:
        UserError: the page would have more than 5 MB with the smallest thumbnails.
        OSError: a picture cannot be read any more.
    """
    indices = sorted({hit.index for search in results for hit in search.hits})
    like = _similar(embedded, indices)
    size = 0
    for side in _SIDES:
        shown = {index: _thumbnail(pictures, index, side) for index in indices}
        asked = {s.query: _thumbnail(_single(s.query), 0, side) for s in results if s.is_picture}
        text = rendered(
            "search.html",
            searches=results,
            shown=shown,
            asked=asked,
            like=like,
            names={index: pictures.name(index) for index in indices},
            model=model,
            place=place,
            num_pictures=len(embedded.rows),
            num_damaged=len(embedded.faults),
        )
        size = len(text.encode())
        if size <= MOST_BYTES:
            return write_text(path, text)
    raise UserError(
        f"the page of {len(results)} queries would have {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f} MB; give "
        "fewer queries, or a smaller --top"
    )


def as_lines(results: Sequence[Search], pictures: Pictures) -> Iterator[str]:
    """Yield a line for each query with its three nearest pictures and their cosines."""
    for search in results:
        hits = [f"{_title(pictures, hit.index)} {hit.similarity:.2f}" for hit in search.hits[:3]]
        yield f"{shortened(search.query, 60)}: {', '.join(hits)}"


def _title(pictures: Pictures, index: int) -> str:
    label, name = shortened(pictures.label(index), 40), pictures.name(index)
    return name if label == name else f"{label} ({name})"


def _embed(embedder: Embedder, pictures: Pictures, rows: Sequence[int]) -> Embedded:
    device = embedder.accelerator.device

    def features(columns: dict[str, torch.Tensor]) -> torch.Tensor:
        with embedder.accelerator.autocast():
            return unit(embedder.image_features(**{name: column.to(device) for name, column in columns.items()}))

    return embed_pictures(pictures, rows, embedder.decoder(), features)


def _similar(embedded: Embedded, indices: Sequence[int]) -> dict[int, list[int]]:
    """Return the most similar pictures among `indices` for each of them."""
    places = np.searchsorted(embedded.rows, indices)
    cosines = embedded.embeds[places] @ embedded.embeds[places].T
    np.fill_diagonal(cosines, -np.inf)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : min(_MOST_LIKE, len(indices) - 1)]
    return {index: [indices[place] for place in row] for index, row in zip(indices, nearest.tolist(), strict=True)}


def _thumbnail(pictures: Pictures, index: int, side: int) -> Picture:
    label = shortened(pictures.label(index), _MOST_LETTERS)
    try:
        return thumbnail(decode_small(pictures.image(index), side), label, side)
    except BadSample as error:
        raise OSError(f"{pictures.name(index)} has changed since it was embedded ({error}); search again") from error


def _is_picture(query: str) -> bool:
    return query.lower().endswith(IMAGE_SUFFIXES) and Path(query).is_file()


def _single(file: str) -> Pictures:
    return FolderPictures(FileList(Path(file).parent, [Path(file).name], 0, allow_outside=True))
