"""The forms that a block takes on GPUs, and in bf16 on CPUs, give what the plain forms give, to rounding."""

import pytest
import torch
from conftest import TOWERS, changed_recipe
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flipscale.engines.first_weights import compile_blocks
from flipscale.model import FlipConfig, FlipModel, FlipTextModel
from flipscale.model.modeling_flip import BlockLayerNorm, FlipAttention, FlipMLP, as_on_gpu

BATCH = {
    "pixel_values": torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    "input_ids": torch.arange(6 * 16).view(6, 16) % 63 + 1,
}


class Quantised(nn.Parameter):
    """A weight that wraps other tensors, as quantised weights do."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return [], None


class Counter(TorchDispatchMode):
    """Counts calls of matrix products with a bias, and of norms by the type of their input."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.norms = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.products += func is torch.ops.aten.addmm.default
        if func is torch.ops.aten.native_layer_norm.default:
            self.norms.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def build(seed: int) -> FlipModel:
    torch.manual_seed(seed)
    changes = {"text_config": {"vocab_size": 64, "max_position_embeddings": 16}}
    model = FlipModel(FlipConfig(**changed_recipe(TOWERS, changes)))
    for module in model.modules():
        if isinstance(module, BlockLayerNorm | FlipAttention):
            for parameter in module.parameters():
                nn.init.normal_(parameter, mean=float(isinstance(module, BlockLayerNorm)), std=0.2)
    return model


@pytest.fixture
def model() -> FlipModel:
    return build(0)


def gradients(model: FlipModel, bf16: bool = False) -> torch.Tensor:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = model(**BATCH, return_loss=True)
    output.loss.backward()
    # The true gradient of a key's bias is 0.
    found = [p.grad.flatten() for name, p in model.named_parameters() if not name.endswith("k_proj.bias")]
    return torch.cat([output.image_embeds.detach().flatten(), output.text_embeds.detach().flatten(), *found])


def test_one_product_gives_what_three_do(model: FlipModel) -> None:
    plain = gradients(model)
    with as_on_gpu(), Counter() as counter:
        one = gradients(model)
    assert (one - plain).abs().max() < 1e-6
    assert counter.products == 4 * 4 + 1, "q, k and v; out; fc1; fc2 of each block, and the patches"


def test_a_compiled_block_has_one_product_too(model: FlipModel, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(sum(node.target is nn.functional.linear for node in graph.graph.nodes))
        return graph

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_module(self, backend=backend, **options))
    plain = gradients(model)
    compile_blocks(model)
    try:
        with as_on_gpu():
            assert (gradients(model) - plain).abs().max() < 1e-6
            gradients(model, bf16=True)
    finally:
        torch._dynamo.reset()
    # Of the image and of the text tower, in fp32 and in bf16.
    assert graphs == [4] * 4


@pytest.mark.parametrize("kind", ["another class", "a hook", "another weight"])
def test_layers_that_are_not_plain_are_called(model: FlipModel, kind: str) -> None:
    calls: list[int] = []

    class Changed(nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return super().forward(states)

    for module in list(model.modules()):
        if isinstance(module, FlipAttention) and kind == "a hook":
            module.v_proj.register_forward_pre_hook(lambda *_: calls.append(1))
        elif isinstance(module, FlipAttention) and kind == "another class":
            module.v_proj.__class__ = Changed
        elif isinstance(module, FlipAttention):
            module.v_proj.weight = Quantised(module.v_proj.weight.detach())
    with as_on_gpu(), Counter() as counter:
        gradients(model)
    assert len(calls) == (0 if kind == "another weight" else 4)
    assert counter.products == 4 * 6 + 1


def assert_rounds_like(runs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    """The replacement differs, but no more than bf16 itself allows, over models of several seeds.

    Autocast rounds 17 tensors a block: two norms, six weights, six products, the attention's weights and output, and
    the GELU. The replacement rounds six more: weight and bias of two norms, and two residuals of the text tower. Errors
    of one size add at worst linearly.

    Args:
        runs: what the replacement gives, what plain bf16 gives, and what fp32 gives.
    """
    errors = [[(found - exact).norm() / exact.norm() for found in bf16] for *bf16, exact in runs]
    ours, plain = torch.tensor(errors).square().mean(dim=0).sqrt()
    assert not any(torch.equal(replaced, rounded) for replaced, rounded, _ in runs)
    assert plain > 1e-3
    assert ours < (17 + 6) / 17 * plain


def test_norms_stay_in_bf16_and_are_as_exact() -> None:
    runs = []
    for model in map(build, range(24)):
        exact, rounded = gradients(model), gradients(model, bf16=True)
        with as_on_gpu(), Counter() as counter:
            runs.append((gradients(model, bf16=True), rounded, exact))
        assert counter.norms.count(torch.bfloat16) >= 2 * 4, "those of both towers' blocks"
    assert_rounds_like(runs)


def test_a_norm_in_bf16_computes_in_fp32() -> None:
    """Only its weights and its result are rounded; the rest is fp32's few errors of values up to 4."""
    torch.manual_seed(0)
    norm, states = BlockLayerNorm(32), torch.randn(512, 32).bfloat16()
    nn.init.normal_(norm.weight, 1.0, 0.2)
    nn.init.normal_(norm.bias, 0.0, 0.2)
    with as_on_gpu():
        found = norm(states).double()
    weight, bias = norm.weight.bfloat16().double(), norm.bias.bfloat16().double()
    exact = nn.functional.layer_norm(states.double(), norm.normalized_shape, weight, bias, norm.eps)
    assert ((found - exact).abs() <= torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 2**-20).all()


def test_the_exact_gelu_on_cpus_differs_by_less_than_rounding() -> None:
    def embeds(model: FlipModel, bf16: bool, tanh: bool) -> torch.Tensor:
        for module in model.modules():
            if isinstance(module, FlipMLP):
                module.is_tanh_gelu = not tanh
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(**BATCH)
        return torch.cat([output.image_embeds, output.text_embeds])

    runs = []
    for model in map(build, range(8)):
        mlps = [module for module in model.modules() if isinstance(module, FlipMLP)]
        for mlp in mlps:  # spread the activations over the range where the two forms differ
            nn.init.normal_(mlp.fc1.bias, std=1.5)
        exact, rounded = embeds(model, bf16=False, tanh=True), embeds(model, bf16=True, tanh=True)
        runs.append((embeds(model, bf16=True, tanh=False), rounded, exact))
    assert_rounds_like(runs)
    mlp, states = mlps[0], torch.randn(4, 32)
    tanh = nn.functional.gelu(mlp.fc1(states), approximate="tanh")
    assert torch.equal(mlp(states), mlp.fc2(tanh)), "fp32 keeps the tanh form"


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
