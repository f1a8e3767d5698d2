"""The caption of a sample and its tokens."""

import torch
from transformers import PreTrainedTokenizerBase

from flipscale.data.faults import MissingCaption, UndecodableCaption


def choose_caption(captions: tuple[bytes, ...], draw: float) -> str:
    """Return one of a sample's captions, chosen by `draw`, a uniform number in [0, 1). Blank captions do not count.

    Raises:
        BadSample: the sample has no caption, or one that is not UTF-8.
    """
    try:
        texts = [text for text in (caption.decode("utf-8").strip() for caption in captions) if text]
    except UnicodeDecodeError as error:
        raise UndecodableCaption(str(error)) from error
    if not texts:
        raise MissingCaption("it is blank" if captions else "there is none")
    return texts[int(draw * len(texts))]


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, int64 `(texts, max_tokens)`, each text cut or padded to that length."""
    tokens = tokenizer(texts, padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
