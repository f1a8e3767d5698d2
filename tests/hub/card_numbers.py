"""Sources of the numbers in a model card."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from flipscale.evaluation.suite import KINDS
from flipscale.hub import card as cards
from flipscale.io import json_lines
from flipscale.training.recipe import ModelRecipe
from flipscale.training.run_summary import read_starts

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")


def untraced_numbers(card: str, run_dir: Path) -> list[str]:
    """Return the numbers of a card that come neither from its template nor from the run's files and audit."""
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    environment = json.loads((run_dir / "environment.json").read_text())
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    places = (run_dir / "results.jsonl", run_dir / "model" / "results.jsonl")
    starts, results = read_starts(run_dir), [line for place in places for line in json_lines.read(place)]
    config = ModelRecipe(**recipe["model"]).config().to_dict()
    values = set(_numbers([recipe, environment, records, results, starts, config]))
    if recipe["hub"].get("audit"):
        audit = json.loads(Path(recipe["hub"]["audit"]).read_text())
        values |= set(_numbers(audit)) | _of_the_audit(audit)
    energy = json_lines.read(run_dir / "energy.jsonl")
    values |= _derived(recipe, environment, records, starts) | _of_the_energy(recipe, energy)
    texts = _texts([recipe, environment, records, results, starts, str(run_dir)])
    words = {token for text in texts for token in NUMBER.findall(text)}
    protocols = [kind.protocol for kind in KINDS.values()]
    template = re.sub(r"{[{%].*?[%}]}", "", cards._TEMPLATE.read_text())
    of_the_template = [token for text in (template, *protocols, cards.INTERVALS) for token in NUMBER.findall(text)]
    # The head of the table of results.
    of_the_template += ["95"]
    untraced = []
    for token in NUMBER.findall(card):
        if token in of_the_template:
            of_the_template.remove(token)
        elif token not in words and not any(_is_rounded(token, value) for value in values):
            untraced.append(token)
    return untraced


def _derived(
    recipe: dict[str, Any], environment: dict[str, Any], records: list[dict[str, Any]], starts: list[dict[str, Any]]
) -> set[float]:
    last, cost = records[-1], recipe["cost"]
    seconds, batch = last["trained_seconds"], recipe["data"]["global_batch_size"]
    begins = [start["trained_seconds"] for start in starts] + [seconds]
    device_seconds = sum((begins[i + 1] - begins[i]) * start["num_processes"] for i, start in enumerate(starts))
    found = {seconds / 3600, last["samples_seen"] / seconds, environment["num_parameters"] / 1e6}
    found.add(sum((stage["samples"] or 0) // batch for stage in recipe["stages"]))
    found |= {100 * stage["share"] for stage in recipe["stages"] if stage.get("share")}
    found |= {100 * stage[name] for stage in recipe["stages"] for name in ("mask_ratio", "text_mask_ratio")}
    if cost["device_hour_dollars"] is not None:
        found.add(device_seconds / 3600 * cost["device_hour_dollars"])
    return found


def _of_the_energy(recipe: dict[str, Any], lines: list[dict[str, Any]]) -> set[float]:
    """The sum of the last line of each start, and its emissions."""
    cost, kwh = recipe["cost"], sum({line["start"]: line["energy_kwh"] for line in lines}.values())
    return {kwh, kwh * cost["pue"] * (cost["kwh_co2_grams"] or 0) / 1000} if lines else set()


def _of_the_audit(audit: dict[str, Any]) -> set[float]:
    """Percentages and sums of an audit."""
    found = {100 * row["share"] for row in audit["languages"]["long"]["languages"]}
    found |= {one["exact"] + one["near"] for one in audit["tests"]}
    return found | {sum(one["count"] for one in audit["unusable"].values())}


def _is_rounded(token: str, value: float) -> bool:
    number = float(token.replace(",", ""))
    if "e" in token:
        return number == value
    decimals = len(token.partition(".")[2])
    return abs(number - value) <= 0.5 * 10**-decimals * (1 + 1e-9)


def _leaves(content: Any) -> Iterator[Any]:
    if isinstance(content, dict):
        yield from content.keys()
        for value in content.values():
            yield from _leaves(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _leaves(value)
    else:
        yield content


def _numbers(content: Any) -> Iterator[float]:
    return (float(leaf) for leaf in _leaves(content) if isinstance(leaf, int | float) and not isinstance(leaf, bool))


def _texts(content: Any) -> Iterator[str]:
    return (leaf for leaf in _leaves(content) if isinstance(leaf, str))
