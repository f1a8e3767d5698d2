"""What the models promise, apart from equality with the original (`test_parity`)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification

from flipscale.model import (
    SIZES,
    FlipConfig,
    FlipModel,
    FlipTextConfig,
    FlipTextModel,
    FlipTextModelWithProjection,
    FlipVisionConfig,
    FlipVisionModel,
    FlipVisionModelWithProjection,
)
from flipscale.model.masking import num_kept, patchify, random_patch_index, take_patches
from flipscale.model.modeling_flip import sincos_positions

NAMES = Path(__file__).parents[1] / "fixtures" / "state_dict_names.txt"
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 16,
    "max_position_embeddings": 8,
}


def small(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **fields: Any) -> FlipModel:
    torch.manual_seed(0)
    config = FlipConfig(
        vision_config={**VISION, **(vision or {})}, text_config={**TEXT, **(text or {})}, projection_dim=20, **fields
    )
    return FlipModel(config).eval()


@pytest.fixture
def model() -> FlipModel:
    return small()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def captions() -> torch.Tensor:
    """Three captions of 5, 2 and 8 ids, padded with 0."""
    ids = torch.randint(1, 16, (3, 8), generator=torch.Generator().manual_seed(2))
    return ids * (torch.arange(8) < torch.tensor([[5], [2], [8]]))


# Patches and masks


@pytest.mark.parametrize("kept", [1, 5, 16])
def test_patches_give_what_pixel_values_give(model: FlipModel, images: torch.Tensor, kept: int) -> None:
    index = torch.stack([torch.randperm(16)[:kept] for _ in images])
    patches = take_patches(patchify(images, 8), index)
    whole = model.vision_model(pixel_values=images, patch_index=index)
    assert whole.last_hidden_state.shape == (3, kept + 1, 32)
    for integer in (torch.int64, torch.int32, torch.uint8):
        cut = model.vision_model(patches=patches, patch_index=index.to(integer))
        assert torch.equal(cut.last_hidden_state, whole.last_hidden_state)


def test_uint8_patches_are_normalised_by_the_model(model: FlipModel, images: torch.Tensor) -> None:
    pixels = (images * 255).round().to(torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    normalised = model.vision_model(pixel_values=(pixels / 255 - mean) / std).last_hidden_state
    index = torch.arange(16).expand(3, -1)
    for inputs in (
        {"patches": patchify(pixels, 8)},
        {"patches": patchify(pixels, 8), "patch_index": index},
        {"pixel_values": pixels},
    ):
        assert torch.allclose(model.vision_model(**inputs).last_hidden_state, normalised, atol=2e-6)


def test_the_patch_embedding_is_a_convolution(model: FlipModel, images: torch.Tensor) -> None:
    weight, bias = model.vision_model.embeddings.patch_embedding.parameters()
    expected = torch.nn.functional.conv2d(images, weight, bias, stride=8).flatten(2).transpose(1, 2)
    assert torch.allclose(model.vision_model.embeddings.patch_embedding(patchify(images, 8)), expected, atol=1e-6)


@pytest.mark.parametrize(("mask_ratio", "kept"), [(0.0, 16), (0.5, 8), (0.6, 6), (0.75, 4), (0.93, 1)])
def test_mask_ratio_is_the_fraction_removed(
    model: FlipModel, images: torch.Tensor, mask_ratio: float, kept: int
) -> None:
    output = model.vision_model(pixel_values=images, image_mask_ratio=mask_ratio, output_hidden_states=True)
    assert output.last_hidden_state.shape == (3, kept + 1, 32)
    assert [state.shape[1] for state in output.hidden_states] == [kept + 1] * 3


@pytest.mark.parametrize(("size", "ratio", "kept"), [("l16", 0.5, 98), ("l16", 0.75, 49), ("h14", 0.5, 128)])
def test_kept_patches_of_the_papers_models(size: str, ratio: float, kept: int) -> None:
    assert num_kept(FlipConfig.from_size(size).vision_config.num_patches, ratio) == kept


def test_each_image_has_a_mask_of_its_own_from_the_global_generator(model: FlipModel, images: torch.Tensor) -> None:
    same = images[:1].expand(4, -1, -1, -1)
    torch.manual_seed(3)
    first = model(pixel_values=same, input_ids=torch.ones(1, 8).long(), image_mask_ratio=0.5).image_embeds
    torch.manual_seed(3)
    index = random_patch_index(4, 16, 0.5, images.device)
    again = model.vision_model(pixel_values=same, patch_index=index).pooler_output
    assert torch.allclose(torch.nn.functional.normalize(model.image_projection(again)), first, atol=1e-6)
    assert len({tuple(row) for row in index.tolist()}) > 1
    assert all(row == sorted(set(row)) for row in index.tolist())


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_mask_ratio_outside_its_range(model: FlipModel, images: torch.Tensor, ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"mask_ratio is {ratio}; it must be in \[0, 1\): the fraction of patches"):
        model.vision_model(pixel_values=images, image_mask_ratio=ratio)


def test_mask_ratio_that_leaves_nothing(model: FlipModel, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"mask_ratio 0\.95 leaves none of 16 patches; use a lower ratio"):
        model.vision_model(pixel_values=images, image_mask_ratio=0.95)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "give either pixel_values or patches"),
        ({"patches": torch.zeros(2, 5, 192)}, "patches has 5 of 16 patches and patch_index is missing"),
        ({"patches": torch.zeros(2, 5, 64)}, r"patches is \(2, 5, 64\), it must be \(batch, kept, 192\)"),
        (
            {"patches": torch.zeros(2, 5, 192), "patch_index": torch.zeros(2, 4).long()},
            r"patch_index is \(2, 4\), it must be \(2, 5\) as patches is",
        ),
        ({"pixel_values": torch.zeros(2, 1, 32, 32)}, r"is \(2, 1, 32, 32\), it must be \(batch, 3, height, width\)"),
        ({"pixel_values": torch.zeros(3, 32, 32)}, r"pixel_values is \(3, 32, 32\), it must be \(batch, 3, "),
        (
            {"pixel_values": torch.zeros(2, 3, 40, 32)},
            "pixel_values are 40x32, the model is for 32x32; resize them, pass",
        ),
        (
            {"pixel_values": torch.zeros(2, 3, 36, 40), "interpolate_pos_encoding": True},
            "pixel_values are 36x40, which patch_size 8 does not divide",
        ),
    ],
)
def test_image_input_that_does_not_fit(model: FlipModel, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.vision_model(**inputs)


# Positions


def test_positions_encode_the_column_first_then_the_row() -> None:
    table = sincos_positions(8, rows=2, columns=3)
    step = torch.tensor([1.0, 0.01])
    for row in range(2):
        for column in range(3):
            parts = [(column * step).sin(), (column * step).cos(), (row * step).sin(), (row * step).cos()]
            assert torch.allclose(table[3 * row + column], torch.cat(parts), atol=1e-6)


def test_interpolated_positions(model: FlipModel, images: torch.Tensor) -> None:
    embeddings = model.vision_model.embeddings
    twice = embeddings._positions_of(torch.zeros(1, 3, 64, 64), interpolate=True).view(8, 8, 32)
    assert torch.allclose(twice[::2, ::2], embeddings.position_embedding.view(4, 4, 32), atol=1e-6)
    wide = model.vision_model(pixel_values=torch.zeros(1, 3, 24, 48), interpolate_pos_encoding=True)
    assert wide.last_hidden_state.shape == (1, 3 * 6 + 1, 32)
    own = model.vision_model(pixel_values=images).pooler_output
    assert torch.equal(model.vision_model(pixel_values=images, interpolate_pos_encoding=True).pooler_output, own)


def test_another_image_size_makes_its_own_positions(model: FlipModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    bigger = FlipModel.from_pretrained(tmp_path, vision_config={"image_size": 64}).eval()
    assert torch.equal(bigger.vision_model.embeddings.position_embedding[0], sincos_positions(32, 8, 8))
    assert bigger.vision_model(pixel_values=torch.zeros(1, 3, 64, 64)).last_hidden_state.shape == (1, 65, 32)
    assert torch.equal(bigger.image_projection.weight, model.image_projection.weight)
    tower = FlipVisionModel.from_pretrained(tmp_path, image_size=64)
    assert torch.equal(tower.embeddings.position_embedding[0], sincos_positions(32, 8, 8))


# Text


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("attend_to_padding", [True, False])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_a_caption_has_one_embedding_however_far_it_is_padded(
    captions: torch.Tensor, attend_to_padding: bool, pooling: str, attn_implementation: str
) -> None:
    text = {"attend_to_padding": attend_to_padding, "pooling": pooling}
    model = small(text=text, attn_implementation=attn_implementation).text_model
    full = model(captions)
    for caption, length, expected, states in zip(captions, (5, 2, 8), full.pooler_output, full[0], strict=True):
        for padded in range(length, 9):
            for mask in (None, (torch.arange(padded) < length).long()[None]):
                output = model(caption[None, :padded], attention_mask=mask)
                assert torch.allclose(output.pooler_output[0], expected, atol=1e-6)
                assert output.last_hidden_state.shape == (1, padded, 24)
                assert torch.allclose(output.last_hidden_state[0, :length], states[:length], atol=1e-6)


def test_padding_takes_part_in_attention_as_in_the_original(captions: torch.Tensor) -> None:
    for attend, same in ((True, False), (False, True)):
        model = small(text={"attend_to_padding": attend}).text_model
        before = model(captions).pooler_output
        with torch.no_grad():
            model.embeddings.token_embedding.weight[0] += 1.0
        after = model(captions).pooler_output
        assert torch.allclose(after[:2], before[:2]) is same
        assert torch.allclose(after[2], before[2])


def test_hidden_states_and_attentions_cover_the_ids_given(captions: torch.Tensor) -> None:
    model = small(attn_implementation="eager").text_model
    output = model(captions[:, :5], output_hidden_states=True, output_attentions=True)
    full = model(captions, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(3, 5, 24)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 4, 5, 5)] * 2
    # The last caption is longer than 5, so it is another one here.
    for short, whole in zip(output.hidden_states, full.hidden_states, strict=True):
        assert torch.allclose(short[:2], whole[:2, :5], atol=1e-6)
    for short, whole in zip(output.attentions, full.attentions, strict=True):
        assert torch.allclose(short[:2], whole[:2, :, :5, :5], atol=1e-6)


def test_a_caption_too_long(model: FlipModel) -> None:
    with pytest.raises(ValueError, match="input_ids has 9 tokens, the model at most 8; truncate them"):
        model.text_model(torch.ones(1, 9).long())
    with pytest.raises(ValueError, match="input_ids is missing"):
        model(pixel_values=torch.zeros(1, 3, 32, 32))


# Training


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_activations_give_the_same_gradients(
    model: FlipModel, images: torch.Tensor, captions: torch.Tensor, use_reentrant: bool
) -> None:
    index = torch.stack([torch.randperm(16)[:6] for _ in images])
    inputs = {"pixel_values": images, "patch_index": index, "input_ids": captions[:, :6], "return_loss": True}
    gradients = []
    for recompute in (False, True):
        model.train().zero_grad()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model(**inputs).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_a_masked_step_compiles_to_one_graph(captions: torch.Tensor, attn_implementation: str) -> None:
    model = small(attn_implementation=attn_implementation).train()
    inputs = {
        "patches": torch.randint(0, 256, (3, 5, 192)).to(torch.uint8),
        "patch_index": torch.stack([torch.randperm(16)[:5] for _ in range(3)]),
        "input_ids": captions,
        "return_loss": True,
    }
    expected = model(**inputs).loss
    torch._dynamo.reset()
    loss = torch.compile(model, fullgraph=True, backend="eager")(**inputs).loss
    assert torch.allclose(loss, expected)
    loss.backward()
    assert model.vision_model.embeddings.class_embedding.grad is not None


def test_a_random_mask_compiles_to_one_graph(model: FlipModel, images: torch.Tensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model.vision_model, fullgraph=True, backend="eager")
    assert compiled(pixel_values=images, image_mask_ratio=0.5).last_hidden_state.shape == (3, 9, 32)


def test_init_is_the_originals() -> None:
    model = small({"hidden_size": 256}, {"hidden_size": 128})
    layer = model.vision_model.encoder.layers[0]
    for weight, bound in (
        (layer.self_attn.q_proj.weight, (6 / (4 * 256)) ** 0.5),
        (layer.self_attn.out_proj.weight, (6 / (2 * 256)) ** 0.5),
        (layer.mlp.fc1.weight, (6 / (256 + 64)) ** 0.5),
        (model.image_projection.weight, (6 / (256 + 20)) ** 0.5),
        (model.vision_model.embeddings.patch_embedding.weight, (6 / (192 + 256)) ** 0.5),
    ):
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    text = model.text_model.embeddings
    for weight in (
        text.token_embedding.weight,
        text.position_embedding.weight,
        model.vision_model.embeddings.class_embedding,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.2)
    for tower in (
        FlipVisionModelWithProjection(model.config.vision_config).image_projection,
        FlipTextModelWithProjection(model.config.text_config).text_projection,
    ):
        bound = (6 / (tower.in_features + 20)) ** 0.5
        assert tower.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


# Weights and folders


def test_names_and_shapes_of_the_weights_are_for_ever() -> None:
    """Published folders hold these names. Never edit the list."""
    state_dict = small({"num_hidden_layers": 1}, {"num_hidden_layers": 1}).state_dict()
    found = "".join(f"{name} {' '.join(map(str, value.shape))}\n" for name, value in state_dict.items())
    assert found == NAMES.read_text()


@pytest.mark.parametrize(("size", "parameters"), [("b16", 139_927_809), ("l16", 413_200_129), ("h14", 966_723_841)])
def test_number_of_parameters(size: str, parameters: int) -> None:
    """139.9, 413.2 and 966.7 M, counted as the original counts: with the fixed image positions `[1 + L, D]`, which are
    parameters there and a buffer here."""
    with torch.device("meta"):
        model = FlipModel(FlipConfig.from_size(size))
    vision = model.config.vision_config
    assert model.num_parameters() + (1 + vision.num_patches) * vision.hidden_size == parameters


@pytest.mark.parametrize("size", SIZES)
def test_every_named_size_builds(size: str) -> None:
    with torch.device("meta"):
        model = FlipModel(FlipConfig.from_size(size))
    assert model.image_projection.weight.shape == (SIZES[size][2], SIZES[size][0]["hidden_size"])


def test_a_loaded_model_is_the_saved_one(
    model: FlipModel, images: torch.Tensor, captions: torch.Tensor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    expected = model(pixel_values=images, input_ids=captions)
    for auto in (FlipModel, AutoModel, AutoModelForZeroShotImageClassification):
        loaded = auto.from_pretrained(tmp_path).eval()
        assert type(loaded) is FlipModel
        output = loaded(pixel_values=images, input_ids=captions)
        assert torch.equal(output.logits_per_image, expected.logits_per_image)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    for tower, inputs, embeds in (
        (FlipVisionModelWithProjection, {"pixel_values": images}, "image_embeds"),
        (FlipTextModelWithProjection, {"input_ids": captions}, "text_embeds"),
    ):
        found = getattr(tower.from_pretrained(tmp_path).eval()(**inputs), embeds)
        assert torch.allclose(torch.nn.functional.normalize(found), getattr(expected, embeds), atol=1e-6)


@pytest.mark.parametrize("tower", [FlipVisionModel, FlipTextModel])
def test_a_tower_is_saved_and_found_by_auto_classes(
    model: FlipModel, tower: type[FlipVisionModel] | type[FlipTextModel], tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "whole")
    tower.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "tower")
    loaded = AutoModel.from_pretrained(tmp_path / "tower")
    assert type(loaded) is tower
    whole = model.state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, whole[f"{tower.base_model_prefix}.{name}"])


def test_bf16_weights_leave_the_fixed_tables_in_fp32(model: FlipModel, images: torch.Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = FlipModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    expected = dict(model.named_buffers())
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    pixels = (images * 255).to(torch.uint8)
    close = loaded.vision_model(pixel_values=pixels).pooler_output.float()
    assert torch.allclose(close, model.vision_model(pixel_values=pixels).pooler_output, atol=0.05)
    output = loaded(pixel_values=pixels, input_ids=torch.ones(3, 8).long())
    assert output.image_embeds.dtype == output.logit_scale.dtype == output.logits_per_image.dtype == torch.float32


def test_meta_init_then_load_fills_the_fixed_tables(model: FlipModel) -> None:
    with torch.device("meta"):
        empty = FlipModel(model.config)
    empty.to_empty(device="cpu")
    empty.init_weights()
    for name, buffer in model.named_buffers():
        assert torch.equal(dict(empty.named_buffers())[name], buffer), name


# Outputs


def test_features_are_the_embeddings_before_normalisation(
    model: FlipModel, images: torch.Tensor, captions: torch.Tensor
) -> None:
    output = model(pixel_values=images, input_ids=captions)
    for features, embeds in (
        (model.get_image_features(images).pooler_output, output.image_embeds),
        (model.get_text_features(captions).pooler_output, output.text_embeds),
    ):
        assert features.shape == (3, 20)
        assert torch.allclose(torch.nn.functional.normalize(features), embeds, atol=1e-6)
        assert torch.allclose(embeds.norm(dim=1), torch.ones(3), atol=1e-6)
    assert torch.allclose(output.logits_per_image, output.logit_scale * output.image_embeds @ output.text_embeds.T)
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)


def test_training_needs_no_logits(model: FlipModel, images: torch.Tensor, captions: torch.Tensor) -> None:
    output = model(pixel_values=images, input_ids=captions, return_logits=False)
    assert output.logits_per_image is None
    assert output.loss is None
    assert output.logit_scale.shape == (1,)


# Configurations


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlipVisionConfig(image_size=225), "image_size 225 is not divisible by patch_size 16; use 224 or 240"),
        (lambda: FlipTextConfig(pooling="max"), "text_config: pooling is 'max'; use 'first' or 'mean'"),
        (lambda: FlipConfig.from_size("xl"), "model size 'xl' is unknown; use one of b16, l16, l14, h14, g14"),
        (
            lambda: FlipConfig(vision_config={"projection_dim": 4}, text_config={"projection_dim": 8}),
            "projection_dim differs: vision_config has 4, text_config has 8; set projection_dim of FlipConfig for both",
        ),
        (lambda: small({"hidden_size": 30}), "vision hidden_size 30 is not divisible by 4, which 2-D sine-cosine"),
        (lambda: small({"num_attention_heads": 5}), "vision_config: hidden_size 32 is not divisible by num_attention_"),
        (lambda: small(None, {"num_attention_heads": 5}), "text_config: hidden_size 24 is not divisible by num_"),
    ],
)
def test_configuration_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_projection_dim_is_one_for_both_towers() -> None:
    config = FlipConfig(projection_dim=7)
    assert config.vision_config.projection_dim == config.text_config.projection_dim == 7
    assert FlipConfig.from_size("l16", text_config={"vocab_size": 50}).text_config.vocab_size == 50
