"""The pages of named tasks; tests/cli compares their figures with the table of docs/evaluation.md."""

from pathlib import Path

import pytest

from flipscale.evaluation.suite import build_task, build_tasks, planned_tasks
from flipscale.evaluation.task_page import page_names, read_page
from flipscale.recipe.outputs import EvalRecipe

# Tasks with the source's class names, because CLIP lists other classes or no classes.
WITHOUT_NAMES = {
    "babel_imagenet",
    "let_it_wag",
    "birdsnap",
    "objectnet",
    "dollar_street",
    "geode",
    "fairface",
    "utkface",
}


@pytest.mark.parametrize("name", page_names())
def test_a_page_is_a_task(name: str) -> None:
    page = read_page(name)
    assert page.comparable or page.why_not
    assert page.licence
    assert page.title
    named = not page.kind.endswith(("retrieval", "selection")) and name not in WITHOUT_NAMES
    assert len(page.class_names) == len(set(page.class_names)) == (page.num_classes if named else 0) or name in (
        "imagenet1k", "imagenet1k_80", "imagenet_real", "imagenetv2", "imagenet_sketch"
    )  # fmt: skip
    assert all(template.count("{c}") == 1 for template in page.templates)
    # YAML reads some names as numbers or booleans.
    assert all(isinstance(text, str) for text in (*page.class_names, *page.templates, page.licence, page.why_not))
    task = build_task(page.listed(Path("data") / page.data), page.name)
    assert (task.kind, task.name, task.task, task.data) == (page.kind, name, name, f"data/{page.data}")
    assert getattr(task, "metric", page.metric) == ("top1" if page.metric == "any_label" else page.metric)
    assert build_tasks([name], "data") == [task]


def test_subsets_have_the_names_of_their_own_classes() -> None:
    whole = read_page("imagenet1k").class_names
    assert read_page("imagenet_a").class_names[:2] == (whole[6], whole[11]) == ("stingray", "goldfinch")
    assert read_page("imagenet_r").class_names[:2] == (whole[1], whole[2]) == ("goldfish", "great white shark")


def test_a_recipe_names_tasks() -> None:
    recipe = EvalRecipe(
        ["food101", {"task": "imagenet1k", "every_samples": 7}, {"task": "imagenet1k_80", "name": "many"}],
        every_samples=100, tasks_dir="sets",
    )  # fmt: skip
    planned = [(task.name, task.kind, task.data, task.every_samples) for task in planned_tasks(recipe)]
    assert planned == [
        ("food101", "zero_shot", "sets/food101", 100),
        ("imagenet1k", "zero_shot", "sets/imagenet1k", 7),
        ("many", "zero_shot", "sets/imagenet1k", 100),
    ]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval.tasks\[1\]: no task is called 'food10'; did you mean food101"):
        build_tasks(["mnist", "food10"])
    with pytest.raises(ValueError, match="no task is called 'qqq'; `flipscale prepare tasks --list`"):
        build_tasks([{"task": "qqq"}])
    (task,) = build_tasks(["imagenetv2"], tmp_path)
    folder, fix = tmp_path / "imagenetv2", f"run `flipscale prepare tasks {tmp_path} --only imagenetv2`"
    with pytest.raises(ValueError, match=rf"the data of task imagenetv2 is missing; {fix}"):
        task.check()
    folder.mkdir()
    with pytest.raises(ValueError, match=rf"the data of task imagenetv2 was prepared only in part; {fix}"):
        task.check()
