"""FlipForConditionalGeneration: decoding, losses, generation and folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from flipscale.model import FlipConfig, FlipDecoderConfig, FlipForConditionalGeneration, FlipModel
from flipscale.model.modeling_flip_caption import NO_TARGET, caption_inputs, caption_losses, shifted_right

DECODER = {
    **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    **{"vocab_size": 16, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2},
}
Captioner = Callable[..., FlipForConditionalGeneration]


@pytest.fixture(scope="session")
def captioner(small: Callable[..., FlipModel]) -> Captioner:
    """Builds a captioner whose weights are large enough for captions that differ from image to image."""

    def build(**decoder: Any) -> FlipForConditionalGeneration:
        config = FlipConfig(vision_config=small().config.vision_config, decoder_config={**DECODER, **decoder})
        torch.manual_seed(0)
        model = FlipForConditionalGeneration(config).eval()
        with torch.no_grad():
            for name, parameter in model.decoder.named_parameters():
                if parameter.ndim == 2:
                    parameter.mul_(20.0 if name.startswith(("lm_head", "embeddings")) else 2.0)
        return model

    return build


def targets(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("attention", "encoder_layers", "how"), [("eager", 0, {"num_beams": 3, "num_return_sequences": 2}), ("sdpa", 1, {})]
)
def test_caches_do_not_change_captions(
    captioner: Captioner, images: torch.Tensor, how: dict[str, int], encoder_layers: int, attention: str
) -> None:
    model = captioner(num_encoder_layers=encoder_layers)
    model.set_attn_implementation(attention)
    images = torch.cat([3.0 * images, -3.0 * images])
    caches = ({}, {"use_cache": False}, {"cache_implementation": "static"})
    cached, plain, static = (model.generate(images, **cache, **how) for cache in caches)
    assert torch.equal(cached, plain)
    assert torch.equal(static, plain)
    assert (cached[:, 0] == 1).all()
    assert cached.shape[1] > 4
    assert len(set(map(tuple, cached.tolist()))) > 2, "the captions do not depend on the images"


def test_the_decoder_sees_only_the_given_patches(captioner: Captioner, images: torch.Tensor) -> None:
    model, index, ids = captioner(), targets([0, 5, 9], [3, 4, 5], [1, 2, 15]), targets([5, 6, 7]).expand(3, -1)
    seen = model(images, input_ids=ids, patch_index=index)
    assert seen.encoder_last_hidden_state.shape == (3, 1 + 3, 32)
    mask = torch.zeros(3, 16).scatter(1, index, 1.0).view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    blind = model(images * mask, input_ids=ids, patch_index=index)
    assert torch.equal(seen.logits, blind.logits)
    assert torch.equal(
        model.generate(images, patch_index=index, use_cache=False), model.generate(images * mask, patch_index=index)
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_parallel_captions_depend_on_the_image_alone(
    captioner: Captioner, images: torch.Tensor, attention: str
) -> None:
    model = captioner(vocab_size=17, mask_token_id=16)
    model.set_attn_implementation(attention)
    ids = torch.randint(3, 16, (3, 8), generator=torch.Generator().manual_seed(3))
    one = model(images, input_ids=ids, in_parallel=torch.tensor([True, False, True])).logits
    other = model(images, input_ids=15 - ids.flip(1) + 3, in_parallel=torch.tensor([True, False, True])).logits
    assert torch.equal(one[[0, 2]], other[[0, 2]]), "the decoder saw the caption"
    assert (one[0, 0] - one[0, 1]).abs().max() > 1e-3, "all positions predict the same"
    causal = model(images, input_ids=ids).logits
    assert torch.allclose(one[1], causal[1], atol=1e-5)
    everywhere = model(images, input_ids=ids, in_parallel=torch.ones(3, dtype=torch.bool)).logits
    assert torch.allclose(everywhere[0], one[0], atol=1e-5)
    # Attention is not causal: the first prediction depends on the last position.
    places = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 6]])
    tokens = model.vision_model(images).last_hidden_state
    moved = model.decoder(ids, tokens, position_ids=places, in_parallel=torch.ones(3, dtype=torch.bool)).logits
    assert (moved[:, 0] - everywhere[:, 0]).abs().max() > 1e-4


def test_decoder_inputs_and_targets() -> None:
    config = FlipDecoderConfig(**DECODER)
    ids = targets([5, 6, 0, 0], [5, 6, 7, 8], [0, 0, 0, 0], [5, 0, 7, 0])
    own = targets([1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0])
    reads, labels = caption_inputs(ids.int(), own.bool(), config)
    no = NO_TARGET
    assert labels.tolist() == [[5, 6, 2, no], [5, 6, 7, 8], [2, no, no, no], [5, 0, 7, 2]]
    assert reads.tolist() == [[1, 5, 6, 2], [1, 5, 6, 7], [1, 2, 0, 0], [1, 5, 0, 7]]
    assert torch.equal(caption_inputs(ids[:3], None, config)[1], labels[:3])


def test_tokenizers_that_add_begin_and_end() -> None:
    config = FlipDecoderConfig(**DECODER)
    bare = targets([5, 6, 0, 0, 0], [5, 0, 0, 0, 0], [0, 0, 0, 0, 0], [5, 6, 7, 0, 0])
    wrapped = targets([1, 5, 6, 2, 0], [1, 5, 2, 0, 0], [1, 2, 0, 0, 0], [1, 5, 6, 7, 0])
    ends_only = targets([5, 6, 2, 0, 0], [5, 2, 0, 0, 0], [2, 0, 0, 0, 0], [5, 6, 7, 2, 0])
    expected = caption_inputs(bare, None, config)
    for ids in (wrapped, ends_only):
        assert all(map(torch.equal, caption_inputs(ids, None, config), expected))
    for cut in (targets([1, 5, 6, 2]), targets([5, 6, 2])):
        assert caption_inputs(cut, None, config)[1][0, :3].tolist() == [5, 6, NO_TARGET]
    padded_with_the_end = targets([1, 5, 2, 2])
    assert caption_inputs(padded_with_the_end, targets([1, 1, 1, 0]), config)[1].tolist() == [[5, 2, -100, -100]]


def test_the_loss_is_the_mean_of_the_captions_means(
    captioner: Captioner, images: torch.Tensor, captions: torch.Tensor
) -> None:
    model = captioner()
    output = model(images, input_ids=captions)
    _, labels = caption_inputs(captions, None, model.config.decoder_config)
    likelihood = output.logits.double().log_softmax(dim=2)
    means = []
    for row in range(3):
        places = [place for place in range(8) if labels[row, place] != NO_TARGET]
        means.append(-sum(likelihood[row, place, labels[row, place]] for place in places) / len(places))
    assert output.caption_losses.tolist() == pytest.approx([mean.item() for mean in means], rel=1e-5)
    assert output.loss.item() == pytest.approx(sum(means).item() / 3, rel=1e-5)
    by_labels = model(images, labels=labels)
    assert torch.equal(by_labels.logits, output.logits)
    assert torch.equal(by_labels.loss, output.loss)
    reads = shifted_right(labels, model.config.decoder_config)
    assert torch.equal(model(images, decoder_input_ids=reads, labels=labels).loss, output.loss)
    assert caption_losses(output.logits, torch.full((3, 8), NO_TARGET)).tolist() == [0.0] * 3


def test_views_share_the_caption(captioner: Captioner, captions: torch.Tensor) -> None:
    model = captioner()
    patches, index = torch.rand(3, 2, 4, 192), torch.arange(4).expand(3, 2, -1)
    both = model(patches=patches, patch_index=index, input_ids=captions)
    assert both.logits.shape == (6, 8, 16)
    one = model(patches=patches[:, 1], patch_index=index[:, 1], input_ids=captions)
    assert torch.allclose(both.caption_losses[1::2], one.caption_losses, atol=1e-6)


def test_prompts(captioner: Captioner, images: torch.Tensor) -> None:
    model = captioner()
    images = 3.0 * images
    whole = model.generate(images)
    text = torch.tensor([[*whole[0, 1:4].tolist(), 0, 0, 0]])
    for given in (text, torch.cat([torch.tensor([[1]]), text], dim=1)):
        assert torch.equal(model.generate(images[:1], input_ids=given)[:, :5], whole[:1, :5])
    assert torch.equal(
        model.generate(images[:1], input_ids=torch.zeros(1, 8, dtype=torch.long)), model.generate(images[:1])
    )
    assert torch.equal(model.generate(images[:2], input_ids=torch.zeros(2, 0)), model.generate(images[:2]))
    with pytest.raises(ValueError, match="input_ids have 1 to 2 tokens"):
        model.generate(images[:2], input_ids=targets([5, 0], [5, 6]))


def test_captions_end_with_the_positions(captioner: Captioner, images: torch.Tensor) -> None:
    model = captioner(eos_token_id=3)
    for how in ({}, {"max_new_tokens": 40}, {"max_new_tokens": 40, "num_beams": 2}):
        assert model.generate(images, eos_token_id=None, **how).shape == (3, 9)
    with pytest.raises(ValueError, match="input_ids has 9 tokens; expected at most 8"):
        model(images, input_ids=torch.ones(3, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="no captions are given"):
        model(images)
    model = captioner(eos_token_id=None)
    assert model.generate(images).shape == (3, 9)
    labels = caption_inputs(targets([5, 6, 0, 0]), None, model.config.decoder_config)[1]
    assert labels.tolist() == [[5, 6, NO_TARGET, NO_TARGET]]


def test_a_captioner_has_no_text_tower(captioner: Captioner, model: FlipModel, tmp_path: Path) -> None:
    captioner().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.text_config is None
    assert config.caption_config is config.decoder_config
    own = FlipConfig.from_own_fields(config.to_dict())
    assert own.text_config is None
    assert own.decoder_config.to_diff_dict() == config.decoder_config.to_diff_dict()
    with pytest.raises(ValueError, match="the config has no text_config"):
        FlipModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the config has no decoder_config"):
        FlipForConditionalGeneration(model.config)
    assert "decoder_config" not in model.config.to_diff_dict()
    assert not model.config.is_encoder_decoder


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "mask_token_id", "pad_token_id"])
def test_tokens_outside_of_the_vocabulary(name: str) -> None:
    with pytest.raises(ValueError, match=f"decoder_config: {name} is 16"):
        FlipDecoderConfig(**{**DECODER, name: 16})
