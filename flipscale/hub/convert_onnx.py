"""Convert both towers to ONNX, and compare them with the model in onnxruntime."""

import importlib.util
import warnings
from pathlib import Path

import torch
from torch import nn

from flipscale.hub.card import derived_card
from flipscale.hub.export import build_processor
from flipscale.hub.loading import load_flip
from flipscale.io.atomic import new_folder
from flipscale.io.errors import UserError
from flipscale.io.progress import each
from flipscale.model import FlipConfig
from flipscale.model.modeling_flip import normalise_embeds

# Largest difference in any number of a unit embedding, in fp32. Rounding gives about 1e-6, a wrong GELU 4e-5.
TOLERANCE = 1e-5

_CARD = """The two towers of a FLIP model as ONNX, compared with the model in onnxruntime.

```python
import onnxruntime

image_model = onnxruntime.InferenceSession("image_model.onnx")
text_model = onnxruntime.InferenceSession("text_model.onnx")
```

`image_model` takes `pixel_values`. `text_model` takes `input_ids`, and `attention_mask` if it has that input. The
processor in this folder makes all of them. The outputs `image_embeds` and `text_embeds` have unit length; logits are
{logit_scale} times their products{and_bias}.
"""

# Protobuf files cannot be larger; larger weights get a file of their own.
_MAX_FILE_BYTES = 2_000_000_000


class _Embedding(nn.Module):
    """A tower and its projection, with outputs of unit length."""

    def __init__(self, tower: nn.Module, projection: nn.Module):
        super().__init__()
        self.tower = tower
        self.projection = projection

    def embed(self, **inputs: torch.Tensor | None) -> torch.Tensor:
        return normalise_embeds(self.projection(self.tower(**inputs).pooler_output))


class _ImageEmbedding(_Embedding):
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.embed(pixel_values=pixel_values)


class _TextEmbedding(_Embedding):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.embed(input_ids=input_ids, attention_mask=attention_mask)


def convert_to_onnx(src: str, dst: Path | str) -> dict[str, float]:
    """Convert the model of the folder or Hub name `src` to the folder `dst`.

    `image_model.onnx` takes `pixel_values` `(batch, channels, image_size, image_size)` and returns `image_embeds`.
    `text_model.onnx` takes `input_ids` `(batch, max_position_embeddings)`, and `attention_mask` if the model uses it,
    and returns `text_embeds`. Embeddings are `(batch, projection_dim)`, of unit length, for any batch size. The files'
    metadata has the `logit_scale` that turns cosines into logits, and the `logit_bias` if the model adds it. The folder
    also has the processor and the configuration.

    Returns:
        Largest difference of each tower's embeddings from the model's, by tower.

    Raises:
        UserError: packages are missing, `src` has no model or no tokenizer, or `dst` exists.
        FloatingPointError: onnxruntime's embeddings differ by more than `TOLERANCE`; nothing is written.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} is not installed; pip install 'flipscale[onnx]'")
    dst = Path(dst)
    with new_folder(dst) as folder:
        model, tokenizer = load_flip(src)
        model = model.float()
        model.set_attn_implementation("sdpa")
        build_processor(model.config, tokenizer).save_pretrained(folder)
        model.config.save_pretrained(folder)
        metadata = {name: repr(value.item()) for name, value in model.loss_values().items()}
        and_bias = f", plus {metadata['logit_bias']}" if "logit_bias" in metadata else ""
        towers: dict[str, tuple[_Embedding, list[dict[str, torch.Tensor]]]] = {
            "image": (_ImageEmbedding(model.vision_model, model.image_projection), _image_inputs(model.config)),
            "text": (_TextEmbedding(model.text_model, model.text_projection), _text_inputs(model.config)),
        }
        card = _CARD.format(logit_scale=metadata["logit_scale"], and_bias=and_bias)
        (folder / "README.md").write_text(derived_card(src, dst.name, "onnx", card), encoding="utf-8")
        return {
            name: _write_and_check(tower.eval(), inputs, folder / f"{name}_model.onnx", f"{name}_embeds", metadata)
            for name, (tower, inputs) in each(towers.items(), "writing", "towers")
        }


def _image_inputs(config: FlipConfig) -> list[dict[str, torch.Tensor]]:
    """Return batches of one and three images. Tracing uses the last, because it would fix a batch size of one."""
    vision, generator = config.vision_config, torch.Generator().manual_seed(0)
    shape = (vision.num_channels, vision.image_size, vision.image_size)
    return [{"pixel_values": torch.randn(count, *shape, generator=generator)} for count in (1, 3)]


def _text_inputs(config: FlipConfig) -> list[dict[str, torch.Tensor]]:
    """Return two batches of captions: one half full, then three that are full, of one token and a third full."""
    text, generator = config.text_config, torch.Generator().manual_seed(0)
    length = text.max_position_embeddings
    inputs = []
    for lengths in ((length // 2,), (length, 1, length // 3)):
        ids = torch.randint(0, text.vocab_size, (len(lengths), length), generator=generator)
        mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
        ids = torch.where(mask.bool(), ids, text.pad_token_id)
        inputs.append({"input_ids": ids} if text.attend_to_padding else {"input_ids": ids, "attention_mask": mask})
    return inputs


@torch.no_grad()
def _write_and_check(
    tower: nn.Module, inputs: list[dict[str, torch.Tensor]], file: Path, output: str, metadata: dict[str, str]
) -> float:
    """Write a tower to `file`, and return the largest difference of its embeddings from the tower's."""
    import onnxruntime

    traced, batch = inputs[-1], torch.export.Dim("batch")
    num_bytes = sum(parameter.nbytes for parameter in tower.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about torch's internals
        program = torch.onnx.export(
            tower,
            kwargs=traced,
            input_names=list(traced),
            output_names=[output],
            dynamic_shapes={name: {0: batch} for name in traced},
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # because dynamo is true
    program.model.metadata_props.update(metadata)
    program.save(str(file), external_data=num_bytes > _MAX_FILE_BYTES)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    difference = 0.0
    for batch_inputs in inputs:
        (embeds,) = session.run([output], {name: value.numpy() for name, value in batch_inputs.items()})
        difference = max(difference, (torch.from_numpy(embeds) - tower(**batch_inputs)).abs().max().item())
    if not difference <= TOLERANCE:
        raise FloatingPointError(
            f"{file.name}: onnxruntime's embeddings differ from the model's by {difference:.2g}, more than "
            f"{TOLERANCE:g}; nothing was written"
        )
    return difference
