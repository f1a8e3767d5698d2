"""Named evaluations: their pages `tasks/NAME.yaml`, and the mark of their prepared data.

A page has the source of the data, the prompts, the metric and the paper's figures. `prepared.json` marks a whole test
set; it is written last.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from flipscale.io.errors import UserError
from flipscale.io.paths import quoted, read_text
from flipscale.io.text_table import plain_table

PAGES = Path(__file__).parent / "tasks"
# Kinds with several metrics. A task names its headline.
_WITH_METRICS = ("zero_shot", "zero_shot_multilabel")
PREPARED = "prepared.json"
PAPER_MODEL = "FLIP L/14, LAION-400M"
SUITES = ("paper", "robustness", "fairness", "languages", "composition", "long_captions")
# CLIP's prompts for ImageNet: the 7 that do most of the work according to its authors, and the 80 of its notebook.
TEMPLATES = {
    name: (PAGES / "prompts" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    for name in ("imagenet7", "imagenet80")
}


@dataclass(frozen=True)
class TaskSource:
    """The place of a task's data on the Hub.

    Args:
        image: image column of a parquet repository; empty for shards in CLIP_benchmark's layout.
        clip: columns that identify a clip, if rows are frames of videos. The middle frame is used.
        frame: column of a frame's number in its clip.
        shards: pattern of the shards' names, by default `SPLIT/0.tar`, ..., or a zip file of images and texts.
        captions: for sets that are not on the Hub, whose `repo` is the URL of an archive of images: languages by the
            URL of their captions, a zip file or a text file for each `{language}`.
        names: URL of the names of the images, in the order of the captions.
        texts: columns of captions, or of lists of captions: the right one of the image, then wrong ones.
        other_image, box: columns of the wrong caption's image, and of the part of an image to keep (x, y, w, h).
        subsets: subsets that have their own repositories, `{subset}` in `repo`.
        leave_out: values of `label` that are no subsets; nor are those of fewer rows than `least`.
    """

    repo: str
    split: str = "test"
    revision: str = "main"
    image: str = ""
    label: str = ""
    clip: tuple[str, ...] = ()
    frame: str = ""
    shards: str = ""
    captions: dict[str, list[str]] = field(default_factory=dict)
    names: str = ""
    texts: Sequence[str] = ()
    other_image: str = ""
    box: str = ""
    subsets: Sequence[str] = ()
    leave_out: Sequence[str] = ()
    least: int = 1

    @property
    def repos(self) -> dict[str, str]:
        return {name: self.repo.format(subset=name) for name in self.subsets} or {"": self.repo}


@dataclass(frozen=True)
class Reference:
    """A figure of the paper, in percent."""

    model: str
    value: float
    metric: str


@dataclass(frozen=True)
class TaskPage:
    """The page of one evaluation.

    Args:
        name: name of the page's file and of the task.
        num_classes: number of classes; None without classes, or if only the source has the list.
        class_names: CLIP's class names; empty for the source's own names. Labels are numbers in the folder's
            `classnames.txt`, which may have another order.
        templates: prompts with `{c}` for the class name; empty without prompts, or for the folder's own.
        prompts: name of the set of `templates`, such as `imagenet7`; empty for the page's own list.
        data: folder of the data; another task's folder, or `name`.
        comparable: whether images, split and metric are those of the paper.
        why_not: reason why they are not, or another remark on the data.
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

    def listed(self, folder: Path) -> dict[str, Any]:
        """Return the task as an entry of a recipe's eval.tasks, with the data at `folder`."""
        listed: dict[str, Any] = {"task": self.name, "kind": self.kind, "data": str(folder), "name": self.name}
        if self.templates:
            listed["templates"] = self.prompts or list(self.templates)
        if self.kind in _WITH_METRICS and "labels" not in self.options:  # label files allow only one metric
            listed["metric"] = self.metric
        return {**listed, **self.options}


@cache
def page_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in PAGES.glob("*.yaml")))


@cache
def read_page(name: str) -> TaskPage:
    if name not in page_names():
        near = difflib.get_close_matches(name, page_names(), 3, 0.5)
        fix = f"did you mean {' or '.join(near)}?" if near else "`flipscale prepare tasks --list` prints all"
        raise UserError(f"no task is called {name!r}; {fix}")
    text = (PAGES / f"{name}.yaml").read_text(encoding="utf-8")
    return _page(name, yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def suite_pages(suite: str) -> tuple[TaskPage, ...]:
    if suite not in (*SUITES, "all"):
        raise UserError(f"no suite is called {suite!r}; use one of {', '.join(SUITES)}, all")
    return tuple(page for page in map(read_page, page_names()) if suite == "all" or suite in page.suites)


def pages_table(pages: Sequence[TaskPage]) -> str:
    rows = [("task", "suites", "images", "classes", "prompts", "metric", "paper")]
    for page in pages:
        figures = [line.value for line in page.reference if (line.model, line.metric) == (PAPER_MODEL, page.metric)]
        classes = f"{page.num_classes:,}" if page.num_classes else ""
        counts = (f"{page.images:,}", classes, str(len(page.templates) or ""))
        figure = f"{figures[0]}{'' if page.comparable else ' *'}" if figures else ""
        rows.append((page.name, ", ".join(page.suites), *counts, page.metric, figure))
    return f"{plain_table(rows, (2, 3, 4))}\n\npaper: {PAPER_MODEL}, in %; * on other images than the source's"


def _page(name: str, content: dict[str, Any]) -> TaskPage:
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


def _class_names(names_field: str | list[str] | dict[str, list[int]]) -> tuple[str, ...]:
    """Return the names of a page: its own list, all of `tasks/names/LIST.txt`, or some of them by `{LIST: NUMBERS}`."""
    if isinstance(names_field, list):
        return tuple(names_field)
    if isinstance(names_field, str):
        return tuple((PAGES / "names" / f"{names_field}.txt").read_text(encoding="utf-8").splitlines())
    ((names, numbers),) = names_field.items()
    listed = _class_names(names)
    return tuple(listed[number] for number in numbers)


def read_prepared(folder: Path) -> dict[str, Any] | None:
    """Return the content of `prepared.json` in `folder`; None if it, or a file in its list, is missing or damaged."""
    try:
        content: dict[str, Any] = json.loads(read_text(folder / PREPARED))
        whole = all((folder / name).stat().st_size == file["bytes"] for name, file in content["files"].items())
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return content if whole else None


def check_prepared(folder: Path, task: str) -> None:
    if read_prepared(folder) is None:
        state = "was prepared only in part" if folder.exists() else "is missing"
        fix = f"flipscale prepare tasks {quoted(folder.parent)} --only {task}"
        raise UserError(f"the data of task {task} {state}; run `{fix}`")
