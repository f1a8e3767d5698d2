"""The results of a model's card: its table, and the Hub's `model-index`.

They come from a run's own evaluations and from the `results.jsonl` that `flipscale evaluate` keeps in a model folder.
"""

import logging
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from yaml import YAMLError

from flipscale.evaluation.kinds.kinds import KINDS
from flipscale.evaluation.reports.record import Line, read_lines, weights_digest
from flipscale.evaluation.reports.setting import data_name
from flipscale.evaluation.results import CHANGED, CHANGES, RESULTS_FILE, THIS_MODEL, Result, with_unit
from flipscale.io.atomic import write_text
from flipscale.io.text_table import escape_markdown, markdown_code

INTERVALS = """The 95 % intervals (Wilson's, for shares) take the n queries for independent draws; they say nothing of
how another training run would differ."""
NOT_EVALUATED = "Not evaluated."
_HEAD = ["| test | metric | who | value | 95 % interval | n |", "|---|---|---|---:|---:|---:|"]
_SECTION = re.compile(r"(?<=\n## Results\n\n).*?(?=\n\n## |\Z)", re.DOTALL)
_log = logging.getLogger(__name__)


def folder_lines(folder: Path) -> list[Line]:
    """Return the lines of a model folder's `results.jsonl` that are of the weights in it.

    Raises:
        ValueError: the file has lines that `flipscale evaluate` did not write.
    """
    lines = read_lines(folder / RESULTS_FILE)
    if not lines:
        return []
    weights = _folder_digest(folder)
    return [line for line in lines if line.about["weights"] == weights]


def lines_of(results: Iterable[Result]) -> list[Line]:
    """Return the results of a run's own evaluations as lines, of which nothing more is known."""
    return [Line(result, {}) for result in results]


def results_table(lines: Sequence[Line]) -> str:
    """Return the table of results as Markdown; of several for the same test, metric and model, the last counts."""
    return _table(_rows(lines)) if lines else NOT_EVALUATED


def protocols(lines: Sequence[Line]) -> str | None:
    """Return how the results were made, None where there are none."""
    kinds = dict.fromkeys(line.result.kind for line in lines)
    said = [KINDS[kind].protocol for kind in kinds if kind in KINDS]
    if any(line.result.interval_text for line in lines):
        said.append(INTERVALS)
    if any(line.result.who in CHANGES for line in lines):
        said.append(CHANGED)
    return "\n\n".join(filter(None, said)) or None


def model_index(lines: Iterable[Line]) -> list[EvalResult]:
    """Return the model's results on whole images as the Hub's `model-index` has them."""
    found = {}
    for line in lines:
        result, data = line.result, line.about.get("data") or {}
        of_whole_images = result.who == THIS_MODEL and "data" in result.made_by and not line.about.get("mask")
        if not of_whole_images or not math.isfinite(result.value):
            continue
        name = line.about.get("title") or data_name(result.made_by["data"])
        kind = KINDS.get(result.kind)
        entry = EvalResult(
            task_type=(kind and kind.hub_task) or result.kind.replace("_", "-"),
            dataset_type=data.get("repo") or data_name(result.made_by["data"]),
            dataset_name=name,
            dataset_split=data.get("split"),
            dataset_revision=data.get("revision"),
            metric_type=(kind and kind.hub_metric) or result.metric,
            metric_name=", ".join(filter(None, (result.shown, result.unit))),
            metric_value=round(result.value, 2 if result.unit == "%" else 4),
        )
        found[_entry_key(entry)] = entry
    return list(found.values())


def refresh_card(folder: Path, lines: Sequence[Line]) -> None:
    """Put results into the card of a model folder, in place of those of the same tests: into the table under
    `## Results` and the `model-index`. The rest of the card stays as it is, and so does a card that is not flipscale's.

    Raises:
        OSError: the disk is full or not writable.
    """
    path = folder / "README.md"
    if not path.is_file() or path.is_symlink():
        return
    try:
        _refresh(path, lines)
    except (ValueError, YAMLError) as error:  # not UTF-8, or a header that is none
        _log.warning("%s stays as it is: it cannot be read as a card (%s)", path, " ".join(str(error).split()))


def _refresh(path: Path, lines: Sequence[Line]) -> None:
    text = path.read_text(encoding="utf-8")
    section = _SECTION.search(text)
    if section is None or "flipscale" not in text:
        _log.info("%s is not a card that flipscale wrote and stays as it is", path)
        return
    paragraphs, rows = _split(section[0])
    texts = [part for part in paragraphs if not part.startswith("![")]
    for part in (protocols(lines) or "").split("\n\n"):
        if part and part not in texts:
            texts.insert(texts.index(INTERVALS) if INTERVALS in texts else len(texts), part)
    figures = [part for part in paragraphs if part.startswith("![")]
    parts = [_table(rows | _rows(lines)), *texts, *figures]
    text = text[: section.start()] + "\n\n".join(parts) + text[section.end() :]
    card = ModelCard(text, ignore_metadata_errors=True)
    data = card.data
    assert isinstance(data, ModelCardData)
    entries = {_entry_key(entry): entry for entry in (*(data.eval_results or ()), *model_index(lines))}
    if entries:
        data.eval_results = list(entries.values())
        data.model_name = data.model_name or _title(text) or path.parent.name
    write_text(path, str(card))


def _split(section: str) -> tuple[list[str], dict[tuple[str, ...], list[str]]]:
    """Return the paragraphs of a section without its table, and the table's rows by what they are of."""
    rows: dict[tuple[str, ...], list[str]] = {}
    paragraphs = []
    for paragraph in section.split("\n\n"):
        if not paragraph.startswith(_HEAD[0]):
            paragraphs += [paragraph] if paragraph != NOT_EVALUATED else []
            continue
        for line in paragraph.split("\n")[2:]:
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            rows[tuple(cells[:3])] = cells
    return paragraphs, rows


def _rows(lines: Iterable[Line]) -> dict[tuple[str, ...], list[str]]:
    """Return the cells of each row by its test, metric and model; of several for the same, the last. Rows of one task
    stand together."""
    by_task: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for line in lines:
        result, rows = line.result, by_task.setdefault(line.result.task, {})
        test, queries = _test(line), "" if result.n is None else f"{result.n:,}"
        test, shown, who = escape_markdown(test), escape_markdown(result.shown), escape_markdown(result.who)
        cells = [test, shown, who, escape_markdown(result.value_text), escape_markdown(result.interval_text), queries]
        rows[tuple(cells[:3])] = cells
        if result.chance is not None and result.who == THIS_MODEL:
            chance = [test, shown, "chance", escape_markdown(with_unit(result.chance, result.unit)), "", ""]
            rows[tuple(chance[:3])] = chance
    return {key: cells for rows in by_task.values() for key, cells in rows.items()}


def _table(rows: dict[tuple[str, ...], list[str]]) -> str:
    return "\n".join([*_HEAD, *(f"| {' | '.join(cells)} |" for cells in rows.values())])


def _test(line: Line) -> str:
    """What the card calls a test: the title of its page and the number of prompts, or the kind and the data; then its
    options, and what was done to images."""
    result, about = line.result, line.about
    prompts = about.get("prompts")
    test = about.get("title") or task_name(result)
    if about.get("title") and prompts:
        test += f", {prompts['number']} prompt{'s' if prompts['number'] > 1 else ''}"
    kind = KINDS.get(result.kind)
    for option, value in result.made_by.items():
        if option == "data":
            test += "" if about.get("title") else f", {markdown_code(data_name(value))}"
        elif kind and kind.hub_options is not None and option not in kind.hub_options:
            continue
        elif option in ("train", "validation"):
            test += f", {option} {markdown_code(data_name(value))}"
        else:
            test += f", {option} {_plain(value)}"
    mask = about.get("mask") or {}
    return test + "".join(f", mask {name} {value}" for name, value in mask.items())


def task_name(result: Result) -> str:
    """What the card calls a task: its kind, and its own name where that is another."""
    kind = result.kind.replace("_", "-")
    return kind if result.task == result.kind else f"{result.task} ({kind})"


def _plain(value: Any) -> str:
    return ", ".join(str(one) for one in value) if isinstance(value, list) else str(value)


def _entry_key(entry: EvalResult) -> tuple[str | None, ...]:
    return entry.task_type, entry.dataset_type, entry.dataset_name, entry.metric_type, entry.metric_name


def _title(text: str) -> str:
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1] if found else ""


def _folder_digest(folder: Path) -> str:
    """Return the digest of the weights that load from a model folder, one tensor in memory at a time."""
    files = [path for path in folder.glob("model*.safetensors") if ".bf16" not in path.name]
    where: dict[str, Path] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            where |= dict.fromkeys(file.keys(), path)

    def read(name: str) -> Any:
        with safe_open(where[name], "pt") as file:
            return file.get_tensor(name)

    return weights_digest(where, read)
