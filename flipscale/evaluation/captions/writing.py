"""What a model with a decoder does with the images of a test set: it writes captions, or says how likely texts are."""

import copy
from typing import Any

import torch

from flipscale.data.captions import tokenise_captions
from flipscale.data.sources.tar_source import TarSource
from flipscale.evaluation.embedding import Embedder


def captioner(embedder: Embedder) -> Any:
    """Return the part of the embedder's model that writes captions, a `FlipForConditionalGeneration` that has the same
    modules.

    Raises:
        ValueError: the model has no decoder.
    """
    from flipscale.model import FlipForConditionalGeneration

    model = embedder.model
    if not hasattr(model, "vision_model") or not hasattr(model, "decoder"):
        raise ValueError(
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

    The decoder looks at an image once, and the keys and values of its tokens serve all texts.

    Args:
        texts: at most as many images times texts are computed at once as the embedder takes images.

    Raises:
        ValueError: the model has no decoder, or the tokenizer makes no token of a text.
    """

    def __init__(self, embedder: Embedder, texts: list[str]):
        from flipscale.model.modeling_flip_decoder import caption_inputs

        self._embedder, self._model = embedder, captioner(embedder)
        config = self._model.config.decoder_config
        tokens = tokenise_captions(embedder.tokenizer, texts, config.max_position_embeddings)
        inputs, labels = caption_inputs(tokens["input_ids"], tokens["attention_mask"], config)
        longest = int((labels >= 0).sum(dim=1).max())
        device = embedder.accelerator.device
        self._inputs, self._labels = inputs[:, :longest].to(device), labels[:, :longest].to(device)

    def of(self, columns: dict[str, Any], together: int) -> torch.Tensor:
        """Collective where the model is sharded. Return the log-likelihood of each text in nats, the sum over its
        tokens and the end, fp32 `(images, texts)`, CPU.

        Args:
            columns: of the images, as the model takes them.
            together: how many texts of each image are computed at once: the same number on every process.
        """
        with torch.no_grad(), self._embedder.accelerator.autocast():
            image_tokens = self._model.vision_model(**columns).last_hidden_state
            begun = self._model.decoder(self._inputs[:1, :1].expand(len(image_tokens), 1), image_tokens, use_cache=True)
            parts = [
                self._of_some(begun, image_tokens, slice(first, first + together))
                for first in range(0, len(self._inputs), together)
            ]
        return torch.cat(parts, dim=1).cpu()

    def _of_some(self, begun: Any, image_tokens: torch.Tensor, some: slice) -> torch.Tensor:
        """Return the log-likelihoods of some texts, after the first token, which is the same for all, was read."""
        from flipscale.model.modeling_flip_decoder import token_losses

        images, (inputs, labels) = len(image_tokens), (self._inputs[some], self._labels[some])
        texts = len(inputs)
        logits = begun.logits.repeat_interleave(texts, dim=0)
        if inputs.shape[1] > 1:
            cache = copy.deepcopy(begun.cache)
            cache.batch_repeat_interleave(texts)
            rest = self._model.decoder(inputs[:, 1:].repeat(images, 1), None, cache=cache, use_cache=True)
            logits = torch.cat([logits, rest.logits], dim=1)
        return -token_losses(logits, labels.repeat(images, 1)).sum(dim=1).view(images, texts)
