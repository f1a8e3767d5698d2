"""A linear probe: a linear classifier of the frozen image tower's features, by the training images of a set."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from flipscale.evaluation.embedding import Embedder, Features
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.metrics import Estimate, mean_per_class, wilson
from flipscale.evaluation.probe.probing import Solver, probe_by_lars, probe_by_regression
from flipscale.evaluation.probe.recipe import LarsRecipe
from flipscale.evaluation.probe.sets import LabelledSet, Sets
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.io.errors import UserError
from flipscale.io.options import Positive, Seed


@dataclass(frozen=True)
class Probe(Task):
    """`top1` and `mean_per_class` of a linear classifier, in percent of the test images. Chance of `top1` is the share
    of the commonest class.

    `data`, `train` and `validation` have shards with `KEY.cls` and `classnames.txt`.

    Args:
        train: the folder of training images; left out, the `train/` of `data`, whose `test/` is tested.
        validation: the folder by whose images the penalty is chosen; left out, a fifth of the training images.
        solver: `lbfgs`, logistic regression on whole images; or `lars`, the paper's recipe on random crops.
        features: `pooled`, before the projection, not normalised; or `embeds`, after it, of unit length.
        l2: the penalty of `lbfgs`, 1 / C of scikit-learn; left out, it is searched, and the last fit is to the
            validation images too.
        lars: how `lars` trains.
        seed: draws the validation images out of the training images.
    """

    train: str = ""
    validation: str = ""
    solver: Solver = "lbfgs"
    features: Features = "pooled"
    l2: Positive | None = None
    lars: LarsRecipe = field(default_factory=LarsRecipe)
    seed: Seed = 0

    needs: ClassVar[str] = "features"
    protocol: ClassVar[str] = """Linear probe: a linear classifier on the frozen image tower's features of whole test
images, the short side resized to the model's size and the centre cut out. `lbfgs` is multinomial logistic regression,
its penalty searched on validation images; `lars` is the paper's recipe, trained on random crops."""
    hub_task: ClassVar[str] = "image-classification"
    hub_metric: ClassVar[str] = "accuracy"
    hub_options: ClassVar[tuple[str, ...] | None] = ("train", "validation", "solver", "features")

    def __post_init__(self) -> None:
        if self.solver == "lars" and (self.l2 is not None or self.validation):
            raise UserError("l2 and validation are of solver lbfgs; lars has neither a penalty nor a search")

    def check(self) -> None:
        sets = self._sets()
        if self.solver == "lars":
            self.lars.check(len(sets.train.source))

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        return partial(test_set.label, len(test_set.class_names()))

    def other_sets(self) -> list[TestSet]:
        named = [(self.train or self.data, "train")] + [(self.validation, "validation")] * bool(self.validation)
        return [TestSet.open(*place) for place in named]

    def evaluate(self, embedder: Embedder) -> list[Result]:
        if self.solver == "lars":
            found = probe_by_lars(embedder, self._sets(), self.features, self.lars)
        else:
            found = probe_by_regression(embedder, self._sets(), self.features, self.l2, self.seed)
        n, hits = int(found.counts.sum()), int(found.hits.sum())
        results = [
            self.estimated("top1", Estimate(hits / n, *wilson(hits, n)), n, 100.0 * float(found.counts.max() / n)),
            self.estimated("mean_per_class", mean_per_class(found.hits, found.counts), n, 100.0 / len(found.counts)),
        ]
        return [dataclasses.replace(result, made_by={**result.made_by, **found.about}) for result in results]

    @property
    def made_by(self) -> dict[str, Any]:
        """What the results depend on; of `lars` the whole recipe."""
        made = {**super().made_by, "solver": self.solver, "features": self.features}
        made.pop("lars", None)
        return {**made, **dataclasses.asdict(self.lars)} if self.solver == "lars" else made

    def _sets(self) -> Sets:
        return Sets(
            LabelledSet.open(self.train or self.data, "train"),
            LabelledSet.open(self.data, "test"),
            LabelledSet.open(self.validation, "validation") if self.validation else None,
        )
