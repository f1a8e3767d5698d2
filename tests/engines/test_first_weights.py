"""Fresh weights: the model's own distributions, the same numbers however they are built, one block at a time."""

import copy
import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from conftest import TOWER
from torch import nn

from flipscale.engines import first_weights
from flipscale.engines.first_weights import build_weights, fresh_weights, initial_weights
from flipscale.model import FlipConfig, FlipModel
from flipscale.objectives.reconstruction import ReconstructingFlipModel

CONFIG = FlipConfig(
    vision_config={**TOWER, "num_hidden_layers": 12, "image_size": 32, "patch_size": 8},
    text_config={**TOWER, "vocab_size": 64, "max_position_embeddings": 8},
)


def build(seed: int, config: FlipConfig = CONFIG) -> FlipModel:
    return build_weights(config, lambda model: None, fresh_weights(seed), lambda block: None)


def test_distributions_are_the_model_s_own() -> None:
    torch.manual_seed(0)
    ours, own = dict(build(0).named_parameters()), dict(FlipModel(CONFIG).named_parameters())
    assert ours.keys() == own.keys()
    for name, value in ours.items():
        expected = own[name].detach()
        if expected.unique().numel() == 1:
            assert torch.equal(value, expected), name
            continue
        # The bound of a uniform draw, or the deviation of a normal one, of at least 32 numbers.
        assert value.std().item() == pytest.approx(expected.std().item(), rel=0.5), name
        if value.numel() > 1000:
            assert value.std().item() == pytest.approx(expected.std().item(), rel=0.05), name
            assert value.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.3), name
            assert abs(value.mean().item()) < 0.1 * value.std().item(), name


def test_fixed_tables_are_filled() -> None:
    for (name, value), expected in zip(build(0).named_buffers(), FlipModel(CONFIG).buffers(), strict=True):
        assert torch.equal(value, expected), name


def test_numbers_depend_on_the_seed_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    one = build(0).state_dict()
    torch.manual_seed(2)
    torch.rand(3)
    other, reseeded = build(0).state_dict(), build(1).state_dict()
    name = "vision_model.encoder.layers.3.mlp.fc1.weight"
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert not torch.equal(one[name], reseeded[name])
    assert not torch.equal(one[name], one[name.replace("3", "4")])
    shallow = FlipConfig(
        vision_config={**TOWER, "num_hidden_layers": 4, "image_size": 32, "patch_size": 8},
        text_config={**TOWER, "vocab_size": 64, "max_position_embeddings": 8},
    )
    assert torch.equal(one[name], build(0, shallow).state_dict()[name]), "keyed by name, not by what came before"


def test_building_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(5)
    build(0)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))


def test_one_block_is_whole_at_a_time() -> None:
    seen: list[FlipModel] = []
    most = 0

    def shard(block: nn.Module) -> None:
        nonlocal most
        most = max(most, sum(p.numel() for p in seen[0].parameters() if not p.is_meta))
        block.to("meta")

    total = sum(p.numel() for p in build(0).parameters())
    with pytest.raises(AssertionError, match="never allocated"):
        build_weights(CONFIG, seen.append, fresh_weights(0), shard)
    assert most < total / 8


def saved(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> str:
    torch.manual_seed(7)
    FlipModel(CONFIG).to(dtype).save_pretrained(folder, **options)
    return str(folder)


def started(init_from: str, kind: type[FlipModel] = FlipModel, config: FlipConfig = CONFIG) -> dict[str, torch.Tensor]:
    init = initial_weights(init_from, config, 3, kind)
    return build_weights(config, lambda model: None, init, lambda block: None, kind).state_dict()


def from_pretrained(
    init_from: str, kind: type[FlipModel] = FlipModel, config: FlipConfig = CONFIG
) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return kind.from_pretrained(init_from, config=config, dtype=torch.float32).state_dict()


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "60KB"}], ids=["one file", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stored_weights_are_those_that_from_pretrained_loads(tmp_path: Path, dtype: torch.dtype, options: dict) -> None:
    folder = saved(tmp_path, dtype, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(options)
    assert same(started(folder), from_pretrained(folder))


@pytest.mark.parametrize("kind", [FlipModel, ReconstructingFlipModel])
@pytest.mark.parametrize("bias", [None, -10.0])
def test_what_is_not_stored_is_drawn_as_from_pretrained_draws_it(
    tmp_path: Path, kind: type[FlipModel], bias: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    config = FlipConfig(**{**CONFIG.to_dict(), "logit_bias_init_value": bias})
    folder = saved(tmp_path)
    state = torch.get_rng_state()
    ours = started(folder, kind, config)
    assert torch.equal(state, torch.get_rng_state())
    assert same(ours, from_pretrained(folder, kind, config))
    missing = [name for name in ("logit_bias", "reconstruction.mask_token") if name in ours]
    assert all(name in caplog.text for name in missing)
    assert ("are drawn: " in caplog.text) == bool(missing)


def test_what_the_model_does_not_have_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ReconstructingFlipModel(CONFIG).save_pretrained(tmp_path)
    assert "reconstruction.mask_token" not in started(str(tmp_path))
    assert "are left out: reconstruction." in caplog.text


def test_images_of_another_size_start_from_the_same_weights(tmp_path: Path) -> None:
    folder, larger = saved(tmp_path), copy.deepcopy(CONFIG)
    larger.vision_config.image_size = 64
    assert same(started(folder, config=larger), from_pretrained(folder, config=larger))


def test_weights_that_cannot_be_loaded_are_one_error(tmp_path: Path) -> None:
    folder, other = saved(tmp_path / "model"), copy.deepcopy(CONFIG)
    other.text_config.vocab_size = 65
    expected = rf"init_from '{folder}' cannot be loaded \(text_model.*token_embedding.weight has the shape \[64, "
    with pytest.raises(ValueError, match=expected):
        initial_weights(folder, other, 0)
    with pytest.raises(ValueError, match=r"init_from '.*none' cannot be loaded"):
        initial_weights(str(tmp_path / "none"), CONFIG, 0)
    file = tmp_path / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model.safetensors is cut short or damaged"):
        initial_weights(folder, CONFIG, 0)
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"has its weights as a pickle \(model.bin\)"):
        initial_weights(folder, CONFIG, 0)


def _start_of_a_rank(init_from: str, other: bool, answer: Connection) -> None:
    """What a rank of two starts from, the files that it opens, and its error."""
    opened: list[str] = []
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
    asked: list[str] = []
    safe_open = first_weights.safe_open
    first_weights.safe_open = lambda file, kind: (asked.append(str(file)), safe_open(file, kind))[1]
    dist.init_process_group("gloo")
    config = FlipConfig(**{**CONFIG.to_dict(), "projection_dim": 24}) if other else CONFIG
    try:
        weights = {name: value.numpy() for name, value in started(init_from, config=config).items()}
        error = ""
    except ValueError as raised:
        weights, error = {}, str(raised)
    dist.destroy_process_group()
    answer.send((weights, len(asked) + sum(name.endswith(".safetensors") for name in opened), error))


def of_two_ranks(init_from: str, other: bool = False) -> list[tuple[dict, int, str]]:
    answers = []
    for environment in processes.rank_environments(2):
        ours, theirs = multiprocessing.Pipe()
        process = processes.start(_start_of_a_rank, init_from, other, theirs, environment=environment)
        theirs.close()
        answers.append((ours, process))
    found = [ours.recv() for ours, _ in answers]
    for _, process in answers:
        process.join()
    return found


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "60KB"}], ids=["one file", "many"])
def test_one_rank_reads_and_the_others_get_the_same(tmp_path: Path, options: dict) -> None:
    folder = saved(tmp_path, **options)
    expected = {name: value.numpy() for name, value in started(folder).items()}
    (first, first_opens, _), (second, second_opens, _) = of_two_ranks(folder)
    assert (first_opens >= 1, second_opens) == (True, 0)
    for weights in (first, second):
        assert weights.keys() == expected.keys()
        assert all((weights[name] == value).all() for name, value in expected.items())


def test_what_one_rank_cannot_load_all_refuse(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    for name, other, message in (
        (f"{folder}/none", False, "cannot be loaded"),
        (folder, True, "has the shape"),
    ):
        (_, _, first), (_, _, second) = of_two_ranks(name, other)
        assert first == second
        assert message in first
