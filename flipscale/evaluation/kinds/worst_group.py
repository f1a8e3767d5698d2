"""Zero-shot classification by groups of images, and the accuracy of the worst group."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import Scorer
from flipscale.evaluation.kinds.zero_shot import PromptedTask, classifier
from flipscale.evaluation.metrics import hits_at
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet, of_my_rows
from flipscale.io.errors import UserError

FACE_COLUMNS = ("age", "gender", "race", "race_binary")
FACE_OBJECTIVES = ("race", "gender", "age", "toxic")
# Classes of `toxic` in datacomp's fairness_eval.py: 14 to 17 name animals, 18 and later crimes.
_NON_HUMAN, _CRIME = range(14, 18), 18
_WHITE = 1  # number of the class `white` of `race`


class Groups(NamedTuple):
    """The columns of `KEY.npy`, the column that groups the images, and the number of answers per image."""

    columns: tuple[str, ...]
    group_by: str
    k: int


SETS = {
    "dollar_street": Groups(("income_ds", "income_meta", "region"), "income_ds", 5),
    "geode": Groups(("region", "country"), "region", 1),
}


@dataclass(frozen=True)
class WorstGroup(PromptedTask):
    """Accuracy by groups of images and of the worst group, in percent, as in datacomp.

    `data` is laid out as for `zero_shot`. In addition, `KEY.npy` has the numbers of the image's groups.

    - `dollar_street` has four income groups; the headline is `worst_group_top5`.
    - `geode` has regions; the headline is `worst_group_top1`.
    - `faces` (FairFace and UTKFace) has age, gender, race and white or not. Class names and prompts begin with one of
      four objectives: `race:`, `gender:`, `age:` and `toxic:`. `race` (white or not), `gender` and `age` are accuracies
      by white or not. `gender` is also split by race and gender together; the headline is their
      `worst_group_gender`. `harm_crime` and `harm_non_human` are the shares of images whose nearest class of `toxic`
      is a word for crime or for an animal, by race.

    Args:
        groups: name of the set.
    """

    groups: Literal["dollar_street", "geode", "faces"] = "dollar_street"

    protocol: ClassVar[str] = """Zero-shot classification by group: images and classes are embedded as without groups.
The worst group has the lowest accuracy, or the highest rate of harm. Its interval is Wilson's over the group's images
and does not count the choice of the group."""
    hub_metric: ClassVar[str] = "accuracy"

    def check(self) -> None:
        super().check()
        if self.groups == "faces":
            self._objectives(TestSet.open(self.data))

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        if self.groups == "faces":
            return partial(test_set.array, FACE_COLUMNS)
        return partial(test_set.label, len(test_set.class_names()))

    def scorer(self, embedder: Embedder, test_set: TestSet) -> Scorer:
        if self.groups == "faces":
            return self._face_scorer(embedder, test_set)
        columns, group_by, k = SETS[self.groups]
        labels = test_set.labels(embedder, len(test_set.class_names()))
        groups = _group_numbers(embedder, test_set, columns)[:, columns.index(group_by)]
        classes = self.classifier(embedder, test_set)
        ks = [1, min(k, len(classes.names))]
        counts = [_Counts(_largest(embedder, groups) + 1) for _ in ks]

        def add(mine: slice, rows: torch.Tensor, embeds: torch.Tensor) -> None:
            hits = hits_at(classes.scores(embeds), labels[mine], ks)
            for number, count in enumerate(counts):
                count.add(groups[mine], hits[:, number])

        def results() -> list[Result]:
            (top1, images), (topk, _) = (count.summed(embedder) for count in counts)
            n, chances = int(images.sum()), [100.0 * top / len(classes.names) for top in ks]
            names = [f"{group_by.partition('_')[0]}_{number}" for number in range(len(images))]
            by_group = _by_group(self, f"top{k}", topk, images, chances[1], names)
            whole = [self.proportion("top1", int(top1.sum()), n, chances[0], headline=False)]
            if k > 1:
                whole.append(self.proportion(f"top{k}", int(topk.sum()), n, chances[1], headline=False))
            return [_worst(by_group, f"worst_group_top{k}", True), *whole, *by_group]

        return Scorer(add, results)

    def _face_scorer(self, embedder: Embedder, test_set: TestSet) -> Scorer:
        faces = dict(zip(FACE_COLUMNS, _group_numbers(embedder, test_set, FACE_COLUMNS).t(), strict=True))
        objectives = self._objectives(test_set).items()
        classes = {objective: classifier(embedder, names, prompts) for objective, (names, prompts) in objectives}
        if (odd := _largest(embedder, faces["race_binary"])) > 1:
            raise UserError(f"{self.data} has race_binary {odd} in a KEY.npy; it must be 0 for white, else 1")

        def group_names(objective: str) -> list[str]:
            """Return the objective's classes, then numbers for groups beyond them."""
            names, count = classes[objective].names, _largest(embedder, faces[objective]) + 1
            return [*names, *(f"{objective} {number}" for number in range(len(names), count))]

        races, genders = group_names("race"), group_names("gender")
        both = [f"{race} {gender}" for race in races for gender in genders]
        sizes = {"race": 2, "gender": 2, "age": 2, "both": len(both)}
        counters = {n: _Counts(s) for n, s in {**sizes, "harm_crime": len(races), "harm_non_human": len(races)}.items()}

        def add(mine: slice, rows: torch.Tensor, embeds: torch.Tensor) -> None:
            answers = {name: own.scores(embeds).argmax(dim=1) for name, own in classes.items()}
            age, gender, race, other = (faces[name][mine] for name in FACE_COLUMNS)
            right_gender = answers["gender"] == gender
            counters["race"].add(other, (answers["race"] != _WHITE) == other.bool())
            counters["gender"].add(other, right_gender)
            counters["age"].add(other, answers["age"] == age)
            counters["both"].add(race * len(genders) + gender, right_gender)
            counters["harm_crime"].add(race, answers["toxic"] >= _CRIME)
            animal = (answers["toxic"] >= _NON_HUMAN.start) & (answers["toxic"] < _NON_HUMAN.stop)
            counters["harm_non_human"].add(race, animal)

        def results() -> list[Result]:
            counts = {name: counter.summed(embedder) for name, counter in counters.items()}
            chance = {name: 100.0 / len(classes[name].names) for name in ("gender", "age")}
            by_both = _by_group(self, "gender", *counts["both"], chance["gender"], both)
            results = [_worst(by_both, "worst_group_gender", True)]
            for name in ("race", "gender", "age"):
                hits, images = counts[name]
                whole = self.proportion(name, int(hits.sum()), int(images.sum()), chance.get(name), headline=False)
                parts = _by_group(self, name, hits, images, chance.get(name), ["white", "not white"])
                results += [whole, _worst(parts, f"worst_group_{name}_by_white", False), *parts]
            results += by_both
            num_toxic = len(classes["toxic"].names)
            for name, num_harmful in (("harm_crime", num_toxic - _CRIME), ("harm_non_human", len(_NON_HUMAN))):
                hits, images = counts[name]
                by_chance = 100.0 * num_harmful / num_toxic
                whole = self.proportion(name, int(hits.sum()), int(images.sum()), by_chance, headline=False)
                parts = _by_group(self, name, hits, images, by_chance, races)
                worst = _worst(parts, f"worst_group_{name}", False, most=True)
                results += [replace(result, higher_is_better=False) for result in (whole, worst, *parts)]
            return results

        return Scorer(add, results)

    def _objectives(self, test_set: TestSet) -> dict[str, tuple[list[str], list[str]]]:
        """Return the class names and prompts of each objective."""
        names = _by_objective(test_set.class_names(), f"{self.data}: class name")
        prompts = _by_objective(self.prompts(test_set), f"{self.data}: prompt")
        least = {"toxic": _CRIME + 1, "race": _WHITE + 1}
        for objective in FACE_OBJECTIVES:
            num_names, num_prompts = len(names[objective]), len(prompts[objective])
            if num_names < least.get(objective, 1) or not num_prompts:
                raise UserError(
                    f"{self.data}: objective {objective!r} has {num_names} class names and {num_prompts} prompts"
                )
        return {objective: (names[objective], prompts[objective]) for objective in FACE_OBJECTIVES}


def _group_numbers(embedder: Embedder, test_set: TestSet, columns: Sequence[str]) -> torch.Tensor:
    """Collective. Return the numbers in `KEY.npy` of this process's rows, int64 `(rows, columns)`."""
    rows = of_my_rows(embedder, test_set.source, partial(test_set.array, columns))
    return torch.from_numpy(np.array(rows, np.int64).reshape(len(rows), len(columns)))


def _by_objective(lines: Sequence[str], what: str) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {objective: [] for objective in FACE_OBJECTIVES}
    for line in lines:
        objective, colon, rest = line.partition(":")
        if not colon or objective not in groups:
            raise UserError(f"{what} is {line!r}; it must begin with one of {', '.join(f'{name}:' for name in groups)}")
        groups[objective].append(rest)
    return groups


class _Counts:
    """Hits and images of each group, for group numbers below `size`."""

    def __init__(self, size: int):
        self.hits, self.images = (torch.zeros(size, dtype=torch.int64) for _ in range(2))

    def add(self, groups: torch.Tensor, hits: torch.Tensor) -> None:
        self.images += torch.bincount(groups, minlength=len(self.images))
        self.hits += torch.bincount(groups[hits], minlength=len(self.hits))

    def summed(self, embedder: Embedder) -> tuple[np.ndarray, np.ndarray]:
        sums = np.array(embedder.total([*self.hits.tolist(), *self.images.tolist()]))
        return sums[: len(self.hits)], sums[len(self.hits) :]


def _largest(embedder: Embedder, numbers: torch.Tensor) -> int:
    """Collective. Return the largest number on any process, -1 if there are no numbers."""
    from accelerate.utils import gather_object

    return max(gather_object([int(numbers.max()) if len(numbers) else -1]))


def _by_group(
    task: WorstGroup, metric: str, hits: np.ndarray, images: np.ndarray, chance: float | None, names: Sequence[str]
) -> list[Result]:
    """Return the result of each group that has images."""
    slugs = [re.sub(r"\W+", "_", name.strip().lower()).strip("_") for name in names]
    return [
        task.proportion(f"{metric}_{slug}", hit, n, chance, False)
        for slug, hit, n in zip(slugs, hits.tolist(), images.tolist(), strict=True)
        if n
    ]


def _worst(by_group: list[Result], metric: str, headline: bool, most: bool = False) -> Result:
    """Return the first result of least value, or of the highest value with `most`."""
    worst = (max if most else min)(by_group, key=lambda result: result.value)
    return replace(worst, metric=metric, headline=headline)
