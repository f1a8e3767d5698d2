"""docs/evaluation.md: its table of tasks is what their pages say."""

import re

import yaml
from cli.pages import ROOT

from flipscale.data.task_page import Reference, TaskPage, suite_pages
from flipscale.evaluation.suite import planned_tasks
from flipscale.recipe.outputs import EvalRecipe

PAGE = (ROOT / "docs/evaluation.md").read_text()
PAPER_MODEL = "FLIP L/14, LAION-400M"
METRICS = {"top1": "top-1", "map11": "11-point mAP", "roc_auc": "ROC AUC", "text_to_image_r1": "R@1, text to image"}


def row(page: TaskPage) -> str:
    """A line of the table."""
    found = [one for one in page.reference if one.metric == page.metric]
    paper: Reference | None = next((one for one in found if one.model == PAPER_MODEL), None)
    figure = "" if paper is None else f"{paper.value:.1f}" if page.comparable else f"({paper.value:.1f})"
    cells = [
        f"`{page.name}`",
        page.title,
        f"`{page.source.repo}`",
        ", ".join(page.suites),
        f"{page.images:,}",
        "" if page.num_classes is None else f"{page.num_classes:,}",
        str(len(page.templates) or ""),
        METRICS.get(page.metric, page.metric.replace("_", " ")),
        figure,
    ]
    return f"| {' | '.join(cells)} |"


def test_the_table_of_tasks_is_what_their_pages_say() -> None:
    rows = [row(page) for page in suite_pages("all")]
    found = [line for line in PAGE.splitlines() if line.startswith("| `") and line.count("|") == 10]
    assert found == rows, "docs/evaluation.md should have:\n" + "\n".join(rows)


def test_its_recipe_is_one() -> None:
    (shown,) = re.findall(r"```yaml\n(eval:\n.*?)```", PAGE, re.DOTALL)
    planned = {task.name: task.every_samples for task in planned_tasks(EvalRecipe(**yaml.safe_load(shown)["eval"]))}
    assert planned == {"imagenet1k": 1_000_000_000, "cars": 200_000_000, "mine": 1_000_000_000}
