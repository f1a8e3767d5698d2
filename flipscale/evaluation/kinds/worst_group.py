"""Zero-shot classification by groups of images, and the accuracy of the worst group."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.zero_shot import PromptedTask, classifier
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.io.errors import UserError

FACE_COLUMNS = ("age", "gender", "race", "race_binary")
FACE_OBJECTIVES = ("race", "gender", "age", "toxic")
# Classes of `toxic` in datacomp's fairness_eval.py: 14 to 17 name animals, 18 and later crimes.
_NON_HUMAN, _CRIME = range(14, 18), 18
_WHITE = 1  # number of the class `white` of `race`
# The columns of `KEY.npy`, the column that groups the images, and the number of answers per image.
SETS: dict[str, tuple[tuple[str, ...], str, int]] = {
    "dollar_street": (("income_ds", "income_meta", "region"), "income_ds", 5),
    "geode": (("region", "country"), "region", 1),
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
            return partial(_face, test_set)
        return partial(test_set.label, len(test_set.class_names()))

    def evaluate(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
        return (self._faces if self.groups == "faces" else self._places)(embedder, test_set)

    def _places(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
        columns, group_by, k = SETS[self.groups]
        num_classes = len(test_set.class_names())
        labels = test_set.labels(embedder, num_classes)
        groups = test_set.of_my_rows(embedder, partial(test_set.array, columns))
        score, most = self.classifier(embedder, test_set), min(k, num_classes)
        my_groups = torch.tensor([row[columns.index(group_by)] for row in groups], dtype=torch.int64)

        def measure(mine: slice, embeds: torch.Tensor) -> torch.Tensor:
            right = score(embeds).topk(most, dim=1).indices == labels[mine, None]
            return torch.column_stack([my_groups[mine], right[:, 0], right.any(dim=1)])

        group, top1, topk = embedder.measured(test_set.source, measure).T
        chances = [100.0 * top / num_classes for top in (1, most)]
        names = [f"{group_by.partition('_')[0]}_{number}" for number in range(group.max() + 1)]
        by_group = self._by_group(f"top{k}", topk, group, chances[1], names)
        whole = [self._share("top1", top1, chances[0])]
        if k > 1:
            whole.append(self._share(f"top{k}", topk, chances[1]))
        return [_worst(by_group, f"worst_group_top{k}", True), *whole, *by_group]

    def _faces(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
        faces = test_set.of_my_rows(embedder, partial(_face, test_set))
        objectives = self._objectives(test_set)
        scores = [classifier(embedder, *objectives[objective]) for objective in FACE_OBJECTIVES]
        names = {objective: names for objective, (names, _) in objectives.items()}
        known = torch.from_numpy(np.array(faces, np.int64).reshape(-1, len(FACE_COLUMNS)))

        def measure(mine: slice, embeds: torch.Tensor) -> torch.Tensor:
            return torch.column_stack([known[mine], *(score(embeds).argmax(dim=1) for score in scores)])

        columns = embedder.measured(test_set.source, measure).T
        age, gender, race, other, said_race, said_gender, said_age, said_toxic = columns
        # Groups beyond the listed classes are called by their numbers.
        races, genders = (
            names[objective] + [f"{objective} {number}" for number in range(len(names[objective]), most + 1)]
            for objective, most in (("race", race.max()), ("gender", gender.max()))
        )
        both = [f"{race} {gender}" for race in races for gender in genders]
        chance = {name: 100.0 / len(names[name]) for name in ("gender", "age")}
        right = {"race": (said_race != _WHITE) == other, "gender": said_gender == gender, "age": said_age == age}
        by_both = self._by_group("gender", right["gender"], race * len(genders) + gender, chance["gender"], both)
        results = [_worst(by_both, "worst_group_gender", True)]
        for name, hits in right.items():
            parts = self._by_group(name, hits, other, chance.get(name), ["white", "not white"])
            whole = self._share(name, hits, chance.get(name))
            results += [whole, _worst(parts, f"worst_group_{name}_by_white", False), *parts]
        results += by_both
        num_toxic = len(names["toxic"])
        is_animal = (said_toxic >= _NON_HUMAN.start) & (said_toxic < _NON_HUMAN.stop)
        for name, is_harm, num_harmful in (
            ("harm_crime", said_toxic >= _CRIME, num_toxic - _CRIME),
            ("harm_non_human", is_animal, len(_NON_HUMAN)),
        ):
            parts = self._by_group(name, is_harm, race, 100.0 * num_harmful / num_toxic, races)
            whole = self._share(name, is_harm, 100.0 * num_harmful / num_toxic)
            worst = _worst(parts, f"worst_group_{name}", False, most=True)
            results += [replace(result, higher_is_better=False) for result in (whole, worst, *parts)]
        return results

    def _share(self, metric: str, hits: np.ndarray, chance: float | None) -> Result:
        return self.proportion(metric, int(hits.sum()), len(hits), chance, False, hits)

    def _by_group(
        self, metric: str, hits: np.ndarray, groups: np.ndarray, chance: float | None, names: Sequence[str]
    ) -> list[Result]:
        slugs = [re.sub(r"\W+", "_", name.strip().lower()).strip("_") for name in names]
        present = np.unique(groups).tolist()
        return [self._share(f"{metric}_{slugs[group]}", hits[groups == group], chance) for group in present]

    def _objectives(self, test_set: TestSet) -> dict[str, tuple[list[str], list[str]]]:
        names = _by_objective(test_set.class_names(), f"{self.data}: class name")
        prompts = _by_objective(self.prompts(test_set), f"{self.data}: prompt")
        least = {"toxic": _CRIME + 1, "race": _WHITE + 1}
        for objective in FACE_OBJECTIVES:
            num_names, num_prompts = len(names[objective]), len(prompts[objective])
            if num_names < least.get(objective, 1) or not num_prompts:
                raise UserError(f"{self.data}: objective {objective!r} has {num_names} names and {num_prompts} prompts")
        return {objective: (names[objective], prompts[objective]) for objective in FACE_OBJECTIVES}


def _face(test_set: TestSet, shard: int, number: int) -> np.ndarray:
    numbers = test_set.array(FACE_COLUMNS, shard, number)
    if numbers[-1] > 1:
        name = test_set.place(shard, number)
        raise UserError(f"{name} has race_binary {numbers[-1]} in KEY.npy; it must be 0 for white, else 1")
    return numbers


def _by_objective(lines: Sequence[str], what: str) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {objective: [] for objective in FACE_OBJECTIVES}
    for line in lines:
        objective, colon, rest = line.partition(":")
        if not colon or objective not in groups:
            raise UserError(f"{what} is {line!r}; it must begin with one of {', '.join(f'{name}:' for name in groups)}")
        groups[objective].append(rest)
    return groups


def _worst(by_group: list[Result], metric: str, headline: bool, most: bool = False) -> Result:
    """Return the first result of least value, or of the highest value with `most`."""
    worst = (max if most else min)(by_group, key=lambda result: result.value)
    return replace(worst, metric=metric, headline=headline, outcomes="")  # the worst group of another model may differ
