"""Zero-shot classification: the nearest class name, the embeddings of all templates averaged and renormalised."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from flipscale.data.sources.tar_source import TarSource
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.kinds.templates import TEMPLATES
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import read_class_names, read_labels, read_lines


@dataclass(frozen=True)
class ZeroShot(Task):
    """`top1` and `top5` of classification shards, in percent of the images.

    `data` has shards with `KEY.cls`, and beside them `classnames.txt` and (unless `templates` is given)
    `zeroshot_classification_templates.txt` with `{c}` for the name, as CLIP_benchmark lays them out.

    Args:
        templates: `imagenet7` or `imagenet80`, CLIP's prompts in place of the folder's own.
    """

    templates: str | None = None

    protocol: ClassVar[str] = """Zero-shot classification: whole images, the short side resized to the model's size and
the centre cut out; the answer is the class whose embedding (the mean over the set's prompts) is nearest in cosine."""
    hub_task: ClassVar[str] = "zero-shot-image-classification"
    hub_metric: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        if self.templates is not None and self.templates not in TEMPLATES:
            raise ValueError(f"templates {self.templates!r} are unknown; use one of {', '.join(TEMPLATES)}")

    def check(self) -> None:
        super().check()
        read_class_names(self.data)
        self._prompts()

    def evaluate(self, embedder: Embedder) -> list[Result]:
        names, prompts, source = read_class_names(self.data), self._prompts(), TarSource(self.data)
        labels = torch.tensor(read_labels(embedder, source, len(names)))
        classes = class_embeds(embedder, names, prompts)
        scores = embedder.my_images(source) @ classes.t()
        right = scores.topk(min(5, len(names))).indices == labels[:, None]
        top1, top5 = embedder.total([right[:, 0].sum().item(), right.any(dim=1).sum().item()])
        chance = 100.0 / len(names)
        return [self.proportion("top1", top1, len(source), chance), self.proportion("top5", top5, len(source))]

    def _prompts(self) -> list[str]:
        if self.templates is not None:
            return TEMPLATES[self.templates]
        file = Path(self.data) / "zeroshot_classification_templates.txt"
        return read_lines(file, "the prompts, {c} for the name")


def class_embeds(embedder: Embedder, class_names: list[str], templates: list[str]) -> torch.Tensor:
    """Collective. Return one embedding a class, `(classes, dim)` of unit length: the mean over the templates, as CLIP
    and FLIP have it."""
    from flipscale.model.modeling_flip import normalise_embeds  # seconds to import; a model has done it

    mine = [class_names[row] for row in embedder.padded_rows(len(class_names))]
    prompts = [template.replace("{c}", name) for name in mine for template in templates]
    means = embedder.my_texts(prompts).unflatten(0, (len(mine), -1)).mean(dim=1)
    return embedder.gathered(normalise_embeds(means), len(class_names))
