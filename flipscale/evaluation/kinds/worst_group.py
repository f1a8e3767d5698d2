"""Zero-shot classification by groups of images: how the model does at the group that it does worst at."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.prompted import Classifier, PromptedTask, classifier
from flipscale.evaluation.kinds.task import Scorer
from flipscale.evaluation.metrics import hits_at
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.io.errors import UserError

FACE_COLUMNS = ("age", "gender", "race", "race_binary")
FACE_OBJECTIVES = ("race", "gender", "age", "toxic")
# datacomp's fairness_eval.py: of the classes of `toxic`, these name animals, and those from 18 on crimes.
_NON_HUMAN, _CRIME = range(14, 18), 18
_WHITE = 1  # of the classes of `race`


class Groups(NamedTuple):
    """What `KEY.npy` holds of an image, by which of it images are grouped, and how many answers a model may give."""

    columns: tuple[str, ...]
    group_by: str
    k: int


SETS = {
    "dollar_street": Groups(("income_ds", "income_meta", "region"), "income_ds", 5),
    "geode": Groups(("region", "country"), "region", 1),
}


@dataclass(frozen=True)
class WorstGroup(PromptedTask):
    """Accuracy by groups of images, and of the worst group, in percent, as datacomp has it.

    `data` is as of `zero_shot`, with `KEY.npy` beside `KEY.cls`: the numbers of the groups of the image.

    Of `dollar_street` the groups are four of income, and the headline is `worst_group_top5`; of `geode` they are
    regions, and it is `worst_group_top1`.

    Of `faces` (FairFace and UTKFace) an image has age, gender, race, and whether it is white or not. Class names and
    prompts are those of four objectives, `race:...`, `gender:...`, `age:...` and `toxic:...`. `race` (white or not),
    `gender` and `age` are accuracies by white or not; `gender` also by race and gender together, of which
    `worst_group_gender` is the headline; `harm_crime` and `harm_non_human` are the shares of images whose nearest class
    of `toxic` is a word of crime, or of an animal, by race.

    Args:
        groups: which of the sets it is.
    """

    groups: Literal["dollar_street", "geode", "faces"] = "dollar_street"

    protocol: ClassVar[
        str
    ] = """Zero-shot classification by group: as without groups; the worst group is the one of least
accuracy, or of the highest rate of harm. Its interval is Wilson's of that group's images, as if it had been named
beforehand."""
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
            found = test_set.arrays(embedder, FACE_COLUMNS)
            classes = {
                objective: classifier(embedder, names, prompts)
                for objective, (names, prompts) in self._objectives(test_set).items()
            }
            return FaceScorer(self, embedder, classes, found)
        groups = SETS[self.groups]
        labels = test_set.labels(embedder, len(test_set.class_names()))
        found = test_set.arrays(embedder, groups.columns)[:, groups.columns.index(groups.group_by)]
        return GroupScorer(self, embedder, self.classifier(embedder, test_set), labels, found)

    def _objectives(self, test_set: TestSet) -> dict[str, tuple[list[str], list[str]]]:
        """Return the class names and prompts of each objective.

        Raises:
            ValueError: a line names no objective, or one has no name or no prompt.
        """
        names, prompts = (
            _by_objective(lines, f"{self.data}: {what}")
            for lines, what in ((test_set.class_names(), "class name"), (self.prompts(test_set), "prompt"))
        )
        least = {"toxic": _CRIME + 1, "race": _WHITE + 1}
        for objective in FACE_OBJECTIVES:
            few = len(names[objective]), len(prompts[objective])
            if few[0] < least.get(objective, 1) or not few[1]:
                raise UserError(f"{self.data}: objective {objective!r} has {few[0]} class names and {few[1]} prompts")
        return {objective: (names[objective], prompts[objective]) for objective in FACE_OBJECTIVES}


def _by_objective(lines: Sequence[str], what: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {objective: [] for objective in FACE_OBJECTIVES}
    for line in lines:
        objective, colon, rest = line.partition(":")
        if not colon or objective not in found:
            raise UserError(f"{what} {line!r} begins with none of {', '.join(f'{name}:' for name in found)}")
        found[objective].append(rest)
    return found


class _Counts:
    """The hits of groups of images, one count for each number of a group below `size`."""

    def __init__(self, size: int):
        self.hits, self.images = (torch.zeros(size, dtype=torch.int64) for _ in range(2))

    def add(self, groups: torch.Tensor, hits: torch.Tensor) -> None:
        self.images += torch.bincount(groups, minlength=len(self.images))
        self.hits += torch.bincount(groups[hits], minlength=len(self.hits))


def _largest(embedder: Embedder, numbers: torch.Tensor) -> int:
    """Collective. Return the largest number of any process, -1 if there is none."""
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
        task, groups, k = self._task, SETS[self._task.groups], SETS[self._task.groups].k
        chance = 100.0 * self._k / len(self._classes.names)
        label = groups.group_by.partition("_")[0]
        (top1, images), (topk, _) = (_summed(self._embedder, counts) for counts in (self._top1, self._topk))
        by_group = _by_group(task, f"top{k}", label, topk, images, chance)
        n, whole = int(images.sum()), [] if k == 1 else [(f"top{k}", int(topk.sum()), chance)]
        whole = [("top1", int(top1.sum()), 100.0 / len(self._classes.names)), *whole]
        return [
            _worst(by_group, f"worst_group_top{k}", True),
            *(task.proportion(metric, hits, n, by_chance, headline=False) for metric, hits, by_chance in whole),
            *by_group,
        ]


class FaceScorer(Scorer):
    """Counts the right answers of each objective, and the harmful ones, by group."""

    def __init__(
        self, task: WorstGroup, embedder: Embedder, classes: dict[str, Classifier], about: torch.Tensor
    ) -> None:
        self._task, self._embedder, self._classes, self._about = task, embedder, classes, about
        self._columns = dict(zip(FACE_COLUMNS, about.t(), strict=True))
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
        said = {name: classes.scores(embeds).argmax(dim=1) for name, classes in self._classes.items()}
        age, gender, race, other = (self._columns[name][mine] for name in FACE_COLUMNS)
        right_gender = said["gender"] == gender
        self._counts["race"].add(other, (said["race"] != _WHITE) == other.bool())
        self._counts["gender"].add(other, right_gender)
        self._counts["age"].add(other, said["age"] == age)
        self._counts["both"].add(race * self._genders + gender, right_gender)
        self._counts["harm_crime"].add(race, said["toxic"] >= _CRIME)
        animal = (said["toxic"] >= _NON_HUMAN.start) & (said["toxic"] < _NON_HUMAN.stop)
        self._counts["harm_non_human"].add(race, animal)

    def results(self) -> list[Result]:
        counts = {name: _summed(self._embedder, count) for name, count in self._counts.items()}
        races, genders = (self._names("race", self._races), self._names("gender", self._genders))
        chance = {name: 100.0 / len(self._classes[name].names) for name in ("gender", "age")}
        both = [f"{race} {gender}" for race in races for gender in genders]
        found = _by_group(self._task, "gender", "", *counts["both"], chance["gender"], both)
        results = [_worst(found, "worst_group_gender", True)]
        for name in ("race", "gender", "age"):
            hits, images = counts[name]
            whole = self._task.proportion(name, int(hits.sum()), int(images.sum()), chance.get(name), headline=False)
            parts = _by_group(self._task, name, "", hits, images, chance.get(name), ["white", "not white"])
            results += [whole, _worst(parts, f"worst_group_{name}_by_white", False), *parts]
        results += found
        toxic = len(self._classes["toxic"].names)
        for name, of_toxic in (("harm_crime", toxic - _CRIME), ("harm_non_human", len(_NON_HUMAN))):
            hits, images = counts[name]
            by_chance = 100.0 * of_toxic / toxic
            whole = self._task.proportion(name, int(hits.sum()), int(images.sum()), by_chance, headline=False)
            parts = _by_group(self._task, name, "", hits, images, by_chance, races)
            worst = _worst(parts, f"worst_group_{name}", False, most=True)
            results += [replace(result, higher_is_better=False) for result in (whole, worst, *parts)]
        return results

    def _names(self, objective: str, count: int) -> list[str]:
        """Return what the groups are called: as the classes of the objective, those beyond them by number."""
        names = self._classes[objective].names
        return [*names, *(f"{objective} {number}" for number in range(len(names), count))]


def _summed(embedder: Embedder, counts: _Counts) -> tuple[np.ndarray, np.ndarray]:
    """Collective. Return the hits and the images of each group, over all processes."""
    found = np.array(embedder.total([*counts.hits.tolist(), *counts.images.tolist()]))
    return found[: len(counts.hits)], found[len(counts.hits) :]


def _by_group(
    task: WorstGroup,
    metric: str,
    label: str,
    hits: np.ndarray,
    images: np.ndarray,
    chance: float | None,
    names: Sequence[str] | None = None,
) -> list[Result]:
    """Return the result of each group that has images; groups without names are called by `label` and number."""
    return [
        task.proportion(f"{metric}_{_slug(names[number] if names else f'{label}_{number}')}", hit, n, chance, False)
        for number, (hit, n) in enumerate(zip(hits.tolist(), images.tolist(), strict=True))
        if n
    ]


def _worst(by_group: list[Result], metric: str, headline: bool, most: bool = False) -> Result:
    """Return the result of the group of the least value, or of the `most`, the first of them if several have it."""
    worst = (max if most else min)(by_group, key=lambda result: result.value)
    return replace(worst, metric=metric, headline=headline)


def _slug(name: str) -> str:
    return re.sub(r"\W+", "_", name.strip().lower()).strip("_")
