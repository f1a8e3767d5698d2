"""Cards of models: what a model is, what it learned from, what it achieves, and how to load it.

`card.md.jinja` has the text. Every number comes from the run's files; the text leaves out what they lack. The results
come from the run's own evaluations and from the `results.jsonl` that `flipscale evaluate` writes into a model folder.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import UndefinedError

from flipscale.evaluation.model_results import Line, data_name, folder_digest, read_result_lines
from flipscale.evaluation.presentation.curves import read_curve
from flipscale.evaluation.presentation.figures import can_draw, draw_curves
from flipscale.evaluation.presentation.results_page import INTERVALS, protocols
from flipscale.evaluation.results import RESULTS_FILE, THIS_MODEL, Result, with_changes, with_unit
from flipscale.evaluation.suite import KINDS
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError, first_line
from flipscale.io.model_folder import local_folder, read_object
from flipscale.io.paths import quoted, read_text
from flipscale.io.templates import render
from flipscale.io.text_table import escape_markdown, markdown_code
from flipscale.process.console import only_describes
from flipscale.recipe.recipe import deciding_part
from flipscale.records.run_summary import RunSummary

NOT_EVALUATED = "Not evaluated."
_HEAD = ["| test | metric | who | value | 95 % interval | n |", "|---|---|---|---:|---:|---:|"]
_RESULTS_SECTION = re.compile(r"(?<=\n## Results\n\n).*?(?=\n\n## |\Z)", re.DOTALL)
# Class and pipeline tag, by the model's abilities.
_CLASSES = {
    "classifies": ("FlipForImageClassification", "image-classification"),
    "answers": ("FlipForQuestionAnswering", "visual-question-answering"),
    "writes": ("FlipForConditionalGeneration", "image-text-to-text"),
    "aligns": ("FlipModel", "zero-shot-image-classification"),
    "embeds": ("FlipModel", "zero-shot-image-classification"),
    "embeds and writes": ("FlipModel", "zero-shot-image-classification"),
}
_log = logging.getLogger(__name__)


def write_card(folder: Path, run_dir: Path, where: str, step: int | None = None) -> None:
    """Write `README.md` and, where matplotlib is installed, `figures/` into the model folder of a run.

    Args:
        where: name that loads the model: a Hub name, or the folder's path.
        step: number of steps of the exported checkpoint; None for the finished run.
    """
    curve, run = read_curve(run_dir, step), RunSummary(run_dir, step)
    figures: list[tuple[str, str]] = []  # caption and name of each
    with only_describes(folder / "figures", run_dir):
        for figure, result in draw_curves([curve], folder / "figures") if can_draw() else ():
            shown = f"{_task_name(result)}, {result.shown}" if result else "Loss of the training batches"
            figures.append((escape_markdown(f"{shown} against training time"), figure))
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    does = _abilities(config)
    model_class, pipeline = _CLASSES[does]
    is_ours = config["model_type"] == "flip"
    if not is_ours:
        (model_class,) = config["architectures"]
    lines = [*(Line(result, {}) for result in with_changes(curve.results)), *folder_lines(folder)]
    name = where.rsplit("/", 1)[-1] if where != str(folder) else run.run_dir.resolve().name
    hub, data, model = run.recipe.get("hub", {}), run.recipe["data"], run.recipe["model"]
    starts = [model[field].removeprefix("hf:") for field in ("init_from", "vision", "text") if model.get(field)]
    bases = [start for start in starts if _is_hub_name(start)]
    sources = data.get("sources") or ([{"shards": data_name(data["shards"])}] if data["shards"] else [])
    deciding = deciding_part(run.recipe, name_of=public_name)
    for tower in (deciding["model"].get("vision_config"), deciding["model"].get("text_config")):
        if tower and tower.get("embedded_by"):
            tower["embedded_by"] = {**tower["embedded_by"], "model": public_name(tower["embedded_by"]["model"])}
    recipe = yaml.safe_dump(deciding, sort_keys=False).rstrip()
    text = card_text(
        "card",
        run=run,
        config={"projection_dim": None, **config},
        labels=list(config.get("id2label", {}).values()),
        name=name,
        where=escape_string(where),
        does=does,
        model_class=model_class,
        is_ours=is_ours,
        remote=", trust_remote_code=True" if is_ours or "auto_map" in config else "",
        starts=[public_name(start) for start in starts],
        # A text encoder may have more positions than captions have tokens.
        max_tokens=None if is_ours else read_object(folder / "tokenizer_config.json").get("model_max_length"),
        results=_table(_rows(lines)) if lines else NOT_EVALUATED,
        protocol=protocols(lines),
        figures=figures,
        sources=[_source_name(source) for source in sources],
        speed=curve.images_per_s if run.trained_seconds else None,
        recipe=recipe.replace("```", "'''"),  # because ``` would end the block
        audit=_audit(hub.get("audit"), run.environment.get("data_samples")),
        licence=hub.get("license"),
    )
    entries = model_index(lines)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["flip", "clip", "flipscale", *(["sentence-transformers"] if does.startswith("embeds") else [])],
        license=hub.get("license"),
        base_model=bases[0] if len(bases) == 1 else bases or None,
        model_name=name if entries else None,
        eval_results=entries or None,
    )
    write_text(folder / "README.md", f"---\n{metadata.to_yaml()}\n---\n\n{text}")


def card_text(template: str, **values: object) -> str:
    """Return the text that a template of this folder makes of `values`, with an end of line."""
    filters: dict[str, Any] = {"code": markdown_code, "plain": escape_markdown, "number": "{:,}".format}
    filters |= {"quoted": quoted, "escaped": escape_string}
    filters["rounded"] = lambda value: f"{value:,.{0 if value >= 100 else 2}f}"
    return render(Path(__file__).with_name(f"{template}.md.jinja"), filters, **values) + "\n"


def _abilities(config: Mapping[str, Any]) -> str:
    """Return the key of `_CLASSES` for a model's configuration."""
    if config.get("architectures") == ["FlipForImageClassification"]:
        return "classifies"
    if config.get("answer_config") is not None:
        return "answers"
    if any((config.get(part) or {}).get("embedded_by") for part in ("vision_config", "text_config")):
        return "aligns"
    if config.get("decoder_config") is None:
        return "embeds"
    return "writes" if config["text_config"] is None else "embeds and writes"


def _source_name(source: Mapping[str, Any]) -> str:
    """Return the name of a source of training data with its weight and columns."""
    details = [] if source.get("weight") is None else [f"weight {source['weight']:g}"]
    if source.get("dataset"):
        details += [f"{name} {markdown_code(source[name])}" for name in ("config", "split") if source.get(name)]
        details.append(f"images from {markdown_code(source['image_column'])}")
        details.append(f"captions from {' and '.join(map(markdown_code, source['caption_columns']))}")
    name = markdown_code(public_name(source.get("dataset") or source.get("shards") or ""))
    return f"{name} ({', '.join(details)})" if details else name


def escape_string(text: object) -> str:
    """Return a text or a path escaped for a Python string between double quotes in a card."""
    return json.dumps(str(text), ensure_ascii=False)[1:-1].replace("```", r"\x60" * 3)  # ``` would end the block


def public_name(place: str) -> str:
    """Return a Hub name unchanged, and the last part of a path or URL; both also behind `hf:`."""
    if place.startswith("hf:"):
        return f"hf:{public_name(place.removeprefix('hf:'))}"
    return place if _is_hub_name(place) else data_name(place)


def _is_hub_name(place: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", place)) and not Path(place).exists()


def _audit(file: str | None, num_samples: int | None) -> str | None:
    """Return the section on the training data; None without an audit of these `num_samples` samples."""
    if not file:
        return None
    try:
        samples, text = read_audit(file)
    except UserError as error:
        _log.warning("the model card has no section on the training data: %s", error)
        return None
    if num_samples is not None and samples != num_samples:
        message = "hub.audit has %s samples and the training data %s; the model card leaves the audit out"
        _log.warning(message, f"{samples:,}", f"{num_samples:,}")
        return None
    return text


def read_audit(file: str) -> tuple[int, str]:
    """Return the number of samples and the card's section from the file of `flipscale prepare audit`. Raise UserError
    if the file cannot be read."""
    try:
        audit = json.loads(read_text(Path(file)))
        return audit["samples"], card_text("audit", **audit).rstrip("\n")
    except (OSError, ValueError, KeyError, TypeError, UndefinedError) as error:
        raise UserError(f"hub.audit is {file!r}, no audit ({error!r}); use that of flipscale prepare audit") from None


def folder_lines(folder: Path) -> list[Line]:
    """Return the lines of a model folder's `results.jsonl` that belong to its weights. Raise UserError if the file has
    lines that `flipscale evaluate` did not write."""
    lines = read_result_lines(folder / RESULTS_FILE)
    if not lines:
        return []
    weights = folder_digest(folder)
    return [line for line in lines if line.about["weights"] == weights]


def model_index(lines: Iterable[Line]) -> list[EvalResult]:
    """Return the model's finite results on whole images as entries of the Hub's `model-index`."""
    entries = {}
    for line in lines:
        result, data, kind = line.result, line.about.get("data") or {}, KINDS.get(line.result.kind)
        is_cut = line.about.get("mask") or line.about.get("dims")
        of_whole_images = result.who == THIS_MODEL and "data" in result.made_by and not is_cut
        if not of_whole_images or not math.isfinite(result.value) or not _is_on_card(result):
            continue
        name = data_name(result.made_by["data"])
        method = result.kind.replace("_", "-")
        task_type = (kind and kind.hub_task) or method
        # Several kinds may answer one of the Hub's tasks.
        how = [*([] if method in task_type else [f"by {method}"]), *_options(result)]
        entry = EvalResult(
            task_type=task_type,
            dataset_type=data.get("repo") or name,
            dataset_name=line.about.get("title") or name,
            dataset_split=data.get("split"),
            dataset_revision=data.get("revision"),
            metric_type=(kind and kind.hub_metric) or result.metric,
            metric_name=", ".join([result.shown_with_unit, *how]),
            metric_value=round(result.value, 2 if result.unit == "%" else 4),
        )
        entries[_entry_key(entry)] = entry
    return list(entries.values())


def _is_on_card(result: Result) -> bool:
    """Return whether a card lists a result. Of many languages, it has the mean and its spread only."""
    return not result.is_certain and (result.headline or not result.kind.startswith("multilingual"))


def _entry_key(entry: EvalResult) -> tuple[str | None, ...]:
    return entry.task_type, entry.dataset_type, entry.dataset_name, entry.metric_type, entry.metric_name


def refresh_card(folder: Path, lines: Sequence[Line]) -> None:
    """Put results into the card of a model folder: into the table under `## Results` and the `model-index`.

    They replace earlier results of the same tests, and nothing else. A card that flipscale did not write is left alone.
    """
    path = folder / "README.md"
    if not path.is_file() or path.is_symlink():
        return
    try:
        text = path.read_text(encoding="utf-8")
        section = _RESULTS_SECTION.search(text)
        if section is None or "flipscale" not in text:
            _log.info("%s is not a card that flipscale wrote and stays unchanged", path)
            return
        text = text[: section.start()] + _merged(section[0], lines) + text[section.end() :]
        card = ModelCard(text, ignore_metadata_errors=True)
        data = card.data
        assert isinstance(data, ModelCardData)
        entries = {_entry_key(entry): entry for entry in (*(data.eval_results or ()), *model_index(lines))}
        if entries:
            title = re.search(r"^# (.+)$", text, re.MULTILINE)
            data.eval_results = list(entries.values())
            data.model_name = data.model_name or (title[1] if title else folder.name)
        write_text(path, str(card))
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # not UTF-8, or a header that is not YAML
        _log.warning("%s stays unchanged: it cannot be read as a card (%s)", path, " ".join(str(error).split()))


def _merged(section: str, lines: Sequence[Line]) -> str:
    """Return the section of results with other lines: the table, then texts, then figures."""
    paragraphs = [paragraph for paragraph in section.split("\n\n") if paragraph != NOT_EVALUATED]
    rows: dict[tuple[str, ...], list[str]] = {}  # by test, metric and model
    for table in [paragraph for paragraph in paragraphs if paragraph.startswith(_HEAD[0])]:
        paragraphs.remove(table)
        for row in table.split("\n")[2:]:
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
            rows[tuple(cells[:3])] = cells
    for part in (protocols(lines) or "").split("\n\n"):
        if part and part not in paragraphs:
            places = [at for at, text in enumerate(paragraphs) if text == INTERVALS or text.startswith("![")]
            paragraphs.insert(places[0] if places else len(paragraphs), part)
    return "\n\n".join([_table(rows | _rows(lines)), *paragraphs])


def _rows(lines: Iterable[Line]) -> dict[tuple[str, ...], list[str]]:
    """Return the cells of each row by test, metric and model, task by task. The last result of each counts."""
    by_task: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for line in (line for line in lines if _is_on_card(line.result)):
        result, rows = line.result, by_task.setdefault(line.result.task, {})
        cells = [_test(line), result.shown, result.who, result.value_text, result.interval_text]
        test, shown, who, *numbers = map(escape_markdown, cells)
        rows[test, shown, who] = [test, shown, who, *numbers, "" if result.n is None else f"{result.n:,}"]
        if result.chance is not None and result.who == THIS_MODEL:
            chance = escape_markdown(with_unit(result.chance, result.unit))
            rows[test, shown, "chance"] = [test, shown, "chance", chance, "", ""]
    return {key: cells for rows in by_task.values() for key, cells in rows.items()}


def _table(rows: dict[tuple[str, ...], list[str]]) -> str:
    return "\n".join([*_HEAD, *(f"| {' | '.join(cells)} |" for cells in rows.values())])


def _test(line: Line) -> str:
    """Return a test's name in the card.

    It has the title of the test's page and the number of prompts, or the kind and the data, then options and the mask.
    """
    result, about = line.result, line.about
    parts = [about.get("title") or _task_name(result)]
    if about.get("title") and (prompts := about.get("prompts")):
        parts.append(f"{prompts['number']} prompt{'s' if prompts['number'] > 1 else ''}")
    if not about.get("title") and "data" in result.made_by:
        parts.append(markdown_code(data_name(result.made_by["data"])))
    parts += _options(result)
    parts += [f"{about['dims']} numbers"] if about.get("dims") else []
    return ", ".join([*parts, *(f"mask {name} {value}" for name, value in (about.get("mask") or {}).items())])


def _options(result: Result) -> list[str]:
    """Return the options of a result's task that belong to the test's name."""
    parts, kind = [], KINDS.get(result.kind)
    for option, value in result.made_by.items():
        if option in ("train", "validation"):
            parts.append(f"{option} {markdown_code(data_name(value))}")
        elif option == "image_size" or (
            option != "data" and (kind is None or kind.hub_options is None or option in kind.hub_options)
        ):
            parts.append(f"{option} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return parts


def _task_name(result: Result) -> str:
    """Return a task's name in the card: its kind, and its own name if that differs."""
    kind = result.kind.replace("_", "-")
    return kind if result.task == result.kind else f"{result.task} ({kind})"


def write_derived_card(folder: Path, src: str, name: str, library: str, **facts: object) -> None:
    """Write the card of a converted model that `library` loads into a folder, by its template and `facts`.

    The licence is that of the original's card, in the model folder or the Hub's repository `src`.
    """
    licence = place = None
    try:
        place = local_folder(src)
        licence = ModelCard.load(src if place is None else place / "README.md").data.license
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:  # no card, a bad one, or no Hub
        if place is not None and (place / "README.md").exists():
            _log.warning("%s/README.md is not a card (%s): its licence is left out", place, first_line(error))
    data = ModelCardData(
        library_name=library,
        license=licence,
        pipeline_tag="zero-shot-image-classification",
        tags=["flip", "clip", "flipscale"],
        base_model=None if Path(src).exists() else src,
    )
    card = f"---\n{data.to_yaml()}\n---\n\n# {escape_markdown(name)}\n\n{card_text(library, **facts)}"
    (folder / "README.md").write_text(card, encoding="utf-8")
