"""Which engine a launch asks for, and what it may not ask for: the same from a file and from the environment of one."""

import json
import re
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from flipscale.engines.ddp import DdpEngine
from flipscale.engines.fsdp2 import Fsdp2Engine
from flipscale.engines.launch import (
    PRECISION,
    Launch,
    launch_environment,
    launch_of,
    launched_precision,
    precision_in_words,
    promised_processes,
    read_launch_file,
)
from flipscale.engines.optimizers import OptimRecipe
from flipscale.engines.start import build_engine, engine_class, engine_classes, start_accelerator

FOLDER = Path(__file__).parents[2] / "ds_configs"
LAUNCH_FILES = sorted(FOLDER.glob("*.yaml"))
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
HSDP = {**FSDP2, "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"}


def made_by_accelerate(file: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment that `accelerate launch` gives to torchrun, and what torchrun adds."""
    monkeypatch.chdir(FOLDER.parent)
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "-m", "flipscale.pretrain"])
    arguments, *_ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ""
    environment = (
        prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    )
    world = str(arguments.num_processes)
    return {**environment, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "ROLE_NAME": arguments.role}


@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: file.stem)
def test_a_launch_file_is_read_as_accelerate_reads_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_by_accelerate(file, monkeypatch)
    read = read_launch_file(file)
    assert read == launch_of(made)
    assert read.engine == {"hsdp": "fsdp2"}.get(file.stem, file.stem)
    assert (read.num_processes, read.precision) == (8, "bf16")
    for name, value in launch_environment(file).items():
        assert made[name] == value, name


def test_an_engine_that_accelerate_has_no_word_for_is_named_by_the_role(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = yaml.safe_load((FOLDER / "ddp.yaml").read_text())
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump({**settings, "mpirun_config": {"role": "fsdp2"}}))
    expected = Launch("fsdp2", 8, "bf16", processes_per_node=8)
    assert read_launch_file(file) == launch_of(made_by_accelerate(file, monkeypatch)) == expected
    file.write_text(yaml.safe_dump({**settings, "mpirun_config": {"role": "ddq"}}))
    with pytest.raises(ValueError, match="role 'ddq' is no engine; leave it out, or use ddp, "):
        engine_class(read_launch_file(file))


@pytest.mark.parametrize("true", ["1", "true", "True", "yes"])
def test_a_flag_is_set_by_any_word_that_accelerate_takes(true: str) -> None:
    assert launch_of({**FSDP2, "ACCELERATE_USE_FSDP": true}).engine == "fsdp2"
    assert launch_of({"ACCELERATE_USE_DEEPSPEED": true}).engine == "zero2"
    sharded = {"ACCELERATE_USE_FSDP": true, "ACCELERATE_USE_PARALLELISM_CONFIG": true, "WORLD_SIZE": "8"}
    assert launch_of({**HSDP, **sharded}) == Launch("fsdp2", 8, shard_size=4)
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        assert (
            launch_of({name: "0"}) == launch_of({name: "false"}) == launch_of({name: ""}) == launch_of({}) == Launch()
        )


@pytest.mark.parametrize(("shard_size", "per_node"), [(8, 8), (4, 8), (16, 8), (24, 24), (1, 8)])
def test_copies_lie_within_a_machine_or_on_whole_ones(shard_size: int, per_node: int) -> None:
    sizes = {"PARALLELISM_CONFIG_DP_SHARD_SIZE": str(shard_size), "LOCAL_WORLD_SIZE": str(per_node), "WORLD_SIZE": "48"}
    sizes |= {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": str(48 // shard_size)}
    found = launch_of({**SHARDED, **sizes})
    assert (found.shard_size, found.processes_per_node) == (shard_size, per_node)


def test_a_launch_file_says_how_many_processes_a_machine_has(tmp_path: Path) -> None:
    settings = yaml.safe_load((FOLDER / "ddp.yaml").read_text())
    file = tmp_path / "nodes.yaml"
    file.write_text(yaml.safe_dump({**settings, "num_machines": 4, "num_processes": 32}))
    assert read_launch_file(file).processes_per_node == 8
    assert read_launch_file(file, 256).processes_per_node == 8
    assert read_launch_file(file, 4).processes_per_node == 4


@pytest.mark.parametrize(
    ("world", "per_node", "found"), [(1, None, 1), (2, None, 2), (256, None, 8), (12, 8, 4), (7, 8, 7), (36, 72, 36)]
)
def test_neighbours_share_work_within_a_machine(world: int, per_node: int | None, found: int) -> None:
    assert Launch("ddp", world, processes_per_node=per_node).neighbours == found


def test_plain_processes_are_data_parallel() -> None:
    assert type(build_engine(Accelerator(cpu=True), Launch(), OptimRecipe(), 8)) is DdpEngine


def test_every_engine_is_named_as_a_launch_names_it() -> None:
    assert {read_launch_file(file).engine for file in LAUNCH_FILES} == engine_classes().keys()
    assert engine_class(launch_of(FSDP2)) is Fsdp2Engine


@pytest.mark.parametrize("version", [{}, {"FSDP_VERSION": "1"}])
def test_the_first_fsdp_is_refused(version: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"fsdp_version is 1; write fsdp_version: 2, as in ds_configs/fsdp2.yaml$"):
        launch_of({"ACCELERATE_USE_FSDP": "true", **version})


def test_a_launch_file_that_is_not_there_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"as in ds_configs/fsdp2.yaml \(`flipscale launch_files \.` writes it\)$"):
        launch_of({"ACCELERATE_USE_FSDP": "true"})


def test_half_precision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="mixed_precision is 'fp16'; the loss is fp32 and needs 'bf16' or 'no'"):
        launch_of({"ACCELERATE_MIXED_PRECISION": "fp16"})
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="mixed_precision is 'fp16'; the loss is fp32 and needs 'bf16' or 'no'"):
        start_accelerator([], "")


SHARDED = {**FSDP2, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}


@pytest.mark.parametrize(("sizes", "found"), [((1, 8), 8), ((4, 8), 8), ((2, 16), 16), ((1, 32), 32), ((32, 1), 1)])
def test_copies_follow_from_the_processes_that_share_one(sizes: tuple[int, int], found: int) -> None:
    names = ("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE")
    asked = {name: str(size) for name, size in zip(names, sizes, strict=True)} | {"WORLD_SIZE": "32"}
    assert launch_of({**SHARDED, **asked}).shard_size == found
    assert launch_of({**SHARDED, **asked, "ACCELERATE_USE_PARALLELISM_CONFIG": "false"}).shard_size is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, r"parallelism_config_tp_size is 2; leave it out: flipscale has only dp_"),
        ({"PARALLELISM_CONFIG_CP_SIZE": "4"}, r"parallelism_config_cp_size is 4; leave it out: flipscale has only dp_"),
        ({"PARALLELISM_CONFIG_SP_SIZE": "8"}, r"parallelism_config_sp_size is 8; leave it out: flipscale has only dp_"),
        (
            {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8"},
            "replicate_size 2 times parallelism_config_dp_shard_size 8 is not the number of processes, 1; use a dp_sh",
        ),
        ({"PARALLELISM_CONFIG_DP_SHARD_SIZE": "8"}, "1 times parallelism_config_dp_shard_size 8 is not the number of"),
        (
            {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "6", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "24"},
            r"dp_shard_size is 6 and a machine has 8 processes, so copies of the weights would be split",
        ),
        ({"ACCELERATE_USE_FSDP": "false"}, "has a parallelism_config, but no distributed_type: FSDP; leave it out, or"),
    ],
)
def test_other_parallelism_is_refused(asked: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch_of({**SHARDED, **asked})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_s_stage_is_the_file_s_or_the_launch_s(stage: int) -> None:
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true"}
    launch = launch_of({**deepspeed, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(FOLDER / f"zero{stage}.json")})
    assert launch.engine == f"zero{stage}"
    assert launch.deepspeed == json.loads((FOLDER / f"zero{stage}.json").read_text())
    for file in ({}, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"}):
        launch = launch_of({**deepspeed, **file, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)})
        assert launch == Launch(f"zero{stage}", deepspeed={"zero_optimization": {"stage": stage}})


def deepspeed_file(tmp_path: Path, given: dict) -> dict[str, str]:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(given))
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, r"fp16 is .*; leave it out: the recipe and"),
        ({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}, r"gradient_clipping is 1.0; leave it out"),
        ({"zero_optimization": {"stage": 0}}, r"zero_optimization.stage is 0; use 1, 2 or 3, or ds_configs/ddp.yaml"),
        ({"steps_per_print": 1}, r"zero_optimization.stage is None; use 1, 2 or 3"),
    ],
)
def test_what_the_recipe_decides_is_refused(given: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        launch_of(deepspeed_file(tmp_path, given))


def test_what_is_left_to_the_recipe_by_auto_is_taken(tmp_path: Path) -> None:
    given = {"zero_optimization": {"stage": 1}, "gradient_clipping": "auto", "fp16": "auto"}
    assert launch_of(deepspeed_file(tmp_path, given)).deepspeed == {"zero_optimization": {"stage": 1}}


def test_a_deepspeed_file_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = re.escape(str(tmp_path))
    with pytest.raises(ValueError, match=rf"no/such.json does not exist in {here}"):
        launch_of({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "no/such.json"})
    # A dry run has the launch file, and finds what lies beside it.
    assert read_launch_file(FOLDER / "zero3.yaml").engine == "zero3"


def test_a_launch_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read as accelerate's"):
        read_launch_file(tmp_path / "none.yaml")


def test_the_promised_processes() -> None:
    assert promised_processes({}) == 1
    assert promised_processes({"FLIPSCALE_NUM_PROCESSES": "8", "WORLD_SIZE": "4"}) == 8
    assert promised_processes({"WORLD_SIZE": "4"}) == 4
    assert promised_processes({"ACCELERATE_USE_CPU": "1", "MASTER_ADDR": "127.0.0.1"}) == 2


def test_launch_files_differ_where_they_must() -> None:
    """One page each, a sentence on when to choose it, and the same lines but for the engine's own."""
    texts = {path.stem: path.read_text() for path in LAUNCH_FILES}
    files = {name: yaml.safe_load(text) for name, text in texts.items()}
    for name, text in texts.items():
        assert len(text.splitlines()) <= 30
        assert "Choose it" in text, name
        own = {"distributed_type", "fsdp_config", "parallelism_config", "deepspeed_config", "mpirun_config"}
        assert {k: v for k, v in files[name].items() if k not in own} == {
            k: v for k, v in files["ddp"].items() if k not in own
        }


@pytest.mark.parametrize(("has_bf16", "found"), [(True, "bf16"), (False, "no"), (None, "no")])
def test_precision_is_the_device_s_unless_the_launch_says_it(
    has_bf16: bool | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_bf16 is not None)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_bf16)
    assert launch_of({}).precision == launch_of({PRECISION: ""}).precision == launched_precision({}) == found
    assert [launch_of({PRECISION: asked}).precision for asked in ("no", "bf16", "BF16")] == ["no", "bf16", "bf16"]


@pytest.mark.parametrize("faster", [True, False])
def test_precision_in_words(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flipscale.engines.launch.is_faster_in_bf16", lambda: faster)
    advice = "; ACCELERATE_MIXED_PRECISION=bf16 is faster here" if faster else ""
    assert precision_in_words({}) == f"fp32 (the default here{advice})"
    assert precision_in_words({PRECISION: "no"}) == f"fp32 (by mixed_precision of the launch{advice})"
    assert precision_in_words({PRECISION: "bf16"}) == (
        "bf16 products, fp32 weights and loss (by mixed_precision of the launch)"
    )
