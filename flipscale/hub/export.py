"""The model folder that everybody else loads, with flipscale installed or without."""

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flipscale.data.loader import load_tokenizer
from flipscale.model import FlipConfig, FlipModel, FlipProcessor
from flipscale.training.checkpoint import load_weights
from flipscale.training.recipe import parse_recipe
from flipscale.training.reconstruction import trained_model, without_decoder

# Above it weights are cut into files: the Hub's own client resumes an upload or download by the file.
MAX_SHARD_SIZE = "5GB"


def build_processor(config: FlipConfig, tokenizer: PreTrainedTokenizerBase) -> FlipProcessor:
    """The processor of a model: its short side resized (bicubic) to `image_size`, the centre cut out, its mean and
    deviation; captions cut and padded to `max_position_embeddings` ids.

    The image processor is the PIL one, which needs no torchvision. The folder it is saved to names neither backend:
    transformers reads it with torchvision's where that is installed, and the two differ by one grey level at most.

    Raises:
        ValueError: the tokenizer has more entries than the model has embeddings, or another padding id.
    """
    vision, text = config.vision_config, config.text_config
    if len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, the model's vocab_size is {text.vocab_size}; use the "
            "tokenizer that the model was trained with"
        )
    if tokenizer.pad_token_id != text.pad_token_id:
        raise ValueError(
            f"the tokenizer pads with id {tokenizer.pad_token_id}, the model with pad_token_id {text.pad_token_id}; "
            "use the tokenizer that the model was trained with"
        )
    # A copy: the caller's tokenizer keeps its own length.
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = text.max_position_embeddings
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": vision.image_size},
        crop_size={"height": vision.image_size, "width": vision.image_size},
        image_mean=by_channel(vision.image_mean, vision.num_channels),
        image_std=by_channel(vision.image_std, vision.num_channels),
    )
    return FlipProcessor(image_processor, tokenizer)


def export_checkpoint(checkpoint: Path, out_dir: Path) -> Path:
    """The folder `out_dir`: the model of a run's checkpoint as `export_model` writes it, without its card.

    Raises:
        ValueError: no such checkpoint, or the tokenizer that its recipe names is gone.
    """
    if not (checkpoint / "recipe.yaml").is_file():
        there = sorted(path.name for path in checkpoint.parent.glob("step-*"))
        raise ValueError(f"{checkpoint} is no checkpoint; there are {', '.join(there) or 'none'}")
    recipe = parse_recipe(["--config", str(checkpoint / "recipe.yaml")])
    config = recipe.model_config()
    with no_init_weights():
        model = trained_model(recipe.loss, recipe.mask)(config)
    load_weights(checkpoint, model)
    tokenizer = load_tokenizer(recipe.data.tokenizer, config.text_config.max_position_embeddings)
    return export_model(without_decoder(model).eval(), build_processor(config, tokenizer), out_dir)


def export_model(
    model: FlipModel, processor: FlipProcessor | None, out_dir: Path | str, max_shard_size: str = MAX_SHARD_SIZE
) -> Path:
    """The folder `out_dir`: configuration, weights (safetensors), processor and the code of `flipscale.model`.

    The weights are there twice: as they are (fp32 of a run), which is what loads, and in half the bytes for
    `from_pretrained(..., variant="bf16", dtype=torch.bfloat16)`.

    It loads by `AutoModel`, `AutoProcessor` and `pipeline("zero-shot-image-classification")` with
    `trust_remote_code=True` where flipscale is not installed. Written aside and renamed, so that it is never seen half
    written; a model folder that is there already is replaced, files of its own included.

    Raises:
        ValueError: `out_dir` is something else than a model folder or an empty one.
    """
    out_dir = Path(out_dir)
    _refuse_to_replace(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        # Registering a class names it once; these are what the pipeline and fine-tuning look for.
        model.config.auto_map = {
            **(getattr(model.config, "auto_map", None) or {}),
            "AutoModelForZeroShotImageClassification": "modeling_flip.FlipModel",
            "AutoModelForImageClassification": "modeling_flip.FlipForImageClassification",
        }
        if processor is not None:
            processor.save_pretrained(aside / "new")
        model.save_pretrained(aside / "new", max_shard_size=max_shard_size)
        # In a folder of its own: a second save removes the shards of the first, and names its type in config.json.
        half = {name: w.bfloat16() if w.is_floating_point() else w for name, w in model.state_dict().items()}
        model.save_pretrained(aside / "bf16", state_dict=half, variant="bf16", max_shard_size=max_shard_size)
        for file in (aside / "bf16").glob("*.safetensors*"):
            file.rename(aside / "new" / file.name)
        if out_dir.exists():
            out_dir.rename(aside / "old")
        (aside / "new").rename(out_dir)
    finally:
        shutil.rmtree(aside)
    return out_dir


def by_channel(value: Any, num_channels: int) -> list[float]:
    """A mean or deviation of the configuration, one number a channel."""
    return [float(value)] * num_channels if isinstance(value, int | float) else [float(v) for v in value]


def _refuse_to_replace(out_dir: Path) -> None:
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    config = out_dir / "config.json"
    if not config.is_file() or json.loads(config.read_text()).get("model_type") != FlipConfig.model_type:
        raise ValueError(f"{out_dir} is there already and is no FLIP model folder; name another folder or remove it")
