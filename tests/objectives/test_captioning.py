"""The caption loss, alone and beside a contrastive loss, and its runs."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHAPES, TOWERS, changed_recipe, check_start, metrics, trained
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from flipscale.data.masks import keep_patches
from flipscale.data.pairs import InputShape
from flipscale.data.sources.tar import TarSource
from flipscale.data.tokenizers import load_tokenizer
from flipscale.engines.first_weights import build_weights, compile_blocks, fresh_weights
from flipscale.hub.loading import load_dual_encoder, load_model
from flipscale.model import FlipConfig, FlipForConditionalGeneration, FlipModel
from flipscale.model.modeling_flip_caption import caption_inputs
from flipscale.model.patches import take_patches
from flipscale.objectives.build_objective import build_config, build_objective
from flipscale.objectives.captioning import CaptioningFlipModel, CaptionLoss, WithCaptions
from flipscale.objectives.contrastive import Contrastive
from flipscale.objectives.objective import Objective
from flipscale.recipe.data import DataRecipe
from flipscale.start.complete_recipe import parse_recipe
from flipscale.start.setup import open_setup

DECODER = {**TOWERS["text_config"], "bos_token_id": 12, "eos_token_id": 13}
CONFIG = FlipConfig(**TOWERS, decoder_config=DECODER)
BOTH = WithCaptions(other=Contrastive(), weight=2.0, prediction="mixed")
ALONE = CaptionLoss(prediction="mixed")
SHORT = [{"name": "masked", "samples": 64, "mask_ratio": 0.5, "base_lr": 0.012}]


def build(objective: Objective) -> Any:
    config = objective.model_config(CONFIG)
    return build_weights(config, lambda _: None, fresh_weights(0), lambda _: None, objective.model_class)


def batch(size: int = 6) -> dict[str, torch.Tensor]:
    """Images of noise with half of the patches masked, and captions of 1 to 8 tokens."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(0, 256, (size, 16, 192), generator=generator, dtype=torch.uint8)
    index = keep_patches(torch.rand(size, 4, 4, generator=generator), 0.5)[:, 0]
    lengths = torch.randint(1, 9, (size, 1), generator=generator)
    ids = torch.randint(2, 12, (size, 8), generator=generator) * (torch.arange(8) < lengths)
    return {
        "patches": take_patches(whole, index),
        "patch_index": index.to(torch.int16),
        "input_ids": ids.int(),
        "attention_mask": ids > 0,
        "in_parallel": torch.arange(size) % 2 == 0,
    }


def loss_of(model: Any, objective: Objective, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**inputs, return_logits=False)
    loss = objective.per_sample_loss(output)
    if objective.needs_global_batch:
        loss = loss + objective.coupled_loss(*objective.loss_inputs(output), **objective.parameters(output))
    return loss


def loss_and_gradients(model: Any, objective: Objective, inputs: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    loss = loss_of(model, objective, inputs)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), torch.cat([gradient.flatten() for gradient in gradients])


def test_the_decoder_does_not_change_the_contrastive_model() -> None:
    plain, both, alone = build(Contrastive()), build(BOTH), build(ALONE)
    state = both.state_dict()
    assert {name for name in state if not name.startswith("decoder.")} == plain.state_dict().keys()
    assert alone.state_dict().keys() < state.keys()
    for model in (plain, alone):
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    inputs = batch()
    ours = both.eval()(**inputs, return_logits=False)
    del inputs["in_parallel"]
    assert torch.equal(ours.image_embeds, plain.eval()(**inputs).image_embeds)
    assert torch.equal(ours.text_embeds, plain(**inputs).text_embeds)


@pytest.mark.parametrize("objective", [BOTH, ALONE, CaptionLoss(), CaptionLoss(prediction="parallel")])
def test_every_parameter_has_a_gradient(objective: Objective) -> None:
    model, inputs = build(objective), batch()
    if objective == CaptionLoss():
        del inputs["in_parallel"]
    elif objective == CaptionLoss(prediction="parallel"):
        inputs["in_parallel"].fill_(True)
    loss_of(model, objective, inputs).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert model.vision_model.embeddings.patch_embedding.weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize("objective", [BOTH, ALONE])
def test_bf16_differs_only_by_rounding(objective: Objective) -> None:
    model, inputs = build(objective), batch()
    exact, gradients = loss_and_gradients(model, objective, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss, rounded = loss_and_gradients(model, objective, inputs)
    assert loss == pytest.approx(exact, rel=2**-8)  # bf16 has 8 bits
    assert loss != exact
    assert (rounded - gradients).norm() < 0.05 * gradients.norm()


@pytest.mark.long
@pytest.mark.parametrize("objective", [BOTH, ALONE])
def test_compiled_blocks(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs are not compiled to machine code, which would take a minute."""
    torch.compiler.reset()
    graphs, compile_module = CompileCounterWithBackend("aot_eager"), torch.nn.Module.compile
    plain, compiled = build(objective), build(objective)
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.Module, "compile", lambda self, **how: compile_module(self, backend=graphs, **how))
        compile_blocks(compiled)
    inputs = batch()
    masked = {**inputs, **{name: inputs[name][:, :4] for name in ("patches", "patch_index")}}
    for shape in (inputs, masked):
        exact, gradients = loss_and_gradients(plain, objective, shape)
        loss, compiled_gradients = loss_and_gradients(compiled, objective, shape)
        assert loss == pytest.approx(exact, rel=1e-6)
        assert torch.allclose(compiled_gradients, gradients, atol=1e-6)
    # One for each shape of the image tower and of the decoder; one of the text tower.
    assert graphs.frame_count == (5 if objective == BOTH else 4)


@pytest.mark.parametrize(("prediction", "share"), [("next_token", None), ("parallel", 1.0), ("mixed", 0.75)])
def test_parallel_captions_are_drawn_by_position(
    shards: Path, caption_tokenizer: Path, prediction: Any, share: float | None
) -> None:
    objective = CaptionLoss(prediction=prediction)
    recipe = DataRecipe(shards=str(shards), lanes=1, shards_per_block=2)
    shape, tokenizer = InputShape.of(objective.model_config(CONFIG)), load_tokenizer(str(caption_tokenizer), 8)
    dataset = objective.dataset(TarSource(str(shards)), tokenizer, recipe, shape, 0, 0.5)
    columns = dataset.__getitems__(list(range(96)))
    if share is None:
        assert "in_parallel" not in columns
        return
    drawn = columns["in_parallel"]
    assert drawn.dtype == torch.bool
    assert drawn.float().mean().item() == pytest.approx(share, abs=0.12)
    for some in (range(7), range(40, 96)):
        assert torch.equal(dataset.__getitems__(list(some))["in_parallel"], drawn[some.start : some.stop])


Write = Callable[..., Path]


@pytest.fixture
def write(write_recipe: Write, tmp_path: Path, caption_tokenizer: Path) -> Write:
    """Writes a recipe whose run directory is the file's path without suffix."""
    tokenizer = {"data": {"tokenizer": str(caption_tokenizer)}}
    return lambda name, **changes: write_recipe(tmp_path / name, **changed_recipe(tokenizer, changes))


def run(file: Path) -> Path:
    trained(file)
    return file.with_suffix("")


@pytest.mark.long
def test_a_captioner_names_colours_and_shapes(write: Write, shards: Path) -> None:
    masked = {"name": "masked", "samples": 1600, "mask_ratio": 0.5, "base_lr": 0.04, "warmup_samples": 160}
    stages = [masked, {"name": "unmasked", "samples": 800}]
    folder = run(write("alone", loss={"kind": "captioning"}, stages=stages)) / "model"
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert isinstance(model, FlipForConditionalGeneration)
    assert isinstance(load_model(str(folder))[1], FlipForConditionalGeneration)
    processor, source = AutoProcessor.from_pretrained(folder), TarSource(str(shards))
    samples = [source.read(0, number) for number in range(30)]
    pictures = [Image.open(io.BytesIO(sample.image)).convert("RGB") for sample in samples]
    truth = [sample.captions[0].decode().split() for sample in samples]
    inputs = processor(images=pictures, return_tensors="pt")
    for beams in (1, 3):
        texts = processor.batch_decode(model.generate(**inputs, num_beams=beams), skip_special_tokens=True)
        captions = [text.split() for text in texts]
        assert all(len(words) == 3 and words[0] == "a" and words[2] in SHAPES for words in captions), captions
        assert np.mean([ours[1] == theirs[1] for ours, theirs in zip(captions, truth, strict=True)]) > 0.6, captions
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_flip_caption.FlipForConditionalGeneration"
    assert "AutoModelForZeroShotImageClassification" not in auto_map
    with pytest.raises(ValueError, match=r"no text tower; .*kind: captioning"):
        load_dual_encoder(str(folder))


@pytest.mark.long
def test_a_folder_of_both_losses(write: Write, shards: Path) -> None:
    changes = {"loss": {"caption_weight": 2.0, "caption_kind": "mixed"}, "stages": SHORT}
    tasks = {"tasks": [{"kind": "zero_shot", "data": str(shards)}], "batch_size": 7}
    one = run(write("one", eval=tasks, **changes))
    assert all(r["loss"] > 2.0 * r["caption_loss"] > 0.1 for r in metrics(one) if "loss" in r)
    assert any("zero_shot/top1" in record for record in metrics(one))
    folder = one / "model"
    stored = load_file(folder / "model.safetensors")
    recipe = parse_recipe(["--config", str(write("one", **changes))])
    expected = CaptioningFlipModel(build_objective(recipe).model_config(recipe.model.config())).state_dict()
    assert stored.keys() == expected.keys()
    for kind, expected_class in ((AutoModel, FlipModel), (AutoModelForImageTextToText, FlipForConditionalGeneration)):
        loaded = kind.from_pretrained(folder)
        assert type(loaded) is expected_class
        assert all(torch.equal(stored[name], value) for name, value in loaded.state_dict().items())
    model, tokenizer = load_dual_encoder(str(folder))
    assert isinstance(model, CaptioningFlipModel)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (12, 13)
    assert "pipeline_tag: zero-shot-image-classification" in (folder / "README.md").read_text()


def test_contradicting_recipes_are_refused(write: Write, tokenizer_dir: Path, shards: Path) -> None:
    both, alone = {"caption_weight": 1.0}, {"kind": "captioning"}
    short = {"decoder_config": {"max_position_embeddings": 4}}
    other = {"decoder_config": {"bos_token_id": 3, "eos_token_id": 13}}
    for changes, message in (
        ({"loss": alone, "data": {"tokenizer": str(tokenizer_dir)}}, "tokenizer"),
        ({"loss": both, "model": short}, "model.decoder_config.max_position_embeddings is 4"),
        ({"loss": both, "model": other}, "bos_token_id 12, the decoder 3"),
        ({"loss": alone, "eval": {"zero_shot": str(shards)}}, "no text tower"),
        ({"eval": {"tasks": [{"kind": "captioning", "data": str(shards)}]}}, "no decoder"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            check_start(parse_recipe(["--config", str(write("bad", **changes))]))


@pytest.mark.parametrize("kind", ["next_token", "mixed"])
def test_a_captioner_as_start_has_its_vocabulary(write: Write, tmp_path: Path, kind: str) -> None:
    loss = {"kind": "captioning", "caption_kind": kind}
    first = parse_recipe(["--config", str(write("first", loss=loss))])
    own = build_config(first)
    _, exported = build_objective(first).exported_model(own)
    assert exported.text_config is None
    exported.save_pretrained(tmp_path / "start")
    second = parse_recipe(["--config", str(write("second", loss=loss, model={"init_from": str(tmp_path / "start")}))])
    assert build_config(second).decoder_config.vocab_size == own.decoder_config.vocab_size


def test_cut_captions_have_no_end(write: Write) -> None:
    model = {"decoder_config": {"max_position_embeddings": 2}}
    recipe = parse_recipe(["--config", str(write("cut", loss={"kind": "captioning"}, model=model))])
    columns = next(iter(open_setup(recipe).datasets.values())).__getitems__([0, 1, 2])
    assert columns["input_ids"].shape == (3, 2), "a caption has three words"
    decoder = build_config(recipe).decoder_config
    _, labels = caption_inputs(columns["input_ids"], columns["attention_mask"], decoder)
    assert torch.equal(labels, columns["input_ids"].long())
