"""First weights: the model's own distributions, keyed draws, one block at a time, and weights of a model folder."""

import copy
import functools
import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from conftest import TOWER, TOWERS, changed_recipe
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from flipscale.engines.first_weights import (
    build_weights,
    compile_blocks,
    fresh_weights,
    initial_weights,
    longer_positions,
)
from flipscale.io import model_folder
from flipscale.model import FlipConfig, FlipModel
from flipscale.objectives.reconstruction import ReconstructingFlipModel

Weights = dict[str, torch.Tensor]


def config_of(layers: int = 12) -> FlipConfig:
    changes = {"vision_config": {"num_hidden_layers": layers}, "text_config": {"vocab_size": 64}}
    return FlipConfig(**changed_recipe(TOWERS, changes))


CONFIG = config_of()


def build(seed: int, config: FlipConfig = CONFIG) -> FlipModel:
    return build_weights(config, lambda model: None, fresh_weights(seed), lambda block: None)


def test_distributions_are_the_model_s() -> None:
    torch.manual_seed(0)
    ours, own = build(0), FlipModel(CONFIG)
    for (name, value), expected in zip(ours.named_buffers(), own.buffers(), strict=True):
        assert torch.equal(value, expected), name
    weights, expected_weights = dict(ours.named_parameters()), dict(own.named_parameters())
    assert weights.keys() == expected_weights.keys()
    for name, value in weights.items():
        expected = expected_weights[name].detach()
        if expected.unique().numel() == 1:
            assert torch.equal(value, expected), name
            continue
        # The bound of a uniform draw, or the deviation of a normal one, of at least 32 numbers.
        many = value.numel() > 1000
        assert value.std().item() == pytest.approx(expected.std().item(), rel=0.05 if many else 0.5), name
        if many:
            assert value.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.3), name
            assert abs(value.mean().item()) < 0.1 * value.std().item(), name


def test_draws_depend_only_on_seed_and_name() -> None:
    torch.manual_seed(1)
    one = build(0).state_dict()
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1)), "the global generator was used"
    other, reseeded = build(0).state_dict(), build(1).state_dict()
    name = "vision_model.encoder.layers.3.mlp.fc1.weight"
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert not torch.equal(one[name], reseeded[name])
    assert not torch.equal(one[name], one[name.replace("3", "4")])
    assert torch.equal(one[name], build(0, config_of(layers=4)).state_dict()[name])


def test_one_block_has_memory_at_a_time() -> None:
    models: list[FlipModel] = []
    most = 0

    def shard(block: nn.Module) -> None:
        nonlocal most
        most = max(most, sum(p.numel() for p in models[0].parameters() if not p.is_meta))
        block.to("meta")

    total = sum(p.numel() for p in build(0).parameters())
    with pytest.raises(AssertionError, match="never allocated"):
        build_weights(CONFIG, models.append, fresh_weights(0), shard)
    assert most < total / 8


def saved(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> str:
    torch.manual_seed(7)
    FlipModel(CONFIG).to(dtype).save_pretrained(folder, **options)
    return str(folder)


def started(
    init_from: str, kind: type[FlipModel] = FlipModel, config: FlipConfig = CONFIG, text_positions: str | None = None
) -> Weights:
    init = initial_weights(init_from, config, 3, kind, text_positions)
    return build_weights(config, lambda model: None, init, lambda block: None, kind).state_dict()


def from_pretrained(init_from: str, kind: type[FlipModel] = FlipModel, config: FlipConfig = CONFIG) -> Weights:
    torch.manual_seed(3)
    return kind.from_pretrained(init_from, config=config, dtype=torch.float32).state_dict()


def same(ours: Weights, theirs: Weights) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, "60KB"), (torch.bfloat16, "5GB")], ids=str)
def test_stored_weights_are_those_of_from_pretrained(tmp_path: Path, dtype: torch.dtype, size: str) -> None:
    folder, larger = saved(tmp_path, dtype, max_shard_size=size), copy.deepcopy(CONFIG)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "60KB")
    assert same(started(folder), from_pretrained(folder))
    larger.vision_config.image_size = 64
    assert same(started(folder, config=larger), from_pretrained(folder, config=larger))


@pytest.mark.parametrize(("kind", "bias"), [(FlipModel, -10.0), (ReconstructingFlipModel, None)])
def test_missing_weights_are_drawn_as_by_from_pretrained(
    tmp_path: Path, kind: type[FlipModel], bias: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    config = FlipConfig(**{**CONFIG.to_dict(), "logit_bias_init_value": bias})
    folder, state = saved(tmp_path), torch.get_rng_state()
    ours = started(folder, kind, config)
    assert torch.equal(state, torch.get_rng_state())
    assert same(ours, from_pretrained(folder, kind, config))
    missing = [name for name in ("logit_bias", "reconstruction.mask_token") if name in ours]
    assert all(name in caplog.text for name in missing)
    assert ("are drawn: " in caplog.text) == bool(missing)


def test_unused_weights_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ReconstructingFlipModel(CONFIG).save_pretrained(tmp_path)
    assert "reconstruction.mask_token" not in started(str(tmp_path))
    assert "are left out: reconstruction." in caplog.text


def test_weights_of_another_model_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One tower may be missing, but not both, and no tower may be there in part."""
    own = load_file(Path(saved(tmp_path / "own")) / "model.safetensors")
    image = {name: value for name, value in own.items() if name.startswith("vision_model.")}
    foreign = {f"backbone.{name}": value for name, value in own.items()}
    few = {name: value for name, value in own.items() if name.startswith("text_model.") or ".layers.1." in name}
    for name, weights, message in (("image", image, ""), ("timm", foreign, "0 of"), ("few", few, "image tower")):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}/config.json").write_bytes((tmp_path / "own/config.json").read_bytes())
        save_file(weights, tmp_path / f"{name}/model.safetensors", {"format": "pt"})
        if message:
            with pytest.raises(ValueError, match=rf"model.init_from .*{message} \d*.*; use weights of its family"):
                started(str(tmp_path / name))
        else:
            with caplog.at_level("INFO", "flipscale"):
                started(str(tmp_path / name))
            count = len(image)
            assert f"model.init_from: {count} of {count} tensors of the image tower and 0 of " in caplog.text


def test_unusable_weights_are_one_error(tmp_path: Path) -> None:
    folder, other = saved(tmp_path / "model"), copy.deepcopy(CONFIG)
    other.text_config.vocab_size = 65
    with pytest.raises(ValueError, match=rf"init_from '{folder}' .*token_embedding.weight has the shape \[64, "):
        initial_weights(folder, other, 0)
    with pytest.raises(ValueError, match="init_from"):
        initial_weights(str(tmp_path / "none"), CONFIG, 0)
    file = tmp_path / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        initial_weights(folder, CONFIG, 0)
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"pickle \(model.bin\)"):
        initial_weights(folder, CONFIG, 0)


def test_longclip_positions_are_its_authors() -> None:
    """Of 77 positions, the published rule makes 248: 20 kept, three between each two of the others, three beyond."""
    old = torch.randn(77, 8, dtype=torch.float64)
    expected = list(old[:20])
    for place in range(20, 76):
        expected += [old[place] * (4 - part) / 4 + old[place + 1] * part / 4 for part in range(4)]
    expected += [old[76] + part * (old[76] - old[75]) / 4 for part in range(4)]
    assert len(expected) == 4 * 77 - 3 * 20
    assert torch.allclose(longer_positions(old, 248, "longclip"), torch.stack(expected), atol=1e-12)


def test_stretched_positions_are_torchs_interpolation() -> None:
    old = torch.randn(12, 8)
    expected = nn.functional.interpolate(old.t()[None], size=31, mode="linear", align_corners=True)[0].t()
    assert torch.allclose(longer_positions(old, 31, "stretched"), expected, atol=1e-5)
    assert torch.equal(longer_positions(old, 12, "stretched"), old)


def test_text_positions_become_longer_by_a_field_only(tmp_path: Path) -> None:
    folder, config, name = saved(tmp_path), copy.deepcopy(CONFIG), "text_model.embeddings.position_embedding.weight"
    before = config.text_config.max_position_embeddings
    config.text_config.max_position_embeddings = 40
    own = started(folder)
    longer = started(folder, config=config, text_positions="stretched")
    assert torch.equal(longer[name], longer_positions(own[name], 40, "stretched"))
    assert all(torch.equal(value, own[key]) for key, value in longer.items() if key != name)
    with pytest.raises(ValueError, match=f"{before} text positions.*embeddings is 40.*model.text_positions"):
        started(folder, config=config)
    with pytest.raises(ValueError, match=r"model\.text_positions, now longclip.*more than 20"):
        started(folder, config=config, text_positions="longclip")
    config.text_config.max_position_embeddings = before - 1
    with pytest.raises(ValueError, match=f"embeddings is {before - 1}; use {before}"):
        started(folder, config=config, text_positions="stretched")


def _start_of_a_rank(init_from: str, other: bool, answer: Connection) -> None:
    """Send the weights of a rank of two, the number of weight files that it opens, and its error."""
    opened: list[str] = []
    safe_open = model_folder.safe_open
    model_folder.safe_open = lambda file, kind: (opened.append(str(file)), safe_open(file, kind))[1]
    dist.init_process_group("gloo")
    config = FlipConfig(**{**CONFIG.to_dict(), "projection_dim": 24}) if other else CONFIG
    weights, error = {}, ""
    try:
        weights = {name: value.numpy() for name, value in started(init_from, config=config).items()}
    except ValueError as raised:
        error = str(raised)
    dist.destroy_process_group()
    answer.send((weights, len(opened), error))


def of_two_ranks(init_from: str, other: bool = False) -> list[tuple[dict, int, str]]:
    answers = []
    for environment in processes.rank_environments(2):
        ours, theirs = multiprocessing.Pipe()
        processes.start(_start_of_a_rank, init_from, other, theirs, environment=environment)
        theirs.close()
        answers.append(ours)
    return [ours.recv() for ours in answers]


def test_one_rank_reads_and_all_get_the_same(tmp_path: Path) -> None:
    folder = saved(tmp_path, max_shard_size="60KB")
    expected = {name: value.numpy() for name, value in started(folder).items()}
    (first, first_opens, _), (second, second_opens, _) = of_two_ranks(folder)
    assert (first_opens >= 1, second_opens) == (True, 0)
    for weights in (first, second):
        assert weights.keys() == expected.keys()
        assert all((weights[name] == value).all() for name, value in expected.items())
    (_, _, first_error), (_, _, second_error) = of_two_ranks(folder, other=True)
    assert first_error == second_error
    assert "has the shape" in first_error


def test_a_compiled_block_is_one_graph_under_ddp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the width of B/16, a block's gradients fill more than one of DDP's buckets."""
    graphs, compile_module = CompileCounterWithBackend("eager"), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(compile_module, backend=graphs))
    vision = {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    config = FlipConfig.from_size("b16", vision, {"num_hidden_layers": 0, "vocab_size": 64})
    model = FlipModel(config)
    compile_blocks(model)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        patches = torch.rand(2, 16, 3 * 8 * 8)
        output = ddp(input_ids=torch.ones(2, 32, dtype=torch.int64), patches=patches)
        (output.image_embeds.sum() + output.text_embeds.sum()).backward()
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()
    assert graphs.frame_count == 1


@pytest.mark.long
@pytest.mark.parametrize(("stated", "threads"), [(None, 11), ("5", 5)])
def test_compilers_share_the_cores_of_a_node(stated: str | None, threads: int) -> None:
    """96 cores for 8 processes. The first compilation of a start, which tries the compiler, starts the pool."""
    program = """
import torch
from torch._inductor import async_compile
from flipscale.engines import device
from flipscale.engines.first_weights import compile_blocks
from flipscale.model import FlipConfig, FlipModel

class Pool(async_compile.SubprocPool):
    def __init__(self, count, **options):
        print("compilers", count)
        super().__init__(count, **options)

async_compile.SubprocPool = Pool
device.decoding_workers = lambda stated: 11
assert device.can_compile(torch.device("cpu"))
tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
compile_blocks(FlipModel(FlipConfig(vision_config=tower, text_config=tower)))
async_compile.AsyncCompile.process_pool()
"""
    own = {} if stated is None else {"TORCHINDUCTOR_COMPILE_THREADS": stated}
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=True).stdout
    assert [line for line in printed.splitlines() if line.startswith("compilers ")] == [f"compilers {threads}"]


def test_stored_code_is_of_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of a cluster share a folder of compiled code, and their CPUs may have vectors of other widths."""
    tags = []
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        compile_blocks(FlipModel(FlipConfig(vision_config=TOWER, text_config=TOWER)))
        tags.append(torch.compiler.config.cache_key_tag)
    assert tags[0] != tags[1]
