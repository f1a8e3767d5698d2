"""Evaluation of other models, of open_clip and of transformers, with their own preprocessing and tokenizers."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    BatchEncoding,
    PreTrainedTokenizerBase,
)

from flipscale.data.decode import UndecodableImage, open_image
from flipscale.data.samples import wrap_errors
from flipscale.data.tokenizers import check_words, num_entries, with_lower_case
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.whole_images import GREY, Decoder
from flipscale.io.digests import weights_digest
from flipscale.io.errors import UserError, first_line, needed
from flipscale.io.model_folder import check_texts, fetch_folder, read_object, read_shapes
from flipscale.model.configuration_flip import embedded_towers
from flipscale.model.modeling_flip import projected
from flipscale.recipe.data import PRECOMPUTED_TOWERS

OPEN_CLIP, TRANSFORMERS = "open_clip:", "hf:"
_MOST_TOKENS = 512  # of a text tower, which may have positions for books
# Configuration fields that make transformers load other kernels and files.
_LEADING = ("_attn_implementation", "attn_implementation", "experts_implementation", "transformers_weights")


def open_clip_embedder(name: str, accelerator: Accelerator, batch_size: int = 256, num_workers: int = 0) -> Embedder:
    """Return the embedder of a model that open_clip knows, see `load_open_clip`."""
    model, preprocess, tokenizer = load_open_clip(name)
    model = model.to(accelerator.device).eval()
    settings = (accelerator, batch_size, num_workers)
    return OpenClipEmbedder(model, tokenizer, *settings, name=f"{OPEN_CLIP}{name}", preprocess=preprocess)


def load_open_clip(name: str) -> tuple[Any, Any, Any]:
    """Return a model that open_clip knows, the preprocessing of its images, and its tokenizer.

    Args:
        name: `NAME,PRETRAINED`, such as `ViT-B-16,laion2b_s34b_b88k`; `hf-hub:ORG/NAME`; or `local-dir:FOLDER`. NAME
            may be a JSON file with a model configuration, PRETRAINED a file of weights.
    """
    open_clip = needed("open_clip", "open_clip is not installed", "'flipscale[peers]'")
    name, _, pretrained = name.partition(",")
    folder = Path(name.removeprefix("local-dir:"))
    with _loading(name):
        if name.endswith(".json") and Path(name).is_file():
            read_object(Path(name))
            open_clip.add_model_config(name)
            name = Path(name).stem
        tags = [] if pretrained or ":" in name else open_clip.list_pretrained_tags_by_model(name)
        if name.startswith("local-dir:") and folder.is_dir():
            check_texts(folder)
    if not pretrained and ":" not in name:
        file = name if Path(name).is_file() else "FILE.pt"
        known = f"use one of {', '.join(tags)}" if tags else f"a checkpoint is open_clip:CONFIG.json,{file}"
        raise UserError(f"open_clip:{name} names no weights; add them after a comma: {known}")
    with _loading(name):  # reads pickles as weights only
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained or None, weights_only=True)
        tokenizer = open_clip.get_tokenizer(name)
        if isinstance(theirs := getattr(tokenizer, "tokenizer", None), PreTrainedTokenizerBase):
            check_words(theirs)
        return model, preprocess, tokenizer


def transformers_embedder(name: str, accelerator: Accelerator, batch_size: int = 256, num_workers: int = 0) -> Embedder:
    """Return the embedder of a model that transformers' `AutoModel` loads, in fp32. Its own code never runs.

    `name` is a Hub name, such as `openai/clip-vit-base-patch32`, or a folder. It is a dual encoder, or one tower: an
    image model (also timm's), a text encoder or a decoder language model.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    full_name = f"{TRANSFORMERS}{name}"
    folder, model = load_transformers(name)
    methods = [method for method in ("get_image_features", "get_text_features") if hasattr(model, method)]
    if len(methods) == 1 or model.config.is_encoder_decoder:
        raise UserError(
            f"{full_name} is a {type(model).__name__}, which is neither a dual encoder of images and texts, such as a "
            "CLIP or a SigLIP, nor an image tower, a text encoder or a decoder language model"
        )
    is_images = model.main_input_name == "pixel_values"
    reader: Any = AutoProcessor if methods else AutoImageProcessor if is_images else AutoTokenizer
    try:
        with no_code_of_models():
            processor = reader.from_pretrained(folder, trust_remote_code=False)
        tokenizer = getattr(processor, "tokenizer", None) if methods else None if is_images else processor
        if tokenizer is not None:
            check_words(tokenizer)
    except Exception as error:  # transformers raises any type for bad files
        raise UserError(f"{full_name} has no processor that can be read ({first_line(error)})") from error
    rows = getattr(model.config.get_text_config(), "vocab_size", None)
    if tokenizer is not None and rows and (entries := num_entries(tokenizer)) > rows:
        raise UserError(
            f"{full_name} has a tokenizer of {entries} words, and its text tower a vocabulary of {rows}; copy "
            "the tokenizer of its training there"
        )
    for part in ("image_processor", "tokenizer") if methods else ():
        if getattr(processor, part, None) is None:
            raise UserError(f"{full_name} has no {part}; it needs preprocessor_config.json and its tokenizer's files")
    model = model.to(accelerator.device).eval()
    settings = (accelerator, batch_size, num_workers)
    if not methods:
        if is_images:
            return ImageTowerEmbedder(model, processor, *settings, name=full_name)
        return TextTowerEmbedder(model, with_lower_case(processor, model.config), *settings, name=full_name)
    processor.tokenizer = with_lower_case(processor.tokenizer, model.config.get_text_config())
    return TransformersEmbedder(model, processor, *settings, name=full_name)


def load_transformers(name: str) -> tuple[Path, Any]:
    """Return the folder and the model of `transformers_embedder`. Raise UserError if it cannot be loaded or lacks
    weights other than a pooler's, and OSError if the Hub cannot be reached."""
    from transformers import AutoConfig, AutoModel

    full_name = f"{TRANSFORMERS}{name}"
    try:
        folder = fetch_folder(name)
        if not any(folder.glob("*.safetensors")):
            folder = fetch_folder(name, ("pytorch_model*.bin", "pytorch_model.bin.index.json"))
        _check_foreign(folder)
        options: dict[str, Any] = {"trust_remote_code": False, "dtype": torch.float32, "output_loading_info": True}
        with no_code_of_models():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            if "num_classes" in (arguments := getattr(config, "model_args", None) or {}):
                del arguments["num_classes"]  # newer timm writes it, and transformers passes its own
            if hasattr(config, "mask_ratio"):
                config.mask_ratio = 0.0  # a masked autoencoder would hide patches from its own encoder
            model, report = AutoModel.from_pretrained(folder, config=config, **options)
    except Exception as error:  # transformers raises any type
        if isinstance(error, OSError) and not Path(name).is_dir():
            raise OSError(f"{full_name} cannot be loaded ({first_line(error)})") from error
        raise UserError(f"{full_name} cannot be loaded ({first_line(error)})") from error
    missing = report["missing_keys"]
    if missing and all(key.startswith("pooler.") for key in missing):
        model.pooler = None  # a classifier or a masked language model is saved without one
    elif missing:
        raise UserError(
            f"{full_name} lacks {len(missing)} of the weights of its config, such as {min(missing)}; download it again"
        )
    return folder, model


@contextmanager
def no_code_of_models() -> Iterator[None]:
    """Make transformers refuse code that a model brings, without a question, whatever the model's files allow."""
    from transformers import dynamic_module_utils as transformers_code

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise UserError("it brings its own code, which never runs")

    before = transformers_code.get_class_in_module, transformers_code.TIME_OUT_REMOTE_CODE
    transformers_code.get_class_in_module, transformers_code.TIME_OUT_REMOTE_CODE = refuse, 0
    try:
        yield
    finally:
        transformers_code.get_class_in_module, transformers_code.TIME_OUT_REMOTE_CODE = before


def _check_foreign(folder: Path) -> None:
    check_texts(folder)
    if (folder / "adapter_config.json").exists():
        raise UserError("it is an adapter of another model; name a folder with the whole model")
    config = read_object(folder / "config.json")
    for name in _LEADING:
        if config.get(name) is not None:
            raise UserError(f"config.json sets {name}, which is not allowed for other models; remove it")
    for file in folder.glob("*.index.json"):
        for name in set(dict(read_object(file).get("weight_map") or {}).values()):
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{file.name} names {name!r:.80}, which is not a file of the folder; download it again")
    for file in folder.glob("*.safetensors"):
        read_shapes(file)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        with no_code_of_models():
            yield
    except Exception as error:  # open_clip, timm, transformers and torch raise any type
        raise UserError(f"open_clip model {name!r} cannot be loaded ({first_line(error)})") from error


@dataclass(frozen=True)
class OpenClipEmbedder(Embedder):
    """An embedder of open_clip's model and tokenizer; `preprocess` turns an image into its tensor."""

    preprocess: Callable[[Image.Image], torch.Tensor] = field(kw_only=True)

    @property
    def image_size(self) -> int:
        size = self.model.visual.image_size
        return size if isinstance(size, int) else size[0]

    @property
    def crop(self) -> str:
        mode = getattr(self.model.visual, "preprocess_cfg", {}).get("resize_mode", "shortest")
        return {"shortest": "resize, crop", "longest": "resize, pad"}.get(mode, mode)

    def decoder(self) -> Decoder:
        return partial(_preprocessed, self.preprocess)

    def image_features(self, **columns: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(columns["image"])

    def pooled_features(self, **columns: torch.Tensor) -> torch.Tensor:
        tower = _without_projection(self.model.visual)
        if tower is None:
            raise UserError(
                f"{self.name} has a {type(self.model.visual).__name__}, whose features before the projection are not "
                "known; use features: embeds, or a model with a ViT"
            )
        return tower(columns["image"])

    def tokens(self, texts: list[str]) -> torch.Tensor:
        return self.tokenizer(texts)

    def text_features(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(batch)

    def pooled_text_features(self, batch: torch.Tensor) -> torch.Tensor:
        tower = getattr(self.model, "text", self.model)
        if getattr(tower, "text_projection", None) is None:
            raise UserError(f"{self.name} has a {type(tower).__name__} without a text_projection; use features: embeds")
        tower = _without(tower, "text_projection")
        return getattr(tower, "encode_text", tower)(batch)


@dataclass(frozen=True)
class TransformersEmbedder(Embedder):
    """An embedder of a model of transformers; its `tokenizer` is the whole processor. SigLIP has no projection after
    the image tower, so there both features are the same."""

    @property
    def image_size(self) -> int:
        """Number of pixels along each side; for a SigLIP2 of any shape, those of a square with as many patches."""
        vision = self.model.config.vision_config
        size = getattr(vision, "image_size", None) or round(vision.num_patches**0.5) * vision.patch_size
        return size if isinstance(size, int) else size[0]

    @property
    def crop(self) -> str:
        return "resize, crop" if getattr(self.tokenizer.image_processor, "do_center_crop", None) else "squash"

    def decoder(self) -> Decoder:
        return partial(_processed, self.tokenizer.image_processor)

    def pooled_features(self, **columns: torch.Tensor) -> torch.Tensor:
        if not hasattr(self.model, "vision_model"):
            raise UserError(
                f"{self.name} is a {type(self.model).__name__} without a vision_model, so its features before the "
                "projection are not known; use features: embeds, or a CLIP or SigLIP"
            )
        return super().pooled_features(**columns)

    def tokens(self, texts: list[str]) -> Any:
        """Return the tokenizer's columns, `(texts, length)` each. SigLIP was trained to attend to the padding, so all
        its texts have the same length."""
        config = self.model.config
        padding = "max_length" if "siglip" in config.model_type else True
        lengths = {"padding": padding, "truncation": True, "max_length": config.text_config.max_position_embeddings}
        columns = self.tokenizer.tokenizer(texts, **lengths, return_tensors="pt")
        if config.model_type == "siglip":
            columns.pop("attention_mask", None)  # of SigLIP 2's tokenizer
        return columns

    def text_features(self, batch: Any) -> torch.Tensor:
        return self.model.get_text_features(**batch).pooler_output


@dataclass(frozen=True)
class ImageTowerEmbedder(Embedder):
    """An embedder of an image tower; its `tokenizer` is its image processor. Both features of an image are the pooled
    output. A tower without it gives the state of its class token, or the mean over its patches."""

    @property
    def gives(self) -> tuple[str, ...]:
        return ("features",)

    @property
    def image_size(self) -> int:
        """Number of pixels along each side; for NaFlex, whose images are rows of patches, those of a square."""
        config, pixels = self.model.config, self.decoder()(GREY, 0)["pixel_values"]
        return pixels.shape[-1] if pixels.ndim == 3 else round(len(pixels) ** 0.5) * config.patch_size

    @property
    def crop(self) -> str:
        return "by its own processor"

    def decoder(self) -> Decoder:
        return partial(_processed, self.tokenizer)

    def image_features(self, **columns: torch.Tensor) -> torch.Tensor:
        output = self.model(**columns)
        if (pooled := getattr(output, "pooler_output", None)) is not None:
            return pooled.flatten(1)
        states = output.last_hidden_state
        if states.ndim != 3:
            raise UserError(f"{self.name} is a {type(self.model).__name__} without a pooled output; use another model")
        has_class_token = any(name.endswith("cls_token") for name, _ in self.model.named_parameters())
        return states[:, 0] if has_class_token else states.mean(dim=1)

    def pooled_features(self, **columns: torch.Tensor) -> torch.Tensor:
        return self.image_features(**columns)


@dataclass(frozen=True)
class TextTowerEmbedder(Embedder):
    """An embedder of a text tower. Both features of a text are the hidden state of its last token in a decoder language
    model (ShareLock, arXiv 2410.07173); in an encoder, the pooled output, or without one the mean over the tokens."""

    @property
    def gives(self) -> tuple[str, ...]:
        return ("texts",)

    @property
    def image_size(self) -> int:
        return 1  # images limit no batch

    @property
    def crop(self) -> str:
        return self._refuse_images()

    def decoder(self) -> Decoder:
        return self._refuse_images()

    def _refuse_images(self) -> NoReturn:
        raise UserError(f"{self.name} embeds no images; use it for `flipscale prepare embed --towers texts`")

    def at(self, image_size: int | None) -> Embedder:
        return self if image_size is None else self._refuse_images()

    def tokens(self, texts: list[str]) -> Any:
        """Return token ids and masks, `(texts, length)`, padded on the right and cut at 512 tokens at most."""
        config, tokenizer = self.model.config, self.tokenizer
        positions = getattr(config, "max_position_embeddings", None) or _MOST_TOKENS
        # RoBERTa and its kin number positions from the padding's id on, which is 1.
        length = min(positions - 2 * (config.pad_token_id == 1), tokenizer.model_max_length, _MOST_TOKENS)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        # SigLIP was trained to attend to the padding, without a mask.
        is_siglip = config.model_type == "siglip_text_model"
        padding, names = "max_length" if is_siglip else True, ["input_ids", "attention_mask"][: 1 if is_siglip else 2]
        lengths = {"padding": padding, "padding_side": "right", "truncation": True, "max_length": length}
        columns = tokenizer(texts, **lengths, return_tensors="pt", return_attention_mask=True)
        return BatchEncoding({name: columns[name] for name in names})

    def text_features(self, batch: Any) -> torch.Tensor:
        output = self.model(**batch)
        if (pooled := getattr(output, "pooler_output", None)) is not None:
            return pooled
        states, mask = output.last_hidden_state, batch["attention_mask"]
        if self._is_decoder:
            return states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1]
        return (states * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)

    @property
    def _is_decoder(self) -> bool:
        """Whether a token sees only those before it."""
        kind, both_ways = type(self.model.config), getattr(self.model.config, "use_bidirectional_attention", False)
        return kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING and not both_ways


@dataclass(frozen=True)
class AlignedEmbedder(Embedder):
    """An embedder of a `FlipModel` that projects the pooled features of two other embedders."""

    of_images: Embedder = field(kw_only=True)
    of_texts: Embedder = field(kw_only=True)

    def side(self, tower: str) -> Embedder:
        return {"images": self.of_images, "texts": self.of_texts}[tower]

    def at(self, image_size: int | None) -> Embedder:
        of_images = self.of_images.at(image_size)
        return replace(self, of_images=of_images, pixels=of_images.pixels)

    @property
    def image_size(self) -> int:
        return self.of_images.image_size

    @property
    def crop(self) -> str:
        return self.of_images.crop

    @property
    def mask(self) -> dict[str, Any]:
        return self.of_images.mask

    def decoder(self) -> Decoder:
        return self.of_images.decoder()

    def image_features(self, **columns: torch.Tensor) -> torch.Tensor:
        if self.of_images.is_ours:
            return self.of_images.image_features(**columns)
        return projected(self.model.image_projection, self.pooled_features(**columns)).pooler_output

    def pooled_features(self, **columns: torch.Tensor) -> torch.Tensor:
        return self.of_images.pooled_features(**columns)

    def tokens(self, texts: list[str]) -> Any:
        return self.of_texts.tokens(texts)

    def text_features(self, batch: Any) -> torch.Tensor:
        return projected(self.model.text_projection, self.pooled_text_features(batch)).pooler_output

    def pooled_text_features(self, batch: Any) -> torch.Tensor:
        return self.of_texts.pooled_text_features(batch)


def with_embedded_towers(embedder: Embedder, name: str | None = None) -> Embedder:
    """Return the embedder of a model with the towers of `FlipVisionConfig.embedded_by`, from their copies in the model
    folder `name`, or else by their names. Raise UserError if one cannot be loaded, or has other weights."""
    sides, settings = dict[str, Embedder](), (embedder.accelerator, embedder.batch_size, embedder.num_workers)
    for part, about in embedded_towers(embedder.model.config).items():
        copy = fetch_folder(name, [f"{part}/*"]) / part if name else None
        place = str(copy) if copy and copy.is_dir() else about["model"].removeprefix(TRANSFORMERS)
        sides[part] = transformers_embedder(place, *settings)
        check_embedded(sides[part].model, sides[part].name, part, about)
    if not sides:
        return embedder
    same = {known.name: getattr(embedder, known.name) for known in fields(Embedder)}
    images, texts = (sides.get(part, embedder) for part in PRECOMPUTED_TOWERS.values())
    return AlignedEmbedder(**{**same, "tokenizer": texts.tokenizer}, of_images=images, of_texts=texts)


def check_embedded(model: Any, name: str, part: str, about: Mapping[str, str]) -> None:
    """Raise UserError if a model has other weights than tower `part`, whose `embedded_by` is `about`."""
    digest = weights_digest(getattr(model, part, model).parameters())
    if digest != about["weights_digest"]:
        had = f"{name} has weights {digest:.12}, and {about['model']} had {about['weights_digest']:.12}"
        raise UserError(f"{had} when its features were stored; use that model, or embed again")


def _rgb_image(encoded: bytes) -> Image.Image:
    """Return an image as CLIP_benchmark and most users of these models read it: without its transparency, as stored."""
    with wrap_errors(UndecodableImage):
        return open_image(encoded).convert("RGB")


def _processed(image_processor: Callable[..., Any], encoded: bytes, row: int) -> dict[str, np.ndarray]:
    columns = image_processor(images=[_rgb_image(encoded)], return_tensors="pt")  # timm's gives no arrays
    return {name: np.ascontiguousarray(column[0]) for name, column in columns.items()}


def _preprocessed(preprocess: Callable[[Image.Image], torch.Tensor], encoded: bytes, row: int) -> dict[str, np.ndarray]:
    return {"image": preprocess(_rgb_image(encoded)).numpy()}


def _without(module: Any, name: str) -> Any:
    """Return a module whose part `name` is None: a copy of its dictionaries, not of its weights."""
    module = copy.copy(module)
    parts = "_parameters" if name in module._parameters else "_modules"
    setattr(module, parts, {**getattr(module, parts), name: None})
    return module


def _without_projection(visual: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return a function from images to the tower's features before the projection; None for an unknown projection."""
    if isinstance(getattr(visual, "proj", None), torch.nn.Parameter):
        return _without(visual, "proj")
    if not hasattr(visual, "trunk"):
        return None
    # In timm's models the projection is a layer of the head or the trunk's own classifier, or there is none.
    pools = [layer for name, layer in visual.head.named_children() if name not in ("drop", "proj", "mlp")]
    head = torch.nn.Sequential(*pools)
    return lambda images: head(visual.trunk.forward_head(visual.trunk.forward_features(images), pre_logits=True))
