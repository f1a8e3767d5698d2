"""Convert both towers to ONNX, also in Immich's layout, and compare them with the model in onnxruntime."""

import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerBase, VisionTextDualEncoderModel

from flipscale.hub.card import write_derived_card
from flipscale.hub.export import build_processor, by_channel
from flipscale.hub.loading import load_dual_encoder
from flipscale.io.atomic import new_folder
from flipscale.io.errors import UserError
from flipscale.io.progress import each
from flipscale.model import FlipConfig
from flipscale.model.modeling_flip import normalise_embeds

# Largest difference in any number of a unit embedding, in fp32. Rounding gives about 1e-6, a wrong GELU 4e-5.
TOLERANCE = 1e-5
# Protobuf files cannot be larger; larger weights get a file of their own.
_MAX_FILE_BYTES = 2_000_000_000

# Captions by which tokenizers are compared.
TEXTS = ["a photo of a cat", "Émile's 3 red_apples, <b>&</b> a naïve café!", "猫 UPPER lower 12345", "x " * 200]


class _Graph(NamedTuple):
    """A file to write: its tower, the tower's argument for each input of the graph, and the output."""

    file: str
    tower: str
    inputs: dict[str, str]
    output: str


# The files that Immich's CLIP encoders read, by the names of their inputs; they take the first output.
_IMMICH = (
    _Graph("visual/model.onnx", "vision", {"image": "pixel_values"}, "image_embeds"),
    _Graph("textual/model.onnx", "text", {"text": "input_ids"}, "text_embeds"),
)


class _Embedding(nn.Module):
    """A tower and its projection, with outputs of unit length."""

    def __init__(self, tower: nn.Module, projection: nn.Module, arguments: list[str], pad: int | None):
        super().__init__()
        self.tower = tower
        self.projection = projection
        self.arguments = arguments
        self.pad = pad  # id that takes no part in attention; None if the tower decides

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        given = dict(zip(self.arguments, inputs, strict=True))
        if self.pad is not None and "input_ids" in given:
            given["attention_mask"] = (given["input_ids"] != self.pad).long()
        return normalise_embeds(self.projection(self.tower(**given).pooler_output))


def convert_to_onnx(src: str, dst: Path | str) -> dict[str, float]:
    """Convert the model of the folder or Hub name `src` to the folder `dst`.

    `visual/model.onnx` takes `image`, float32 `(batch, channels, image_size, image_size)`, and `textual/model.onnx`
    takes `text`, int32 `(batch, max_position_embeddings)`: Immich's layout. For the family `flip`, `image_model.onnx`
    takes `pixel_values` instead, and `text_model.onnx` takes `input_ids`, int64, and `attention_mask` if the model uses
    it. Embeddings are `(batch, projection_dim)`, of unit length, for any batch size. The files' metadata has the
    `logit_scale` that turns cosines into logits, and the `logit_bias` if the model adds it. The folder also has the
    processor and the configuration.

    Returns:
        Largest difference of the embeddings from the model's, by file.

    Raises:
        UserError: packages are missing, `src` has no model or no tokenizer that Immich can read, or `dst` exists.
        FloatingPointError: onnxruntime's embeddings differ by more than `TOLERANCE`; nothing is written.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} is not installed; pip install 'flipscale[onnx]'")
    dst = Path(dst)
    with new_folder(dst) as folder:
        model, tokenizer = load_dual_encoder(src)
        values, config = model.loss_values(), model.config
        processor = build_processor(config, tokenizer)
        model = _plain(model.float())
        model.set_attn_implementation("sdpa")
        processor.save_pretrained(folder)
        model.config.save_pretrained(folder)
        _write_for_immich(folder, config, processor.tokenizer, f"model {src!r}")
        metadata = {name: repr(value.item()) for name, value in values.items()}
        graphs = [*_own_graphs(config), *_IMMICH]
        own = " ".join(f"`{file}`" for file, *_ in graphs[:-2])
        facts = {"length": config.caption_config.max_position_embeddings, "dim": config.projection_dim, **metadata}
        write_derived_card(folder, src, dst.name, "onnx", kind=type(model).__name__, own=own, **facts)
        vision, generator = config.vision_config, torch.Generator().manual_seed(0)
        shape = (vision.num_channels, vision.image_size, vision.image_size)
        # Of one and three images. Tracing uses the last, because it would fix a batch size of one.
        images = [{"pixel_values": torch.randn(count, *shape, generator=generator)} for count in (1, 3)]
        batches = {"vision": images, "text": _text_batches(config, processor.tokenizer)}
        return {
            graph.file: _write_and_check(model, graph, batches[graph.tower], folder / graph.file, metadata)
            for graph in each(graphs, "writing", "files")
        }


def _plain(model: Any) -> Any:
    """Return a model of the family `flip`, or transformers' own model with the weights of another family's."""
    if isinstance(model.config, FlipConfig):
        return model
    plain = model.config.exported_class(model.config.exported())
    shapes = {name: weight.shape for name, weight in plain.state_dict().items()}
    plain.load_state_dict({name: model.state_dict()[name].reshape(shape) for name, shape in shapes.items()})
    return plain.eval()


def _own_graphs(config: Any) -> list[_Graph]:
    """Return the files with the inputs of the family `flip`'s own processor."""
    if not isinstance(config, FlipConfig):
        return []
    names = ["input_ids"] if config.text_config.attend_to_padding else ["input_ids", "attention_mask"]
    return [
        _Graph("image_model.onnx", "vision", {"pixel_values": "pixel_values"}, "image_embeds"),
        _Graph("text_model.onnx", "text", {name: name for name in names}, "text_embeds"),
    ]


def _write_for_immich(folder: Path, config: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Write the other files of Immich's layout. Raise UserError if its reading of the tokenizer gives other ids."""
    vision, length = config.vision_config, config.caption_config.max_position_embeddings
    preprocess = {
        "size": [vision.image_size] * 2,
        "mode": "RGB",
        **{name: by_channel(getattr(vision, f"image_{name}"), vision.num_channels) for name in ("mean", "std")},
        "interpolation": "bicubic",
        "resize_mode": "squash" if getattr(config, "squashes", False) else "shortest",
    }
    # open_clip's names, beside the configuration of the model. Immich reads the length only.
    towers = {
        "embed_dim": config.projection_dim,
        "vision_cfg": {"image_size": vision.image_size, "patch_size": vision.patch_size},
        "text_cfg": {"context_length": length, "vocab_size": config.text_config.vocab_size},
    }
    content = {**json.loads((folder / "config.json").read_text(encoding="utf-8")), **towers}
    for name, written in (("config.json", content), ("visual/preprocess_cfg.json", preprocess)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder / "textual")
    file = folder / "textual/tokenizer.json"
    if not file.is_file():
        raise UserError(f"{where}: its tokenizer is a {type(tokenizer).__name__}, without the tokenizer.json for ONNX")
    read, pad = Tokenizer.from_file(str(file)), str(tokenizer.pad_token)
    read.enable_padding(length=length, pad_token=pad, pad_id=read.token_to_id(pad))
    read.enable_truncation(max_length=length)
    for text in TEXTS:
        if read.encode(text).ids != tokenizer(text, padding="max_length", truncation=True, max_length=length).input_ids:
            raise UserError(f"{where}: tokenizer.json alone gives other ids than its tokenizer for {text[:40]!r}")


def _text_batches(config: Any, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, torch.Tensor]]:
    """Return two batches of captions: one half full, then three that are full, of one token and a third full."""
    text, generator = config.caption_config, torch.Generator().manual_seed(0)
    length, end = text.max_position_embeddings, getattr(text, "eos_token_id", None)
    batches = []
    for lengths in ((length // 2,), (length, 1, length // 3)):
        ids = torch.randint(0, text.vocab_size, (len(lengths), length), generator=generator)
        if end is not None and end < text.vocab_size:  # CLIP's text tower pools there
            ids[torch.arange(len(lengths)), torch.tensor(lengths).clamp(min=1) - 1] = end
        mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
        ids = torch.where(mask.bool(), ids, tokenizer.pad_token_id)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@torch.no_grad()
def _write_and_check(
    model: Any, graph: _Graph, batches: list[dict[str, torch.Tensor]], file: Path, metadata: dict[str, str]
) -> float:
    """Write a tower to `file`, and return the largest difference of its embeddings from the tower's."""
    import onnxruntime

    names = ("image_projection", "visual_projection") if graph.tower == "vision" else ("text_projection",)
    projection = next((getattr(model, name) for name in names if hasattr(model, name)), nn.Identity())
    text: Any = model.config.text_config
    module = getattr(model, f"{graph.tower}_model")
    pad = text.pad_token_id if isinstance(model, VisionTextDualEncoderModel) else None
    tower = _Embedding(module, projection, list(graph.inputs.values()), pad).eval()
    # Immich's token ids have 32 bits.
    kind = torch.int32 if "text" in graph.inputs else None
    given = [tuple(batch[name].to(kind) for name in tower.arguments) for batch in batches]
    batch = torch.export.Dim("batch")
    num_bytes = sum(parameter.nbytes for parameter in tower.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about torch's internals
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of four operators if torchvision is missing
        program = torch.onnx.export(
            tower,
            given[-1],
            input_names=list(graph.inputs),
            output_names=[graph.output],
            dynamic_shapes=(tuple({0: batch} for _ in graph.inputs),),
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # because dynamo is true
    program.model.metadata_props.update(metadata)
    program.save(str(file), external_data=num_bytes > _MAX_FILE_BYTES)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    difference = 0.0
    for inputs in given:
        feed = {name: value.numpy() for name, value in zip(graph.inputs, inputs, strict=True)}
        (embeds,) = session.run([graph.output], feed)
        difference = max(difference, (torch.from_numpy(embeds) - tower(*inputs)).abs().max().item())
    if not difference <= TOLERANCE:
        raise FloatingPointError(
            f"{graph.file}: onnxruntime's embeddings differ from the model's by {difference:.2g}, more than "
            f"{TOLERANCE:g}; nothing was written"
        )
    return difference
