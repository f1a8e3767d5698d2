"""A page of searches: for each query, words or a picture, the nearest of many pictures.

A small text tower and its tokenizer are data of the page, and templates/search.js computes them for any words.
"""

import base64
import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from flipscale.data.decode import decode_small
from flipscale.data.samples import BadSample
from flipscale.data.sources.raw_data import IMAGE_SUFFIXES
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.explain import patch_embeds
from flipscale.evaluation.model_results import state_dict_digest
from flipscale.io.atomic import atomic_write, write_text
from flipscale.io.errors import UserError
from flipscale.io.progress import each
from flipscale.model import FlipModel
from flipscale.pages.page import Picture, rendered, shortened, thumbnail
from flipscale.pages.pictures import EmbeddedPictures, FolderPictures, Pictures, embed_pictures
from flipscale.preparation.lists import FileList

MOST_BYTES = 5_000_000
# Limits of a page that finds any words, which has all pictures.
_MOST_SEARCH_BYTES, _MOST_SEARCHED = 50_000_000, 10_000
# Longer sides of thumbnails; the first that makes the page small enough is used.
_SIDES = (144, 112, 80, 56, 40)
_MOST_LETTERS = 70
_DARKEST = 150  # opacity of a map's shadow, of 255
_STORED = {"key", "rows", "embeds", "faults"}  # arrays in the file of embeddings
MOST_TOWER_BYTES = 20_000_000
_ACTIVATIONS = ("relu", "gelu_pytorch_tanh")
_TOWER_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "layer_norm_eps"),
    *("hidden_act", "attend_to_padding", "pooling", "pad_token_id"),
)
# Steps of the tokenizers that `flipscale prepare tokenizer` writes, and all special tokens that these may have.
_STEPS = [
    "Precompiled",
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "Unigram",
]
_SPECIAL = {"<pad>", "<unk>", "<s>", "</s>"}


class Search(NamedTuple):
    """A query with its hits, nearest first: index of a picture and its cosine; none for words that the model does not
    know.

    Args:
        is_picture: whether the query is a picture file, not words.
        maps: the query's map of each hit by its index, fp32 `(rows, columns)`; none without `with_maps`.
    """

    query: str
    hits: list[tuple[int, float]]
    is_picture: bool = False
    maps: Mapping[int, np.ndarray] = MappingProxyType({})


def embedded_pictures(embedder: Embedder, pictures: Pictures, cache: Path) -> EmbeddedPictures:
    """Return the embeddings of all pictures, from the file `cache` if it fits this model and these pictures.

    New embeddings are written there. Raise UserError if no picture can be decoded, or `cache` is another file.
    """
    stored = _load(cache)
    weights = embedder.model.state_dict()
    about = [
        embedder.name.split("/")[-1],
        embedder.files,
        embedder.accelerator.mixed_precision,
        pictures.state(),
        embedder.dims,
    ]
    key = hashlib.sha256(json.dumps([state_dict_digest(weights, weights.__getitem__), about]).encode()).hexdigest()
    if str(stored.get("key")) == key:
        return EmbeddedPictures(stored["rows"], stored["embeds"], stored["faults"].tolist())
    embedded = _embed(embedder, pictures, range(len(pictures)))
    if not len(embedded.rows):
        raise UserError(f"none of the {len(pictures)} pictures can be read, the first: {embedded.faults[0]}")
    faults = np.array(embedded.faults, "U")
    with atomic_write(cache) as partial, open(partial, "wb") as file:
        np.savez(file, key=np.array(key), rows=embedded.rows, embeds=embedded.embeds, faults=faults)
    return embedded


def _load(cache: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file of embeddings; none if there is no file. Raise UserError if another file has this
    name."""
    if not cache.exists() and not cache.is_symlink():
        return {}
    # numpy raises these for files that are damaged or not its own.
    with suppress(OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
        if cache.is_file() and not cache.is_symlink():
            with np.load(cache, allow_pickle=False) as file:
                if set(file.files) == _STORED:
                    return {name: file[name] for name in _STORED}
    raise UserError(f"{cache} exists, and no search wrote it; name another page with --out, or move it away")


def searches(embedder: Embedder, embedded: EmbeddedPictures, queries: Sequence[str], top: int) -> list[Search]:
    """Return the nearest `top` pictures to each query. A query that names a picture file finds similar pictures."""
    files = [query for query in queries if query.lower().endswith(IMAGE_SUFFIXES)]
    if missing := [file for file in files if not Path(file).is_file()]:
        raise UserError(f"the query {missing[0]} is not a file; name a picture by its path from the current folder")
    words = [query for query in queries if query not in files]
    if words and "texts" not in embedder.gives:
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
        count = 0 if query in words and _is_unknown(query, embedder.tokenizer) else top
        best = np.argsort(-cosines, kind="stable")[:count].tolist()
        hits = [(int(embedded.rows[place]), float(cosines[place])) for place in best]
        results.append(Search(query, hits, query in files))
    return results


def with_maps(embedder: Embedder, pictures: Pictures, results: Sequence[Search]) -> list[Search]:
    """Return the searches with a map of each hit: where in the picture the words are (`patch_embeds`)."""
    device, mapped = embedder.accelerator.device, []
    for search in each(results, "mapping", "queries", leave=False, delay=5):
        if search.is_picture or not search.hits:
            mapped.append(search)
            continue
        (text,) = embedder.texts([search.query]).to(device)

        def features(columns: dict[str, torch.Tensor], text: torch.Tensor = text) -> torch.Tensor:
            return patch_embeds(embedder, **{name: column.to(device) for name, column in columns.items()}) @ text

        embedded = embed_pictures(pictures, [index for index, _ in search.hits], embedder.decoder(), features)
        mapped.append(search._replace(maps=dict(zip(embedded.rows.tolist(), embedded.embeds, strict=True))))
    return mapped


def _overlay(heat: np.ndarray, picture: Picture, squashes: bool) -> Picture:
    """Return a map as a shadow to lie over a thumbnail, which keeps its hues: clear where the text is most, dark where
    it is least and outside the model's crop."""
    shares = (heat.max() - heat) / max(float(np.ptp(heat)), 1e-12)
    size = (picture.width, picture.height) if squashes else (min(picture.width, picture.height),) * 2
    alpha = Image.fromarray((_DARKEST * shares).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    whole = Image.new("L", (picture.width, picture.height), _DARKEST)
    whole.paste(alpha, ((picture.width - size[0]) // 2, (picture.height - size[1]) // 2))
    shadow = Image.merge("LA", (Image.new("L", whole.size), whole))
    return thumbnail(np.asarray(shadow.convert("RGBA")), "", max(whole.size))


def write_search_page(
    path: Path,
    embedder: Embedder,
    pictures: Pictures,
    embedded: EmbeddedPictures,
    results: Sequence[Search],
    **texts: object,
) -> str:
    """Write the page of searches. Its box finds any words among all pictures, if the page can compute and hold them.

    Args:
        texts: `model`, the model's name; `place`, the name of the pictures' folder; `top`, how many the box finds.

    Returns:
        The reason why the box only filters the queries; empty if it finds any words.

    Raises:
        UserError: the page of the queries alone would have more than 5 MB with the smallest thumbnails.
        OSError: a picture cannot be read any more.
    """
    tower = text_tower(embedder)
    reason = tower if isinstance(tower, str) else ""
    if len(embedded.rows) > _MOST_SEARCHED:
        reason = reason or f"there are more than {_MOST_SEARCHED:,} pictures"
    hits, size = sorted({index for search in results for index, _ in search.hits}), 0
    searched = [] if reason else [(embedded.rows.tolist(), _MOST_SEARCH_BYTES)]
    for indices, most in [*searched, (hits, MOST_BYTES)]:
        embeds = embedded.embeds[np.searchsorted(embedded.rows, indices)]
        for side in _SIDES:
            thumbnails = each(indices, "drawing", "pictures", leave=False, delay=5)
            text = rendered(
                "search.html",
                searches=results,
                shown=(shown := {index: _thumbnail(pictures, index, side) for index in thumbnails}),
                maps=[
                    {index: _overlay(heat, shown[index], embedder.crop == "squash") for index, heat in one.maps.items()}
                    for one in results
                ],
                asked={s.query: _thumbnail(_single(s.query), 0, side) for s in results if s.is_picture},
                names={index: pictures.name(index) for index in indices},
                number={index: number for number, index in enumerate(indices)},
                num_pictures=len(embedded.rows),
                num_damaged=len(embedded.faults),
                dim=embeds.shape[1],
                embeds=_as_base64(np.round(embeds * 32767).astype("<i2")),
                tower=None if reason else tower,
                **texts,
            )
            size = len(text.encode())
            if size <= most:
                write_text(path, text)
                return reason
        reason = reason or f"with all pictures, the page would have {size / 1e6:.0f} MB"
    raise UserError(
        f"the page of {len(results)} queries would have {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f} MB; give "
        "fewer queries, or a smaller --top"
    )


def text_tower(embedder: Embedder) -> dict[str, Any] | str:
    """Return what templates/text_tower.js reads of a model and its tokenizer; or the reason why a page cannot."""
    model = embedder.model
    if not isinstance(model, FlipModel) or embedder.tokenizer is None:
        return "a page computes only the text tower of a FlipModel with a tokenizer"
    config = model.config.text_config
    if config.embedded_by:
        return "the text tower is another library's model"
    if config.projection_hidden_size is not None:
        return "the projection of texts has two layers"
    weights = {**model.text_model.state_dict(), "projection.weight": model.text_projection.weight[: embedder.dims]}
    arrays = {name: weight.detach().float().cpu().numpy() for name, weight in weights.items()}
    num_bytes = sum(array.nbytes for array in arrays.values())
    if num_bytes > MOST_TOWER_BYTES:
        return f"the text tower has {num_bytes / 1e6:.1f} MB, more than {MOST_TOWER_BYTES / 1e6:.0f} MB"
    if config.num_hidden_layers and config.hidden_act not in _ACTIVATIONS:
        return f"the text tower's hidden_act is {config.hidden_act}, not {' or '.join(_ACTIVATIONS)}"
    tokenizer = json.loads(embedder.tokenizer.backend_tokenizer.to_str())
    pieces, steps = tokenizer["model"], (tokenizer["normalizer"] or {}).get("normalizers", [{}])
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    adds = pieces.get("byte_fallback") or (tokenizer["post_processor"] or {}).get("special_tokens")
    its_steps = [steps[0].get("type"), *steps[1:], tokenizer["pre_tokenizer"], pieces["type"]]
    if adds or its_steps != _STEPS or not special.keys() <= _SPECIAL:
        return "`flipscale prepare tokenizer` did not write the tokenizer"
    return {
        **{name: getattr(config, name) for name in _TOWER_FIELDS},
        "pieces": pieces["vocab"],
        "longest": max(len(piece) for piece, _ in pieces["vocab"]),
        # The penalty of an unknown letter is SentencePiece's.
        "unknown": {"id": pieces["unk_id"], "score": min(score for _, score in pieces["vocab"]) - 10.0},
        "special": special,
        "characters": steps[0]["precompiled_charsmap"],
        "weights": {name: _as_base64(array.astype("<f4")) for name, array in arrays.items()},
    }


def _as_base64(array: np.ndarray) -> str:
    """Return the bytes of an array for a page's script."""
    return base64.b64encode(array.tobytes()).decode()


def as_lines(results: Sequence[Search], pictures: Pictures) -> Iterator[str]:
    """Yield a line for each query with its three nearest pictures and their cosines."""
    for search in results:
        hits = []
        for index, similarity in search.hits[:3]:
            label, name = shortened(pictures.label(index), 40), pictures.name(index)
            hits.append(f"{name if label == name else f'{label} ({name})'} {similarity:.2f}")
        yield f"{shortened(search.query, 60)}: {', '.join(hits) or 'the model knows no part of these words'}"


def _embed(embedder: Embedder, pictures: Pictures, rows: Sequence[int]) -> EmbeddedPictures:
    device = embedder.accelerator.device

    def features(columns: dict[str, torch.Tensor]) -> torch.Tensor:
        with embedder.accelerator.autocast():
            return embedder.unit_embeds(
                embedder.image_features(**{name: column.to(device) for name, column in columns.items()})
            )

    return embed_pictures(pictures, rows, embedder.decoder(), features)


def _thumbnail(pictures: Pictures, index: int, side: int) -> Picture:
    label = shortened(pictures.label(index), _MOST_LETTERS)
    try:
        return thumbnail(decode_small(pictures.image(index), side), label, side)
    except BadSample as error:
        raise OSError(f"{pictures.name(index)} has changed since it was embedded ({error}); search again") from error


def _is_unknown(words: str, tokenizer: Any) -> bool:
    """Return whether a tokenizer of transformers makes only blanks and special tokens of words, such as `<unk>`."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return False
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(words)["input_ids"])
    return set(tokens) <= {"▁", *tokenizer.all_special_tokens}


def _single(file: str) -> Pictures:
    return FolderPictures(FileList(Path(file).parent, [Path(file).name], 0, allow_outside=True))
