"""The card of a trained model: what it is, what it learned from and what it achieves.

Every number comes from the run's files. `card_templates` has all that a card can say; a paragraph or table row that
needs something which the run did not record is left out.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from flipscale.evaluation.reports.comparison import Curve, curve_of
from flipscale.evaluation.reports.figures import can_draw, draw_loss, draw_result, result_figures
from flipscale.evaluation.reports.setting import data_name
from flipscale.evaluation.results import with_changes
from flipscale.hub.card_audit import audit_section
from flipscale.hub.card_results import folder_lines, lines_of, model_index, protocols, results_table, task_name
from flipscale.hub.card_templates import TEMPLATES
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.io.text_table import escape_markdown, markdown_code
from flipscale.training.recipe import deciding_part
from flipscale.training.run_summary import RunSummary

NO_LICENCE = "None was stated for these weights by those who trained them."
_MOST_NAMED = 3  # classes
# Of models that do not embed texts.
_PIPELINES = {
    "classifies": "image-classification",
    "writes": "image-text-to-text",
    "answers": "visual-question-answering",
}
_LOSS_FIGURE = "Loss of the training batches against training time"


def write_card(folder: Path, run_dir: Path, where: str, step: int | None = None) -> None:
    """Write `README.md` and, where matplotlib is installed, `figures/` into the model folder of a run.

    Args:
        folder: what `export_model` wrote.
        where: the name that users load it by: a Hub name, or the folder's own.
        step: of the checkpoint that was exported; None for the finished run.

    Raises:
        ValueError: a file of the run is damaged.
    """
    try:
        figures = _draw(curve_of(run_dir, step), folder / "figures") if can_draw() else {}
        text = model_card(folder, run_dir, where, step, figures)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, yaml.YAMLError) as error:
        raise UserError(
            "the model card cannot be written: recipe.yaml, environment.json, starts.jsonl or metrics.jsonl of "
            f"{run_dir} is damaged ({error!r})"
        ) from error
    write_text(folder / "README.md", text)


def _draw(curve: Curve, folder: Path) -> dict[str, str]:
    """Draw a run's figures and return their captions by their names."""
    folder.mkdir(exist_ok=True)
    captions = {}
    if len(curve.points("loss")[0]) > 1:
        draw_loss([curve], folder / "loss.png")
        captions["loss"] = _LOSS_FIGURE
    for name, result in result_figures([curve]).items():
        draw_result([curve], result, folder / f"{name}.png")
        captions[name] = f"{task_name(result)}, {result.shown} against training time"
    return captions


def model_card(folder: Path, run_dir: Path, where: str, step: int | None, drawn: dict[str, str]) -> str:
    """Return the card as Markdown with its metadata; `drawn` are the captions of the figures in the folder."""
    run = _Run(folder, run_dir, step)
    name = where.rsplit("/", 1)[-1] if where != str(folder) else run_dir.name
    figures = "\n\n".join(f"![{escape_markdown(caption)}](figures/{file}.png)" for file, caption in drawn.items())
    known = {"name": escape_markdown(name), "where": as_string(where), "figures": figures or None}
    text = filled(TEMPLATES[run.does], {**run.values(), **known})
    return f"---\n{run.metadata(name).to_yaml()}\n---\n\n{text}"


def filled(template: str, values: dict[str, str | None]) -> str:
    """Return the template with its fields filled in, less the paragraphs and table rows that have a field of None."""

    def known(text: str) -> bool:
        return all(field is None or values[field] is not None for _, field, _, _ in Formatter().parse(text))

    blocks = []
    for block in template.split("\n\n"):
        lines = [line for line in block.split("\n") if not line.startswith("|") or known(line)]
        if known("\n".join(lines)):
            blocks.append("\n".join(lines).format(**values))
    return "\n\n".join(blocks)


class _Run:
    """What a run's files say, up to a step."""

    def __init__(self, folder: Path, run_dir: Path, step: int | None):
        self.step = step
        self.summary = RunSummary(run_dir, step)
        self.recipe, self.environment = self.summary.recipe, self.summary.environment
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.does = _what_it_does(self.config)
        self.curve: Curve = curve_of(run_dir, step)
        self.lines = [*lines_of(with_changes(self.curve.results)), *folder_lines(folder)]
        self.hub: dict[str, Any] = self.recipe.get("hub", {})

    def values(self) -> dict[str, str | None]:
        """Return every field of the template, None where it is unknown."""
        vision, last = self.config["vision_config"], self.curve.records[-1]
        text = self.config["text_config"] or self.config["decoder_config"]
        batch, parameters = self.recipe["data"]["global_batch_size"], self.environment.get("num_parameters")
        minutes = self.recipe.get("budget_minutes")
        total_steps = sum((stage["samples"] or 0) // batch for stage in self.recipe["stages"])
        seconds, run = last["trained_seconds"], self.summary
        return {
            "version": escape_markdown(self.environment["flipscale"]),
            "parameters": parameters and f"{parameters / 1e6:,.1f} M",
            "image_size": str(vision["image_size"]),
            "patch_size": str(vision["patch_size"]),
            "max_tokens": str(text["max_position_embeddings"]),
            "dim": str(self.config["projection_dim"]),
            **self._classes(),
            "unfinished_step": self.step and f"{self.step:,}",
            "length": f"{minutes:g} minutes of training" if minutes else f"{total_steps:,}",
            "results": results_table(self.lines),
            "protocol": protocols(self.lines),
            "data": self._data(),
            "data_samples": _number(self.environment.get("data_samples")),
            "samples_seen": _number(last["samples_seen"]),
            "time": _duration(seconds),
            "hardware": self._hardware(),
            "pairs_per_s": _rounded(self.curve.images_per_s) if seconds else None,
            "precision": {"no": "fp32"}.get(*[self.environment["mixed_precision"]] * 2),
            "energy": _rounded(run.energy.kwh),
            "measured": run.energy.words,
            "emissions": _rounded(run.co2_kg),
            "grid": _rounded(run.cost.kwh_co2_grams),
            "pue": f"{run.cost.pue:g}",
            "cost": _rounded(run.dollars),
            "price": _rounded(run.cost.device_hour_dollars),
            "stages": "\n".join(self._stages()),
            "audit": audit_section(self.hub.get("audit"), self.environment.get("data_samples")),
            "recipe": self._recipe(),
            "licence": self.hub.get("license") and markdown_code(self.hub["license"]),
            "no_licence": None if self.hub.get("license") else NO_LICENCE,
        }

    def metadata(self, name: str) -> ModelCardData:
        """Return the card's header, with the results as the Hub's `model-index`."""
        results = model_index(self.lines)
        init_from = self.recipe["model"].get("init_from")
        return ModelCardData(
            library_name="transformers",
            pipeline_tag=_PIPELINES.get(self.does, "zero-shot-image-classification"),
            tags=["flip", "clip", "flipscale", *([] if self.does in _PIPELINES else ["sentence-transformers"])],
            license=self.hub.get("license"),
            base_model=init_from if init_from and _is_hub_name(init_from) else None,
            model_name=name if results else None,
            eval_results=results or None,
        )

    def _classes(self) -> dict[str, str | None]:
        """Return what the card says of the classes or the answers, and of the model that it started from."""
        names, init_from = list(self.config.get("id2label", {}).values()), self.recipe["model"].get("init_from")
        return {
            "num_labels": f"{len(names):,}",
            "labels": ", ".join(map(markdown_code, names[:_MOST_NAMED])),
            "base": f" from {markdown_code(public_name(init_from))}" if init_from else "",
        }

    def _data(self) -> str | None:
        """Return the names of the training data; of a mixture, each source with its weight and columns."""
        data = self.recipe["data"]
        sources = [_source_name(source) for source in data.get("sources", [])]
        return "; ".join(sources) or (markdown_code(data_name(data["shards"])) if data["shards"] else None)

    def _hardware(self) -> str | None:
        return escape_markdown(", then ".join(self.summary.hardware)) or None

    def _stages(self) -> Iterator[str]:
        for stage in self.recipe["stages"]:
            rate = "goes on" if stage.get("base_lr") is None else f"{stage['base_lr']:g}"
            seen = f"{stage['samples']:,}" if stage.get("share") is None else f"{stage['share']:.1%} of the time"
            removed = (f"{stage.get(name, 0):.0%}" for name in ("mask_ratio", "text_mask_ratio"))
            size = stage.get("image_size")
            name = escape_markdown(stage["name"]) + (f" ({size} x {size} pixels)" if size else "")
            yield f"| {name} | {seen} | {' | '.join(removed)} | {rate} |"

    def _recipe(self) -> str:
        text = yaml.safe_dump(deciding_part(self.recipe, name_of=public_name), sort_keys=False).rstrip()
        return text.replace("```", "'''")  # which would end the block


def _what_it_does(config: dict[str, Any]) -> str:
    """Return which of `TEMPLATES` a model's configuration asks for."""
    if config.get("architectures") == ["FlipForImageClassification"]:
        return "classifies"
    if config.get("answer_config") is not None:
        return "answers"
    if config.get("decoder_config") is None:
        return "embeds"
    return "writes" if config["text_config"] is None else "embeds and writes"


def as_string(text: str) -> str:
    """Return what stands between the quotes of a Python string of `text`."""
    return json.dumps(text, ensure_ascii=False)[1:-1].replace("```", "'''")


def public_name(place: str) -> str:
    """Return a Hub name as it is, and of a path or URL the last part."""
    return place if _is_hub_name(place) else data_name(place)


def _is_hub_name(place: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", place)) and not Path(place).exists()


def _source_name(source: dict[str, Any]) -> str:
    """Return a source of a mixture as the card names it."""
    about = [] if source.get("weight") is None else [f"weight {source['weight']:g}"]
    if source.get("dataset"):
        about += [f"{name} {markdown_code(source[name])}" for name in ("config", "split") if source.get(name)]
        about.append(f"images from {markdown_code(source['image_column'])}")
        about.append(f"captions from {' and '.join(map(markdown_code, source['caption_columns']))}")
    name = markdown_code(public_name(source.get("dataset") or source.get("shards") or ""))
    return f"{name} ({', '.join(about)})" if about else name


def _number(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:,.{0 if value >= 100 else 2}f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:,.1f} h"
