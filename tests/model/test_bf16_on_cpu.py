"""What is computed otherwise in bf16 on a CPU is within what bf16 itself rounds away."""

import torch
from torch import nn

from flipscale.model import FlipConfig, FlipModel, FlipTextModel
from flipscale.model.modeling_flip import FlipMLP


def test_the_stand_in_for_the_tanh_gelu_is_lost_in_the_rounding() -> None:
    torch.manual_seed(0)
    tower = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    model = FlipModel(
        FlipConfig(
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            text_config={**tower, "vocab_size": 64, "max_position_embeddings": 16},
            projection_dim=32,
        )
    )
    for name, weight in model.named_parameters():
        if name.endswith("fc1.bias"):
            # Spread the activations over the range where the two forms differ.
            nn.init.normal_(weight, std=1.5)
    mlps = [module for module in model.modules() if isinstance(module, FlipMLP)]
    batch = {"pixel_values": torch.randn(16, 3, 32, 32), "input_ids": torch.randint(1, 64, (16, 16))}

    def embeds(bf16: bool, tanh: bool) -> torch.Tensor:
        for mlp in mlps:
            mlp.is_tanh_gelu = not tanh
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(**batch)
        return torch.cat([output.image_embeds, output.text_embeds])

    exact = embeds(bf16=False, tanh=True)
    rounded, stand_in = embeds(bf16=True, tanh=True), embeds(bf16=True, tanh=False)
    assert not torch.equal(rounded, stand_in)
    assert (rounded - exact).norm() / exact.norm() > 1e-3
    assert (stand_in - exact).norm() < 1.2 * (rounded - exact).norm()


def test_fp32_keeps_the_tanh_form() -> None:
    mlp = FlipMLP(FlipConfig.from_size("b16").text_config)
    states = torch.randn(4, 512)
    expected = mlp.fc2(nn.functional.gelu(mlp.fc1(states), approximate="tanh"))
    assert torch.equal(mlp(states), expected)


def test_the_projections_of_a_layer_keep_one_cast_of_their_input() -> None:
    tower = FlipConfig.from_size("b16", text_config={"num_hidden_layers": 1, "vocab_size": 64}).text_config
    model = FlipTextModel(tower)
    kept = set()

    def keep(saved: torch.Tensor) -> torch.Tensor:
        if saved.shape == (4 * 32, tower.hidden_size):
            kept.add(saved.untyped_storage().data_ptr())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved), torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randint(1, 64, (4, 32)))
    assert output.last_hidden_state.dtype == torch.float32
    # One for q, k and v, one for the attention's output and one for the MLP.
    assert len(kept) == 3
