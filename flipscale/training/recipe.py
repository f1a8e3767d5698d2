"""The recipe: every setting of a run, read from YAML and `--section.field` flags."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import yaml

from flipscale.data.recipe import DataRecipe, MaskRecipe
from flipscale.engines.checkpoint import SaveRecipe
from flipscale.engines.optimizers import OptimRecipe
from flipscale.evaluation.recipe import EvalRecipe
from flipscale.io.errors import UserError
from flipscale.io.options import (
    CountOrZero,
    MinutesAboveZero,
    SamplesOrZero,
    Seconds,
    Seed,
    ShareBelowOne,
    changed_fields,
    check_fields,
    check_ranges,
    parser_message,
)
from flipscale.io.yaml_text import check_yaml, read_outline
from flipscale.objectives.recipe import LossRecipe, build_objective
from flipscale.training.cost import CostRecipe
from flipscale.training.schedule import StageRecipe, check_image_sizes

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from flipscale.model.configuration_flip import FlipConfig
    from flipscale.objectives.objective import Objective

RECIPES = Path(__file__).parent.parent / "recipes"
_BERT_ENTRIES = 30_522

# Fields of any section that are marked {"learned": False} do not change what is learned: they may differ when a run is
# resumed, and the model card leaves them out. {"place": True} marks a path or a name, which the card shortens.
# {"before": value} marks a field whose default is not what versions without it did: they did what `value` does.


@dataclass(frozen=True)
class ModelRecipe:
    """What is trained.

    Args:
        size: The size of the two towers: b16, l16, l14, h14 or g14.
        vision_config: Fields of the image tower that differ from the size's, such as `{image_size: 112}`.
        text_config: Fields of the text tower that differ from the size's, such as `{num_hidden_layers: 6}`.
            `vocab_size` is the size of the tokenizer where that is a folder, else 30,523.
        decoder_config: Fields of the decoder that writes captions, which is otherwise as wide as the text tower.
            `bos_token_id` and `eos_token_id` are the tokenizer's where that is a folder, else BERT's [CLS] and [SEP].
        answer_config: Fields of the transformer that answers questions (loss.kind answer) that differ from the paper's.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time. Does not change what
            is learned.
        compile: Compile the blocks with torch.compile; the first steps of each mask ratio wait for it. Does not change
            what is learned.
        init_from: A run, a model folder or a Hub name whose weights the run starts from.
        drop_path_rate: Stochastic depth: the share of the samples for which the image tower's last block drops its
            attention, and likewise its MLP; it grows linearly from 0 at the first block. 0.2 in the paper's
            fine-tuning. A released model drops nothing.
        frozen: Parts whose weights stay as they start, by their names in the model, such as `[logit_scale]` (the
            temperature) or `[vision_model, image_projection]`.
    """

    size: str = "b16"
    vision_config: dict[str, Any] = field(default_factory=dict)
    text_config: dict[str, Any] = field(default_factory=dict)
    decoder_config: dict[str, Any] = field(default_factory=dict)
    answer_config: dict[str, Any] = field(default_factory=dict)
    gradient_checkpointing: bool = field(default=False, metadata={"learned": False})
    compile: bool = field(default=False, metadata={"learned": False})
    init_from: str | None = field(default=None, metadata={"place": True})
    drop_path_rate: ShareBelowOne = 0.0
    frozen: list[str] = field(default_factory=list)

    def config(self) -> "FlipConfig":
        """Return the model's configuration.

        Raises:
            ValueError: an unknown size or field, an image size that the patch does not divide.
        """
        from huggingface_hub.errors import StrictDataclassError

        from flipscale.model.configuration_flip import PARTS, FlipConfig

        for section, tower in PARTS:
            known = list(tower.__annotations__)  # what transformers adds may name code to load
            for name in getattr(self, section, {}):
                if name not in known:
                    near = difflib.get_close_matches(str(name), known, 1)
                    has = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
                    raise UserError(f"model.{section}.{name} is not a field of {tower.__name__}; {has}")
        try:
            found = FlipConfig.from_size(self.size, self.vision_config, self.text_config)
            return found.with_parts(self.decoder_config, self.answer_config)
        except (StrictDataclassError, ValueError, OverflowError) as error:
            raise UserError(f"model: {' '.join(str(error).split())}") from None


@dataclass(frozen=True)
class LogRecipe:
    """What is reported.

    Args:
        every_samples: How many samples lie between two lines of training metrics; at 0, there is none.
        every_share: In a run with a time budget, the share of it that lies between two lines, in place of
            `every_samples`; at 0, samples are counted.
        report_to: Trackers of accelerate that get the metrics besides `metrics.jsonl`, such as tensorboard or wandb.
            They get the recipe as their configuration; wandb, trackio and comet_ml go on with the same run when the run
            is resumed.
        hang_seconds: A step that takes more seconds ends the run, after every rank has written what it was doing. Below
            the ten minutes after which NCCL ends it without a word.
        profile_steps: How many steps of each start are profiled, in `profile/` of the run directory; at 0, none.
    """

    every_samples: SamplesOrZero = 1_000_000
    every_share: ShareBelowOne = 0.0
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    hang_seconds: Seconds = 540.0
    profile_steps: CountOrZero = 0


@dataclass(frozen=True)
class HubRecipe:
    """Where the model is pushed while it is trained and at the end, and what its card cannot know by itself.

    Args:
        push_to_hub: Push every save, in the background, and the finished model.
        hub_model_id: The name of the model on the Hub, ORG/NAME; it is made if it does not exist.
        hub_private_repo: Whether a repository that is made is private; null takes the organisation's default.
        hub_revision: The branch that is pushed to, made if it does not exist; null is main.
        license: The licence of the weights, as the Hub writes it (`apache-2.0`); for the model card, like the audit.
        audit: The `audit.json` that `flipscale prepare audit` wrote of the training data.
    """

    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None
    hub_revision: str | None = None
    license: str | None = None
    audit: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A run. `model`, `data`, `mask`, `loss`, `optim`, `stages`, `budget_minutes` and `seed` decide what is learned;
    the others do not.

    Args:
        model: What is trained.
        data: What is read, and how it becomes a batch.
        mask: How patches and words are chosen; how many are removed is up to the stages.
        loss: What pulls pairs together and pushes the rest of the batch apart.
        optim: How the weights are updated.
        seed: The seed of the first weights, the order, the crops and the masks.
        log: What is reported, and how often.
        save: When checkpoints are written.
        eval: What is evaluated, and how often.
        hub: Whether the model is pushed to the Hub, and to where.
        cost: What a device's hour costs, and what a kWh emits.
        stages: The stages of the run, one after the other: masked pre-training and unmasked tuning, or any list of mask
            ratios and rates, such as '[{name: masked, samples: 1000000, mask_ratio: 0.5, base_lr: 4e-6}]'.
        budget_minutes: How long the run trains, evaluations and saves left out: it ends by its clock, and each stage
            has its `share` of that time. Left out, the run ends by the samples of its stages.
        output_dir: The run directory, where everything is written that the run leaves.
        resume_from_checkpoint: What is done with checkpoints of `output_dir`: `auto` resumes from the newest, `never`
            stops with an error if there is one.
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

    def objective(self) -> "Objective":
        """Return what is learned.

        Raises:
            ValueError: as `build_objective`.
        """
        return build_objective(self.loss, self.mask)

    def model_config(self) -> "FlipConfig":
        """Return the model's configuration, with the loss parameters that the objective needs.

        Raises:
            ValueError: as `ModelRecipe.config`, `build_objective` and `check_image_sizes`.
        """
        if self.model.decoder_config and not self.loss.learns_captions:
            raise UserError("model.decoder_config is set, but no loss learns captions; set loss.caption_weight too")
        config = self.objective().model_config(self.model.config())
        sizes = {f"stage {stage.name!r}": stage.image_size for stage in self.stages}
        sizes.update({f"eval.tasks: {task.name}": task.image_size for task in self.eval.planned()})
        check_image_sizes(sizes, config.vision_config.patch_size)
        return config


def build_parser(verb: str = "pretrain") -> "ArgumentParser":
    """Return the parser of a verb that trains: `--config RECIPE` and a flag for every field."""
    from jsonargparse import ArgumentParser

    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser = ArgumentParser(
        prog=f"flipscale {verb}",
        usage=f"flipscale {verb} --config RECIPE [--SECTION.FIELD VALUE ...]",
        description="Train a model as a recipe says. Every field of a recipe is also a flag, which overrides the file. "
        "Texts, numbers, lists and mappings are written as in YAML. --dry_run prints the memory and the time that the "
        "run needs: flipscale pretrain --dry_run --help.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help=f"A recipe file, or one of these names: {names}.")
    parser.add_class_arguments(Recipe)
    return parser


def parse_recipe(arguments: Sequence[str], is_saved: bool = False) -> Recipe:
    """Return the recipe that command-line `arguments` describe; a bare name after `--config` is one of the package's.

    Args:
        is_saved: it is one that a run wrote, which says what its model is, whatever the tokenizer's folder now holds.

    Raises:
        ValueError: a file that is no recipe, a key that does not exist, a value of the wrong type or out of its range,
            lanes that do not divide the batch, or a tokenizer's folder that cannot be loaded.
        SystemExit: `--help` is among the arguments; it has been printed.
    """
    if {"-h", "--help"} & set(arguments):
        build_parser().parse_args(["--help"])
    from jsonargparse import ArgumentError

    words = [word for argument in arguments for word in _split(argument)]
    for number, (flag, word) in enumerate(zip(["", *words], words, strict=False)):
        if flag == "--config":
            file = _recipe_file(word)
            outline = read_outline(file)
            words[number] = str(file)
            check_fields(outline, Recipe, "", str(file))
        else:
            _check_value(flag, word)
    parser = build_parser()
    try:
        built = parser.instantiate(parser.parse_args(words))
    except (ArgumentError, ValueError, OverflowError) as error:
        said = parser_message(error)
        raise UserError(f"{said}{_nearest_flag(said)}") from None
    recipe = Recipe(**{f.name: getattr(built, f.name) for f in dataclasses.fields(Recipe)})
    check_ranges(recipe)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, lanes=recipe.data.num_lanes))
    return recipe if is_saved else _with_vocabulary(recipe)


def _with_vocabulary(recipe: Recipe) -> Recipe:
    """Return the recipe with what it leaves to the tokenizer in a folder: the size of the vocabulary, unless the run
    starts from weights, which have one, and the tokens around captions that are learned. BERT's vocabulary keeps the
    default size, which has a row more, as the original has.

    Raises:
        ValueError: the tokenizer cannot be loaded, or has no such tokens.
    """
    model, folder = recipe.model, recipe.data.tokenizer
    takes_size = "vocab_size" not in model.text_config and not model.init_from
    takes_ends = recipe.loss.learns_captions and not {"bos_token_id", "eos_token_id"} <= model.decoder_config.keys()
    if not (takes_size or takes_ends) or not Path(folder).is_dir():
        return recipe
    from flipscale.data.tokenizers import begin_and_end, load_tokenizer, num_entries

    tokenizer = load_tokenizer(folder, 1)
    entries, ends = num_entries(tokenizer), begin_and_end(tokenizer) if takes_ends else {}
    size = {"vocab_size": entries} if takes_size and entries != _BERT_ENTRIES else {}
    text, decoder = {**model.text_config, **size}, {**ends, **model.decoder_config}
    return dataclasses.replace(recipe, model=dataclasses.replace(model, text_config=text, decoder_config=decoder))


def _nearest_flag(said: str) -> str:
    """Return a question for the flag that was meant, where the parser said that there is none of its name."""
    unknown = re.match(r"unrecognized arguments: (--\S+)", said)
    flags = [f"--{name}" for name in as_fields(Recipe())]
    near = difflib.get_close_matches(unknown[1], flags, 1) if unknown else []
    return f"; did you mean {near[0]}?" if near else ""


def _split(argument: str) -> list[str]:
    """Return `--flag=value` as two words."""
    return argument.split("=", 1) if argument.startswith("--") else [argument]


def _recipe_file(name: str) -> Path:
    file, named = Path(name), RECIPES / f"{name}.yaml"
    with suppress(OSError, ValueError):  # too long for a name, or a NUL byte in it
        if file.exists():
            return file
        if "/" not in name and named.exists():
            return named
    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise UserError(f"recipe {name[:200]!r} is neither a file nor one of {names}")


def _check_value(flag: str, word: str) -> None:
    """Raise if the value of a flag is YAML that is no good, or stands in place of a section's fields.

    Raises:
        ValueError: it is.
    """
    sections = [f"--{name}" for name, hint in get_type_hints(Recipe).items() if dataclasses.is_dataclass(hint)]
    if flag in sections and not word.startswith("{"):
        raise UserError(f"{flag} is {word[:60]!r}; set its fields, such as {flag}.FIELD VALUE")
    if word.startswith(("{", "[", "&")):
        with suppress(yaml.YAMLError):  # a text, such as a path
            check_yaml(word, flag)


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, which `--config` reads back.

    Raises:
        ValueError: as `DataRecipe.num_lanes`.
    """
    plain = dataclasses.asdict(recipe)
    plain["data"]["lanes"] = recipe.data.num_lanes
    plain["data"]["crop_scale"] = list(recipe.data.crop_scale)
    return yaml.safe_dump(plain, sort_keys=False)


def deciding_part(
    saved: dict[str, Any], kind: type = Recipe, name_of: Callable[[str], str] | None = None
) -> dict[str, Any]:
    """Return the fields of a saved recipe that decide what is learned.

    A field that the recipe lacks was saved by a version without it, which did what the default does, or what
    `{"before": value}` of its metadata says. A field that `kind` does not know is kept.

    Args:
        saved: what `recipe.yaml` holds, or a section of it.
        kind: its dataclass.
        name_of: how to write fields that are marked `{"place": True}`, which hold a path or a name; None leaves them.
    """
    known, types = {f.name: f for f in dataclasses.fields(kind)}, get_type_hints(kind)
    kept = {}
    for name in dict.fromkeys([*known, *saved]):
        if name not in known:
            kept[name] = saved[name]
        elif known[name].metadata.get("learned", True):
            value = saved[name] if name in saved else known[name].metadata.get("before", _default(known[name]))
            if known[name].metadata.get("place") and isinstance(value, str) and name_of is not None:
                value = name_of(value)
            kept[name] = _deciding_value(value, types[name], name_of)
    return kept


def as_fields(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """Return the fields of a resolved recipe that are set, such as `{"stages.0.base_lr": 4e-06, ...}`."""

    def fields_of(value: Any, name: str) -> Iterator[tuple[str, bool | int | float | str]]:
        if isinstance(value, dict | list):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                yield from fields_of(inner, f"{name}.{key}" if name else str(key))
        elif value is not None:
            yield name, value

    return dict(fields_of(yaml.safe_load(to_yaml(recipe)), ""))


def differences(recipe: Recipe, saved: dict[str, Any]) -> list[str]:
    """Return the fields that decide what is learned and differ from a saved recipe's, such as
    `stages[1].mask_ratio: 0.0, now 0.5`."""
    return sorted(changed_fields(deciding_part(saved), deciding_part(yaml.safe_load(to_yaml(recipe)))))


def conflicts(recipe: Recipe, saved: dict[str, Any]) -> list[str]:
    """Return the `differences` by which a recipe cannot go on with what a saved one began.

    Stages added after the saved ones are none, if the first of them has a base_lr: with the schedule of its own, every
    step before it is what it was.
    """
    stages = saved.get("stages")
    count = len(stages) if isinstance(stages, list) else 0
    if 0 < count < len(recipe.stages) and recipe.stages[count].base_lr is not None:
        recipe = dataclasses.replace(recipe, stages=recipe.stages[:count])
    return differences(recipe, saved)


def _deciding_value(value: Any, hint: Any, name_of: Callable[[str], str] | None) -> Any:
    """Return a value with what does not decide left out of the dataclasses in it."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return deciding_part(value, hint, name_of)
    elements = get_args(hint)
    if isinstance(value, list) and elements and dataclasses.is_dataclass(elements[0]):
        return [_deciding_value(one, elements[0], name_of) for one in value]
    return value


def _default(field: dataclasses.Field) -> Any:
    """Return a field's default as YAML holds it, None where it has none."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return list(value) if isinstance(value, tuple) else None if value is dataclasses.MISSING else value
