"""Whether a word for a role without a gender lies nearer the drawing of a man or of a woman in that role."""

import json
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import Scorer, StreamedTask
from flipscale.evaluation.metrics import Z95, clustered_share
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet, read_text
from flipscale.io.errors import UserError

ROLES = "roles.json"


class Couple(NamedTuple):
    """The rows of a woman and of a man in one role, by one artist."""

    role: str
    woman: int
    man: int


@dataclass(frozen=True)
class Association(StreamedTask):
    """`nearer_man`: of the couples of a role, in percent, those of which the role's word ("firefighter") is nearer the
    man than the woman. `man_less_woman`: the mean difference of the two cosines.

    `data` has images, and `roles.json`: a list of `{role, woman, man}`, the word and the rows of the two images that
    differ by gender only. `python examples/demo/data.py --with_roles` writes it of emoji.

    Args:
        template: the prompt, with `{c}` for the role's word.
    """

    template: str = "{c}"

    protocol: ClassVar[str] = """Association: pictures of a woman and of a man in the same role by the same artist; of
how many pairs the word for the role, which has no gender, is nearer the man's. 50 % is no preference. The intervals
take roles for independent draws, and pictures of one role not."""

    def __post_init__(self) -> None:
        if "{c}" not in self.template:
            raise UserError(f"template is {self.template!r}; write {{c}} where the role's word stands")

    def check(self) -> None:
        super().check()
        self._couples(TestSet.open(self.data))

    def scorer(self, embedder: Embedder, test_set: TestSet) -> "AssociationScorer":
        couples = self._couples(test_set)
        words = list(dict.fromkeys(couple.role for couple in couples))
        embeds = embedder.texts([self.template.replace("{c}", word) for word in words])
        return AssociationScorer(self, embedder, couples, dict(zip(words, embeds, strict=True)), len(test_set))

    def _couples(self, test_set: TestSet) -> list[Couple]:
        """Return the couples of `roles.json`.

        Raises:
            ValueError: it is missing, or not such a list.
        """
        text = read_text(self.data, ROLES)
        if text is None:
            raise UserError(f"{self.data}/{ROLES} is missing; it lists the role, woman and man of each couple")
        try:
            couples = [Couple(str(one["role"]), int(one["woman"]), int(one["man"])) for one in json.loads(text)]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.data}/{ROLES} is not a list of {{role, woman, man}}: {error!r}") from None
        out = [couple for couple in couples if not 0 <= min(couple[1:]) <= max(couple[1:]) < len(test_set)]
        if not couples or out:
            about = f"names rows {out[0].woman} and {out[0].man} of {len(test_set)}" if out else "lists no couple"
            raise UserError(f"{self.data}/{ROLES} {about}; write it anew with the images")
        return couples


class AssociationScorer(Scorer):
    """Keeps the cosine of each image of a couple with its role's word."""

    def __init__(
        self, task: Association, embedder: Embedder, couples: list[Couple], words: dict[str, torch.Tensor], count: int
    ):
        self._task, self._embedder, self._couples = task, embedder, couples
        self._words: list[torch.Tensor | None] = [None] * count
        for couple in couples:
            self._words[couple.woman] = self._words[couple.man] = words[couple.role]
        self._count, self._seen = count, 0
        self._mine = torch.zeros(len(embedder.rows(count)), 1)

    def add(self, rows: torch.Tensor, embeds: torch.Tensor) -> None:
        for row, embed in zip(rows.tolist(), embeds, strict=True):
            word = self._words[row]
            if word is not None:
                self._mine[self._seen] = embed @ word
            self._seen += 1

    def results(self) -> list[Result]:
        cosines = self._embedder.gathered(self._mine, self._count)[:, 0].double().numpy()
        differences: dict[str, list[float]] = {}
        for couple in self._couples:
            differences.setdefault(couple.role, []).append(cosines[couple.man] - cosines[couple.woman])
        # A tie is half a preference for each.
        nearer = np.array([sum((d > 0) + (d == 0) / 2 for d in of_role) for of_role in differences.values()])
        counts = np.array([len(of_role) for of_role in differences.values()])
        share = clustered_share(nearer, counts)
        sums = np.array([sum(of_role) for of_role in differences.values()])
        n, roles = int(counts.sum()), len(counts)
        mean = float(sums.sum() / n)
        spread = float(np.sqrt(((sums - mean * counts) ** 2).sum() * roles / max(roles - 1, 1))) / n
        difference = Result(
            *(self._task.name, self._task.kind, "man_less_woman", mean, n),
            low=mean - Z95 * spread if roles > 1 else None,
            high=mean + Z95 * spread if roles > 1 else None,
            unit="",
            chance=0.0,
            headline=False,
            made_by=self._task.made_by,
        )
        return [self._task.estimated("nearer_man", share, n, 50.0), difference]
