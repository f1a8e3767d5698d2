"""Launches, read from launch files and from launchers' environments."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from flipscale.engines.build import build_engine, engine_class, engine_classes, start_accelerator
from flipscale.engines.ddp import DdpEngine
from flipscale.engines.launch import (
    PRECISION,
    Launch,
    launch_environment,
    launch_of,
    launched_precision,
    promised_processes,
    read_launch_file,
)
from flipscale.recipe.optim import OptimRecipe

FOLDER = Path(__file__).parents[2] / "ds_configs"
LAUNCH_FILES = sorted(FOLDER.glob("*.yaml"))
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
SHARDED = {**FSDP2, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


def sizes(**values: int) -> dict[str, str]:
    return {f"PARALLELISM_CONFIG_{name.upper()}_SIZE": str(value) for name, value in values.items()}


def made_by_accelerate(file: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment that `accelerate launch` gives to torchrun, and what torchrun adds."""
    monkeypatch.chdir(FOLDER.parent)
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "-m", "flipscale.pretrain"])
    arguments, *_ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ""
    if arguments.use_deepspeed:
        environment = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        environment = prepare_multi_gpu_env(arguments)
    world = str(arguments.num_processes)
    return {**environment, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "ROLE_NAME": arguments.role}


@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: file.stem)
def test_launch_files_are_read_as_by_accelerate(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, read = made_by_accelerate(file, monkeypatch), read_launch_file(file)
    assert read == launch_of(made)
    assert read.engine == {"hsdp": "fsdp2"}.get(file.stem, file.stem)
    assert (read.num_processes, read.precision) == (8, "bf16")
    assert (read.reshard_after_forward, read.prefetches) == (file.stem != "hsdp", file.stem in ("fsdp2", "hsdp"))
    assert launch_environment(file).items() <= made.items()


def test_the_role_names_other_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = yaml.safe_load((FOLDER / "ddp.yaml").read_text())
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump({**settings, "mpirun_config": {"role": "fsdp2"}}))
    expected = Launch("fsdp2", 8, "bf16", processes_per_node=8)
    assert read_launch_file(file) == launch_of(made_by_accelerate(file, monkeypatch)) == expected
    sharded = yaml.safe_load((FOLDER / "hsdp.yaml").read_text())
    file.write_text(yaml.safe_dump({**sharded, "mpirun_config": {"role": "fsdp2_bf16_reduce"}}))
    expected = replace(read_launch_file(FOLDER / "hsdp.yaml"), reduce_in_bf16=True)
    assert read_launch_file(file) == launch_of(made_by_accelerate(file, monkeypatch)) == expected
    file.write_text(yaml.safe_dump({**settings, "mpirun_config": {"role": "ddq"}}))
    with pytest.raises(ValueError, match="role 'ddq'"):
        engine_class(read_launch_file(file))


@pytest.mark.parametrize("true", ["1", "True", "yes"])
def test_flags(true: str) -> None:
    assert launch_of({**FSDP2, "ACCELERATE_USE_FSDP": true}).engine == "fsdp2"
    assert launch_of({"ACCELERATE_USE_DEEPSPEED": true}).engine == "zero2"
    flags = {"ACCELERATE_USE_FSDP": true, "ACCELERATE_USE_PARALLELISM_CONFIG": true, "WORLD_SIZE": "8"}
    assert launch_of({**FSDP2, **sizes(dp_shard=4), **flags}) == Launch("fsdp2", 8, shard_size=4)
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        assert all(launch_of({name: false}) == Launch() for false in ("0", "false", ""))


def test_processes_per_machine(tmp_path: Path) -> None:
    settings = yaml.safe_load((FOLDER / "ddp.yaml").read_text())
    file = tmp_path / "nodes.yaml"
    file.write_text(yaml.safe_dump({**settings, "num_machines": 4, "num_processes": 32}))
    assert [read_launch_file(file, world).processes_per_node for world in (None, 256, 4)] == [8, 8, 4]


@pytest.mark.parametrize(
    ("world", "per_node", "neighbours"),
    [(1, None, 1), (2, None, 2), (256, None, 8), (12, 8, 4), (7, 8, 7), (36, 72, 36)],
)
def test_neighbours(world: int, per_node: int | None, neighbours: int) -> None:
    assert Launch("ddp", world, processes_per_node=per_node).neighbours == neighbours


def test_engines() -> None:
    assert type(build_engine(Accelerator(cpu=True), Launch(), OptimRecipe(), 8)) is DdpEngine
    assert {read_launch_file(file).engine for file in LAUNCH_FILES} == engine_classes().keys()


def test_fsdp_1_and_fp16_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ({}, {"FSDP_VERSION": "1"}):
        with pytest.raises(ValueError, match=r"fsdp_version is 1; .*as in ds_configs/fsdp2.yaml$"):
            launch_of({"ACCELERATE_USE_FSDP": "true", **version})
    with pytest.raises(ValueError, match="mixed_precision is 'fp16'"):
        launch_of({PRECISION: "fp16"})
    monkeypatch.setenv(PRECISION, "fp16")
    with pytest.raises(ValueError, match="mixed_precision is 'fp16'"):
        start_accelerator([], "")
    monkeypatch.chdir(tmp_path)  # where there are no launch files
    with pytest.raises(ValueError, match="flipscale launch_files"):
        launch_of({"ACCELERATE_USE_FSDP": "true"})


@pytest.mark.parametrize(("replicas", "shard", "per_node"), [(1, 8, 8), (12, 4, 8), (3, 16, 8), (48, 1, 8)])
def test_shard_size(replicas: int, shard: int, per_node: int) -> None:
    """Copies lie within machines or on whole machines."""
    world = {"LOCAL_WORLD_SIZE": str(per_node), "WORLD_SIZE": "48"}
    environment = {**SHARDED, **sizes(dp_replicate=replicas, dp_shard=shard), **world}
    launch = launch_of(environment)
    assert (launch.shard_size, launch.processes_per_node) == (shard, per_node)
    assert launch_of({**environment, "ACCELERATE_USE_PARALLELISM_CONFIG": "false"}).shard_size is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (sizes(tp=2), "parallelism_config_tp_size is 2"),
        (sizes(dp_replicate=2, dp_shard=8), "dp_replicate_size 2 .*dp_shard_size 8 .*1 processes"),
        ({**sizes(dp_shard=6), "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "24"}, "dp_shard_size is 6 .*8 processes"),
        ({"ACCELERATE_USE_FSDP": "false"}, "parallelism_config, but no distributed_type: FSDP"),
    ],
)
def test_other_parallelism_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch_of({**SHARDED, **environment})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_stage_comes_from_the_file_or_the_launch(stage: int) -> None:
    launch = launch_of({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(FOLDER / f"zero{stage}.json")})
    assert launch.engine == f"zero{stage}"
    assert launch.deepspeed == json.loads((FOLDER / f"zero{stage}.json").read_text())
    for file in ({}, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"}):
        launch = launch_of({**DEEPSPEED, **file, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)})
        assert launch == Launch(f"zero{stage}", deepspeed={"zero_optimization": {"stage": stage}})


def deepspeed_file(tmp_path: Path, settings: dict) -> dict[str, str]:
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    return {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero.json")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, "fp16 is "),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0"),
    ],
)
def test_deepspeed_settings_of_the_recipe_are_refused(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        launch_of(deepspeed_file(tmp_path, settings))


def test_auto_is_left_to_the_recipe(tmp_path: Path) -> None:
    settings = {"zero_optimization": {"stage": 1}, "gradient_clipping": "auto", "fp16": "auto"}
    assert launch_of(deepspeed_file(tmp_path, settings)).deepspeed == {"zero_optimization": {"stage": 1}}


def test_missing_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no/such.json does not exist in .*" + tmp_path.name):
        launch_of({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "no/such.json"})
    assert read_launch_file(FOLDER / "zero3.yaml").engine == "zero3", "the JSON lies beside the launch file"
    with pytest.raises(ValueError, match="cannot be read"):
        read_launch_file(tmp_path / "none.yaml")


def test_promised_processes() -> None:
    environments = ({}, {"FLIPSCALE_NUM_PROCESSES": "8", "WORLD_SIZE": "4"}, {"WORLD_SIZE": "4"})
    assert [promised_processes(environment) for environment in environments] == [1, 8, 4]
    assert promised_processes({"ACCELERATE_USE_CPU": "1", "MASTER_ADDR": "127.0.0.1"}) == 2


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "no"), (None, "no")])
def test_precision_is_the_device_s_by_default(
    has_bf16: bool | None, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_bf16 is not None)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_bf16)
    assert launch_of({}).precision == launch_of({PRECISION: ""}).precision == launched_precision({}) == precision
    assert [launch_of({PRECISION: asked}).precision for asked in ("no", "bf16", "BF16")] == ["no", "bf16", "bf16"]
