"""Cards of models: what a model is, what it learned from, what it achieves, and how to load it.

`card.md.jinja` has the text. Every number comes from the run's files; the text leaves out what they lack. The results
come from the run's own evaluations and from the `results.jsonl` that `flipscale evaluate` writes into a model folder.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import StrictUndefined, Template
from safetensors import safe_open

from flipscale.evaluation.reports.curves import Curve, read_curve
from flipscale.evaluation.reports.figures import can_draw, draw_loss, draw_result, result_figures
from flipscale.evaluation.reports.record import Line, data_name, read_lines, weights_digest
from flipscale.evaluation.results import CHANGED, CHANGES, RESULTS_FILE, THIS_MODEL, Result, with_changes, with_unit
from flipscale.evaluation.suite import KINDS
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.io.files import read_text
from flipscale.io.model_folder import local_folder
from flipscale.io.text_table import escape_markdown, markdown_code
from flipscale.training.recipe import deciding_part
from flipscale.training.run_summary import RunSummary

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
INTERVALS = """The 95 % intervals (Wilson's, for shares) treat the n queries as independent draws. They do not cover the
difference between training runs."""
NOT_EVALUATED = "Not evaluated."
_HEAD = ["| test | metric | who | value | 95 % interval | n |", "|---|---|---|---:|---:|---:|"]
_RESULTS_SECTION = re.compile(r"(?<=\n## Results\n\n).*?(?=\n\n## |\Z)", re.DOTALL)
# Class and pipeline tag, by the model's abilities.
_CLASSES = {
    "classifies": ("FlipForImageClassification", "image-classification"),
    "answers": ("FlipForQuestionAnswering", "visual-question-answering"),
    "writes": ("FlipForConditionalGeneration", "image-text-to-text"),
    "embeds": ("FlipModel", "zero-shot-image-classification"),
    "embeds and writes": ("FlipModel", "zero-shot-image-classification"),
}
_SHOWN_LABELS, _SHOWN_AUDITED = 3, 5
_log = logging.getLogger(__name__)


def write_card(folder: Path, run_dir: Path, where: str, step: int | None = None) -> None:
    """Write `README.md` and, where matplotlib is installed, `figures/` into the model folder of a run.

    Args:
        folder: exported model folder.
        run_dir: path of the run directory.
        where: name that loads the model: a Hub name, or the folder's path.
        step: number of steps of the exported checkpoint; None for the finished run.
    """
    curve, run = read_curve(run_dir, step), RunSummary(run_dir, step)
    figures = []  # caption and name of each
    if can_draw():
        (folder / "figures").mkdir(exist_ok=True)
        if len(curve.points("loss")[0]) > 1:
            draw_loss([curve], folder / "figures/loss.png")
            figures.append(("Loss of the training batches against training time", "loss"))
        for figure, result in result_figures([curve]).items():
            draw_result([curve], result, folder / f"figures/{figure}.png")
            figures.append((escape_markdown(f"{_task_name(result)}, {result.shown} against training time"), figure))
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    does = _abilities(config)
    model_class, pipeline = _CLASSES[does]
    lines = [*(Line(result, {}) for result in with_changes(curve.results)), *folder_lines(folder)]
    name = where.rsplit("/", 1)[-1] if where != str(folder) else run.run_dir.name
    hub, init_from = run.recipe.get("hub", {}), run.recipe["model"].get("init_from")
    text = Template(
        _TEMPLATE.read_text(encoding="utf-8"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).render(
        **_model_fields(config, run),
        name=escape_markdown(name),
        where=escape_string(where),
        does=does,
        model_class=model_class,
        base=f" from {markdown_code(public_name(init_from))}" if init_from else "",
        version=escape_markdown(run.environment["flipscale"]),
        results=results_table(lines),
        protocol=protocols(lines),
        figures=figures,
        training=list(_training_rows(run, curve)),
        stages=list(_stages(run.recipe["stages"])),
        recipe=_recipe_text(run.recipe),
        audit=_audit(hub.get("audit"), run.environment.get("data_samples")),
        licence=hub.get("license") and markdown_code(hub["license"]),
    )
    embeds = model_class == "FlipModel"
    entries = model_index(lines)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["flip", "clip", "flipscale", *(["sentence-transformers"] if embeds else [])],
        license=hub.get("license"),
        base_model=init_from if init_from and _is_hub_name(init_from) else None,
        model_name=name if entries else None,
        eval_results=entries or None,
    )
    write_text(folder / "README.md", f"---\n{metadata.to_yaml()}\n---\n\n{text}\n")


def _abilities(config: Mapping[str, Any]) -> str:
    """Return the key of `_CLASSES` for a model's configuration."""
    if config.get("architectures") == ["FlipForImageClassification"]:
        return "classifies"
    if config.get("answer_config") is not None:
        return "answers"
    if config.get("decoder_config") is None:
        return "embeds"
    return "writes" if config["text_config"] is None else "embeds and writes"


def _model_fields(config: Mapping[str, Any], run: RunSummary) -> dict[str, str | None]:
    text = config["text_config"] or config["decoder_config"]
    parameters, labels = run.environment.get("num_parameters"), list(config.get("id2label", {}).values())
    total, minutes = run.total_samples, run.budget_minutes
    length = f"{minutes:g} minutes of training" if total is None else f"{total // run.batch_size:,}"
    return {
        "parameters": parameters and f"{parameters / 1e6:,.1f} M",
        "image_size": str(config["vision_config"]["image_size"]),
        "patch_size": str(config["vision_config"]["patch_size"]),
        "max_tokens": str(text["max_position_embeddings"]),
        "dim": str(config["projection_dim"]),
        "num_labels": f"{len(labels):,}",
        "labels": ", ".join(map(markdown_code, labels[:_SHOWN_LABELS])),
        "unfinished_step": f"{run.step:,}" if run.step else None,
        "length": length,
    }


def _training_rows(run: RunSummary, curve: Curve) -> Iterator[tuple[str, str | None]]:
    """Yield the names and values of the table about the training; the value is None if it is unknown."""
    seconds, cost, samples = run.trained_seconds, run.cost, run.environment.get("data_samples")
    hours = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:,.1f} h"
    precision = run.environment["mixed_precision"]
    yield "training data", _data(run.recipe["data"])
    yield "pairs in it", None if samples is None else f"{samples:,}"
    yield "pairs seen", f"{curve.records[-1]['samples_seen']:,}"
    yield "time", hours
    yield "hardware", escape_markdown(", then ".join(run.hardware))
    yield "speed", f"{_rounded(curve.images_per_s)} pairs/s" if seconds else None
    yield "precision", "fp32" if precision == "no" else precision
    kwh, co2, dollars = run.energy.kwh, run.co2_kg, run.dollars
    yield "energy", None if kwh is None else f"{_rounded(kwh)} kWh, {run.energy.words}"
    if co2 is not None and cost.kwh_co2_grams is not None:
        grid = f"{_rounded(cost.kwh_co2_grams)} g a kWh and a PUE of {cost.pue:g}"
        yield "emissions", f"{_rounded(co2)} kg of CO2, at {grid}, without the making of the machines"
    if dollars is not None and cost.device_hour_dollars is not None:
        yield "cost", f"{_rounded(dollars)} dollars, at {_rounded(cost.device_hour_dollars)} an hour of a device"


def _data(data: Mapping[str, Any]) -> str | None:
    """Return the names of the training data; of a mixture, each source with its weight and columns."""
    sources = [_source_name(source) for source in data.get("sources", [])]
    return "; ".join(sources) or (markdown_code(data_name(data["shards"])) if data["shards"] else None)


def _source_name(source: Mapping[str, Any]) -> str:
    details = [] if source.get("weight") is None else [f"weight {source['weight']:g}"]
    if source.get("dataset"):
        details += [f"{name} {markdown_code(source[name])}" for name in ("config", "split") if source.get(name)]
        details.append(f"images from {markdown_code(source['image_column'])}")
        details.append(f"captions from {' and '.join(map(markdown_code, source['caption_columns']))}")
    name = markdown_code(public_name(source.get("dataset") or source.get("shards") or ""))
    return f"{name} ({', '.join(details)})" if details else name


def _stages(stages: Iterable[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Yield the cells of each stage's row."""
    for stage in stages:
        rate = "goes on" if stage.get("base_lr") is None else f"{stage['base_lr']:g}"
        pairs = f"{stage['samples']:,}" if stage.get("share") is None else f"{stage['share']:.1%} of the time"
        size = stage.get("image_size")
        name = escape_markdown(stage["name"]) + (f" ({size} x {size} pixels)" if size else "")
        yield [name, pairs, *(f"{stage.get(key, 0):.0%}" for key in ("mask_ratio", "text_mask_ratio")), rate]


def _recipe_text(recipe: dict[str, Any]) -> str:
    text = yaml.safe_dump(deciding_part(recipe, name_of=public_name), sort_keys=False).rstrip()
    return text.replace("```", "'''")  # because ``` would end the block


def escape_string(text: str) -> str:
    """Return a text escaped for a Python string between double quotes in a card."""
    return json.dumps(text, ensure_ascii=False)[1:-1].replace("```", "'''")


def public_name(place: str) -> str:
    """Return a Hub name unchanged, and the last part of a path or URL."""
    return place if _is_hub_name(place) else data_name(place)


def _is_hub_name(place: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", place)) and not Path(place).exists()


def _rounded(value: float) -> str:
    return f"{value:,.{0 if value >= 100 else 2}f}"


def check_audit(file: str | None) -> None:
    """Raise UserError unless the recipe's `hub.audit` can be read, or is not set."""
    if file:
        _read_audit(file)


def _audit(file: str | None, num_samples: int | None) -> dict[str, str] | None:
    """Return the fields of the section on the training data; None without an audit of these `num_samples` samples."""
    if not file:
        return None
    try:
        samples, fields = _read_audit(file)
    except UserError as error:
        _log.warning("the model card has no section on the training data: %s", error)
        return None
    if num_samples is not None and samples != num_samples:
        _log.warning(
            "hub.audit has %s samples and the training data %s; the model card leaves the audit out",
            f"{samples:,}",
            f"{num_samples:,}",
        )
        return None
    return fields


def _read_audit(file: str) -> tuple[int, dict[str, str]]:
    """Return the number of samples and the fields for the card from the file of `flipscale prepare audit`."""
    try:
        audit = json.loads(read_text(Path(file)))
        captions, images, gender = audit["captions"], audit["images"], audit["gender"]
        occupations = [row for row in gender["occupations"] if row["with_women"] + row["with_men"]]
        counts = {
            "samples": audit["samples"],
            "captions": captions["captions"],
            "distinct": captions["distinct"],
            "exact": images["exact_copies"],
            "near": images["near_copies"],
            "unusable": sum(fault["count"] for fault in audit["unusable"].values()),
            "letters": audit["languages"]["long_letters"],
            **{words: gender[words] for words in ("women", "men", "both")},
        }
        lists = {
            "languages": [f"{row['language']} {row['share']:.1%}" for row in audit["languages"]["long"]["languages"]],
            "occupations": [
                f"{row['occupation']} ({row['with_women']:,} of women, {row['with_men']:,} of men)"
                for row in occupations
            ],
            "countries": [f"{row['name']} ({row['captions']:,})" for row in audit["countries"]["rows"]],
        }
        tests = [f"{row['exact'] + row['near']:,} of the {row['images']:,} of {row['name']}" for row in audit["tests"]]
        texts = {name: ", ".join(items[:_SHOWN_AUDITED]) for name, items in lists.items()}
        texts["tests"] = ", ".join(tests)
        return audit["samples"], {
            **{name: f"{count:,}" for name, count in counts.items()},
            **{name: escape_markdown(text) or "none" for name, text in texts.items()},
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"hub.audit is {file!r}, which is not an audit ({error!r}); use the audit.json of flipscale prepare audit"
        ) from None


def folder_lines(folder: Path) -> list[Line]:
    """Return the lines of a model folder's `results.jsonl` that belong to its weights.

    Raises:
        UserError: the file has lines that `flipscale evaluate` did not write.
    """
    lines = read_lines(folder / RESULTS_FILE)
    if not lines:
        return []
    files: dict[str, Any] = {}  # maps each weight to its opened file, which reads one tensor at a time
    for path in folder.glob("model*.safetensors"):
        if ".bf16" not in path.name:
            file = safe_open(path, "pt")
            files |= dict.fromkeys(file.keys(), file)
    weights = weights_digest(files, lambda name: files[name].get_tensor(name))
    return [line for line in lines if line.about["weights"] == weights]


def results_table(lines: Sequence[Line]) -> str:
    """Return the table of results as Markdown; the last result of each test, metric and model counts."""
    return _table(_rows(lines)) if lines else NOT_EVALUATED


def protocols(lines: Sequence[Line]) -> str | None:
    """Return paragraphs about the methods of the evaluations, or None without results."""
    kinds = dict.fromkeys(line.result.kind for line in lines)
    paragraphs = [KINDS[kind].protocol for kind in kinds if kind in KINDS]
    if any(line.result.interval_text for line in lines):
        paragraphs.append(INTERVALS)
    if any(line.result.who in CHANGES for line in lines):
        paragraphs.append(CHANGED)
    return "\n\n".join(filter(None, paragraphs)) or None


def model_index(lines: Iterable[Line]) -> list[EvalResult]:
    """Return the model's finite results on whole images as entries of the Hub's `model-index`."""
    entries = {}
    for line in lines:
        result, data = line.result, line.about.get("data") or {}
        of_whole_images = result.who == THIS_MODEL and "data" in result.made_by and not line.about.get("mask")
        if not of_whole_images or not math.isfinite(result.value):
            continue
        kind = KINDS.get(result.kind)
        entry = EvalResult(
            task_type=(kind and kind.hub_task) or result.kind.replace("_", "-"),
            dataset_type=data.get("repo") or data_name(result.made_by["data"]),
            dataset_name=line.about.get("title") or data_name(result.made_by["data"]),
            dataset_split=data.get("split"),
            dataset_revision=data.get("revision"),
            metric_type=(kind and kind.hub_metric) or result.metric,
            metric_name=", ".join(filter(None, (result.shown, result.unit))),
            metric_value=round(result.value, 2 if result.unit == "%" else 4),
        )
        entries[_entry_key(entry)] = entry
    return list(entries.values())


def _entry_key(entry: EvalResult) -> tuple[str | None, ...]:
    return entry.task_type, entry.dataset_type, entry.dataset_name, entry.metric_type, entry.metric_name


def refresh_card(folder: Path, lines: Sequence[Line]) -> None:
    """Put results into the card of a model folder: into the table under `## Results` and the `model-index`.

    They replace earlier results of the same tests. The rest of the card stays unchanged. A card that flipscale did not
    write is left alone.
    """
    path = folder / "README.md"
    if not path.is_file() or path.is_symlink():
        return
    try:
        _refresh(path, lines)
    except (ValueError, yaml.YAMLError) as error:  # not UTF-8, or a header that is not YAML
        _log.warning("%s stays unchanged: it cannot be read as a card (%s)", path, " ".join(str(error).split()))


def _refresh(path: Path, lines: Sequence[Line]) -> None:
    text = path.read_text(encoding="utf-8")
    section = _RESULTS_SECTION.search(text)
    if section is None or "flipscale" not in text:
        _log.info("%s is not a card that flipscale wrote and stays unchanged", path)
        return
    paragraphs, rows = _split(section[0])
    figures = [part for part in paragraphs if part.startswith("![")]
    texts = [part for part in paragraphs if part not in figures]
    for part in (protocols(lines) or "").split("\n\n"):
        if part and part not in texts:
            texts.insert(texts.index(INTERVALS) if INTERVALS in texts else len(texts), part)
    parts = [_table(rows | _rows(lines)), *texts, *figures]
    text = text[: section.start()] + "\n\n".join(parts) + text[section.end() :]
    card = ModelCard(text, ignore_metadata_errors=True)
    data = card.data
    assert isinstance(data, ModelCardData)
    entries = {_entry_key(entry): entry for entry in (*(data.eval_results or ()), *model_index(lines))}
    if entries:
        title = re.search(r"^# (.+)$", text, re.MULTILINE)
        data.eval_results = list(entries.values())
        data.model_name = data.model_name or (title[1] if title else path.parent.name)
    write_text(path, str(card))


def _split(section: str) -> tuple[list[str], dict[tuple[str, ...], list[str]]]:
    """Return the paragraphs of a section without its table, and the table's rows by test, metric and model."""
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
    """Return the cells of each row by test, metric and model, task by task. The last result of each counts."""
    by_task: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for line in lines:
        result, rows = line.result, by_task.setdefault(line.result.task, {})
        test, shown, who = escape_markdown(_test(line)), escape_markdown(result.shown), escape_markdown(result.who)
        value, interval = escape_markdown(result.value_text), escape_markdown(result.interval_text)
        rows[test, shown, who] = [test, shown, who, value, interval, "" if result.n is None else f"{result.n:,}"]
        if result.chance is not None and result.who == THIS_MODEL:
            chance = escape_markdown(with_unit(result.chance, result.unit))
            rows[test, shown, "chance"] = [test, shown, "chance", chance, "", ""]
    return {key: cells for rows in by_task.values() for key, cells in rows.items()}


def _table(rows: dict[tuple[str, ...], list[str]]) -> str:
    return "\n".join([*_HEAD, *(f"| {' | '.join(cells)} |" for cells in rows.values())])


def _test(line: Line) -> str:
    """Return a test's name in the card.

    It has the title of the test's page and the number of prompts, or else the kind and the data. Options and the mask
    follow.
    """
    result, about = line.result, line.about
    prompts = about.get("prompts")
    test = about.get("title") or _task_name(result)
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
            test += f", {option} {', '.join(map(str, value)) if isinstance(value, list) else value}"
    mask = about.get("mask") or {}
    return test + "".join(f", mask {name} {value}" for name, value in mask.items())


def _task_name(result: Result) -> str:
    """Return a task's name in the card: its kind, and its own name if that differs."""
    kind = result.kind.replace("_", "-")
    return kind if result.task == result.kind else f"{result.task} ({kind})"


def derived_card(src: str, name: str, library: str, text: str) -> str:
    """Return the card of a converted model as Markdown. The licence is that of the card of `src`.

    Args:
        src: model folder or Hub name of the original.
        name: name of the converted model.
        library: library that loads the converted model.
        text: body of the card.
    """
    licence = None
    with suppress(OSError, ValueError, yaml.YAMLError):  # the card may be missing, or the Hub out of reach
        place = local_folder(src)
        licence = ModelCard.load(src if place is None else place / "README.md").data.license
    data = ModelCardData(
        library_name=library,
        license=licence,
        pipeline_tag="zero-shot-image-classification",
        tags=["flip", "clip", "flipscale"],
        base_model=None if Path(src).exists() else src,
    )
    return f"---\n{data.to_yaml()}\n---\n\n# {escape_markdown(name)}\n\n{text}"
