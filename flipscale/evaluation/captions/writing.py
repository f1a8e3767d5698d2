"""What a model with a decoder does with the images of a test set: it writes captions, or says how likely texts are."""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from flipscale.data.captions import tokenise_captions
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder
from flipscale.io.errors import UserError


def captioner(embedder: Embedder) -> Any:
    """Return the part of the embedder's model that writes captions, a `FlipForConditionalGeneration` that has the same
    modules.

    Raises:
        ValueError: the model has no decoder.
    """
    from flipscale.model import FlipForConditionalGeneration

    model = embedder.model
    if not hasattr(model, "vision_model") or not hasattr(model, "decoder"):
        raise UserError(
            f"{embedder.name or 'the model'} has no decoder, so it writes no captions; name a model that was trained "
            "to, such as by loss.caption_weight"
        )
    if isinstance(model, FlipForConditionalGeneration):
        return model
    with torch.device("meta"):
        found = FlipForConditionalGeneration(model.config)
    found.vision_model, found.decoder = model.vision_model, model.decoder
    return found.eval()


def written_captions(embedder: Embedder, source: TarSource, max_new_tokens: int, num_beams: int) -> list[str]:
    """Collective. Return a caption for each image of `source`, on every process: the most likely next token each time,
    or the most likely of `num_beams` captions that are followed.

    Raises:
        ValueError: the model has no decoder, or an image cannot be decoded.
        OSError: a shard cannot be read, or a worker died.
    """
    from accelerate.utils import gather_object

    model, mine = captioner(embedder), []
    for rows, columns in embedder.image_columns(source):
        with torch.no_grad(), embedder.accelerator.autocast():
            ids = model.generate(
                **columns,
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=False,
                # A sharded model computes as often on each process.
                synced_gpus=embedder.accelerator.num_processes > 1,
            )
        mine += list(zip(rows, embedder.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=False))
    return [caption for _, caption in sorted(gather_object(mine))]


class Likelihoods:
    """How likely a decoder finds each of several texts as the caption of an image.

    What texts begin with is read once for all of them, such as "a photo of a", and so is the image.

    Args:
        images: so many are given at once, at most; the same number on every process.

    Raises:
        ValueError: the model has no decoder, or the tokenizer makes no token of a text.
    """

    def __init__(self, embedder: Embedder, texts: list[str], images: int):
        from flipscale.model.modeling_flip_caption import caption_inputs

        self._embedder, self._model, self._images = embedder, captioner(embedder), images
        config = self._model.config.decoder_config
        tokens = tokenise_captions(embedder.tokenizer, texts, config.max_position_embeddings)
        _, labels = caption_inputs(tokens["input_ids"], tokens["attention_mask"], config)
        targets = [tuple(row[row >= 0].tolist()) for row in labels]
        # In this order, those that begin alike follow each other.
        order = sorted(range(len(texts)), key=targets.__getitem__)
        self._places = torch.tensor(order).argsort()
        # The decoder reads so many texts of so many images at once: as many rows as the embedder takes images.
        self._group = min(images, max(1, embedder.batch_size // len(texts)))
        together, device = max(1, embedder.batch_size // self._group), embedder.accelerator.device
        self._parts = [
            _read_once([targets[number] for number in order[first : first + together]], device)
            for first in range(0, len(order), together)
        ]

    def of(self, columns: dict[str, Any]) -> torch.Tensor:
        """Collective where the model is sharded. Return the log-likelihood of each text in nats, the sum over its
        tokens and the end, fp32 `(images, texts)`, CPU.

        Args:
            columns: of the images, as the model takes them.
        """
        scores = []
        with torch.no_grad(), self._embedder.accelerator.autocast():
            image_tokens = self._model.vision_model(**columns).last_hidden_state
            for first in range(0, self._images, self._group):
                # Where other processes have more images, the first is read again meanwhile.
                some = image_tokens[first : first + self._group]
                scores.append(self._of_some(some if len(some) else image_tokens[:1]))
        return torch.cat(scores)[: len(image_tokens), self._places].cpu()

    def _of_some(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """Return the log-likelihoods `(images, texts)` of the texts as they are ordered."""
        begin = image_tokens.new_full(
            (len(image_tokens), 1), self._model.config.decoder_config.bos_token_id, dtype=torch.int64
        )
        begun = self._model.decoder(begin, image_tokens, use_cache=True)
        return torch.cat([self._of_part(begun, steps) for steps in self._parts], dim=1)

    def _of_part(self, begun: Any, steps: list["_Step"]) -> torch.Tensor:
        """Return the log-likelihoods `(images, texts)` of texts, after the token that all begin with was read."""
        cache, logits = copy.deepcopy(begun.cache), begun.logits
        of_images = [(layer.keys, layer.values) for layer in begun.cache.cross_attention_cache.layers]
        images, device = len(logits), logits.device
        scores = torch.zeros(images, len(steps[0].texts), device=device)
        for step in steps:
            if step.tokens is not None:
                before = torch.arange(images, device=device)[:, None] * logits.shape[1]
                cache.self_attention_cache.batch_select_indices((before + step.parents).flatten())
                for layer, kept in zip(cache.cross_attention_cache.layers, of_images, strict=True):
                    # Of one image, these are views.
                    layer.keys, layer.values = (
                        part[:, None].expand(-1, len(step.tokens), *part.shape[1:]).flatten(0, 1) for part in kept
                    )
                read = self._model.decoder(step.tokens.repeat(images)[:, None], None, cache=cache, use_cache=True)
                logits = read.logits.unflatten(0, (images, -1))[:, :, -1]
            likely = logits.float().log_softmax(dim=-1)
            scores[:, step.texts] += likely[:, step.beginnings, step.targets]
        return scores


@dataclass(frozen=True)
class _Step:
    """What a decoder reads to predict one more token of several texts: each different beginning of them once.

    Args:
        tokens: the last of each beginning, int64 `(beginnings,)`; None before the first.
        parents: the places of the beginnings that are a token shorter, in the step before.
        texts, beginnings, targets: of each text that has a token here: its place, that of its beginning, and the token.
    """

    tokens: torch.Tensor | None
    parents: torch.Tensor
    texts: torch.Tensor
    beginnings: torch.Tensor
    targets: torch.Tensor


def _read_once(texts: list[tuple[int, ...]], device: Any) -> list[_Step]:
    """Return the steps in which texts of the given tokens are read."""
    steps: list[_Step] = []
    known: dict[tuple[int, ...], int] = {(): 0}
    for length in range(max(map(len, texts))):
        here = [place for place, text in enumerate(texts) if len(text) > length]
        found = {beginning: place for place, beginning in enumerate(dict.fromkeys(texts[p][:length] for p in here))}
        columns = (
            [beginning[-1] for beginning in found] if length else [],
            [known[beginning[:-1]] for beginning in found],
            here,
            [found[texts[place][:length]] for place in here],
            [texts[place][length] for place in here],
        )
        tokens, *others = (torch.tensor(column, dtype=torch.int64, device=device) for column in columns)
        steps.append(_Step(tokens if length else None, *others))
        known = found
    return steps
