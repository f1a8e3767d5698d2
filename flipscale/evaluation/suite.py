"""All the evaluations that a recipe or a command asks for, as one flat record."""

from flipscale.evaluation import retrieval, zero_shot
from flipscale.evaluation.embedding import Embedder


def run_suite(
    embedder: Embedder, zero_shot_folder: str | None, retrieval_folder: str | None, templates: str | None = None
) -> dict[str, float]:
    """Collective. `zero_shot/top1`, `retrieval/text_to_image_r1`, ...: percent, of the folders given."""
    metrics: dict[str, float] = {}
    if zero_shot_folder:
        found = zero_shot.run(embedder, zero_shot_folder, templates)
        metrics.update({f"zero_shot/{name}": value for name, value in found.items()})
    if retrieval_folder:
        found = retrieval.run(embedder, retrieval_folder)
        metrics.update({f"retrieval/{name}": value for name, value in found.items()})
    return metrics
