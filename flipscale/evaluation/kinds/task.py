"""What every evaluation has: its data, its name and when it is due; and the one signature that they share."""

from abc import ABC, abstractmethod
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar

from flipscale.data.sources.tar_source import TarSource
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.results import Result, wilson


@dataclass(frozen=True)
class Task(ABC):
    """An evaluation that a recipe lists. Each kind is a subclass whose own fields are the options that it takes.

    Args:
        kind: one of `flipscale.evaluation.suite.KINDS`.
        data: the folder of the test set.
        name: what its results are called; the kind, where it is left out.
        every_samples: how often it runs while the model is trained, 0 only at the end; left out, `eval.every_samples`.
    """

    kind: str
    data: str
    name: str = ""
    every_samples: int | None = None

    # For the model card: how it is done, and the Hub's names of task and metric (left out: the kind and the metric).
    protocol: ClassVar[str] = ""
    hub_task: ClassVar[str] = ""
    hub_metric: ClassVar[str] = ""

    def check(self) -> None:
        """Raise if the test set is not there, before a run begins. Its manifest is written if there is none.

        Raises:
            ValueError: a file is missing.
        """
        TarSource(self.data)

    @abstractmethod
    def evaluate(self, embedder: Embedder) -> list[Result]:
        """Collective. Return what the model of `embedder` achieves.

        Raises:
            ValueError: the test set is not as this kind needs it.
        """

    def proportion(self, metric: str, hits: int, n: int, chance: float | None = None, headline: bool = True) -> Result:
        """Return the result that `hits` of `n` queries were answered rightly, in percent with its interval."""
        low, high = wilson(hits, n)
        return Result(
            *(self.name, self.kind, metric, 100.0 * hits / n, n, 100.0 * low, 100.0 * high),
            chance=chance,
            headline=headline,
            made_by=self.made_by,
        )

    @property
    def made_by(self) -> dict[str, Any]:
        """What the results depend on: the data, and the options that are not at their defaults."""
        options = [option for option in fields(self) if option.name not in {known.name for known in fields(Task)}]
        given = {option.name: getattr(self, option.name) for option in options}
        return {"data": self.data, **{o.name: given[o.name] for o in options if given[o.name] != _default(o)}}


def _default(option: Field) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()
