"""Retrieval and zero-shot classification in many languages: each language, their mean, and its spread."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.retrieval import Retrieval
from flipscale.evaluation.kinds.task import LabelledTask
from flipscale.evaluation.kinds.zero_shot import Scores, classifier
from flipscale.evaluation.metrics import hits_by_class
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet, read_lines, read_list, read_text
from flipscale.io.errors import UserError

_CAPTIONS = "captions/{}.json"
_PROTOCOL = """The figure is the mean over the languages, each with the same weight. The standard deviation between the
languages, the lowest and the highest show its spread."""


@dataclass(frozen=True)
class MultilingualRetrieval(Retrieval):
    """The results of `retrieval` as means over languages, with the spread of the headline, and for each language.

    `languages.txt` lists the languages, and `captions/LANGUAGE.json` the caption of each image in shard order. Every
    image has one caption in each language, as in CLIP_benchmark.
    """

    protocol: ClassVar[str] = f"{Retrieval.protocol} {_PROTOCOL}"

    def contents(self) -> list[Any]:
        return [[name, read_text(self.data, _CAPTIONS.format(name))] for name in self._languages()]

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        for language in self._languages():
            self._captions(test_set, language)
        return lambda shard, number: None

    def evaluate(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
        captions = {language: self._captions(test_set, language) for language in self._languages()}
        images = embedder.images(test_set.source)
        return _over_languages({name: self.recalls(embedder, images, texts) for name, texts in captions.items()})

    def _languages(self) -> list[str]:
        return read_lines(self.data, "languages.txt", "the languages")

    def _captions(self, test_set: TestSet, language: str) -> list[list[str]]:
        name = _CAPTIONS.format(language)
        captions, count = read_list(self.data, name, "captions"), len(TestSet.open(self.data))
        if len(captions) != count or not all(isinstance(caption, str) for caption in captions):
            raise UserError(f"{self.data}/{name} has {len(captions)} captions of {count} images; list one for each")
        return [[captions[number]] for number in test_set.row_numbers]


@dataclass(frozen=True)
class MultilingualZeroShot(LabelledTask):
    """The results of `zero_shot` as means over languages, with the spread of the headline, and for each language.

    `data` holds ImageNet's validation images. The languages, their classes, names and prompts are Babel-ImageNet's
    (arXiv 2306.08658), from the package clip-benchmark. A language is tested on the images of its classes only.
    """

    protocol: ClassVar[str] = f"""Zero-shot classification in each language, of the images of the classes with a name in
this language, among these classes. {_PROTOCOL}"""
    hub_task: ClassVar[str] = "zero-shot-image-classification"

    def check(self) -> None:
        super().check()
        num_classes = len(TestSet.open(self.data).class_names())
        for language, (classes, _, _) in babel_imagenet().items():
            if max(classes) >= num_classes:
                raise UserError(f"{self.data} has {num_classes} classes; {language} has names of {max(classes) + 1}")

    def evaluate(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
        num_classes, languages = len(test_set.class_names()), babel_imagenet()
        labels = test_set.labels(embedder, num_classes)
        own_labels, scores = dict[str, torch.Tensor](), dict[str, Scores]()
        for language, (classes, names, prompts) in languages.items():
            places = torch.full((num_classes,), -1)
            places[classes] = torch.arange(len(classes))
            own_labels[language] = places[labels]
            if embedder.total([int((own_labels[language] >= 0).sum())]) == [0]:
                raise UserError(f"{self.data} has no image of the {len(classes)} classes of {language}")
            scores[language] = classifier(embedder, names, prompts)
        # A row whose class has no name in the language keeps the label -1, which leaves it out.
        hits = {language: torch.full((len(labels), 4), -1, dtype=torch.int32) for language in languages}
        for mine, embeds in embedder.image_batches(test_set.source):
            for language, score in scores.items():
                own = own_labels[language][mine]
                hits[language][mine][own >= 0] = hits_by_class(score(embeds[own >= 0]), own[own >= 0])
        results = {
            language: self.class_results(
                embedder, embedder.gathered(hits[language], len(test_set)).numpy(), names, "top1"
            )
            for language, (_, names, _) in languages.items()
        }
        return _over_languages(results)


def babel_imagenet() -> dict[str, tuple[list[int], list[str], list[str]]]:
    """Return the classes, their names and the prompts, `{c}` for the name, of each language that has prompts. Raise
    UserError if clip-benchmark is not installed."""
    spec = importlib.util.find_spec("clip_benchmark")
    if spec is None or spec.origin is None:
        raise UserError("the names of Babel-ImageNet come in the package clip-benchmark; `pip install clip-benchmark`")
    folder = Path(spec.origin).parent / "datasets"
    classes, prompts = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("babel_imagenet", "nllb_dist13b_prompts")
    )
    return {
        language.lower(): (*classes[language], [prompt.replace("{}", "{c}") for prompt in prompts[language]])
        for language in sorted(classes.keys() & prompts.keys())
    }


def _over_languages(by_language: dict[str, list[Result]]) -> list[Result]:
    """Return the mean of each result, the spread of the first headline, and the headlines of each language."""
    results, languages = [], list(by_language)
    for same in zip(*by_language.values(), strict=True):
        values, first = np.array([result.value for result in same]), same[0]
        shown = partial(replace, first, low=None, high=None, n=sum(result.n or 0 for result in same), outcomes="")
        chances = [result.chance for result in same if result.chance is not None]
        mean_chance = float(np.mean(chances)) if chances else None
        mean = f"{first.shown}, mean of {len(languages)} languages"
        results.append(shown(value=float(values.mean()), label=mean, chance=mean_chance))
        if first.headline:
            low, high = int(values.argmin()), int(values.argmax())
            for name, value, label in (
                ("std", values.std(), "standard deviation between languages"),
                ("min", values[low], f"lowest: {languages[low]}"),
                ("max", values[high], f"highest: {languages[high]}"),
            ):
                label = f"{first.shown}, {label}"
                results.append(shown(metric=f"{first.metric}_{name}", value=float(value), label=label, chance=None))
    own = [(language, result) for language, found in by_language.items() for result in found if result.headline]
    shown_alone = partial(replace, headline=False, outcomes="")
    return results + [
        shown_alone(result, metric=f"{result.metric}_{language}", label=f"{result.shown}, {language}")
        for language, result in own
    ]
