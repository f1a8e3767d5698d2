"""The recipe: every setting of a run, read from YAML and `--section.field` flags."""

import dataclasses
import difflib
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args, get_type_hints

import yaml

from flipscale.data.recipe import STORED_TOWERS, DataRecipe, MaskRecipe
from flipscale.engines.recipe import OptimRecipe, SaveRecipe
from flipscale.evaluation.recipe import EvalRecipe
from flipscale.io.errors import UserError
from flipscale.io.model_folder import fetch_folder, local_folder, read_object
from flipscale.io.options import (
    CountOrZero,
    MinutesAboveZero,
    NonNegative,
    Overhead,
    SamplesOrZero,
    Seconds,
    Seed,
    ShareBelowOne,
    changed_fields,
    check_fields,
    check_ranges,
    parser_message,
    refuse_set,
)
from flipscale.io.yaml_text import check_yaml, read_outline, read_saved_recipe
from flipscale.model.families import family_of
from flipscale.objectives.recipe import LossRecipe, build_objective
from flipscale.training.flags import unknown_flag, with_stages
from flipscale.training.schedule import Stage, StageRecipe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from flipscale.engines.start_towers import Towers
    from flipscale.model.configuration_flip import FlipConfig
    from flipscale.objectives.objective import Objective

RECIPES = Path(__file__).parent.parent / "recipes"
_BERT_ENTRIES = 30_522

# {"learned": False} marks a field that does not change what is learned: it may differ at a resume, and the model card
# leaves it out. {"place": True} marks a path or a name, which the card shortens. {"before": value} gives the value of a
# saved recipe without the field.


@dataclass(frozen=True)
class ModelRecipe:
    """The model.

    Args:
        family: The architecture. `flip` is the paper's. `clip` and `siglip` are transformers' CLIPModel and
            SiglipModel, and their exported folders need no code of flipscale. They take all masks of images, but no
            text masks, drop path, decoders or heads. `towers` is the same for their VisionTextDualEncoderModel of
            any two towers, `vision` and `text`.
        size: The size of the two towers. Family `flip` has b16, l16, l14, h14 and g14. `clip` also has s16 and b32.
            `siglip` has s16, b16, l16, so400m14, so400m16 and g16.
        vision_config: Changed fields of the image tower, such as `{image_size: 112}`.
        text_config: Changed fields of the text tower, such as `{num_hidden_layers: 6}`. `vocab_size` defaults to that
            of the start weights, else to the size of a tokenizer in a folder, else to 30,523.
        decoder_config: Changed fields of the caption decoder, which is as wide as the text tower. `bos_token_id` and
            `eos_token_id` default to those of a tokenizer in a folder, else to BERT's [CLS] and [SEP].
        answer_config: Changed fields of the transformer that answers questions (loss.kind answer).
        gradient_checkpointing: Recompute activations: less memory, more time. Does not change what is learned.
        compile: Compile the blocks, which delays the first steps at each mask ratio. By default on GPUs, except with
            ZeRO-3 and in family `towers`. Does not change what is learned.
        init_from: The start weights: a run, a model folder or a Hub name.
        text_positions: How the text positions of start weights become longer, where `text_config` has more
            `max_position_embeddings` than they. `stretched` interpolates all linearly. `longclip` keeps the first 20
            and stretches the rest, as LongCLIP does (77 become 248).
        text_rows: `matched` takes the rows of start weights by the pieces of another `data.tokenizer`, and draws the
            rows of new pieces. By default, both vocabularies must be the same.
        vision: The image tower of family `towers`, a folder or a Hub name: a ViT of transformers or timm. Its
            normalisation of pixels comes with it. The projections are drawn. For family `flip`, a model of flipscale.
        text: The text tower of family `towers`, a folder or a Hub name: a text encoder, with its tokenizer. For family
            `flip`, a model of flipscale. There, one of both may be left out and is drawn.
        drop_path_rate: Stochastic depth: how often the image tower's last block drops its attention, and separately
            its MLP. The rate grows linearly from 0 at the first block. The paper fine-tunes with 0.2. Exported
            models drop nothing.
        frozen: Parts whose weights stay fixed, by their names in the model, such as `[logit_scale]` (the temperature)
            or `[vision_model, image_projection]`.
    """

    family: Literal["flip", "clip", "siglip", "towers"] = "flip"
    size: str = "b16"
    vision_config: dict[str, Any] = field(default_factory=dict)
    text_config: dict[str, Any] = field(default_factory=dict)
    decoder_config: dict[str, Any] = field(default_factory=dict)
    answer_config: dict[str, Any] = field(default_factory=dict)
    gradient_checkpointing: bool = field(default=False, metadata={"learned": False})
    compile: bool | None = field(default=None, metadata={"learned": False})
    init_from: str | None = field(default=None, metadata={"place": True})
    vision: str | None = field(default=None, metadata={"place": True})
    text: str | None = field(default=None, metadata={"place": True})
    text_positions: Literal["stretched", "longclip"] | None = None
    text_rows: Literal["matched"] | None = None
    drop_path_rate: ShareBelowOne = 0.0
    frozen: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("text_positions", "text_rows"):
            if (value := getattr(self, name)) and not self.init_from:
                raise UserError(f"model.{name} is {value!r}, for start weights, and model.init_from is not set; set it")

    @property
    def start(self) -> "str | Towers | None":
        """The start weights, or None."""
        if self.vision is None and self.text is None:
            return self.init_from
        from flipscale.engines.start_towers import Towers  # imports the models

        return Towers(*cast(tuple[str, str], (self.vision, self.text)))

    def config(self) -> "FlipConfig":
        """Return the model's configuration. Raise UserError if the size or a field is unknown, or the patch does not
        divide the image size."""
        from huggingface_hub.errors import StrictDataclassError

        from flipscale.model.families import config_class

        kind = config_class(self.family)
        for section in ("vision_config", "text_config", "decoder_config", "answer_config"):
            # What transformers adds may name code to load.
            known = kind.parts(self.vision_config, self.text_config).get(section, [])
            for name in getattr(self, section):
                if name not in known:
                    near = difflib.get_close_matches(str(name), known, 1)
                    has = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
                    raise UserError(f"model.{section}.{name} is not a field of model.family {self.family}; {has}")
        try:
            config = kind.from_size(self.size, self.vision_config, self.text_config)
            return config.with_parts(self.decoder_config, self.answer_config) if self.family == "flip" else config
        except (StrictDataclassError, ValueError, OverflowError) as error:
            raise UserError(f"model: {' '.join(str(error).split())}") from None


@dataclass(frozen=True)
class LogRecipe:
    """The log.

    Args:
        every_samples: Samples between two records of training metrics; 0 for none before the end. By default, each
            hundredth of the run has one, and each half minute in which no hundredth ended.
        every_share: Share of a time budget between two records, in place of `every_samples`; 0 leaves it in place.
        report_to: Trackers of accelerate that get the metrics besides `metrics.jsonl`, such as tensorboard or wandb.
            They receive the recipe as their configuration. wandb, trackio and comet_ml continue a run after a resume.
        hang_seconds: The run ends after this time without progress. Ranks write their stacks at half of it, or
            earlier. NCCL would end the run silently after ten minutes.
        profile_steps: Steps of each start to profile in `profile/` of the run directory; 0 for none.
    """

    every_samples: SamplesOrZero | None = None
    every_share: ShareBelowOne = 0.0
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    hang_seconds: Seconds = 540.0
    profile_steps: CountOrZero = 0


@dataclass(frozen=True)
class HubRecipe:
    """Pushes to the Hub, and facts for the model card.

    Args:
        push_to_hub: Push every save, in the background, and the finished model.
        hub_model_id: The name of the model on the Hub, ORG/NAME. The repository is created if it does not exist.
        hub_private_repo: Whether a new repository is private; null for the organisation's default.
        hub_revision: The branch to push to, created if it does not exist; null for main.
        license: The licence of the weights for the model card, as the Hub writes it (`apache-2.0`).
        audit: The `audit.json` of the training data, written by `flipscale prepare audit`, for the model card.
    """

    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None
    hub_revision: str | None = None
    license: str | None = None
    audit: str | None = None


@dataclass(frozen=True)
class CostRecipe:
    """The section `cost`: prices for the model card, the page and `flipscale plan`. Null leaves out a cost.

    Args:
        device_hour_dollars: The price of a device for an hour, in dollars.
        kwh_co2_grams: The grid's CO2 emissions in grams per kWh.
        pue: Power usage effectiveness: total power of the data centre divided by its machines'. 1 leaves out cooling.
    """

    device_hour_dollars: NonNegative | None = None
    kwh_co2_grams: NonNegative | None = None
    pue: Overhead = 1.0

    def dollars(self, device_hours: float | None) -> float | None:
        """Return the price of device hours, or None if the hours or the price are unknown."""
        if device_hours is None or self.device_hour_dollars is None:
            return None
        return device_hours * self.device_hour_dollars

    def co2_kg(self, kwh: float | None) -> float | None:
        """Return the grid's emissions for the machines' kWh, or None if either is unknown.

        The emissions of making the machines are left out.
        """
        return None if kwh is None or self.kwh_co2_grams is None else kwh * self.pue * self.kwh_co2_grams / 1000


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

    def recomputes(self, stage: StageRecipe | Stage) -> bool:
        """Return whether activations are recomputed in a stage."""
        own = stage.gradient_checkpointing
        return self.model.gradient_checkpointing if own is None else own

    def objective(self) -> "Objective":
        """Return the training objective. Raise UserError if the section `loss` is wrong."""
        return build_objective(self.loss, self.mask, self.data.teachers)

    def model_config(self) -> "FlipConfig":
        """Return the model's configuration, with the loss parameters that the objective needs. Raise UserError if the
        section `model` or `loss` is wrong, or the patch does not divide an image size."""
        from flipscale.model.configuration_flip import patches_along  # seconds to import

        if self.model.decoder_config and not self.loss.learns_captions:
            raise UserError("model.decoder_config is set, but no loss learns captions; set loss.caption_weight too")
        if self.model.family != "flip":
            settings = {"model.drop_path_rate": self.model.drop_path_rate, **self.besides_contrastive()}
            refuse_set(settings, f"model.family is {self.model.family!r}, and only flip has it")
        config = self.objective().model_config(self.model.config())
        if self.data.pack_captions:
            reason = "data.pack_captions is true, which is for the contrastive losses of whole captions"
            refuse_set(self.besides_contrastive(), reason)
            if not config.packs_captions:
                fix = " or set model.text_config.attend_to_padding to false" if self.model.family == "flip" else ""
                raise UserError(
                    f"data.pack_captions is true, and captions of this model.family {self.model.family!r} see their "
                    f"padding; leave it out{fix}"
                )
        sizes = {f"stage {stage.name!r}": stage.image_size for stage in self.stages}
        sizes.update({f"eval.tasks: {task.name}": task.image_size for task in self.eval.planned()})
        patch_size = config.vision_config.patch_size
        for name, size in sizes.items():
            try:
                patches_along(patch_size if size is None else size, patch_size)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
        return config

    def besides_contrastive(self) -> dict[str, Any]:
        """Return the settings of losses besides the contrastive ones, and of text masks."""
        return {
            "loss.kind": self.loss.kind if self.loss.kind not in ("infonce", "sigmoid") else None,
            "loss.caption_weight": self.loss.caption_weight,
            "loss.reconstruction_weight": self.loss.reconstruction_weight,
            **{f"stages.{stage.name}.text_mask_ratio": stage.text_mask_ratio for stage in self.stages},
        }


def build_parser(verb: str = "pretrain") -> "ArgumentParser":
    """Return the parser of a verb that trains: `--config RECIPE` and a flag for every field."""
    from jsonargparse import ArgumentParser

    class RecipeParser(ArgumentParser):
        def __init__(self, **options: Any) -> None:  # jsonargparse makes others for the stages and --stages.help
            usage = f"flipscale {verb} --config RECIPE [--SECTION.FIELD VALUE ...]"
            own: dict[str, Any] = {"prog": f"flipscale {verb}", "usage": usage, "exit_on_error": False}
            super().__init__(**(own | {"allow_abbrev": False} | options))

    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    start = " from the weights of `model.init_from`" if verb == "finetune" else ""
    parser = RecipeParser(
        description=f"Train a model{start} as a recipe says. Every field of a recipe is also a flag, which overrides "
        "the file. Texts, numbers, lists and mappings are written as in YAML. --dry_run prints the memory and the time "
        "that the run needs: flipscale pretrain --dry_run --help.",
    )
    parser.add_argument("--config", action="config", help=f"A recipe file, or one of these names: {names}.")
    parser.add_class_arguments(Recipe)
    helps = dict.fromkeys(_section_flags(), ("MAPPING", "Several fields of this section: '{FIELD: VALUE, ...}'."))
    helps["--print_config"] = ("", "Print the whole recipe, with defaults and other flags applied, and exit.")
    for action in parser._actions:
        if action.option_strings[0] in helps:
            action.metavar, action.help = helps[action.option_strings[0]]
    return parser


def _section_flags(kind: type = Recipe, prefix: str = "--") -> Iterator[str]:
    """Yield the flags of the recipe's sections, such as `--data` and `--data.augment`."""
    for name, hint in get_type_hints(kind).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield prefix + name
            yield from _section_flags(hint, f"{prefix}{name}.")


def parse_recipe(arguments: Sequence[str], is_saved: bool = False) -> Recipe:
    """Return the recipe of command-line `arguments`. A bare name after `--config` is a recipe of the package.

    Args:
        is_saved: whether a run wrote the recipe. Its model is complete then, and the tokenizer's folder is not read.

    Raises:
        UserError: the file is no recipe, a key is unknown, a value has the wrong type or range, or the tokenizer's
            folder cannot be loaded.
        SystemExit: `--help` was among the arguments and is printed.
    """
    if {"-h", "--help"} & set(arguments):
        build_parser().parse_args(["--help"])
    from jsonargparse import ArgumentError

    words = [word for argument in arguments for word in argument.split("=", 1 if argument.startswith("--") else 0)]
    for number, (flag, word) in enumerate(zip(["", *words], words, strict=False)):
        if flag == "--config":
            file = _recipe_file(word)
            outline = read_outline(file)
            words[number] = word if file == Path(word) else str(file)  # ./-x.yaml would lose its ./
            check_fields(outline, Recipe, "", str(file))
        elif flag in _section_flags() and not word.startswith("{"):
            raise UserError(f"{flag} is {word[:60]!r}; set its fields, such as {flag}.FIELD VALUE")
        elif word.startswith(("{", "[", "&")):
            with suppress(yaml.YAMLError):  # a text, such as a path
                check_yaml(word, flag)
    words = with_stages(words, lambda others: parse_recipe(others, is_saved=True).stages)
    parser = build_parser()
    try:
        built = parser.instantiate(parser.parse_args(words))
    except (ArgumentError, ValueError, OverflowError) as error:
        message = parser_message(error)
        if unknown := re.match(r"unrecognized arguments: (--\S+)", message):
            flags = {flag for action in parser._actions for flag in action.option_strings}
            message = unknown_flag(unknown[1], sorted(flags - set(_section_flags())))
        elif stray := re.match(r"unrecognized arguments: (.+)", message):
            word = next((word for word in words if word and stray[1].startswith(word)), stray[1])[:200]
            message = f"{word!r} stands without a flag; name a recipe by --config {shlex.quote(word)}"
        raise UserError(message) from None
    recipe = Recipe(**{f.name: getattr(built, f.name) for f in dataclasses.fields(Recipe)})
    check_ranges(recipe)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, lanes=recipe.data.num_lanes))
    return recipe if is_saved else with_vocabulary(_with_stored(recipe))


def _with_stored(recipe: Recipe) -> Recipe:
    """Return the recipe with the towers frozen whose features are stored."""
    frozen = dict.fromkeys([*recipe.model.frozen, *map(STORED_TOWERS.__getitem__, recipe.data.stored)])
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, frozen=[*frozen]))


def with_vocabulary(recipe: Recipe, fetches: bool = False) -> Recipe:
    """Return the recipe with the size of the vocabulary, and with the tokens around learned captions.

    The size is that of the start weights, or else of a tokenizer in a folder. BERT's vocabulary keeps the default size,
    which has one more row, as in the original. Start weights on the Hub are looked up with `fetches` only.
    """
    model, folder = recipe.model, recipe.data.tokenizer
    named = [name for name in ("vision", "text") if getattr(model, name) is not None]
    if named and (model.family in ("clip", "siglip") or (model.family == "flip" and model.init_from)):
        raise UserError(
            f"model.{named[0]} is {getattr(model, named[0])!r} and model.family {model.family!r}, with model.init_from "
            f"{model.init_from!r}; set the family to towers, or to flip without init_from"
        )
    if model.family == "towers" and (len(named) == 1 or bool(named) == bool(model.init_from)):
        raise UserError(
            f"model.family is 'towers', model.vision {model.vision!r}, model.text {model.text!r} and model.init_from "
            f"{model.init_from!r}; set both towers, or init_from to a folder of both"
        )
    if re.match(r"(open_clip|hf|untrained):", model.init_from or ""):
        raise UserError(
            f"model.init_from is {model.init_from!r}, which `flipscale evaluate` takes and training does not; name a "
            "run, a model folder or a Hub name, such as a folder that `flipscale convert transformers` made of it"
        )
    if model.family != "flip":
        return _with_towers(recipe, fetches)
    if named:
        recipe = _with_towers(recipe, fetches)
        model, folder = recipe.model, recipe.data.tokenizer
    if model.init_from and "vocab_size" not in model.text_config and not model.text_rows:
        size = _vocabulary_of(model.init_from, Path(recipe.output_dir), fetches)
        model = dataclasses.replace(model, text_config={**model.text_config, **size})
        recipe = dataclasses.replace(recipe, model=model)
    takes_size = "vocab_size" not in model.text_config and (model.text_rows or not model.init_from)
    takes_ends = recipe.loss.learns_captions and not {"bos_token_id", "eos_token_id"} <= model.decoder_config.keys()
    if not (takes_size or takes_ends) or not Path(folder).is_dir():
        return recipe
    from flipscale.data.tokenizers import begin_and_end, load_tokenizer, num_entries

    tokenizer = load_tokenizer(folder, 1)
    entries, ends = num_entries(tokenizer), begin_and_end(tokenizer) if takes_ends else {}
    size = {"vocab_size": entries} if takes_size and entries != _BERT_ENTRIES else {}
    text, decoder = {**model.text_config, **size}, {**ends, **model.decoder_config}
    return dataclasses.replace(recipe, model=dataclasses.replace(model, text_config=text, decoder_config=decoder))


def _with_towers(recipe: Recipe, fetches: bool) -> Recipe:
    """Return a recipe of another family than `flip` with the towers and the tokenizer of its start weights, or without
    them with the special tokens of its tokenizer. Fields that the recipe sets stay."""
    from flipscale.training.start_weights import start_fields, tokenizer_fields  # imports the models

    model, tokenizer = recipe.model, recipe.data.tokenizer
    if model.start:
        # A recipe of family `towers` that names the kinds of its towers needs no folder to be planned.
        fetches = fetches or (model.family == "towers" and "model_type" not in model.vision_config)
        towers, own = start_fields(model, Path(recipe.output_dir), fetches)
        tokenizer = own if tokenizer == DataRecipe.tokenizer else tokenizer
        if model.text_rows:
            towers["text_config"] |= tokenizer_fields(tokenizer)
    else:
        towers = {"vision_config": {}, "text_config": tokenizer_fields(tokenizer)}
    fields: dict[str, Any] = {name: {**found, **getattr(model, name)} for name, found in towers.items()}
    data = dataclasses.replace(recipe.data, tokenizer=tokenizer)
    return dataclasses.replace(recipe, model=dataclasses.replace(model, **fields), data=data)


def _vocabulary_of(init_from: str, run_dir: Path, fetches: bool) -> dict[str, Any]:
    """Return the field `vocab_size` of start weights: as the run of these weights in `run_dir` has it, or else they."""
    content: dict[str, Any] = {}
    with suppress(UserError):
        saved = read_saved_recipe(run_dir / "recipe.yaml").get("model")
        content = saved if isinstance(saved, dict) and saved.get("init_from") == init_from else {}
    try:
        if not content and (folder := fetch_folder(init_from, ["config.json"]) if fetches else local_folder(init_from)):
            content = read_object(folder / "config.json")
    except (UserError, OSError) as error:
        if fetches:
            raise UserError(f"model.init_from {init_from!r} cannot be loaded ({error})") from error
    if (family := family_of(content.get("model_type"))) not in ("flip", None):
        kind = content["model_type"]
        raise UserError(f"model.init_from {init_from!r} has the model_type {kind!r}; set model.family to {family}")
    text = content.get("text_config")
    return {"vocab_size": text["vocab_size"]} if isinstance(text, dict) and "vocab_size" in text else {}


def _recipe_file(name: str) -> Path:
    file, named = Path(name), RECIPES / f"{name}.yaml"
    with suppress(OSError, ValueError):  # too long for a name, or a NUL byte in it
        if file.exists():
            return file
        if "/" not in name and named.exists():
            return named
    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise UserError(f"recipe {name[:200]!r} is neither a file nor one of {names}")


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, which `--config` reads back."""
    plain = dataclasses.asdict(recipe)
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

    return dict(fields_of(yaml.safe_load(to_yaml(recipe)), ""))


def differences(recipe: Recipe, saved: dict[str, Any]) -> list[str]:
    """Return the fields that decide what is learned and differ from a saved recipe's, such as
    `stages[1].mask_ratio: 0.0, now 0.5`."""
    return sorted(changed_fields(deciding_part(saved), deciding_part(yaml.safe_load(to_yaml(recipe)))))


def conflicts(recipe: Recipe, saved: dict[str, Any]) -> list[str]:
    """Return the `differences` by which a recipe cannot resume the run of a saved one.

    Added stages are no conflict if the first of them has a base_lr, because its schedule leaves earlier steps alone.
    """
    stages = saved.get("stages")
    count = len(stages) if isinstance(stages, list) else 0
    if 0 < count < len(recipe.stages) and recipe.stages[count].base_lr is not None:
        recipe = dataclasses.replace(recipe, stages=recipe.stages[:count])
    return differences(recipe, saved)
