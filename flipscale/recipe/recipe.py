"""The recipe: every setting of a run, read from YAML and `--section.field` flags."""

import dataclasses
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from flipscale.io.errors import UserError
from flipscale.io.options import MinutesAboveZero, Seed, changed_fields, check_ranges, parser_message
from flipscale.io.urls import without_secrets
from flipscale.io.yaml_text import check_yaml
from flipscale.recipe.data import PRECOMPUTED_TOWERS, DataRecipe, MaskRecipe
from flipscale.recipe.files import read_recipes, recipe_names
from flipscale.recipe.flags import unknown_flag, with_stages
from flipscale.recipe.loss import LossRecipe
from flipscale.recipe.model import ModelRecipe
from flipscale.recipe.optim import OptimRecipe, StageRecipe
from flipscale.recipe.outputs import CostRecipe, EvalRecipe, HubRecipe, LogRecipe, SaveRecipe

# {"learned": False} marks a field that does not change what is learned: it may differ at a resume, and the model card
# leaves it out. {"place": True} marks a path or a name, which the card shortens. {"before": value} gives the value of a
# saved recipe without the field.


@dataclass(frozen=True)
class Recipe:
    """The run.

    `model`, `data`, `mask`, `loss`, `optim`, `stages`, `budget_minutes` and `seed` decide what is learned.

    Args:
        model: The model.
        data: The training data, its order and its batches.
        mask: The choice of removed patches and words. The stages decide how many.
        loss: The loss.
        optim: The optimiser.
        seed: The seed of the first weights, the order, the crops and the masks.
        log: The log.
        save: The times of checkpoints.
        eval: The evaluations and their times.
        hub: Pushes to the Hub, and facts for the model card.
        cost: The price of a device's hour, and the emissions of a kWh.
        stages: The stages of the run in their order. An example is '[{name: masked, samples: 1000000, mask_ratio: 0.5,
            base_lr: 4e-6}]'. The usual stages are masked pre-training, then unmasked tuning. A flag such as
            `--stages.masked.base_lr 1e-5` changes one field of a stage, which has its name or its number from 0.
        budget_minutes: Training time in minutes, without evaluations and saves. Each stage has a `share` of it; if all
            stages have `samples`, they get shares by their operations. Without a budget, the run ends after the
            samples of its stages.
        output_dir: The run directory, which gets all files of the run.
        resume_from_checkpoint: `auto` resumes from the newest checkpoint of `output_dir`. `never` stops with an error
            if `output_dir` has a checkpoint.
    """

    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    mask: MaskRecipe = field(default_factory=MaskRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    stages: list[StageRecipe] = field(default_factory=list)
    budget_minutes: MinutesAboveZero | None = None
    seed: Seed = 0
    log: LogRecipe = field(default_factory=LogRecipe, metadata={"learned": False})
    save: SaveRecipe = field(default_factory=SaveRecipe, metadata={"learned": False})
    eval: EvalRecipe = field(default_factory=EvalRecipe, metadata={"learned": False})
    hub: HubRecipe = field(default_factory=HubRecipe, metadata={"learned": False})
    cost: CostRecipe = field(default_factory=CostRecipe, metadata={"learned": False})
    output_dir: str = field(default="runs/flip", metadata={"learned": False})
    resume_from_checkpoint: str = field(default="auto", metadata={"learned": False})

    def recomputes(self, stage: StageRecipe) -> bool:
        own = stage.gradient_checkpointing
        return self.model.gradient_checkpointing if own is None else own

    @property
    def counts_samples(self) -> bool:
        """Whether all stages have lengths in samples, of which a time budget makes shares."""
        counted = (stage.samples and stage.share is None and not stage.warmup_share for stage in self.stages)
        return bool(self.stages) and all(counted)


def build_parser(verb: str = "pretrain") -> ArgumentParser:
    """Return the parser of a verb that trains: `--config RECIPE` and a flag for every field."""

    class RecipeParser(ArgumentParser):
        def __init__(self, **options: Any) -> None:  # jsonargparse makes others for the stages and --stages.help
            usage = f"flipscale {verb} --config RECIPE [--SECTION.FIELD VALUE ...]"
            own: dict[str, Any] = {"prog": f"flipscale {verb}", "usage": usage, "exit_on_error": False}
            super().__init__(**(own | {"allow_abbrev": False} | options))

    start = " from the weights of `model.init_from`" if verb == "finetune" else ""
    parser = RecipeParser(
        description=f"Train a model{start} as a recipe says. Every field of a recipe is also a flag, which overrides "
        "the file. Texts, numbers, lists and mappings are written as in YAML. --dry_run prints the memory and the time "
        "that the run needs: flipscale pretrain --dry_run --help.",
    )
    parser.add_argument("--config", action="config", help=f"A recipe file, or one of these names: {recipe_names()}.")
    parser.add_class_arguments(Recipe)
    several = ("MAPPING", "Several fields of this section: '{FIELD: VALUE, ...}'.")
    helps = {flag: several for flag, is_list in _section_flags() if not is_list}
    helps["--print_config"] = ("", "Print the whole recipe, with defaults and other flags applied, and exit.")
    for action in parser._actions:
        if action.option_strings[0] in helps:
            action.metavar, action.help = helps[action.option_strings[0]]
    return parser


def _section_flags(kind: type = Recipe, prefix: str = "--") -> Iterator[tuple[str, bool]]:
    """Yield the flags of the recipe's sections, such as `--data`, and of its lists of sections, such as
    `--data.sources`, each with whether it is a list."""
    for name, hint in get_type_hints(kind).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield prefix + name, False
            yield from _section_flags(hint, f"{prefix}{name}.")
        elif get_origin(hint) is list and dataclasses.is_dataclass(get_args(hint)[0]):
            yield prefix + name, True


def parse_fields(arguments: Sequence[str]) -> Recipe:
    """Return the recipe of command-line `arguments`. A bare name after `--config` is a recipe of the package.

    Flags override files wherever they stand. A later `--config` changes an earlier one as if it extended it.
    The values of `loss.options`, the masks' kinds and `eval.tasks` are not checked, see `start.complete_recipe`, nor
    the rules between fields, see `recipe.rules`.

    Raises:
        UserError: the file is not a recipe, a key is unknown, or a value has the wrong type or range.
        SystemExit: `--help` was among the arguments and is printed.
    """
    if {"-h", "--help"} & set(arguments):
        build_parser().parse_args(["--help"])
    words = [word for argument in arguments for word in argument.split("=", 1 if argument.startswith("--") else 0)]
    words = with_stages(words, lambda others: parse_fields(others).stages)
    sections = dict(_section_flags())
    files: list[str] = []
    flags: list[str] = []
    for flag, word in zip(["", *words], words, strict=False):
        if flag == "--config":
            files.append(word)
            del flags[-1]
            continue
        # Emptied first, because jsonargparse gives the elements the fields of a list as long, which this one replaces.
        flags += ["[]", flag, word] if sections.get(flag) else [word]
        if sections.get(flag) is False and not word.startswith("{"):
            raise UserError(f"{flag} is {word[:60]!r}; set its fields, such as {flag}.FIELD VALUE")
        elif word.startswith(("{", "[", "&")):
            with suppress(yaml.YAMLError):  # a text, such as a path
                check_yaml(word, flag)
    words = ["--config", read_recipes(files, Recipe), *flags] if files else flags
    parser = build_parser()
    try:
        built = parser.instantiate(parser.parse_args(words))
    except (ArgumentError, ValueError, OverflowError) as error:
        message = parser_message(error)
        if unknown := re.match(r"unrecognized arguments: (--\S+)", message):
            known = {flag for action in parser._actions for flag in action.option_strings}
            message = unknown_flag(unknown[1], sorted(known - sections.keys()))
        elif stray := re.match(r"unrecognized arguments: (.+)", message):
            word = next((word for word in words if word and stray[1].startswith(word)), stray[1])[:200]
            message = f"{word!r} stands without a flag; name a recipe by --config {shlex.quote(word)}"
        raise UserError(message) from None
    recipe = Recipe(**{f.name: getattr(built, f.name) for f in dataclasses.fields(Recipe)})
    check_ranges(recipe)
    data, model = recipe.data, recipe.model
    # The towers whose features are stored are frozen. Other libraries' models have no weights here.
    towers = [part for tower, part in PRECOMPUTED_TOWERS.items() if tower in data.stored.keys() - model.embedded.keys()]
    frozen = dict.fromkeys([*model.frozen, *towers])
    model = dataclasses.replace(model, frozen=[*frozen])
    return dataclasses.replace(recipe, model=model, data=dataclasses.replace(data, lanes=data.num_lanes))


def to_yaml(recipe: Recipe, is_public: bool = False) -> str:
    """Return the resolved recipe as YAML, which `--config` reads back; with `is_public`, without secrets of URLs."""
    plain = without_secrets(dataclasses.asdict(recipe)) if is_public else dataclasses.asdict(recipe)
    plain["data"]["lanes"] = recipe.data.num_lanes
    plain["data"]["crop_scale"] = list(recipe.data.crop_scale)
    return yaml.safe_dump(plain, sort_keys=False)


def deciding_part(
    saved: dict[str, Any], kind: type = Recipe, name_of: Callable[[str], str] | None = None
) -> dict[str, Any]:
    """Return the fields of a saved recipe that decide what is learned.

    A missing field gets its default, or `{"before": value}` of its metadata. An unknown field is kept.

    Args:
        saved: content of `recipe.yaml`, or of a section.
        kind: dataclass of the content.
        name_of: function that shortens the paths and names of fields with `{"place": True}`; None keeps them.
    """
    types, deciding = get_type_hints(kind), {}
    for f in dataclasses.fields(kind):
        if not f.metadata.get("learned", True):
            continue
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        value = saved.get(f.name, f.metadata.get("before", None if default is dataclasses.MISSING else default))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        hints = (types[f.name], *get_args(types[f.name]))
        section: Any = next((hint for hint in hints if dataclasses.is_dataclass(hint)), None)
        if isinstance(value, str | list) and f.metadata.get("place") and name_of is not None:
            value = name_of(value) if isinstance(value, str) else [*map(name_of, value)]
        elif isinstance(value, dict) and section is not None:
            value = deciding_part(value, section, name_of)
        elif isinstance(value, list | tuple):
            value = [deciding_part(v, section, name_of) if section and isinstance(v, dict) else v for v in value]
        deciding[f.name] = value
    return deciding | {name: value for name, value in saved.items() if name not in types}


def as_fields(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """Return the set fields of a resolved recipe, such as `{"stages.0.base_lr": 4e-06, ...}`."""

    def fields_of(value: Any, name: str) -> Iterator[tuple[str, bool | int | float | str]]:
        if isinstance(value, dict | list):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                yield from fields_of(inner, f"{name}.{key}" if name else str(key))
        elif value is not None:
            yield name, value

    return dict(fields_of(yaml.safe_load(to_yaml(recipe, is_public=True)), ""))


def differences(recipe: Recipe, saved: dict[str, Any]) -> list[str]:
    """Return the fields that decide what is learned and differ from a saved recipe's, such as
    `stages[1].mask_ratio: 0.0, now 0.5`."""
    return sorted(changed_fields(deciding_part(saved), deciding_part(yaml.safe_load(to_yaml(recipe, is_public=True)))))


def conflicts(recipe: Recipe, saved: dict[str, Any], step: int = 0) -> list[str]:
    """Return the `differences` by which a recipe cannot resume the run of a saved one after `step` steps.

    Stages that are added are no conflict if they leave earlier steps alone: if the first of them has a base_lr or is a
    cooldown. Nor is another end of a constant rate that the run has not passed, nor what follows it.
    """
    theirs = saved_stages(saved)
    if (trunk := _trunk(recipe, theirs, step)) is not None:
        theirs = [*theirs[:trunk], theirs[trunk] | {"samples": recipe.stages[trunk].samples}]
        recipe, saved = _cut(recipe, trunk + 1), saved | {"stages": theirs}
    elif 0 < len(theirs) < len(recipe.stages):
        added = recipe.stages[len(theirs)]
        if added.base_lr is not None or added.schedule is not None:
            recipe = _cut(recipe, len(theirs))
    return differences(recipe, saved)


def is_longer(recipe: Recipe, saved: dict[str, Any]) -> bool:
    """Return whether a recipe goes on after the end of a saved one without `conflicts`."""
    theirs = saved_stages(saved)
    if recipe.budget_minutes is not None:
        return len(recipe.stages) > len(theirs)
    return sum(stage.samples or 0 for stage in recipe.stages) > sum(map(_samples, theirs))


def saved_stages(saved: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the stages of a saved recipe; none if they are no stages."""
    stages = saved.get("stages")
    return stages if isinstance(stages, list) and all(isinstance(stage, dict) for stage in stages) else []


def _samples(saved_stage: dict[str, Any]) -> int:
    """Return the samples of a saved stage; 0 under a time budget, or if they are no number."""
    samples = saved_stage.get("samples")
    return samples if isinstance(samples, int) else 0


def _cut(recipe: Recipe, count: int) -> Recipe:
    return dataclasses.replace(recipe, stages=recipe.stages[:count])


def _trunk(recipe: Recipe, theirs: list[dict[str, Any]], step: int) -> int | None:
    """Return the number of the stage of the last of `step` steps if both recipes keep its rate constant to that step,
    else None. `differences` compares the rest of it."""
    first = 0
    for number, (mine, other) in enumerate(zip(recipe.stages, theirs, strict=False)):
        lengths = [one // recipe.data.global_batch_size for one in (mine.samples or 0, _samples(other))]
        if first < step <= first + min(lengths):
            return number if mine.schedule == other.get("schedule") == "constant" else None
        first += lengths[0]
    return None
