"""Gender association: whether the word for a role is nearer to the picture of a man or of a woman in that role."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.intervals import Z95, clustered_share
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet, read_list
from flipscale.io.errors import UserError

ROLES = "roles.json"


class Couple(NamedTuple):
    """A role, and the rows of a woman and of a man in that role by the same artist."""

    role: str
    woman: int
    man: int


@dataclass(frozen=True)
class Association(Task):
    """`nearer_man`: percent of couples whose role word ("firefighter") is nearer to the man than to the woman.
    `man_less_woman`: mean difference of the two cosines.

    `data` has images and `roles.json`, a list of `{role, woman, man}`: the word, and two rows that differ by gender.

    Args:
        template: the prompt, with `{c}` for the role word.
    """

    template: str = "{c}"

    protocol: ClassVar[str] = """Association: pictures of a woman and of a man in the same role by the same artist. The
figure is the share of pairs in which the word for the role, which has no gender, is nearer to the man. 50 % is no
preference. The intervals treat roles as independent draws, and pictures of one role as a cluster."""

    def __post_init__(self) -> None:
        if "{c}" not in self.template:
            raise UserError(f"template is {self.template!r}; write {{c}} in place of the role word")

    def check(self) -> None:
        super().check()
        self._couples(TestSet.open(self.data))

    def evaluate(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
        couples, count = self._couples(test_set), len(test_set)
        names = list(dict.fromkeys(couple.role for couple in couples))
        embeds = embedder.texts([self.template.replace("{c}", name) for name in names])
        by_role = dict(zip(names, embeds, strict=True))
        words = {row: by_role[couple.role] for couple in couples for row in (couple.woman, couple.man)}
        rows = embedder.rows(count)
        cosines = torch.zeros(len(rows), 1)
        for mine, images in embedder.image_batches(test_set.source):
            for place, image in zip(range(mine.start, mine.stop), images, strict=True):
                if rows[place] in words:
                    cosines[place] = image @ words[rows[place]]
        return self._results(couples, embedder.gathered(cosines, count)[:, 0].double().numpy())

    def _results(self, couples: list[Couple], cosines: np.ndarray) -> list[Result]:
        _, roles_of, counts = np.unique([couple.role for couple in couples], return_inverse=True, return_counts=True)
        differences = np.array([cosines[couple.man] - cosines[couple.woman] for couple in couples])
        # A tie is half a preference for each.
        nearer = np.bincount(roles_of, (differences > 0) + (differences == 0) / 2)
        sums = np.bincount(roles_of, differences)
        n, roles = int(counts.sum()), len(counts)
        mean = float(sums.sum() / n)
        deviation = float(np.sqrt(((sums - mean * counts) ** 2).sum() * roles / max(roles - 1, 1))) / n
        difference = Result(
            *(self.name, self.kind, "man_less_woman", mean, n),
            low=mean - Z95 * deviation if roles > 1 else None,
            high=mean + Z95 * deviation if roles > 1 else None,
            unit="",
            chance=0.0,
            headline=False,
            made_by=self.made_by,
        )
        return [self.estimated("nearer_man", clustered_share(nearer, counts), n, 50.0), difference]

    def _couples(self, test_set: TestSet) -> list[Couple]:
        path = f"{self.data}/{ROLES}"
        rows = read_list(self.data, ROLES, "roles")
        try:
            couples = [Couple(str(row["role"]), int(row["woman"]), int(row["man"])) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a list of {{role, woman, man}}: {error!r}") from error
        count = len(TestSet.open(self.data))
        for couple in couples:
            if not 0 <= min(couple[1:]) <= max(couple[1:]) < count:
                them = f"rows {couple.woman} and {couple.man} of {count}"
                raise UserError(f"{path} names {them}; write it anew with the images")
        place = {number: row for row, number in enumerate(test_set.row_numbers)}
        there = [couple for couple in couples if place.keys() >= {couple.woman, couple.man}]
        if not there:
            raise UserError(f"{path} lists no couple of which both images are left")
        return [Couple(couple.role, place[couple.woman], place[couple.man]) for couple in there]
