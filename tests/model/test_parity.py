"""The model against the original JAX FLIP: embeddings, losses and gradients of the same weights on the same inputs."""

import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from flipscale.hub.convert_flip import convert_flip_checkpoint, our_layout, our_name
from flipscale.model import FlipModel
from flipscale.model.modeling_flip import FlipOutput, as_on_gpu

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parity"
POSITIONS = "img_encoder/posembed_encoder/pos_embedding"
GIVEN = np.load(FIXTURES / "io.npz")
INPUTS = {
    "pixel_values": torch.from_numpy(GIVEN["images_nhwc"]).permute(0, 3, 1, 2).contiguous(),
    "input_ids": torch.from_numpy(GIVEN["txt"]).long(),
}
MASKED = {**INPUTS, "patch_index": torch.from_numpy(GIVEN["ids_keep"])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    with tarfile.open(FIXTURES / "t5x.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    convert_flip_checkpoint(folder / "checkpoint_7", folder / "model", image_heads=4, text_heads=4)
    return folder / "model"


@pytest.fixture(params=["eager", "sdpa", "sdpa as on a GPU"])
def model(folder: Path, request: pytest.FixtureRequest) -> Iterator[FlipModel]:
    attention, _, place = request.param.partition(" ")
    with as_on_gpu() if place else nullcontext():
        yield FlipModel.from_pretrained(folder, attn_implementation=attention)


def distance(tensor: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(tensor.detach().numpy() - expected).max())


def loss_bound(output: FlipOutput, z_img: np.ndarray, z_txt: np.ndarray) -> float:
    """Return what the loss may differ by: by at most twice what a logit does, and logits by the scaled embeddings.

    fp32 also rounds each logit and the loss itself.
    """
    scale, eps = output.logit_scale.item(), torch.finfo(torch.float32).eps
    pairs = ((output.image_embeds, z_img), (output.text_embeds, z_txt))
    apart = sum(float(np.linalg.norm(ours.detach().numpy() - theirs, axis=1).max()) for ours, theirs in pairs)
    return 2 * scale * (apart + eps) + eps * output.loss.item()


def assert_gradients_equal(model: FlipModel, gradients: dict[str, np.ndarray]) -> None:
    """Within 2e-5 of each parameter's largest. The true gradient of k_proj.bias is 0 (a constant added to all scores of
    a query changes nothing): what is stored is rounding."""
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients.items():
        ours_is, expected = our_name(name), our_layout(name, torch.from_numpy(gradient))
        if not ours_is.endswith("k_proj.bias"):
            gradient_of = ours[ours_is]
            assert gradient_of is not None, ours_is
            assert gradient_of.shape == expected.shape
            assert (gradient_of - expected).abs().max() <= 2e-5 * expected.abs().max(), ours_is


def test_embeddings_loss_and_temperature(model: FlipModel) -> None:
    output: FlipOutput = model(**INPUTS, return_loss=True)
    assert distance(output.image_embeds, GIVEN["z_img"]) < 2e-6
    assert distance(output.text_embeds, GIVEN["z_txt"]) < 2e-6
    assert distance(output.loss, GIVEN["loss"]) < loss_bound(output, GIVEN["z_img"], GIVEN["z_txt"])
    assert distance(1 / output.logit_scale, GIVEN["tau"]) < 1e-7


def test_every_gradient(model: FlipModel) -> None:
    model(**INPUTS, return_loss=True).loss.backward()
    stored = np.load(FIXTURES / "grads.npz")
    gradients = {name: stored[name] for name in stored.files if name != POSITIONS}
    assert len(gradients) == len(list(model.parameters()))
    assert not stored[POSITIONS].any()
    assert_gradients_equal(model, gradients)


def test_masked_forward_and_its_gradients(model: FlipModel) -> None:
    output = model(**MASKED, return_loss=True)
    assert distance(output.image_embeds, GIVEN["train_z_img"]) < 2e-6
    assert distance(output.text_embeds, GIVEN["train_z_txt"]) < 2e-6
    assert distance(output.loss, GIVEN["train_loss"]) < loss_bound(output, GIVEN["train_z_img"], GIVEN["train_z_txt"])
    assert distance(1 / output.logit_scale, GIVEN["train_tau"]) < 1e-7
    output.loss.backward()
    prefix = "train_grad/"
    gradients = {name.removeprefix(prefix): GIVEN[name] for name in GIVEN.files if name.startswith(prefix)}
    assert len(gradients) == 6
    assert_gradients_equal(model, gradients)


def test_the_order_of_the_kept_patches_does_not_matter(model: FlipModel) -> None:
    ascending = {**MASKED, "patch_index": MASKED["patch_index"].sort(dim=1).values}
    assert distance(model(**ascending).image_embeds, GIVEN["train_z_img"]) < 2e-6


def test_temperature_is_clipped_in_the_forward_alone(model: FlipModel) -> None:
    """Beyond ln(100) the parameter stays as it is and has no gradient."""
    with torch.no_grad():
        model.logit_scale.copy_(torch.from_numpy(GIVEN["clip_logit_scale"]))
    output = model(**INPUTS, return_loss=True)
    output.loss.backward()
    assert distance(output.loss, GIVEN["clip_loss"]) < loss_bound(output, GIVEN["z_img"], GIVEN["z_txt"])
    assert distance(1 / output.logit_scale, GIVEN["clip_tau"]) < 1e-8
    assert distance(model.logit_scale.grad, GIVEN["clip_grad_logit_scale"]) == 0.0
    assert model.logit_scale.item() == GIVEN["clip_logit_scale"][0]


def test_the_class_token_has_no_position(model: FlipModel) -> None:
    """`pos_alt` has a row for the class token that is not zero; the original does not use it either."""
    model.vision_model.embeddings.position_embedding.copy_(torch.from_numpy(GIVEN["pos_alt"][:, 1:]))
    assert distance(model(**INPUTS).image_embeds, GIVEN["pos_alt_z_img"]) < 2e-6
