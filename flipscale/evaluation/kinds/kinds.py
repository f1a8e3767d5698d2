"""The kinds of evaluation, and one evaluation made from what a recipe says of it."""

import re
from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from flipscale.evaluation.kinds.answers.captioning import Captioning
from flipscale.evaluation.kinds.answers.likelihood import Likelihood
from flipscale.evaluation.kinds.answers.vqa import Vqa
from flipscale.evaluation.kinds.association import Association
from flipscale.evaluation.kinds.classification import Classification
from flipscale.evaluation.kinds.few_shot import FewShot
from flipscale.evaluation.kinds.probe import Probe
from flipscale.evaluation.kinds.retrieval import Retrieval
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.kinds.worst_group import WorstGroup
from flipscale.evaluation.kinds.zero_shot import ZeroShot
from flipscale.evaluation.kinds.zero_shot_multilabel import ZeroShotMultilabel
from flipscale.io.errors import UserError
from flipscale.io.options import check_ranges, parser_message

KINDS: dict[str, type[Task]] = {
    "zero_shot": ZeroShot,
    "zero_shot_multilabel": ZeroShotMultilabel,
    "retrieval": Retrieval,
    "worst_group": WorstGroup,
    "association": Association,
    "few_shot": FewShot,
    "probe": Probe,
    "captioning": Captioning,
    "likelihood": Likelihood,
    "vqa": Vqa,
    "classification": Classification,
}


def build_task(content: dict[str, Any], where: str) -> Task:
    """Return the task that `{kind: ..., data: ..., ...}` describes; `where` begins the messages.

    Raises:
        ValueError: an unknown kind, or a field that its kind does not take.
    """
    for name in ("kind", "data", "name"):
        if not isinstance(content.get(name, ""), str):
            raise UserError(f"{where}: {name} is {content[name]!r:.60}; it must be a text")
    if content.get("kind") not in KINDS:
        raise UserError(f"{where}: kind is {content.get('kind')!r}; use one of {', '.join(KINDS)}")
    kind = KINDS[content["kind"]]
    known = [field.name for field in fields(kind)]
    for name in content:
        if name not in known:
            raise UserError(f"{where}: {content['kind']} has no field {name!r}; it has {', '.join(known)}")
    content = {**content, "name": content.get("name") or content["kind"]}
    if not content.get("data"):
        raise UserError(f"{where}: data is missing; name the folder of the test set")
    if not re.fullmatch(r"[\w.-]+", content["name"]):
        raise UserError(f"{where}: name is {content['name']!r}; use letters, digits, '.', '_' and '-'")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "task")
    try:
        task: Task = parser.instantiate(parser.parse_object({"task": content})).task
    except (ArgumentError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: {parser_message(error).removeprefix('task.')}") from None
    check_ranges(task, where)
    return task
