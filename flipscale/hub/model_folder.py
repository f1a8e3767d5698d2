"""Write the model folder that others load, with or without flipscale installed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flipscale.data.tokenizers import begin_and_end, check_tokenizer, load_tokenizer
from flipscale.engines.checkpoint import CheckpointReader, list_checkpoints
from flipscale.engines.checkpoint_integrity import require_whole
from flipscale.evaluation.class_names import kept_class_names
from flipscale.hub.push import other_files
from flipscale.hub.sentence_transformer import write_sentence_transformer
from flipscale.io.atomic import atomic_write
from flipscale.io.digests import check_weight, write_tensors
from flipscale.io.errors import UserError
from flipscale.io.lock import FolderLock
from flipscale.io.model_folder import check_folder, fetch_folder, read_object
from flipscale.io.quiet import without_bars
from flipscale.model import (
    FlipConfig,
    FlipForConditionalGeneration,
    FlipModel,
    FlipPreTrainedModel,
    FlipProcessor,
)
from flipscale.training.recipe import parse_recipe

# Larger weights are split into files, because the Hub's client resumes uploads and downloads file by file.
MAX_SHARD_SIZE = "5GB"


def build_processor(config: FlipConfig, tokenizer: PreTrainedTokenizerBase) -> FlipProcessor:
    """Return the processor of a model.

    It resizes the short side of an image to `image_size` (bicubic), crops the centre and normalises by the model's mean
    and standard deviation. It cuts and pads captions to `max_position_embeddings` ids. The tokens that begin and end
    captions which the model writes are special tokens of its tokenizer.

    The image processor is transformers' PIL one, which needs no torchvision. The saved files name no backend: where
    torchvision is installed, transformers loads its one instead. The two differ by one grey level at most.

    Raises:
        ValueError: the tokenizer has more entries than the model has embeddings, or another padding id.
    """
    check_tokenizer(tokenizer, config.caption_config)
    # A copy, because the caller's tokenizer keeps its length.
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = config.caption_config.max_position_embeddings
    if config.decoder_config is not None:
        # Known as special tokens, they are left out of what captions are decoded to.
        for name, token in begin_and_end(tokenizer).items():
            setattr(tokenizer, name.removesuffix("_id"), tokenizer.convert_ids_to_tokens(token))
    return FlipProcessor(build_image_processor(config), tokenizer)


def build_image_processor(config: FlipConfig) -> CLIPImageProcessorPil:
    """Return the image processor of a model, as `build_processor` has it."""
    vision = config.vision_config
    return CLIPImageProcessorPil(
        size={"shortest_edge": vision.image_size},
        crop_size={"height": vision.image_size, "width": vision.image_size},
        image_mean=by_channel(vision.image_mean, vision.num_channels),
        image_std=by_channel(vision.image_std, vision.num_channels),
    )


def export_model(
    model: FlipModel, processor: FlipProcessor | None, out_dir: Path | str, max_shard_size: str = MAX_SHARD_SIZE
) -> Path:
    """Write configuration, weights (safetensors), processor and the code of `flipscale.model` to the folder `out_dir`.

    fp32 weights are written twice: as they are, which is what loads by default, and in half the bytes for
    `from_pretrained(..., variant="bf16", dtype=torch.bfloat16)`.

    Where flipscale is not installed, the folder loads by `AutoModel`, `AutoProcessor` and
    `pipeline("zero-shot-image-classification")` with `trust_remote_code=True`. It is written aside and renamed, so it
    is never seen half written. A model folder that exists is replaced, with all files in it.

    Raises:
        ValueError: `out_dir` exists and is neither a model folder nor empty, or another process writes it.
    """
    weights = model.state_dict()
    shapes = {name: weight.shape for name, weight in weights.items()}

    def save(folder: Path) -> None:
        _write_weights(folder, shapes, lambda name: weights[name].cpu(), model.dtype, max_shard_size)

    return _write_folder(model, processor, Path(out_dir), save)


class Interpolation(NamedTuple):
    """Weights between those of two models: WiSE-FT (arXiv 2109.01903), which keeps of a fine-tuned model what it lost
    on other tasks.

    Args:
        base: a run, a model folder or a Hub name, such as the one that the fine-tuning started from.
        alpha: the share of the fine-tuned weights; at 0 they are the base's.
    """

    base: str
    alpha: float

    def applied(self, shapes: dict[str, torch.Size], read: Callable[[str], torch.Tensor]) -> Callable:
        """Return what reads a weight between the base's and what `read` returns, in fp32.

        Raises:
            ValueError: the base is no model, or lacks a weight of these shapes.
        """
        files = {name: file for path in check_folder(fetch_folder(self.base)) for name, file in _opened(path).items()}
        for name, shape in shapes.items():
            found = list(files[name].get_slice(name).get_shape()) if name in files else None
            if found != list(shape):
                has = "no such weight" if found is None else f"one of shape {found}"
                raise UserError(
                    f"--interpolate {self.base}: the run has the weight {name} of shape {list(shape)}, and the base "
                    f"has {has}; interpolate between models of one size and kind"
                )

        def between(name: str) -> torch.Tensor:
            tuned, base = read(name).float(), files[name].get_tensor(name).float()
            check_weight(f"{name} of {self.base}", base)
            return torch.lerp(base, tuned, self.alpha)

        return between


def _opened(path: Path) -> dict[str, Any]:
    file = safe_open(path, "pt")
    return dict.fromkeys(file.keys(), file)


def export_checkpoint(
    checkpoint: Path, out_dir: Path, dtype: torch.dtype = torch.float32, between: Interpolation | None = None
) -> Path:
    """Write the model of a run's checkpoint to the folder `out_dir` as `export_model` does, in `dtype`, without a card.

    If the recipe keeps averages of the weights, these are exported; with `between`, a mixture with another model's. One
    tensor is in memory at a time, whatever engine and number of processes wrote the checkpoint.

    Raises:
        OSError: the checkpoint is damaged or cannot be read.
        ValueError: the checkpoint does not exist, its recipe's tokenizer cannot be loaded, `out_dir` exists and is
            neither a model folder nor empty, another process writes it, or as `Interpolation.applied`.
    """
    if not checkpoint.exists():
        there = [path.name for path in list_checkpoints(checkpoint.parents[1])]
        raise UserError(f"{checkpoint} is no checkpoint; there are {', '.join(there) or 'none'}")
    require_whole(checkpoint)
    recipe = parse_recipe(["--config", str(checkpoint / "recipe.yaml")], is_saved=True)
    config, reader = recipe.model_config(), CheckpointReader(checkpoint)
    objective = recipe.objective()
    processor: FlipProcessor | CLIPImageProcessorPil
    if objective.takes_text:
        tokenizer = load_tokenizer(recipe.data.tokenizer, config.caption_config.max_position_embeddings)
        processor = build_processor(config, tokenizer)
    else:
        processor = build_image_processor(config)
    if objective.num_labels is not None:
        names = kept_class_names(checkpoint.parents[1], objective.num_labels)
        config.id2label, config.label2id = dict(enumerate(names)), {name: place for place, name in enumerate(names)}
    with torch.device("meta"):
        model = objective.exported_class._from_config(config, dtype=dtype)
    kind = "weight" if recipe.optim.ema_decay is None else "ema"
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}

    def read(name: str) -> torch.Tensor:
        return reader.tensor(kind, name)

    read_weight = read if between is None else between.applied(shapes, read)

    def save(folder: Path) -> None:
        _write_weights(folder, shapes, read_weight, dtype, MAX_SHARD_SIZE)

    return _write_folder(model, processor, out_dir, save)


def _write_weights(
    folder: Path,
    shapes: dict[str, torch.Size],
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    max_shard_size: str,
) -> None:
    """Write the weights that `read` returns by name, in `dtype`; fp32 weights also as the variant `bf16`.

    Files are named and sharded as `from_pretrained` expects. One tensor is in memory at a time.
    """
    for variant, kind in [("", dtype), *([(".bf16", torch.bfloat16)] if dtype == torch.float32 else [])]:
        weights = {name: torch.empty(shape, dtype=kind, device="meta") for name, shape in shapes.items()}
        split = split_torch_state_dict_into_shards(
            weights, filename_pattern=f"model{variant}{{suffix}}.safetensors", max_shard_size=max_shard_size
        )
        for file, names in split.filename_to_tensors.items():
            layout = {name: (kind, shapes[name]) for name in names}
            bar = tqdm(names, file, leave=False, delay=2, disable=None)
            write_tensors(folder / file, layout, (_checked(name, read(name)).to(kind) for name in bar))
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / f"model.safetensors.index{variant}.json").write_text(
                json.dumps(index, indent=1) + "\n", encoding="utf-8"
            )


def _checked(name: str, weight: torch.Tensor) -> torch.Tensor:
    check_weight(name, weight)
    return weight


def _write_folder(
    model: FlipPreTrainedModel,
    processor: FlipProcessor | CLIPImageProcessorPil | None,
    out_dir: Path,
    save: Callable[[Path], None],
) -> Path:
    """Write the configuration, the code and the processor to `out_dir`, and the weights, which `save` writes."""
    _refuse_to_replace(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    compares = isinstance(model, FlipModel)
    if compares and model.config.decoder_config is not None:
        # The folder of both losses is that of a model that writes captions; FlipModel takes its own weights of it.
        with torch.device("meta"):
            model = FlipForConditionalGeneration._from_config(model.config, dtype=model.dtype)
    model.config.auto_map = {**(getattr(model.config, "auto_map", None) or {}), **_auto_map(model.config, compares)}
    lock = FolderLock(out_dir.with_name(f".{out_dir.name}.lock"), f"writes {out_dir}")
    lock.acquire()
    try:
        with atomic_write(out_dir) as folder:
            if processor is not None:
                processor.save_pretrained(folder)
            if isinstance(processor, FlipProcessor) and compares:
                write_sentence_transformer(folder)
            with without_bars():
                model.save_pretrained(folder, state_dict={})
            for empty in folder.glob("*.safetensors"):
                empty.unlink()
            save(folder)
    finally:
        lock.release()
    return out_dir


def _auto_map(config: FlipConfig, compares: bool) -> dict[str, str]:
    """Return the names that pipelines and fine-tuning look for; registering a class names it once.

    Args:
        compares: whether the weights of a FlipModel are there.
    """
    found = {"AutoModelForImageClassification": "modeling_flip.FlipForImageClassification"}
    if compares:
        found["AutoModelForZeroShotImageClassification"] = "modeling_flip.FlipModel"
    if config.decoder_config is not None:
        writes = "modeling_flip_caption.FlipForConditionalGeneration"
        found["AutoModel"] = "modeling_flip.FlipModel" if compares else writes
    return found


def by_channel(value: Any, num_channels: int) -> list[float]:
    """Return a mean or standard deviation of the configuration as one number for each channel."""
    return [float(value)] * num_channels if isinstance(value, int | float) else [float(v) for v in value]


def _refuse_to_replace(out_dir: Path) -> None:
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    config = out_dir / "config.json"
    if not config.is_file() or read_object(config).get("model_type") != FlipConfig.model_type:
        raise UserError(f"{out_dir} exists and is not a FLIP model folder; name another folder or remove it")
    if others := other_files(out_dir):
        raise UserError(
            f"{out_dir} holds {', '.join(others[:6])}, which flipscale did not write and an export would remove; name "
            "another folder, or move that away"
        )
