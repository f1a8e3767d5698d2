"""The pages of evaluations that have a name, `tasks/NAME.yaml`: where the data is, and how it is used and judged."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flipscale.evaluation.kinds.templates import TEMPLATES
from flipscale.io.errors import UserError
from flipscale.io.text_table import plain_table

if TYPE_CHECKING:
    from flipscale.evaluation.kinds.task import Task

PAGES = Path(__file__).parent / "tasks"
# Kinds that have several metrics, of which a task names its headline.
_WITH_METRICS = ("zero_shot", "zero_shot_multilabel")
PAPER_MODEL = "FLIP L/14, LAION-400M"
SUITES = ("paper", "robustness", "fairness")


@dataclass(frozen=True)
class TaskSource:
    """Where the Hub has a task's data.

    Args:
        repo: of data sets, `owner/name`.
        split: the folder of the shards, or the split of a parquet repository.
        revision: a branch, or a commit where one is known.
        image: the column of images of a parquet repository; empty for shards in CLIP_benchmark's layout.
        label: the column of classes of a parquet repository.
        clip: the columns that name a clip, where rows are the frames of videos, of which the middle one is taken.
        frame: the column of a frame's number in its clip.
        shards: a pattern of the shards' names, where they are others than `SPLIT/0.tar`, `SPLIT/1.tar`, ...
    """

    repo: str
    split: str = "test"
    revision: str = "main"
    image: str = ""
    label: str = ""
    clip: tuple[str, ...] = ()
    frame: str = ""
    shards: str = ""


@dataclass(frozen=True)
class Reference:
    """A figure of the paper: which model, and its value in percent."""

    model: str
    value: float
    metric: str


@dataclass(frozen=True)
class TaskPage:
    """What the page of one evaluation says.

    Args:
        name: of the page's file, of the task, and of the folder where `flipscale prepare tasks` puts its data.
        title: what people call the data set.
        kind: of the evaluation, one of `KINDS`.
        suites: those of `SUITES` that it belongs to.
        source: where the data is.
        licence: of the images, as their source states it.
        images: how many the split has.
        num_classes: None for a task without classes, or where only the source has the list.
        class_names: CLIP's; empty where the names are the source's own. Labels are numbers in the folder's
            `classnames.txt`, whose order may be another.
        templates: the prompts, `{c}` for the name; empty where the folder's own are used or there are none.
        prompts: the name of the set that `templates` is, such as `imagenet7`; empty for a list of the page's own.
        metric: the headline.
        data: the folder of the data, where another task's is used; else `name`.
        options: further fields of the kind.
        reference: what the paper reports.
        comparable: whether images, split and metric are those of the paper.
        why_not: the reason why they are not, or what else is to be known of the data.
    """

    name: str
    title: str
    kind: str
    suites: tuple[str, ...]
    source: TaskSource
    licence: str
    images: int
    metric: str
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    prompts: str = ""
    data: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    reference: tuple[Reference, ...] = ()
    comparable: bool = False
    why_not: str = ""

    @property
    def num_prompts(self) -> int:
        """How many prompts a class has; 0 without classes, or where only the source has the list."""
        return len(self.templates)

    def listed(self, folder: Path) -> dict[str, Any]:
        """Return the task as a recipe may list it, with the data at `folder`."""
        templates = {"templates": self.prompts or list(self.templates)} if self.templates else {}
        about = {"task": self.name, "kind": self.kind, "data": str(folder), "name": self.name}
        # Labels in a file of their own have one metric.
        several = self.kind in _WITH_METRICS and "labels" not in self.options
        metric = {"metric": self.metric} if several else {}
        return {**about, **templates, **metric, **self.options}

    def task(self, folder: Path) -> "Task":
        """Return the task, with the data at `folder`.

        Raises:
            ValueError: the page says what its kind does not take.
        """
        from flipscale.evaluation.kinds.kinds import build_task  # with torch; the pages are read without it

        return build_task(self.listed(folder), f"task {self.name}")


@cache
def page_names() -> tuple[str, ...]:
    """Return the names of all pages, sorted."""
    return tuple(sorted(path.stem for path in PAGES.glob("*.yaml")))


@cache
def read_page(name: str) -> TaskPage:
    """Return the page called `name`.

    Raises:
        ValueError: there is none; the message has the nearest names.
    """
    if name not in page_names():
        near = difflib.get_close_matches(name, page_names(), 3, 0.5)
        fix = f"did you mean {' or '.join(near)}?" if near else "`flipscale prepare tasks --list` prints all"
        raise UserError(f"no task is called {name!r}; {fix}")
    text = (PAGES / f"{name}.yaml").read_text(encoding="utf-8")
    return _page(name, yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def read_pages() -> tuple[TaskPage, ...]:
    """Return all pages, in the order of their names."""
    return tuple(read_page(name) for name in page_names())


def suite_pages(suite: str) -> tuple[TaskPage, ...]:
    """Return the pages of a suite, or of all.

    Raises:
        ValueError: no suite is called so.
    """
    if suite not in (*SUITES, "all"):
        raise UserError(f"no suite is called {suite!r}; use one of {', '.join(SUITES)}, all")
    return tuple(page for page in read_pages() if suite == "all" or suite in page.suites)


def pages_table(pages: Sequence[TaskPage]) -> str:
    """Return the pages as a table for people: what each is, and what the paper's L/14 achieves."""
    rows = [("task", "suites", "images", "classes", "prompts", "metric", "paper")]
    for page in pages:
        figures = [line.value for line in page.reference if (line.model, line.metric) == (PAPER_MODEL, page.metric)]
        counts = (f"{page.images:,}", f"{page.num_classes:,}" if page.num_classes else "", str(page.num_prompts or ""))
        figure = f"{figures[0]}{'' if page.comparable else ' *'}" if figures else ""
        rows.append((page.name, ", ".join(page.suites), *counts, page.metric, figure))
    return f"{plain_table(rows, (2, 3, 4))}\n\npaper: {PAPER_MODEL}, in %; * on other images than the source's"


def _page(name: str, content: dict[str, Any]) -> TaskPage:
    """Return the page that a file's content describes."""
    known = {option.name for option in fields(TaskPage)} - {"name", "prompts"}
    assert content.keys() <= known, f"tasks/{name}.yaml has {sorted(content.keys() - known)}"
    named = content.get("templates") or []
    page = {
        **content,
        "suites": tuple(content["suites"]),
        "source": TaskSource(**{**content["source"], "clip": tuple(content["source"].get("clip", ()))}),
        "class_names": _class_names(content.get("class_names") or []),
        "templates": tuple(TEMPLATES[named] if isinstance(named, str) else named),
        "prompts": named if isinstance(named, str) else "",
        "data": content.get("data") or name,
        "reference": tuple(
            Reference(line["model"], line["value"], line.get("metric", content["metric"]))
            for line in content.get("reference") or []
        ),
    }
    return TaskPage(name, **page)


def _class_names(said: str | list[str] | dict[str, list[int]]) -> tuple[str, ...]:
    """Return the names that a page lists itself, or takes from `tasks/names/LIST.txt`: all, or those at `{LIST:
    NUMBERS}`."""
    if isinstance(said, list):
        return tuple(said)
    if isinstance(said, str):
        return tuple((PAGES / "names" / f"{said}.txt").read_text(encoding="utf-8").splitlines())
    ((names, numbers),) = said.items()
    listed = _class_names(names)
    return tuple(listed[number] for number in numbers)
