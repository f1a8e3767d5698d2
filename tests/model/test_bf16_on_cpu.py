"""Replacements in bf16 on a CPU differ by less than bf16's own rounding."""

import torch
from conftest import TOWERS, changed_recipe
from torch import nn

from flipscale.model import FlipConfig, FlipModel, FlipTextModel
from flipscale.model.modeling_flip import FlipMLP


def test_the_exact_gelu_differs_by_less_than_rounding() -> None:
    torch.manual_seed(0)
    changes = {"text_config": {"vocab_size": 64, "max_position_embeddings": 16}}
    model = FlipModel(FlipConfig(**changed_recipe(TOWERS, changes), projection_dim=32))
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
    rounded, replaced = embeds(bf16=True, tanh=True), embeds(bf16=True, tanh=False)
    assert not torch.equal(rounded, replaced)
    assert (rounded - exact).norm() / exact.norm() > 1e-3
    assert (replaced - exact).norm() < 1.2 * (rounded - exact).norm()


def test_fp32_keeps_the_tanh_form() -> None:
    mlp = FlipMLP(FlipConfig.from_size("b16").text_config)
    states = torch.randn(4, 512)
    assert torch.equal(mlp(states), mlp.fc2(nn.functional.gelu(mlp.fc1(states), approximate="tanh")))


def test_q_k_and_v_share_one_cast_of_their_input() -> None:
    tower = FlipConfig.from_size("b16", text_config={"num_hidden_layers": 1, "vocab_size": 64}).text_config
    model, saved = FlipTextModel(tower), set()

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == (4 * 32, tower.hidden_size):
            saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randint(1, 64, (4, 32)))
    assert output.last_hidden_state.dtype == torch.float32
    assert len(saved) == 3, "inputs of q, k and v; of the attention's output; and of the MLP"
