"""Evaluations of a decoder: the captions that it writes, and the class whose name it finds the most likely caption."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch

from flipscale.data.captions import tokenise_captions
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import ChosenRows, Embedder
from flipscale.evaluation.intervals import Estimate, mean_estimate
from flipscale.evaluation.kinds.caption_metrics import bleu_4, caption_words, cider, rouge_l
from flipscale.evaluation.kinds.task import ClassHits, LabelledTask, Task
from flipscale.evaluation.kinds.zero_shot import ZeroShot
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.io.errors import UserError
from flipscale.io.options import Count

_LABELS = {"cider": "CIDEr", "bleu_4": "BLEU-4", "rouge_l": "ROUGE-L"}


@dataclass(frozen=True)
class Captioning(Task):
    """`cider`, `bleu_4` and `rouge_l` of a caption for each image, times 100, as in COCO's evaluation.

    `data` has shards with `KEY.txt`; each line is a reference caption of the image. Every process holds all captions.
    CIDEr's word weights come from the references of the whole set.

    Args:
        metrics: metrics to compute; the first is the headline.
        max_new_tokens: most tokens of a caption.
        num_beams: number of beams; 1 is greedy.
    """

    metrics: list[Literal["cider", "bleu_4", "rouge_l"]] = field(default_factory=lambda: ["cider", "bleu_4", "rouge_l"])
    max_new_tokens: Count = 30
    num_beams: Count = 1

    needs: ClassVar[str] = "decoder"
    protocol: ClassVar[
        str
    ] = """Captioning: a caption for each whole image by beam search (one beam is greedy), compared
with all reference captions of the set, in words of the Penn Treebank without punctuation. All figures are times 100.
Intervals are over images for fixed references; BLEU's is by the bootstrap."""
    hub_task: ClassVar[str] = "image-to-text"

    def __post_init__(self) -> None:
        if not self.metrics:
            raise UserError(f"metrics is {self.metrics}; list one or more, such as [cider, bleu_4]")

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        return test_set.captions_of

    def evaluate(self, embedder: Embedder) -> list[Result]:
        captioner(embedder)  # refuses a model without a decoder before the set is read
        test_set = TestSet.open(self.data)
        references = [[line for line in lines if line.strip()] for lines in test_set.captions(embedder)]
        generated = generated_captions(embedder, test_set.source, self.max_new_tokens, self.num_beams)
        candidates = [caption_words(caption) for caption in generated]
        words = [[caption_words(caption) for caption in captions] for captions in references]
        estimates: dict[str, Callable[[], Estimate]] = {
            "cider": lambda: mean_estimate(cider(candidates, words)),
            "bleu_4": lambda: bleu_4(candidates, words),
            "rouge_l": lambda: mean_estimate(rouge_l(candidates, words)),
        }
        results = []
        for metric in dict.fromkeys(self.metrics):
            value, low, high = (100.0 * part for part in estimates[metric]())
            results.append(
                Result(
                    *(self.name, self.kind, metric, value, len(candidates), low, high),
                    unit="",
                    label=_LABELS[metric],
                    headline=metric == self.metrics[0],
                    made_by=self.made_by,
                )
            )
            embedder.alive()
        return results


@dataclass(frozen=True)
class Likelihood(LabelledTask):
    """`top1`, `top5` (with five classes or more) and `mean_per_class` of classification shards, in percent.

    `data` is laid out as for `zero_shot`. A class's score is the log-likelihood of its prompt under the decoder: the
    sum over its tokens and the end, and the mean over several prompts. The decoder reads each prefix of the prompts for
    each image, which costs a thousand times as much as captions for 1,000 classes. Use few prompts or few images.

    Args:
        templates: prompts, as for `zero_shot`.
        metric: the headline.
        images: number of test images, spread over the set; all by default.
    """

    templates: str | list[str] | None = None
    metric: Literal["top1", "top5", "mean_per_class"] = "top1"
    images: Count | None = None

    needs: ClassVar[str] = "decoder"
    protocol: ClassVar[str] = """Classification by likelihood: whole images. The answer is the class whose prompt the
decoder finds the most likely caption, by the sum of its tokens' log-likelihoods (the mean over the set's prompts).
Intervals are those of zero-shot classification."""
    hub_task: ClassVar[str] = "zero-shot-image-classification"

    def __post_init__(self) -> None:
        self._zero_shot()

    def check(self) -> None:
        super().check()
        self._zero_shot().check()

    def prompts(self, test_set: TestSet) -> list[str]:
        return self._zero_shot().prompts(test_set)

    def evaluate(self, embedder: Embedder) -> list[Result]:
        test_set = TestSet.open(self.data)
        if self.images is not None and self.images < len(test_set):
            chosen = np.linspace(0, len(test_set), self.images, endpoint=False, dtype=np.int64)
            test_set = replace(test_set, source=ChosenRows(test_set.source, chosen))
        names, prompts = test_set.class_names(), self.prompts(test_set)
        texts = [prompt.replace("{c}", name) for name in names for prompt in prompts]
        likelihoods = Likelihoods(embedder, texts, embedder.most_in_batch(len(test_set)))
        hits = ClassHits(self, embedder, test_set.labels(embedder, len(names)), names)
        for rows, columns in embedder.image_columns(test_set.source):
            scores = likelihoods.of(columns)[: len(rows)]
            hits.add(scores.view(len(rows), len(names), len(prompts)).mean(dim=2))
        return hits.results(self.metric)[0]

    def _zero_shot(self) -> ZeroShot:
        return ZeroShot(self.kind, self.data, self.name, templates=self.templates, metric=self.metric)


def captioner(embedder: Embedder) -> Any:
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
        wrapper = FlipForConditionalGeneration(model.config)
    wrapper.vision_model, wrapper.decoder = model.vision_model, model.decoder
    return wrapper.eval()


def generated_captions(embedder: Embedder, source: TarSource, max_new_tokens: int, num_beams: int) -> list[str]:
    """Collective. Return a caption for each image of `source`, on every process, by beam search."""
    from accelerate.utils import gather_object

    model, mine = captioner(embedder), []
    for rows, columns in embedder.image_columns(source):
        with torch.no_grad(), embedder.accelerator.autocast():
            ids = model.generate(
                **columns,
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=False,
                # The forward passes of a sharded model are collective.
                synced_gpus=embedder.accelerator.num_processes > 1,
            )
        mine += list(zip(rows, embedder.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=False))
    return [caption for _, caption in sorted(gather_object(mine))]


class Likelihoods:
    """Log-likelihoods of several texts as the caption of an image.

    The decoder reads a common prefix such as "a photo of a" once for all texts that begin with it.

    Args:
        images: most images in a batch, the same on every process.
    """

    def __init__(self, embedder: Embedder, texts: list[str], images: int):
        from flipscale.model.modeling_flip_caption import caption_inputs

        self._embedder, self._model, self._images = embedder, captioner(embedder), images
        config = self._model.config.decoder_config
        tokens = tokenise_captions(embedder.tokenizer, texts, config.max_position_embeddings)
        _, labels = caption_inputs(tokens["input_ids"], tokens["attention_mask"], config)
        targets = [tuple(row[row >= 0].tolist()) for row in labels]
        # This order puts texts with a common prefix side by side.
        order = sorted(range(len(texts)), key=targets.__getitem__)
        self._places = torch.tensor(order).argsort()
        # Images times texts in one decoder batch: about as many as the embedder's batch has images.
        self._group = min(images, max(1, embedder.batch_size // len(texts)))
        together, device = max(1, embedder.batch_size // self._group), embedder.accelerator.device
        self._parts = [
            _prefix_steps([targets[number] for number in order[first : first + together]], device)
            for first in range(0, len(order), together)
        ]

    def of(self, columns: dict[str, Any]) -> torch.Tensor:
        """Collective for a sharded model. Return the log-likelihood of each text in nats, fp32 `(images, texts)`, CPU.

        It is the sum over the text's tokens and the end."""
        scores = []
        with torch.no_grad(), self._embedder.accelerator.autocast():
            image_tokens = self._model.vision_model(**columns).last_hidden_state
            for first in range(0, self._images, self._group):
                # A process with fewer images reads its first again, because the forward pass is collective.
                group = image_tokens[first : first + self._group]
                group = group if len(group) else image_tokens[:1]
                first_token = self._model.config.decoder_config.bos_token_id
                begin = group.new_full((len(group), 1), first_token, dtype=torch.int64)
                begun = self._model.decoder(begin, group, use_cache=True)
                scores.append(torch.cat([self._of_part(begun, steps) for steps in self._parts], dim=1))
        return torch.cat(scores)[: len(image_tokens), self._places].cpu()

    def _of_part(self, begun: Any, steps: list["_Step"]) -> torch.Tensor:
        """Return the log-likelihoods `(images, texts)` of some texts, after the decoder read the first token."""
        cache, logits = copy.deepcopy(begun.cache), begun.logits
        of_images = [(layer.keys, layer.values) for layer in begun.cache.cross_attention_cache.layers]
        images, device = len(logits), logits.device
        scores = torch.zeros(images, len(steps[0].texts), device=device)
        for step in steps:
            if step.tokens is not None:
                before = torch.arange(images, device=device)[:, None] * logits.shape[1]
                cache.self_attention_cache.batch_select_indices((before + step.parents).flatten())
                for layer, kept in zip(cache.cross_attention_cache.layers, of_images, strict=True):
                    # For a single image, these are views.
                    layer.keys, layer.values = (
                        part[:, None].expand(-1, len(step.tokens), *part.shape[1:]).flatten(0, 1) for part in kept
                    )
                output = self._model.decoder(step.tokens.repeat(images)[:, None], None, cache=cache, use_cache=True)
                logits = output.logits.unflatten(0, (images, -1))[:, :, -1]
            log_probs = logits.float().log_softmax(dim=-1)
            scores[:, step.texts] += log_probs[:, step.prefixes, step.targets]
        return scores


class _Step(NamedTuple):
    """One decoder step over several texts: each distinct prefix once, and the next token of each text."""

    tokens: torch.Tensor | None  # last token of each prefix, int64 `(prefixes,)`; None for the empty prefix
    parents: torch.Tensor  # index, in the step before, of each prefix without its last token
    texts: torch.Tensor  # index of each text that has a token here
    prefixes: torch.Tensor  # index of the prefix of each of these texts
    targets: torch.Tensor  # next token of each of these texts


def _prefix_steps(texts: list[tuple[int, ...]], device: Any) -> list[_Step]:
    steps: list[_Step] = []
    parents: dict[tuple[int, ...], int] = {(): 0}
    for length in range(max(map(len, texts))):
        longer = [place for place, text in enumerate(texts) if len(text) > length]
        prefixes = {prefix: place for place, prefix in enumerate(dict.fromkeys(texts[p][:length] for p in longer))}
        columns = (
            [prefix[-1] for prefix in prefixes] if length else [],
            [parents[prefix[:-1]] for prefix in prefixes],
            longer,
            [prefixes[texts[place][:length]] for place in longer],
            [texts[place][length] for place in longer],
        )
        tokens, *others = (torch.tensor(column, dtype=torch.int64, device=device) for column in columns)
        steps.append(_Step(tokens if length else None, *others))
        parents = prefixes
    return steps
