"""Load a model from a folder, the Hub or another program, with one clear error."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from flipscale.data.tokenizers import check_tokenizer, read_tokenizer, with_lower_case
from flipscale.engines.device import best_attention
from flipscale.engines.first_weights import model_without_storage
from flipscale.evaluation import foreign_models
from flipscale.evaluation.embedding import ClassifierEmbedder, Embedder
from flipscale.evaluation.whole_images import dummy_batch
from flipscale.io.digests import check_weight
from flipscale.io.errors import UserError, first_line
from flipscale.io.model_folder import check_folder, fetch_folder, pixel_fields, read_object, read_shapes, texts_digest
from flipscale.io.streams import without_bars
from flipscale.model import (
    FlipConfig,
    FlipForConditionalGeneration,
    FlipForImageClassification,
    FlipForQuestionAnswering,
    FlipModel,
    FlipPreTrainedModel,
)
from flipscale.model.configuration_flip import embedded_towers
from flipscale.model.families import config_class, family_of
from flipscale.objectives.captioning import CaptioningFlipModel
from flipscale.start.pretrained_fields import saved_towers

if TYPE_CHECKING:
    from accelerate import Accelerator

UNTRAINED = "untrained:"


def untrained_embedder(folder: str, accelerator: "Accelerator", batch_size: int, num_workers: int) -> Embedder:
    """Return the embedder of a new model with the configuration in `folder` and random weights of seed 0."""
    try:
        config = FlipConfig.from_own_fields(read_object(fetch_folder(folder) / "config.json"))
    except (ValueError, OSError) as error:
        raise UserError(f"{folder} has no configuration of a model ({error}); name a model's folder") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FlipModel(config).eval().to(accelerator.device)
    return Embedder(model, None, accelerator, batch_size, num_workers, name=f"{UNTRAINED}{folder}")


# Embedders of other programs' models, by the prefix of their names.
OTHERS: dict[str, Callable[..., Embedder]] = {
    foreign_models.OPEN_CLIP: foreign_models.open_clip_embedder,
    foreign_models.TRANSFORMERS: foreign_models.transformers_embedder,
    UNTRAINED: untrained_embedder,
}


def load_dual_encoder(name: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return `load_with_tokenizer` of a model of any family with texts. Raise UserError for one without texts, too."""
    model, tokenizer = load_with_tokenizer(name)
    if embedded_towers(model.config):
        raise UserError(
            f"model {name!r} projects features of other models, so only `flipscale evaluate`, `search` and `prepare "
            "embed` take it; name a model with towers of its own"
        )
    if tokenizer is None or (isinstance(model, FlipPreTrainedModel) and not isinstance(model, FlipModel)):
        kind = "captioning" if tokenizer else "classification"
        raise UserError(
            f"model {name!r} is a {type(model).__name__}, which has no text tower; use `flipscale evaluate` with "
            f"--task '{{kind: {kind}, data: TEST_SET}}'"
        )
    return model, tokenizer


def load_with_tokenizer(name: str) -> tuple[FlipPreTrainedModel, PreTrainedTokenizerBase | None]:
    """Return the model of `load_model`, and its tokenizer, which is None for a classifier. Raise as `load_model`, and
    UserError if the tokenizer cannot be read or does not fit."""
    folder, model = load_model(name)
    if isinstance(model, FlipForImageClassification) or "text_model" in embedded_towers(model.config):
        return model, None
    try:
        tokenizer = read_tokenizer(folder, config=model.config)
    except Exception as error:  # the tokenizers library raises Exception itself for damaged files
        raise UserError(
            f"model {name!r} has no tokenizer that can be read ({first_line(error)}); it needs tokenizer.json and "
            "tokenizer_config.json: copy those of its training, or export it again"
        ) from error
    tokenizer = with_lower_case(tokenizer, model.config.caption_config)
    check_tokenizer(tokenizer, model.config.caption_config)
    return model, tokenizer


def load_model(name: str) -> tuple[Path, FlipPreTrainedModel]:
    """Return the folder and the model, fp32 in evaluation mode, of a model folder or Hub name.

    The model is a `FlipModel` (with a decoder if it writes captions too), a captioner or a classifier. Nothing is
    unpickled, and no code of the folder runs. Only the model's own fields of the configuration are read.

    Raises:
        UserError: the folder is missing, incomplete, of a newer version or has only a pickle, or its weights are not
            finite or do not fit the configuration.
        OSError: the Hub cannot be reached.
    """
    kind: type[FlipPreTrainedModel] = FlipModel
    try:
        folder = fetch_folder(name)
        files = check_folder(folder)
        content = read_object(folder / "config.json")
        model_type = content.get("model_type")
        if (name_of_family := family_of(model_type)) is None:
            raise UserError(
                f"its config.json has the model_type {model_type!r}, which is of no family of flipscale; to evaluate a "
                f"model of transformers or timm, name it hf:{name}"
            )
        if name_of_family != "flip":
            family = config_class(name_of_family)
            towers = saved_towers(folder)
            if not pixel_fields(folder):
                raise UserError("it has no preprocessor_config.json, which normalises its images; copy it there")
            config, kind = family.of_towers(towers["vision_config"], towers["text_config"]), family.trained_class
        else:
            config = FlipConfig.from_own_fields(content)
        if content.get("architectures") == [FlipForImageClassification.__name__]:
            kind, config.id2label = FlipForImageClassification, _learned_names(content)
        elif config.answer_config is not None:
            kind = FlipForQuestionAnswering
            if "id2label" in content:
                config.id2label = _learned_names(content)
        elif config.decoder_config is not None:
            kind = FlipForConditionalGeneration if config.text_config is None else CaptioningFlipModel
        stored = {n: shape for file in files for n, shape in read_shapes(file).items()}
        if name_of_family == "towers":
            from flipscale.engines.pretrained_towers import tower_weights  # imports the models

            weights = tower_weights(str(folder), config)
            stored = {n: list(weight.shape) for n, weight in weights.items()}
        # transformers' CLIP has a logit_scale of shape (), and old files have its numbers of positions.
        stored = {n: shape or [1] for n, shape in stored.items() if not n.endswith(".position_ids")}
        if "logit_bias" in stored and not isinstance(config, FlipConfig):
            config.logit_bias_init_value = 0.0  # replaced by the stored bias
        check_shapes(config, stored, kind)
        if name_of_family != "towers":
            weights = {n: weight for file in files for n, weight in load_file(file).items() if n in stored}
        weights = {n: weight.reshape(stored[n]) for n, weight in weights.items()}
        for weight_name, weight in weights.items():
            check_weight(weight_name, weight)
    except (ValueError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"model {name!r} cannot be loaded ({' '.join(str(error).split())})") from error
    with without_bars():
        return folder, kind.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32).eval()


def _learned_names(content: dict[str, Any]) -> dict[int, str]:
    """Return the class names of a head in a config.json. Raise UserError if their numbers are not 0, 1 and so on."""
    names = content.get("id2label")
    if not isinstance(names, dict) or set(names) != {str(index) for index in range(len(names))}:
        raise UserError("id2label in its config.json does not count classes from 0; export it again")
    return {index: str(names[str(index)]) for index in range(len(names))}


def check_shapes(config: FlipConfig, stored: dict[str, list[int]], kind: type[FlipPreTrainedModel]) -> None:
    """Raise UserError if weights of these shapes are missing, unexpected or misshapen, before any is in memory."""
    expected = {name: list(weight.shape) for name, weight in model_without_storage(config, kind).state_dict().items()}
    for fault, names in (
        ("missing", expected.keys() - stored.keys()),
        ("unexpected", stored.keys() - expected.keys()),
        ("misshapen", {name for name in expected if name in stored and expected[name] != stored[name]}),
    ):
        if names:
            name = min(names)
            shapes = f" of shape {stored[name]}, not {expected[name]}" if fault == "misshapen" else ""
            raise UserError(
                f"the weights do not fit its config: {len(names)} {fault} keys, such as {name}{shapes}; download or "
                "export it again"
            )


def open_embedder(
    name: str, accelerator: "Accelerator", batch_size: int = 256, num_workers: int = 0, most_dims: int | None = None
) -> Embedder:
    """Return the embedder of a model, after a trial with a text and an image. Raise UserError if the model cannot be
    loaded, does not embed, or its embeddings have fewer numbers than `most_dims`.

    Args:
        name: model folder or Hub name of ours, `open_clip:NAME,PRETRAINED`, `hf:NAME`, or `untrained:FOLDER` (random
            weights).
    """
    for prefix, open_other in OTHERS.items():
        if name.startswith(prefix):
            embedder = open_other(name.removeprefix(prefix), accelerator, batch_size, num_workers)
            try:
                for weight_name, weight in embedder.model.named_parameters():
                    check_weight(weight_name, weight)
            except ValueError as error:
                raise UserError(f"model {name!r} cannot be loaded ({error})") from error
            return _tried(replace(embedder, files=_files_digest(prefix, name.removeprefix(prefix))), most_dims)
    model, tokenizer = load_with_tokenizer(name)
    model.set_attn_implementation(best_attention(accelerator.device))
    kind = ClassifierEmbedder if isinstance(model, FlipForImageClassification) else Embedder
    embedder = kind(model.to(accelerator.device), tokenizer, accelerator, batch_size, num_workers, name=name)
    embedder = replace(embedder, files=_files_digest("", name))
    return _tried(foreign_models.with_embedded_towers(embedder, name), most_dims)


def _files_digest(prefix: str, name: str) -> str:
    """Return the `texts_digest` of a model, or of the configuration file of an open_clip model."""
    if prefix != foreign_models.OPEN_CLIP:
        return texts_digest(fetch_folder(name))
    place = Path(name.partition(",")[0].removeprefix("local-dir:"))
    if place.is_file():
        return hashlib.sha256(place.read_bytes()).hexdigest()
    return texts_digest(place) if place.is_dir() else ""


def _tried(embedder: Embedder, most_dims: int | None) -> Embedder:
    """Return the embedder after it has embedded a text and an image. Raises as `open_embedder`."""
    device, embeds = embedder.accelerator.device, dict[str, torch.Tensor]()
    try:
        with torch.no_grad(), embedder.accelerator.autocast():
            if "features" in embedder.gives:
                embeds["an image"] = embedder.image_features(**dummy_batch(embedder.decoder()).to(device))
            if embedder.tokenizer is not None and "texts" in embedder.gives:
                embeds["a text"] = embedder.text_features(embedder.tokens(["a photo"]).to(device))
    except Exception as error:  # other programs' tokenizers, processors and models raise any exception
        raise UserError(f"model {embedder.name!r} cannot embed ({first_line(error)}); download it again") from error
    for kind, features in embeds.items():
        if not features.isfinite().all():
            raise UserError(f"model {embedder.name!r} embeds {kind} as NaN or infinite numbers; use another model")
        replace(embedder, dims=most_dims).unit_embeds(features)
    return embedder
