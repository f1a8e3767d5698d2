"""Captions of a sample and their tokens."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flipscale.data.samples import (
    MAX_TEXT_BYTES,
    BadSample,
    MissingCaption,
    UndecodableCaption,
    check_bytes,
    one_line_reason,
    wrap_errors,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Most numbers of rows that packed captions of a batch can have: memory is allocated anew for each.
MAX_ROW_COUNTS = 64
# A limit, because the time and memory of tokenizers grow with the length.
MAX_CAPTION_BYTES = 1 << 16


class UntokenizableCaption(BadSample):
    """The tokenizer raises for the caption, or returns no token."""

    cause = "untokenizable_caption"


def choose_caption(captions: tuple[bytes, ...], draw: float) -> str:
    """Return the caption that `draw`, a uniform number in [0, 1), chooses. Blank captions do not count."""
    return choose_captions({"": captions}, {"": 1.0}, [draw])[0]


def choose_captions(
    kinds: Mapping[str, tuple[bytes, ...]], weights: Mapping[str, float], draws: Sequence[float]
) -> list[str]:
    """Return a caption for each draw, a uniform number in [0, 1). They are drawn without replacement.

    The weights choose among the kinds that the sample has. A blank caption does not count.
    """
    texts = {kind: [text for text in map(_text, kinds.get(kind, ())) if text] for kind in weights}
    if not any(texts.values()):
        raise MissingCaption("it is blank" if any(kinds.get(kind) for kind in weights) else "there is none")
    chosen: list[str] = []
    left: dict[str, list[str]] = {}
    for draw in draws:
        left = {kind: rest for kind, rest in left.items() if rest}
        left = left or {kind: list(given) for kind, given in texts.items() if given}
        point = draw * sum(weights[kind] for kind in left)
        for kind in left:
            if point < weights[kind]:
                break
            point -= weights[kind]
        rest = left[kind]
        chosen.append(rest.pop(min(int(point / weights[kind] * len(rest)), len(rest) - 1)))
    return chosen


def _text(caption: bytes) -> str:
    """Return a caption without the blanks, and the byte order mark, around it."""
    if len(caption) > MAX_CAPTION_BYTES:
        raise BadSample(f"{len(caption):,} bytes; at most {MAX_CAPTION_BYTES:,} are read", "caption_too_long")
    try:
        text = caption.decode("utf-8").removeprefix("\ufeff").strip()
    except UnicodeDecodeError as error:
        raise UndecodableCaption(str(error)) from error
    if "\0" in text:
        raise UndecodableCaption(f"a NUL at character {text.index(chr(0))}, as in UTF-16; it must be UTF-8")
    return text


def captions_of_json(stored: bytes) -> tuple[bytes, ...]:
    """Return the captions in a sample's `KEY.json`, an object: the field `captions`, else `caption`."""
    fields = fields_of_json(stored)
    name = "captions" if fields.get("captions") not in (None, [], "") else "caption"
    return encoded_captions(fields.get(name), f"KEY.json: {name!r}")


def fields_of_json(stored: bytes) -> dict[str, Any]:
    check_bytes(len(stored), MAX_TEXT_BYTES, "KEY.json")
    try:
        fields = json.loads(stored)
    except (ValueError, RecursionError) as error:
        raise UndecodableCaption(f"KEY.json: {one_line_reason(error)}") from error
    if not isinstance(fields, dict):
        raise UndecodableCaption(f"KEY.json holds a {type(fields).__name__}; it must be an object with a caption")
    return fields


def encoded_captions(value: Any, name: str) -> tuple[bytes, ...]:
    """Return the captions in a field, UTF-8: a text is one caption, a list holds several; nulls are skipped."""
    captions = value if isinstance(value, list) else [value]
    for caption in captions:
        if not isinstance(caption, str | None):
            raise UndecodableCaption(f"{name} has a {type(caption).__name__}; it must be a text or a list of texts")
    try:
        return tuple(caption.encode() for caption in captions if caption is not None)
    except UnicodeEncodeError as error:
        raise UndecodableCaption(f"{name} has half of a surrogate pair at character {error.start}") from error


def tokenise(tokenizer: "PreTrainedTokenizerBase", texts: list[str], max_tokens: int) -> dict[str, "torch.Tensor"]:
    """Return `input_ids` and `attention_mask`, int64 `(texts, max_tokens)`; texts are cut or padded to that length."""
    with wrap_errors(UntokenizableCaption):
        tokens = tokenizer(
            *(texts,),
            padding="max_length",
            max_length=max_tokens,
            truncation=True,
            return_tensors="pt",
            return_attention_mask=True,
        )
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def tokenise_captions(tokenizer: "PreTrainedTokenizerBase", texts: list[str], length: int) -> dict[str, "torch.Tensor"]:
    """Return `tokenise` of captions, each of which needs a token."""
    tokens = tokenise(tokenizer, texts, length)
    if not tokens["attention_mask"].any(dim=1).all():
        raise UntokenizableCaption("the tokenizer makes no token of it")
    return tokens


def pack_captions(tokens: dict[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """Return captions in fewer rows of the same length, several in a row.

    Args:
        tokens: `tokenise_captions`, padded on the right, `(captions, max_tokens)`.

    Returns:
        `input_ids` and `position_ids` int64 `(rows, max_tokens)`. The positions of each caption begin at 0, and padding
        has position 0. `caption_ends` int64 `(captions,)`: place of each caption's first end token in the flat rows.
    """
    import torch

    ids, mask = tokens["input_ids"], tokens["attention_mask"].bool()
    count, width = ids.shape
    lengths = mask.sum(1)
    places = _best_fit(lengths.tolist(), width)
    unit = -(-count // MAX_ROW_COUNTS)
    rows = min(count, -(-(max(places) // width + 1) // unit) * unit)
    starts, steps = torch.tensor(places)[:, None], torch.arange(width).expand(count, -1)
    packed = ids.new_zeros(2, rows * width)
    packed[:, (starts + steps)[mask]] = torch.stack([ids[mask], steps[mask]])
    # A caption may spell out its end token, and CLIP pools at the first.
    ends = (ids == ids.gather(1, lengths[:, None] - 1)).int().argmax(1)
    input_ids, position_ids = packed.view(2, rows, width)
    return {"input_ids": input_ids, "position_ids": position_ids, "caption_ends": starts[:, 0] + ends}


def _best_fit(lengths: list[int], width: int) -> list[int]:
    """Return the place of each caption in flat rows of `width` tokens: the longest first, each where it fits best."""
    places, num_rows = [0] * len(lengths), 0
    rows_by_room: list[list[int]] = [[] for _ in range(width + 1)]
    for caption in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        room = next((room for room in range(lengths[caption], width + 1) if rows_by_room[room]), None)
        if room is None:
            rows_by_room[width].append(num_rows)
            num_rows, room = num_rows + 1, width
        row = rows_by_room[room].pop()
        places[caption] = row * width + width - room
        rows_by_room[room - lengths[caption]].append(row)
    return places
