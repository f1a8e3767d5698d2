"""Zero-shot classification: the nearest class name, every template's embedding averaged and renormalised."""

from pathlib import Path

import torch

from flipscale.data.sources.tar_source import TarSource
from flipscale.evaluation.embedding import Embedder, sample_numbers
from flipscale.evaluation.templates import TEMPLATES
from flipscale.model.modeling_flip import normalise_embeds


def _lines(path: Path, what: str) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; it lists {what}, one a line")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def class_embeds(embedder: Embedder, classnames: list[str], templates: list[str]) -> torch.Tensor:
    """Collective. One embedding a class, `(classes, dim)`, of unit length: the mean over templates, as CLIP and FLIP
    have it."""
    prompts = [template.replace("{c}", name) for name in classnames for template in templates]
    return normalise_embeds(embedder.texts(prompts).unflatten(0, (len(classnames), -1)).mean(dim=1))


def run(embedder: Embedder, folder: str, templates: str | None = None) -> dict[str, float]:
    """Collective. `top1`, `top5` and `chance`, in percent, of the classification shards in `folder`.

    Args:
        folder: webdataset shards with `KEY.cls`, and beside them `classnames.txt` and (unless `templates` is given)
            `zeroshot_classification_templates.txt` with `{c}` for the name, as CLIP_benchmark lays them out.
        templates: `imagenet7` or `imagenet80`.

    Raises:
        ValueError: a file or a class number that is missing, unknown templates.
    """
    classnames = _lines(Path(folder) / "classnames.txt", "the class names")
    if templates is None:
        prompts = _lines(Path(folder) / "zeroshot_classification_templates.txt", "the prompts, {c} for the name")
    elif templates in TEMPLATES:
        prompts = TEMPLATES[templates]
    else:
        raise ValueError(f"templates {templates!r} are unknown; use one of {', '.join(TEMPLATES)}")
    source = TarSource(folder)
    labels = []
    for shard, number in sample_numbers(source):
        sample = source.read(shard, number)
        if sample.label is None or not 0 <= sample.label < len(classnames):
            raise ValueError(f"{folder}: {sample.name} has class {sample.label}; {len(classnames)} names are listed")
        labels.append(sample.label)
    scores = embedder.images(source) @ class_embeds(embedder, classnames, prompts).t()
    best = scores.topk(min(5, len(classnames))).indices == torch.tensor(labels)[:, None]
    return {
        "top1": 100.0 * best[:, 0].float().mean().item(),
        "top5": 100.0 * best.any(dim=1).float().mean().item(),
        "chance": 100.0 / len(classnames),
    }
