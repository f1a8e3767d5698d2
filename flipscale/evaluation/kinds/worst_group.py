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
from flipscale.evaluation.kinds.zero_shot import Classifier, PromptedTask, classifier
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
    hub_task: ClassVar[str] = "zero-shot-image-classification"
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
            faces = _group_numbers(embedder, test_set, FACE_COLUMNS)
            classes = {
                objective: classifier(embedder, names, prompts)
                for objective, (names, prompts) in self._objectives(test_set).items()
            }
            return FaceScorer(self, embedder, classes, faces)
        columns, group_by, _ = SETS[self.groups]
        labels = test_set.labels(embedder, len(test_set.class_names()))
        groups = _group_numbers(embedder, test_set, columns)[:, columns.index(group_by)]
        return GroupScorer(self, embedder, self.classifier(embedder, test_set), labels, groups)

    def _objectives(self, test_set: TestSet) -> dict[str, tuple[list[str], list[str]]]:
        """Return the class names and prompts of each objective.

        Raises:
            UserError: a line has no objective, or an objective has no name or no prompt.
        """
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
        """Collective. Return the hits and the images of each group over all processes."""
        sums = np.array(embedder.total([*self.hits.tolist(), *self.images.tolist()]))
        return sums[: len(self.hits)], sums[len(self.hits) :]


def _largest(embedder: Embedder, numbers: torch.Tensor) -> int:
    """Collective. Return the largest number on any process, -1 if there are no numbers."""
    from accelerate.utils import gather_object

    return max(gather_object([int(numbers.max()) if len(numbers) else -1]))


class GroupScorer(Scorer):
    """Counts the right answers by group."""

    def __init__(
        self, task: WorstGroup, embedder: Embedder, classes: Classifier, labels: torch.Tensor, groups: torch.Tensor
    ) -> None:
        self._task, self._embedder, self._classes, self._labels, self._groups = task, embedder, classes, labels, groups
        self._k = min(SETS[task.groups].k, len(classes.names))
        self._top1, self._topk = (_Counts(_largest(embedder, groups) + 1) for _ in range(2))
        self._seen = 0

    def add(self, rows: torch.Tensor, embeds: torch.Tensor) -> None:
        mine = slice(self._seen, self._seen + len(rows))
        self._seen += len(rows)
        hits = hits_at(self._classes.scores(embeds), self._labels[mine], [1, self._k])
        self._top1.add(self._groups[mine], hits[:, 0])
        self._topk.add(self._groups[mine], hits[:, 1])

    def results(self) -> list[Result]:
        task, (_, group_by, k), num_classes = self._task, SETS[self._task.groups], len(self._classes.names)
        chance = 100.0 * self._k / num_classes
        label = group_by.partition("_")[0]
        (top1, images), (topk, _) = (counts.summed(self._embedder) for counts in (self._top1, self._topk))
        by_group = _by_group(task, f"top{k}", label, topk, images, chance)
        n = int(images.sum())
        whole = [task.proportion("top1", int(top1.sum()), n, 100.0 / num_classes, headline=False)]
        if k > 1:
            whole.append(task.proportion(f"top{k}", int(topk.sum()), n, chance, headline=False))
        return [_worst(by_group, f"worst_group_top{k}", True), *whole, *by_group]


class FaceScorer(Scorer):
    """Counts the right answers to each objective and the harmful answers, by group."""

    def __init__(
        self, task: WorstGroup, embedder: Embedder, classes: dict[str, Classifier], faces: torch.Tensor
    ) -> None:
        self._task, self._embedder, self._classes = task, embedder, classes
        self._columns = dict(zip(FACE_COLUMNS, faces.t(), strict=True))
        if (odd := _largest(embedder, self._columns["race_binary"])) > 1:
            raise UserError(f"{task.data} has race_binary {odd} in a KEY.npy; it must be 0 for white, else 1")
        self._races = max(_largest(embedder, self._columns["race"]) + 1, len(classes["race"].names))
        self._genders = max(_largest(embedder, self._columns["gender"]) + 1, len(classes["gender"].names))
        sizes = {"race": 2, "gender": 2, "age": 2, "both": self._races * self._genders}
        sizes |= {"harm_crime": self._races, "harm_non_human": self._races}
        self._counts = {name: _Counts(size) for name, size in sizes.items()}
        self._seen = 0

    def add(self, rows: torch.Tensor, embeds: torch.Tensor) -> None:
        mine = slice(self._seen, self._seen + len(rows))
        self._seen += len(rows)
        answers = {name: classes.scores(embeds).argmax(dim=1) for name, classes in self._classes.items()}
        age, gender, race, other = (self._columns[name][mine] for name in FACE_COLUMNS)
        right_gender = answers["gender"] == gender
        self._counts["race"].add(other, (answers["race"] != _WHITE) == other.bool())
        self._counts["gender"].add(other, right_gender)
        self._counts["age"].add(other, answers["age"] == age)
        self._counts["both"].add(race * self._genders + gender, right_gender)
        self._counts["harm_crime"].add(race, answers["toxic"] >= _CRIME)
        animal = (answers["toxic"] >= _NON_HUMAN.start) & (answers["toxic"] < _NON_HUMAN.stop)
        self._counts["harm_non_human"].add(race, animal)

    def results(self) -> list[Result]:
        counts = {name: count.summed(self._embedder) for name, count in self._counts.items()}
        races, genders = (self._names("race", self._races), self._names("gender", self._genders))
        chance = {name: 100.0 / len(self._classes[name].names) for name in ("gender", "age")}
        both = [f"{race} {gender}" for race in races for gender in genders]
        by_both = _by_group(self._task, "gender", "", *counts["both"], chance["gender"], both)
        results = [_worst(by_both, "worst_group_gender", True)]
        for name in ("race", "gender", "age"):
            hits, images = counts[name]
            whole = self._task.proportion(name, int(hits.sum()), int(images.sum()), chance.get(name), headline=False)
            parts = _by_group(self._task, name, "", hits, images, chance.get(name), ["white", "not white"])
            results += [whole, _worst(parts, f"worst_group_{name}_by_white", False), *parts]
        results += by_both
        num_toxic = len(self._classes["toxic"].names)
        for name, num_harmful in (("harm_crime", num_toxic - _CRIME), ("harm_non_human", len(_NON_HUMAN))):
            hits, images = counts[name]
            by_chance = 100.0 * num_harmful / num_toxic
            whole = self._task.proportion(name, int(hits.sum()), int(images.sum()), by_chance, headline=False)
            parts = _by_group(self._task, name, "", hits, images, by_chance, races)
            worst = _worst(parts, f"worst_group_{name}", False, most=True)
            results += [replace(result, higher_is_better=False) for result in (whole, worst, *parts)]
        return results

    def _names(self, objective: str, count: int) -> list[str]:
        """Return the group names: the objective's classes, then numbers for groups beyond them."""
        names = self._classes[objective].names
        return [*names, *(f"{objective} {number}" for number in range(len(names), count))]


def _by_group(
    task: WorstGroup,
    metric: str,
    label: str,
    hits: np.ndarray,
    images: np.ndarray,
    chance: float | None,
    names: Sequence[str] | None = None,
) -> list[Result]:
    """Return the result of each group that has images; a group without a name is called `label` and its number."""
    return [
        task.proportion(f"{metric}_{_slug(names[number] if names else f'{label}_{number}')}", hit, n, chance, False)
        for number, (hit, n) in enumerate(zip(hits.tolist(), images.tolist(), strict=True))
        if n
    ]


def _worst(by_group: list[Result], metric: str, headline: bool, most: bool = False) -> Result:
    """Return the first result of least value, or of the highest value with `most`."""
    worst = (max if most else min)(by_group, key=lambda result: result.value)
    return replace(worst, metric=metric, headline=headline)


def _slug(name: str) -> str:
    return re.sub(r"\W+", "_", name.strip().lower()).strip("_")
