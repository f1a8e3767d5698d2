"""Evaluations of a decoder: the captions that it writes, and the class whose name it finds the most likely caption."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F

from flipscale.data.captions import tokenise_captions
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.intervals import Estimate, mean_estimate
from flipscale.evaluation.kinds.caption_metrics import bleu_4, caption_words, cider, rouge_l
from flipscale.evaluation.kinds.task import LabelledTask, Task
from flipscale.evaluation.kinds.zero_shot import PromptedTask
from flipscale.evaluation.metrics import hits_by_class
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.evaluation.whole_images import ChosenRows
from flipscale.io.errors import UserError
from flipscale.io.options import Copies, Count
from flipscale.process.world import gather_objects

_LABELS = {"cider": "CIDEr", "bleu_4": "BLEU-4", "rouge_l": "ROUGE-L"}


@dataclass(frozen=True)
class Captioning(Task):
    """`cider`, `bleu_4` and `rouge_l` of a caption for each image, times 100, as in COCO's evaluation.

    `data` has shards with `KEY.txt`; each line is a reference caption of the image. Every process holds all captions.
    CIDEr's word weights come from the references of the whole set.

    Args:
        metrics: metrics to compute; the first is the headline.
        num_beams: number of beams; 1 is greedy.
    """

    metrics: list[Literal["cider", "bleu_4", "rouge_l"]] = field(default_factory=lambda: ["cider", "bleu_4", "rouge_l"])
    max_new_tokens: Count = 30
    num_beams: Copies = 1

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

    def evaluate(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
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
            estimate, headline, label = estimates[metric](), metric == self.metrics[0], _LABELS[metric]
            results.append(self.estimated(metric, estimate, len(candidates), headline=headline, unit="", label=label))
            embedder.alive()
        return results


@dataclass(frozen=True)
class Likelihood(PromptedTask, LabelledTask):
    """`top1`, `top5` (with five classes or more) and `mean_per_class` of classification shards, in percent.

    `data` is laid out as for `zero_shot`. A class's score is the log-likelihood of its prompt under the decoder: the
    sum over its tokens and the end, and the mean over several prompts. The decoder reads each prompt for each image,
    which costs a thousand times as much as captions for 1,000 classes. Use few prompts or few images.

    Args:
        images: number of test images, spread over the set; all by default.
    """

    metric: Literal["top1", "top5", "mean_per_class"] = "top1"
    images: Count | None = None

    needs: ClassVar[str] = "decoder"
    protocol: ClassVar[str] = """Classification by likelihood: whole images. The answer is the class whose prompt the
decoder finds the most likely caption, by the sum of its tokens' log-likelihoods (the mean over the set's prompts).
Intervals are those of zero-shot classification."""

    def evaluate(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
        if self.images is not None and self.images < len(test_set):
            chosen = np.linspace(0, len(test_set), self.images, endpoint=False, dtype=np.int64)
            test_set = replace(test_set, source=ChosenRows(test_set.source, chosen))
        names, prompts = test_set.class_names(), self.prompts(test_set)
        texts = [prompt.replace("{c}", name) for name in names for prompt in prompts]
        likelihoods = Likelihoods(embedder, texts, embedder.share(len(test_set)).size)
        labels, mine = test_set.labels(embedder, len(names)), list[torch.Tensor]()
        for rows, columns in embedder.image_columns(test_set.source):
            scores = likelihoods.of(columns)[: len(rows)].view(len(rows), len(names), len(prompts)).mean(dim=2)
            seen = sum(map(len, mine))
            mine.append(hits_by_class(scores, labels[seen : seen + len(rows)]))
        hits = embedder.gathered(torch.cat(mine), len(test_set)).numpy()
        return self.class_results(embedder, hits, names, self.metric)


def captioner(embedder: Embedder) -> Any:
    """Return the embedder's model, or its image tower and decoder, as a `FlipForConditionalGeneration`."""
    from flipscale.model import FlipForConditionalGeneration

    model = embedder.model
    if isinstance(model, FlipForConditionalGeneration):
        return model
    with torch.device("meta"):
        wrapper = FlipForConditionalGeneration(model.config)
    wrapper.vision_model, wrapper.decoder = model.vision_model, model.decoder
    return wrapper.eval()


def generated_captions(embedder: Embedder, source: TarSource, max_new_tokens: int, num_beams: int) -> list[str]:
    """Collective. Return a caption for each image of `source`, on every process, by beam search."""
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
    return [caption for _, caption in sorted(gather_objects(mine))]


class Likelihoods:
    """Log-likelihoods of several texts as the caption of an image.

    Args:
        images: most images in a batch, the same on every process.
    """

    def __init__(self, embedder: Embedder, texts: list[str], images: int):
        from flipscale.model.modeling_flip_caption import caption_inputs

        self._embedder, self._model, self._images = embedder, captioner(embedder), images
        config, device = self._model.config.decoder_config, embedder.accelerator.device
        tokens = tokenise_captions(embedder.tokenizer, texts, config.max_position_embeddings)
        columns = caption_inputs(tokens["input_ids"], tokens["attention_mask"], config)
        inputs, targets = (part.to(device) for part in columns)
        # Images times texts in one decoder batch: about as many as the embedder's batch has images.
        self._group = min(images, max(1, embedder.batch_size // len(texts)))
        together = max(1, embedder.batch_size // self._group)
        self._parts = list(zip(inputs[:, 1:].split(together), targets.split(together), strict=True))

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
                scores.append(torch.cat([self._of_part(begun, *part) for part in self._parts], dim=1))
        return torch.cat(scores)[: len(image_tokens)].cpu()

    def _of_part(self, begun: Any, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the log-likelihoods `(images, texts)` of some texts, after the decoder read the first token."""
        images, texts = len(begun.logits), len(inputs)
        cache = copy.deepcopy(begun.cache)
        cache.batch_repeat_interleave(texts)
        output = self._model.decoder(inputs.repeat(images, 1), None, cache=cache, use_cache=True)
        logits = torch.cat([begun.logits.repeat_interleave(texts, dim=0), output.logits], dim=1).float()
        losses = F.cross_entropy(logits.transpose(1, 2), targets.repeat(images, 1), reduction="none")
        return -losses.sum(dim=1).view(images, texts)
