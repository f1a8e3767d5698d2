"""The pages of named tasks, against the table of the paper's data sets and figures."""

from pathlib import Path

import pytest

from flipscale.evaluation.recipe import EvalRecipe
from flipscale.evaluation.suite import build_task, build_tasks
from flipscale.evaluation.task_page import page_names, read_page, suite_pages

# Images, classes, CLIP's prompts, metric, FLIP L/14's figure on LAION-400M, and whether the images are the paper's.
TABLE = {
    "imagenet1k": (50_000, 1000, 7, "top1", 74.6, True),
    "imagenet1k_80": (50_000, 1000, 80, "top1", None, False),
    "imagenet_real": (50_000, 1000, 7, "any_label", None, False),
    "imagenetv2": (10_000, 1000, 7, "top1", 66.8, True),
    "imagenet_a": (7_500, 200, 7, "top1", 51.2, True),
    "imagenet_r": (30_000, 200, 80, "top1", 86.5, True),
    "imagenet_sketch": (50_889, 1000, 7, "top1", 59.9, True),
    "objectnet": (18_574, 113, 1, "top1", 59.1, True),
    "food101": (25_250, 101, 1, "top1", 89.3, True),
    "cifar10": (10_000, 10, 18, "top1", 97.2, True),
    "cifar100": (10_000, 100, 18, "top1", 84.1, True),
    "birdsnap": (1_851, 490, 1, "top1", 63.0, False),
    "sun397": (108_754, 397, 2, "top1", 73.1, False),
    "cars": (8_041, 196, 8, "top1", 90.7, True),
    "dtd": (1_880, 47, 8, "top1", 60.4, True),
    "stl10": (8_000, 10, 2, "top1", 98.5, True),
    "fgvc_aircraft": (3_333, 100, 2, "mean_per_class", 29.1, True),
    "pets": (3_669, 37, 1, "mean_per_class", 92.6, True),
    "caltech101": (6_085, 102, 34, "mean_per_class", 93.8, True),
    "flowers": (6_149, 102, 1, "mean_per_class", 75.0, True),
    "voc2007": (4_952, 20, 1, "map11", 83.1, True),
    "mnist": (10_000, 10, 1, "top1", 80.3, True),
    "gtsrb": (12_630, 43, 3, "top1", 41.4, True),
    "country211": (21_100, 211, 5, "top1", 23.1, True),
    "eurosat": (5_400, 10, 3, "top1", 53.5, False),
    "resisc45": (6_300, 45, 18, "top1", 70.8, False),
    "kitti": (711, 4, 1, "top1", 34.8, True),
    "clevr_counts": (15_000, 8, 1, "top1", 22.7, False),
    "pcam": (32_768, 2, 1, "top1", 50.3, True),
    "rendered_sst2": (1_821, 2, 1, "top1", 58.5, True),
    "hateful_memes": (500, 2, 1, "roc_auc", 54.0, True),
    "ucf101": (3_783, 101, 48, "top1", 74.1, False),
    "let_it_wag": (130_500, 290, 7, "top1", None, False),
    "flickr30k": (1_000, None, 0, "text_to_image_r1", 75.4, True),
    "mscoco": (5_000, None, 0, "text_to_image_r1", 44.2, True),
    "dollar_street": (3_503, 58, 0, "worst_group_top5", None, False),
    "geode": (12_488, 40, 0, "worst_group_top1", None, False),
    "fairface": (10_954, None, 0, "worst_group_gender", None, False),
    "utkface": (23_703, None, 0, "worst_group_gender", None, False),
}
FLIP = "FLIP L/14, LAION-400M"
# Tasks with the source's class names, because CLIP lists other classes or no classes.
WITHOUT_NAMES = {"let_it_wag", "birdsnap", "objectnet", "dollar_street", "geode", "fairface", "utkface"}


@pytest.mark.parametrize("name", TABLE)
def test_a_page_is_its_row_of_the_table(name: str) -> None:
    page = read_page(name)
    figures = [line.value for line in page.reference if (line.model, line.metric) == (FLIP, page.metric)]
    facts = (page.images, page.num_classes, len(page.templates), page.metric, figures[0] if figures else None)
    assert (*facts, page.comparable) == TABLE[name]
    assert page.comparable or page.why_not
    assert page.licence
    assert page.title
    named = page.kind != "retrieval" and name not in WITHOUT_NAMES
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


def test_suites() -> None:
    assert set(page_names()) == {page.name for page in suite_pages("all")} == TABLE.keys()
    robust = {"imagenet1k", "imagenetv2", "imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet"}
    assert {page.name for page in suite_pages("robustness")} == robust | {"imagenet_real", "let_it_wag"}
    assert {page.name for page in suite_pages("fairness")} == {"dollar_street", "geode", "fairface", "utkface"}
    assert {page.name for page in suite_pages("paper")} == {name for name, row in TABLE.items() if row[4]}
    with pytest.raises(ValueError, match="no suite is called 'fair'"):
        suite_pages("fair")


def test_a_recipe_names_tasks() -> None:
    recipe = EvalRecipe(
        ["food101", {"task": "imagenet1k", "every_samples": 7}, {"task": "imagenet1k_80", "name": "many"}],
        every_samples=100, tasks_dir="sets",
    )  # fmt: skip
    planned = [(task.name, task.kind, task.data, task.every_samples) for task in recipe.planned()]
    assert planned == [
        ("food101", "zero_shot", "sets/food101", 100),
        ("imagenet1k", "zero_shot", "sets/imagenet1k", 7),
        ("many", "zero_shot", "sets/imagenet1k", 100),
    ]
    apart = recipe.every(1 / 3)
    assert (apart.every_share, {task.every_samples for task in apart.planned()}) == (1 / 3, {None})


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval.tasks\[1\]: no task is called 'food10'; did you mean food101"):
        build_tasks(["mnist", "food10"])
    with pytest.raises(ValueError, match="no task is called 'qqq'; `flipscale prepare tasks --list`"):
        build_tasks([{"task": "qqq"}])
    (task,) = build_tasks(["imagenetv2"], tmp_path)
    folder, fix = tmp_path / "imagenetv2", f"run `flipscale prepare tasks {tmp_path} --only imagenetv2`"
    with pytest.raises(ValueError, match=rf"the data of task imagenetv2 is missing \({folder}\); {fix}"):
        task.check()
    folder.mkdir()
    with pytest.raises(ValueError, match=rf"the data of task imagenetv2 was prepared only in part .*; {fix}"):
        task.check()
