"""Write a model folder: weights, configuration, processor and code, for users with or without flipscale."""

import copy
import json
import logging
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, VisionTextDualEncoderModel
from transformers.image_utils import PILImageResampling
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from flipscale.data.features import PROBE
from flipscale.data.tokenizers import begin_and_end, check_tokenizer, model_tokenizer, read_tokenizer, with_lower_case
from flipscale.engines.checkpoint import CheckpointReader, list_checkpoints, require_valid
from flipscale.engines.trainable import ReadWeight, lora_config, lora_layers, merged
from flipscale.evaluation.foreign_models import check_embedded, load_transformers
from flipscale.evaluation.test_set import kept_class_names
from flipscale.hub.card import public_name
from flipscale.hub.push import split_own_files
from flipscale.io.atomic import atomic_write
from flipscale.io.digests import check_weight, write_tensors
from flipscale.io.errors import UserError
from flipscale.io.model_folder import LOADED, fetch_folder, local_folder, open_weight_file, pixel_fields, read_object
from flipscale.io.progress import each
from flipscale.io.streams import without_bars
from flipscale.model import FlipConfig, FlipForConditionalGeneration, FlipModel, FlipPreTrainedModel, FlipProcessor
from flipscale.model.configuration_flip import embedded_towers
from flipscale.model.families import family_of
from flipscale.objectives.build_objective import build_config, build_objective
from flipscale.recipe.recipe import Recipe
from flipscale.start.complete_recipe import parse_recipe

_log = logging.getLogger(__name__)

# Larger weights are split into files, because the Hub's client resumes transfers file by file.
MAX_SHARD_SIZE = "5GB"
# Fields of a configuration on which the function of trained weights does not depend, or which the tokenizer decides.
_FREE = re.compile(
    r"name_or_path|version|auto_map|dtype|architectures|dropout|drop_path|init|label|return_|output_|use_cache|"
    r"text_config\.eos_token_id"
)
# Files of an adapter, as PEFT names them.
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# An image processor, the processor of a model with a text tower, or the tokenizer if only the text tower is ours.
Processor = CLIPImageProcessorPil | ProcessorMixin | PreTrainedTokenizerBase | None

# Files of sentence-transformers: its modules in order, inputs and methods of the first, and the similarity. 6.0 is the
# first release with both modules under these names. The default padding would be to the longest caption of a batch.
_SENTENCE_TRANSFORMER = Path(__file__).with_name("sentence_transformers")


def build_processor(config: Any, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    """Return the processor of a model; `clip` and `siglip` have transformers' own.

    It cuts and pads captions to `max_position_embeddings` ids. The begin and end tokens of written captions become
    special tokens of the tokenizer. The end token that it adds becomes `text_config.eos_token_id` of family `flip`.
    Raise UserError if the tokenizer does not fit the model.
    """
    check_tokenizer(tokenizer, config.caption_config)
    # A copy, because the caller's tokenizer keeps its length.
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = config.caption_config.max_position_embeddings
    if config.decoder_config is not None:
        # Decoding leaves special tokens out.
        for name, token in begin_and_end(tokenizer).items():
            setattr(tokenizer, name.removesuffix("_id"), tokenizer.convert_ids_to_tokens(token))
    if isinstance(config, FlipConfig):
        word = tokenizer("a", return_special_tokens_mask=True)
        if config.text_config is not None and word["special_tokens_mask"][-1:] == [1]:
            config.text_config.eos_token_id = word["input_ids"][-1]
        return FlipProcessor(build_image_processor(config), tokenizer)
    tokenizer.model_input_names = list(config.caption_inputs)
    return config.processor_class(build_image_processor(config), tokenizer)


def build_image_processor(config: Any) -> Any:
    """Return the image processor of a model: resize the short side (bicubic), crop the centre, normalise.

    SigLIP's resizes the whole image to the square. It is transformers' PIL one, which needs no torchvision. The saved
    files name no backend: with torchvision, transformers loads its own instead, which differs by a grey level at most.
    """
    vision = config.vision_config
    square = {"height": vision.image_size, "width": vision.image_size}
    names = ("image_mean", "image_std")
    pixels: dict[str, Any] = {name: by_channel(getattr(vision, name), vision.num_channels) for name in names}
    if getattr(config, "squashes", False):
        return SiglipImageProcessorPil(size=square, resample=PILImageResampling.BICUBIC, **pixels)
    return CLIPImageProcessorPil(size={"shortest_edge": vision.image_size}, crop_size=square, **pixels)


def by_channel(value: float | list[float], num_channels: int) -> list[float]:
    """Return a mean or standard deviation of the configuration as one number for each channel."""
    return [float(value)] * num_channels if isinstance(value, int | float) else [float(v) for v in value]


def export_model(model: PreTrainedModel, processor: ProcessorMixin | None, out_dir: Path | str) -> Path:
    """Write configuration, weights (safetensors), processor and any code of `flipscale.model` to the folder `out_dir`.

    fp32 weights are written twice, as fp32 and as `variant="bf16"`. transformers and sentence-transformers load the
    folder without flipscale, with `trust_remote_code=True`. Once whole, it replaces an existing model folder entirely.

    Raises:
        UserError: `out_dir` exists and is neither a model folder nor empty.
    """
    weights = model.state_dict()
    return _write_folder(model, processor, Path(out_dir), lambda name: weights[name].cpu())


def export_checkpoint(
    checkpoint: Path, out_dir: Path, dtype: torch.dtype = torch.float32, base: str | None = None, alpha: float = 0.5
) -> Path:
    """Write the model of a run's checkpoint to the folder `out_dir` as `export_model` does, without a card.

    The recipe's averages of the weights are exported if it keeps them. LoRA's changes are added to the weights. A
    tensor or two are in memory at a time, for any engine and number of processes of the checkpoint.

    Args:
        dtype: data type of the weights.
        base: run, model folder or Hub name of another model to mix the weights with, such as the start of the
            fine-tuning: WiSE-FT (arXiv 2109.01903), which keeps a fine-tuned model's skill on other tasks.
        alpha: share of the checkpoint's weights; 0 gives those of `base`.

    Raises:
        OSError: the checkpoint is damaged or cannot be read.
        UserError: there is no such checkpoint, its tokenizer cannot be loaded, weights differ, or as `export_model`.
    """
    recipe, reader, stored = _opened(checkpoint)
    config, objective = build_config(recipe), build_objective(recipe)
    processor: Processor
    towers = embedded_towers(config)
    if objective.takes_text and "text_model" not in towers:
        processor = build_processor(config, model_tokenizer(recipe.data.tokenizer, config.caption_config))
        processor = processor.tokenizer if towers else processor
    else:
        processor = None if "vision_model" in towers else build_image_processor(config)
    if objective.num_labels is not None:
        names = kept_class_names(checkpoint.parents[1], objective.num_labels)
        config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    kind, exported = objective.exported_model(config)
    with torch.device("meta"):
        model = kind._from_config(exported, dtype=dtype)
    read = merged(stored, reader.shapes, recipe.optim.lora)
    if base is not None:
        _check_same_function(exported, processor, base)
        read = _mixed(model, read, base, alpha)
    return _write_folder(model, processor, out_dir, read)


def _opened(checkpoint: Path) -> tuple[Recipe, CheckpointReader, ReadWeight]:
    """Return the recipe of a whole checkpoint, and readers of its tensors and of its averages or else its weights."""
    if not checkpoint.exists():
        names = [path.name for path in list_checkpoints(checkpoint.parents[1])]
        raise UserError(f"{checkpoint} does not exist; the checkpoints are {', '.join(names) or 'none'}")
    require_valid(checkpoint)
    recipe = parse_recipe(["--config", str(checkpoint / "recipe.yaml")], is_saved=True)
    reader = CheckpointReader(checkpoint)
    return recipe, reader, partial(reader.tensor, "weight" if recipe.optim.ema_decay is None else "ema")


def export_adapter(checkpoint: Path, out_dir: Path) -> Path:
    """Write the LoRA changes of a run's checkpoint to the folder `out_dir`, for PEFT. Their base is the run's start.

    Raises:
        OSError: the checkpoint is damaged or cannot be read.
        UserError: the run has no LoRA, its other weights are not those of the start weights, or the folder is in use.
    """
    recipe, reader, read = _opened(checkpoint)
    lora, base = recipe.optim.lora, recipe.model.init_from or ""
    if lora.rank is None:
        raise UserError(f"--adapter needs optim.lora, and optim.lora.rank of {checkpoint} is null; leave --adapter out")
    if out_dir.exists() and not (out_dir / _ADAPTER[0]).is_file():
        raise UserError(f"{out_dir} exists and is not an adapter; name another folder or remove it")
    _refuse_others(out_dir, sorted({file.name for file in out_dir.glob("*")} - {*_ADAPTER}))
    _check_base(base, reader)
    folder, layers = local_folder(base), lora_layers(reader.shapes)
    weights = {}
    for name in (f"{layer}.lora_{letter}" for layer in layers for letter in "AB"):
        weights[f"base_model.model.{name}.weight"] = weight = read(f"{name}.default.weight")
        check_weight(name, weight)
    with atomic_write(out_dir) as adapter:
        lora_config(layers, lora, str(folder or base)).save_pretrained(adapter)
        save_file(weights, adapter / _ADAPTER[1])
    return out_dir


def _check_base(base: str, reader: CheckpointReader) -> None:
    """Raise UserError unless a run's fixed weights are those of its start weights."""
    files = open_weight_file(fetch_folder(base))
    for name in (name for name in reader.shapes if ".lora_" not in name):
        stored, fixed = name.replace(".base_layer", ""), reader.tensor("weight", name)
        if stored not in files or not torch.equal(files[stored].get_tensor(stored).float().reshape(fixed.shape), fixed):
            raise UserError(f"--adapter: {stored} of the run is not that of {base}; leave --adapter out")


def _check_same_function(config: Any, processor: Processor, base: str) -> None:
    """Raise UserError if the fields, pixels or tokens of `base` make another function of the same weights."""
    folder = fetch_folder(base)
    theirs = type(config).from_dict(read_object(folder / "config.json"))
    ours, others = _flat(config.to_dict()), _flat(theirs.to_dict())
    if isinstance(processor, ProcessorMixin):
        pixels, stored = processor.image_processor, pixel_fields(folder)
        ours |= {name: [*getattr(pixels, name)] for name in ("image_mean", "image_std")}
        others |= {name: stored.get(name) for name in ("image_mean", "image_std")}
        text = getattr(theirs, "caption_config", theirs.text_config)  # a model of two towers has no such property
        tokenizer = with_lower_case(read_tokenizer(folder, config=theirs), text)
        for values, one in ((ours, processor.tokenizer), (others, tokenizer)):
            values["tokenizer entries"], values["tokens"] = one.get_vocab(), one.tokenize(PROBE)
    for name in sorted(ours.keys() & others.keys()):
        if ours[name] != others[name] and not _FREE.search(name):
            raise UserError(
                f"--interpolate {base}: {name} is {others[name]!r:.80} in the base and {ours[name]!r:.80} in the run; "
                "use models of one configuration, processor and tokenizer, such as a start and its fine-tuning"
            )


def _flat(fields: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return the fields of a configuration and of its sections by their whole names."""
    flat = dict[str, Any]()
    for name, value in fields.items():
        is_section = isinstance(value, dict) and name.endswith("_config")
        plain = [*value] if isinstance(value, tuple) else value
        flat |= _flat(value, f"{before}{name}.") if is_section else {before + name: plain}
    return flat


def _mixed(model: PreTrainedModel, read: ReadWeight, base: str, alpha: float) -> ReadWeight:
    """Return a reader of a model's weights between those that `read` returns and those of `base`, in fp32."""
    files, stored = open_weight_file(fetch_folder(base)), exported_names(model)
    for name, weight in model.state_dict().items():
        name, shape = stored[name], weight.shape
        base_shape = list(files[name].get_slice(name).get_shape()) if name in files else None
        if base_shape != list(shape):
            has = f"shape {base_shape}" if base_shape else "no value"
            raise UserError(
                f"--interpolate {base}: weight {name} has {has} in the base and {list(shape)} in the run; use models "
                "of one size and kind"
            )

    def mixed(name: str) -> torch.Tensor:
        weight = files[stored[name]].get_tensor(stored[name]).float()
        check_weight(f"{name} of {base}", weight)
        return torch.lerp(weight, read(name).float(), alpha)

    return mixed


def _write_weights(folder: Path, shapes: dict[str, torch.Size], read: ReadWeight, dtype: torch.dtype) -> None:
    """Write the weights in `dtype`, and fp32 weights also as `bf16`, in the files of `from_pretrained`, one by one."""
    for variant, kind in [("", dtype), *([(".bf16", torch.bfloat16)] if dtype == torch.float32 else [])]:

        def checked(name: str, kind: torch.dtype = kind) -> torch.Tensor:
            weight = read(name)
            check_weight(name, weight)
            return weight.to(kind).reshape(shapes[name])

        weights = {name: torch.empty(shape, dtype=kind, device="meta") for name, shape in shapes.items()}
        split = split_torch_state_dict_into_shards(
            weights, filename_pattern=f"model{variant}{{suffix}}.safetensors", max_shard_size=MAX_SHARD_SIZE
        )
        for file, names in split.filename_to_tensors.items():
            progress = each(names, f"writing {file}", "tensors", delay=2, leave=False)
            write_tensors(folder / file, {name: (kind, shapes[name]) for name in names}, map(checked, progress))
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            _write_json(folder / f"model.safetensors.index{variant}.json", index, 1)


def _write_json(path: Path, content: object, indent: int = 2) -> None:
    path.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def _write_folder(model: PreTrainedModel, processor: Processor, out_dir: Path, read: ReadWeight) -> Path:
    """Write the configuration, our classes' code, the processor and the weights that `read` returns to `out_dir`."""
    check_replaceable(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    own = {stored: name for name, stored in exported_names(model).items()}
    weights, dtype = model.state_dict(), model.dtype
    shapes = {stored: weights[name].shape for stored, name in own.items()}
    is_ours = isinstance(model, FlipPreTrainedModel)
    compares = isinstance(model, FlipModel) or not is_ours
    if isinstance(model, FlipPreTrainedModel):
        model = _with_code(model)
    with atomic_write(out_dir) as folder:
        if processor is not None:
            processor.save_pretrained(folder)
        if isinstance(processor, ProcessorMixin) and compares:
            for file in _SENTENCE_TRANSFORMER.iterdir():
                shutil.copyfile(file, folder / file.name)
        if not is_ours:
            _write_for_transformers_4(folder, processor)
        with without_bars():
            model.save_pretrained(folder, state_dict={})
        for empty in folder.glob("*.safetensors"):
            empty.unlink()
        _write_weights(folder, shapes, lambda stored: read(own[stored]), dtype)
        for part, about in embedded_towers(model.config).items():
            try:
                tower, other = load_transformers(about["model"].removeprefix("hf:"))
                check_embedded(other, about["model"], part, about)
            except (UserError, OSError) as error:
                _log.warning("%s has no copy of its %s, and evaluations will need it: %s", out_dir, part, error)
            else:
                _copy_tower(tower, folder, part)
    return out_dir


def _copy_tower(tower: Path, folder: Path, part: str) -> None:
    """Copy the files of another library's model that loaders read to subfolder `part` of a model folder, whose
    configuration then names no path of this machine. Pickles are not copied: the name has to load them."""
    if any(tower.glob("*.safetensors")):
        (folder / part).mkdir()
        for file in {file for pattern in LOADED for file in tower.glob(pattern)}:
            shutil.copyfile(file, folder / part / file.name)
        content = read_object(folder / "config.json")
        about = content[part.replace("model", "config")]["embedded_by"]
        about["model"] = public_name(about["model"])
        _write_json(folder / "config.json", content)


def exported_names(model: PreTrainedModel) -> dict[str, str]:
    """Return the name in a model folder of each weight, by its name in the model. Most are the same."""
    if not isinstance(model, VisionTextDualEncoderModel):
        return {name: name for name in model.state_dict()}
    from flipscale.model.masked_families import stored_names as names_of_towers  # imports the models

    return names_of_towers(model)


def _write_for_transformers_4(folder: Path, processor: Any) -> None:
    """Write the names under which transformers 4 looks for an image processor and its own tokenizer classes."""
    processor.image_processor.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    content = read_object(file)
    if content.get("tokenizer_class") == "TokenizersBackend":
        _write_json(file, {**content, "tokenizer_class": "PreTrainedTokenizerFast"})


def _with_code(model: FlipPreTrainedModel) -> FlipPreTrainedModel:
    """Return a model that is saved with its code, under the names by which the Auto classes load it."""
    compares, config, dtype = isinstance(model, FlipModel), model.config, model.dtype
    classes = {"AutoModelForImageClassification": "modeling_flip.FlipForImageClassification"}
    if compares:
        classes["AutoModelForZeroShotImageClassification"] = "modeling_flip.FlipModel"
    if config.decoder_config is not None:
        writes = "modeling_flip_caption.FlipForConditionalGeneration"
        classes["AutoModel"] = "modeling_flip.FlipModel" if compares else writes
        if compares:
            # A model with both losses is saved as one that writes captions; FlipModel loads its own weights from it.
            with torch.device("meta"):
                model = FlipForConditionalGeneration._from_config(config, dtype=dtype)
    model.config.auto_map = {**(getattr(model.config, "auto_map", None) or {}), **classes}
    return model


def check_replaceable(out_dir: Path) -> None:
    """Raise UserError unless a folder is missing, empty, or a model folder without foreign files."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    config = out_dir / "config.json"
    kind = read_object(config).get("model_type") if config.is_file() else None
    # A model of another family without sentence-transformers' files is another program's.
    if family_of(kind) is None or (kind != "flip" and not (out_dir / "modules.json").is_file()):
        raise UserError(f"{out_dir} exists and is not a model folder of flipscale; name another folder or remove it")
    _refuse_others(out_dir, split_own_files(out_dir)[1])


def _refuse_others(out_dir: Path, others: list[str]) -> None:
    if others:
        raise UserError(
            f"{out_dir} holds {', '.join(others[:6])}, which flipscale did not write and an export would remove; name "
            "another folder, or move them away"
        )
