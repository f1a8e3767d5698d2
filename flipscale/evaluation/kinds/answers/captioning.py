"""Captions that a model writes, beside those that people wrote."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from flipscale.evaluation.captions.scores import bleu_4, cider, mean_estimate, rouge_l
from flipscale.evaluation.captions.tools import missing_tool, score_with_tools
from flipscale.evaluation.captions.words import caption_words
from flipscale.evaluation.captions.writing import captioner, written_captions
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.metrics import Estimate
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.io.errors import UserError
from flipscale.io.options import Count

Metric = Literal["cider", "bleu_4", "rouge_l", "meteor", "spice"]

_LABELS: dict[str, str] = {
    "cider": "CIDEr",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "spice": "SPICE",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captioning(Task):
    """`cider`, `bleu_4` and `rouge_l` of a caption written for each image, times 100, as in COCO's evaluation.

    `data` has shards with `KEY.txt`, whose lines are the reference captions of an image. Every process holds all
    captions. CIDEr's weights of words are those of the whole set's references.

    Args:
        metrics: `meteor` and `spice` are computed by COCO's tools (the package pycocoevalcap, and Java); where these
            are missing, such a metric is left out, and the log names it.
        max_new_tokens: of a caption, at most.
        num_beams: captions that are followed at once; 1 is greedy.
    """

    metrics: list[Metric] = field(default_factory=lambda: ["cider", "bleu_4", "rouge_l"])
    max_new_tokens: Count = 30
    num_beams: Count = 1

    needs: ClassVar[str] = "decoder"
    protocol: ClassVar[str] = """Captioning: a caption written for each whole image by beam search (one beam is greedy),
beside all reference captions of the set, in words of the Penn Treebank without punctuation; all figures times 100.
Intervals are over images, the set's references being given; of BLEU by the bootstrap."""
    hub_task: ClassVar[str] = "image-to-text"

    def __post_init__(self) -> None:
        if not self.metrics:
            raise UserError(f"metrics is {self.metrics}; it must list one or more, such as [cider, bleu_4]")

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        return test_set.captions_of

    def evaluate(self, embedder: Embedder) -> list[Result]:
        captioner(embedder)  # refuses a model that writes none before the set is read
        test_set = TestSet.open(self.data)
        references = [[line for line in lines if line.strip()] for lines in test_set.captions(embedder)]
        written = written_captions(embedder, test_set.source, self.max_new_tokens, self.num_beams)
        made = [caption_words(caption) for caption in written]
        given = [[caption_words(caption) for caption in some] for some in references]
        results = []
        for metric in dict.fromkeys(self.metrics):
            if metric in ("meteor", "spice"):
                results += self._by_tools(embedder, metric, made, given)
                continue
            estimates: dict[str, Callable[[], Estimate]] = {
                "cider": lambda: mean_estimate(cider(made, given)),
                "bleu_4": lambda: bleu_4(made, given),
                "rouge_l": lambda: mean_estimate(rouge_l(made, given)),
            }
            found = estimates[metric]()
            results.append(self._result(metric, len(made), found.value, found.low, found.high))
            embedder.alive()
        return results

    def _by_tools(
        self, embedder: Embedder, metric: str, made: list[list[str]], given: list[list[list[str]]]
    ) -> list[Result]:
        """Collective. Return what the main process's tools say; nothing where it has none."""
        from accelerate.utils import broadcast_object_list

        found: list[float | str | Exception | None] = [None]
        if embedder.accelerator.is_main_process:
            missing = missing_tool(metric)
            try:
                found = [missing or score_with_tools(metric, made, given)]
            except OSError as error:
                found = [error]
        (score,) = broadcast_object_list(found)
        if isinstance(score, Exception):
            raise score
        if isinstance(score, str):
            if embedder.accelerator.is_main_process:
                _log.warning("%s: %s is left out: %s", self.name, _LABELS[metric], score)
            return []
        return [self._result(metric, len(made), score)]

    def _result(self, metric: str, n: int, value: float, low: float | None = None, high: float | None = None) -> Result:
        """Return a figure of all `n` images, in hundredths as everybody gives it."""
        low, high = (None if end is None else 100.0 * end for end in (low, high))
        return Result(
            *(self.name, self.kind, metric, 100.0 * value, n, low, high),
            unit="",
            label=_LABELS[metric],
            headline=metric == self.metrics[0],
            made_by=self.made_by,
        )
