"""Models side by side: names, tables of suites with the paper's figures, and the dot plot."""

import dataclasses
from pathlib import Path

import pytest

from flipscale.cli.evaluate import name_models
from flipscale.evaluation.intervals import wilson
from flipscale.evaluation.model_results import Line
from flipscale.evaluation.presentation import results_page
from flipscale.evaluation.presentation.results_page import Column, draw_results, suite_tables
from flipscale.evaluation.results import Result
from flipscale.evaluation.task_page import TaskPage, read_page, suite_pages

pytestmark = pytest.mark.usefixtures("real_figures")


def line_of(page: TaskPage, value: float, **about: object) -> Line:
    low, high = wilson(round(value / 100 * page.images), page.images)
    chance = 100 / page.num_classes if page.num_classes else None
    interval = (page.images, 100 * low, 100 * high)
    result = Result(page.name, page.kind, page.metric, value, *interval, chance=chance, made_by={"data": page.name})
    said = {
        "group": page.name,
        "weights": "12ab34cd56ef78",
        "page": page.name,
        "title": page.title,
        "data": {"name": page.name, "images": page.images},
        "prompts": {"number": len(page.templates)} if page.templates else None,
        "image_size": 224,
        "mask": {},
        "precision": "bf16",
        "versions": {"flipscale": "0.1.0"},
    }
    return Line(result, {**said, **about})


def cells(text: str, first: str) -> list[str]:
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {first} ")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_paper_s_figure() -> None:
    cars, birds, imagenet = (read_page(name) for name in ("cars", "birdsnap", "imagenet1k"))
    one = Column("one", [line_of(cars, 41.5), line_of(birds, 20.0), line_of(imagenet, 50.0)])
    two = Column("two", [line_of(cars, 42.5)])
    text = suite_tables([one, two], [])
    assert cells(text, cars.title) == [
        cars.title, "top-1", "41.5 % (40.4 to 42.6)", "42.5 % (41.4 to 43.6)", "8,041", "0.51 %", "-", "90.7 %",
    ]  # fmt: skip
    assert cells(text, birds.title)[3:] == ["-", "1,851", "0.20 %", "-", "[1]"]
    assert f"[1] Not comparable with the paper: {birds.why_not}" in text.splitlines()
    assert cells(text, imagenet.title)[-1] == "74.6 %"


def test_the_mean_of_a_suite() -> None:
    pages = suite_pages("fairness")
    whole = [line_of(page, 10.0 * number) for number, page in enumerate(pages)]
    text = suite_tables([Column("one", whole), Column("two", whole[1:])], ["fairness"])
    assert text.startswith("## Fairness\n")
    assert cells(text, f"mean of {len(pages)}")[2:4] == [f"{10 * (len(pages) - 1) / 2:.1f} %", "-"]
    assert f"No mean for two: 1 of the suite's {len(pages)} tasks are missing ({pages[0].name})." in text
    assert "mean of" not in suite_tables([Column("two", whole[1:])], ["fairness"])
    nothing = dataclasses.replace(whole[0], result=dataclasses.replace(whole[0].result, value=float("nan")))
    text = suite_tables([Column("one", [nothing, *whole[1:]]), Column("two", whole)], ["fairness"])
    assert cells(text, f"mean of {len(pages)}")[2] == cells(text, pages[0].title)[2] == "-"
    assert "nan" not in text


def test_a_figure_ends_where_its_results_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, line = [], line_of(read_page("cars"), 50.0)
    own, replace = dataclasses.replace(line, about={**line.about, "page": None}), dataclasses.replace
    monkeypatch.setattr(results_page, "save_figure", lambda figure, path: drawn.append(figure.axes[0].get_xlim()))
    for value in (30.0, 99.0):
        draw_results(
            [Column("a", [replace(own, result=replace(own.result, value=value, low=value - 2, high=value))])],
            tmp_path / "results.png",
        )
    assert [(low, high < 50) for low, high in drawn] == [(0, True), (0, False)]
    assert drawn[1][1] <= 100


def test_a_model_may_be_named_as_a_formula(tmp_path: Path) -> None:
    draw_results([Column(r"a$\x$", [line_of(read_page("cars"), 41.5)])], tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 10_000


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("runs/a/model", "runs/b/model", "other/a/model", "exported"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folders")
def test_names_and_homes() -> None:
    given = ["runs/a/model", "exported", "org/name", "open_clip:ViT-B-16,laion2b", "hf:google/siglip", "hf:exported"]
    models = name_models(given, None)
    assert [model.name for model in models] == ["a", "exported", *given[2:]]
    homes = ["runs/a/model", "exported"]
    homes += [f"evaluations/{n}" for n in ("org-name", "open_clip-ViT-B-16,laion2b", "hf-google-siglip", "hf-exported")]
    assert [str(model.home) for model in models] == homes
    assert [str(model.folder) for model in models[:3]] == ["runs/a/model", "exported", "None"]
    assert [str(model.home) for model in name_models(given[:2], Path("out"))] == ["out/a", "out/exported"]
    # Equal names become paths.
    assert [model.name for model in name_models(["runs/a/model", "other/a/model"], None)] == [
        "runs/a/model", "other/a/model",
    ]  # fmt: skip


@pytest.mark.usefixtures("folders")
def test_a_model_named_twice() -> None:
    for given in (["org/name", "org/name"], ["exported", "./exported"], ["org/name", "org-name"]):
        with pytest.raises(ValueError, match="2 models are called"):
            name_models(given, None)
