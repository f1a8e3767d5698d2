"""Captions of a sample and their tokens."""

import json
from typing import TYPE_CHECKING, Any

from flipscale.data.samples import (
    MAX_TEXT_BYTES,
    BadSample,
    MissingCaption,
    UndecodableCaption,
    check_bytes,
    reason_of,
    wrap_errors,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# A limit, because the time and memory of tokenizers grow with the length.
MAX_CAPTION_BYTES = 1 << 16


class UntokenizableCaption(BadSample):
    """The tokenizer raises for the caption, or returns no token."""

    cause = "untokenizable_caption"


def choose_caption(captions: tuple[bytes, ...], draw: float) -> str:
    """Return one of a sample's captions. Blank captions do not count.

    Args:
        draw: uniform number in [0, 1) that chooses the caption.
    """
    texts = [text for text in (_text(caption) for caption in captions) if text]
    if not texts:
        raise MissingCaption("it is blank" if captions else "there is none")
    return texts[int(draw * len(texts))]


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
    check_bytes(len(stored), MAX_TEXT_BYTES, "KEY.json")
    try:
        fields = json.loads(stored)
    except (ValueError, RecursionError) as error:
        raise UndecodableCaption(f"KEY.json: {reason_of(error)}") from error
    if not isinstance(fields, dict):
        raise UndecodableCaption(f"KEY.json holds a {type(fields).__name__}; it must be an object with a caption")
    name = "captions" if fields.get("captions") not in (None, [], "") else "caption"
    return encoded_captions(fields.get(name), f"KEY.json: {name!r}")


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


def tokenise_captions(
    tokenizer: "PreTrainedTokenizerBase", captions: list[str], length: int
) -> dict[str, "torch.Tensor"]:
    """Return `tokenise` of captions, each of which needs a token."""
    tokens = tokenise(tokenizer, captions, length)
    if not tokens["attention_mask"].any(dim=1).all():
        raise UntokenizableCaption("the tokenizer makes no token of it")
    return tokens
