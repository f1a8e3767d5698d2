"""What zero-shot tasks share: classes with names, prompts for them, and one embedding a class."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import StreamedTask
from flipscale.evaluation.kinds.templates import TEMPLATES
from flipscale.evaluation.test_set import TestSet
from flipscale.io.errors import UserError

# ImageNet-21k with CLIP's 80 prompts has 1.8 million.
_MOST_TEXTS = 10_000_000


class Classifier(NamedTuple):
    """The names of the classes, and their embeddings, `(dim, classes)` of unit length."""

    names: list[str]
    weights: torch.Tensor

    def scores(self, embeds: torch.Tensor) -> torch.Tensor:
        """Return 100 times the cosine of each image, `(images, dim)`, and each class: `(images, classes)`."""
        return 100.0 * embeds @ self.weights


@dataclass(frozen=True)
class PromptedTask(StreamedTask):
    """A task whose answers are classes of `classnames.txt`.

    Args:
        templates: `imagenet7` or `imagenet80`, CLIP's prompts, or a list of prompts with `{c}` for the name; left out,
            the folder's own.
    """

    templates: str | list[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.templates, str) and self.templates not in TEMPLATES:
            known = ", ".join(TEMPLATES)
            raise UserError(f"templates {self.templates!r} are unknown; use one of {known}, or a list of prompts")
        without = [prompt for prompt in self.templates or ["{c}"] if "{c}" not in prompt]
        if self.templates is not None and (not self.templates or (without and not isinstance(self.templates, str))):
            raise UserError(f"templates have {without[:1] or 'no'} prompt; each prompt must have {{c}} for the name")

    def check(self) -> None:
        super().check()
        test_set = TestSet.open(self.data)
        names, prompts = test_set.class_names(), self.prompts(test_set)
        if len(names) * len(prompts) > _MOST_TEXTS:
            raise UserError(
                f"{self.data} has {len(prompts):,} prompts for each of {len(names):,} classes, more than "
                f"{_MOST_TEXTS:,} texts; use fewer prompts"
            )

    def prompts(self, test_set: TestSet) -> list[str]:
        """Return the prompts, `{c}` for the name.

        Raises:
            ValueError: the folder's own are missing, or have no `{c}`.
        """
        if isinstance(self.templates, str):
            return TEMPLATES[self.templates]
        if self.templates is not None:
            return self.templates
        prompts = test_set.templates()
        without = [prompt for prompt in prompts if prompt and "{c}" not in prompt]  # a blank line counts as one
        if without:
            raise UserError(f"{self.data} has the prompt {without[0]!r:.80}; each prompt must have {{c}} for the name")
        return prompts

    def classifier(self, embedder: Embedder, test_set: TestSet) -> Classifier:
        """Collective. Return the embedded classes of the set.

        Raises:
            ValueError: their names or prompts are missing.
        """
        return classifier(embedder, test_set.class_names(), self.prompts(test_set))


def classifier(embedder: Embedder, class_names: list[str], templates: list[str]) -> Classifier:
    """Collective. Return classes, each embedded as the mean over its prompts' embeddings, of unit length again, as CLIP
    and FLIP have it."""
    prompts = [template.replace("{c}", name) for name in class_names for template in templates]
    return Classifier(class_names, embedder.texts(prompts, together=len(templates)).t().contiguous())
