"""Launches, read from launch files and from launchers' environments."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import Accelerator
from accelerate.commands.config import cluster
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from flipscale.engines.build_engine import build_engine, engine_class, engine_classes, start_accelerator
from flipscale.engines.ddp import DdpEngine
from flipscale.engines.launch import (
    PRECISION,
    Launch,
    launch_environment,
    launch_of,
    launched_precision,
    read_launch_file,
)
from flipscale.process.world import promised_processes
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
    with pytest.raises(ValueError, match=r"role 'ddq'.*fsdp2_bf16_reduce"):
        engine_class(read_launch_file(file))


def test_flags() -> None:
    for name, engine in (("ACCELERATE_USE_FSDP", "fsdp2"), ("ACCELERATE_USE_DEEPSPEED", "zero2")):
        for true in ("1", "True", "yes"):
            assert launch_of({"FSDP_VERSION": "2", name: true}).engine == engine
        assert all(launch_of({name: false}) == Launch() for false in ("0", "false", ""))
    with pytest.raises(ValueError, match="FSDP_RESHARD_AFTER_FORWARD=full_shard"):
        launch_of({**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"})


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


@pytest.mark.parametrize(("replicas", "shard"), [(1, 8), (12, 4), (3, 16), (48, 1)])
def test_shard_size(replicas: int, shard: int) -> None:
    """Copies lie within machines or on whole machines."""
    world = {"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "48"}
    environment = {**SHARDED, **sizes(dp_replicate=replicas, dp_shard=shard), **world}
    assert launch_of(environment).shard_size == shard
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


def test_deepspeed_settings_of_the_recipe_are_refused(tmp_path: Path) -> None:
    """The setting `auto` is left to the recipe."""
    file = tmp_path / "zero.json"
    environment = {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    for settings, message in (
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, "fp16 is "),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0"),
        ({"zero_optimization": 2}, "zero_optimization is 2"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer is .*'cpu'"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param is .*'nvme'"),
        ({"zero_optimization": {"stage": 1, "cpu_offload": True}}, "cpu_offload is True"),
    ):
        file.write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=message):
            launch_of(environment)
    zero = {"stage": 1, "reduce_bucket_size": "auto"}
    file.write_text(json.dumps({"zero_optimization": zero, "gradient_clipping": "auto", "fp16": "auto"}))
    assert launch_of(environment).deepspeed == {"zero_optimization": {"stage": 1}}


def test_missing_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no/such.json does not exist in .*" + tmp_path.name):
        launch_of({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "no/such.json"})
    assert read_launch_file(FOLDER / "zero3.yaml").engine == "zero3", "the JSON lies next to the launch file"
    with pytest.raises(ValueError, match="cannot be read"):
        read_launch_file(tmp_path / "none.yaml")


def test_promised_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    environments = ({}, {"FLIPSCALE_NUM_PROCESSES": "8", "WORLD_SIZE": "4"}, {"WORLD_SIZE": "4"})
    assert [promised_processes(environment) for environment in environments] == [1, 8, 4]
    # As `accelerate launch --cpu --num_processes=2` sets them, which then starts one process.
    for name, value in {"ACCELERATE_USE_CPU": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="the launcher promised 2 or more processes, 1 started"):
        start_accelerator([], "")


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "no"), (None, "no")])
def test_precision_is_the_device_s_by_default(
    has_bf16: bool | None, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_bf16 is not None)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_bf16)
    assert launch_of({}).precision == launch_of({PRECISION: ""}).precision == launched_precision({}) == precision
    assert [launch_of({PRECISION: asked}).precision for asked in ("no", "bf16", "BF16")] == ["no", "bf16", "bf16"]


# Answers to the questions of `accelerate config` beside its defaults, by the question's beginning.
GPUS = {"Which type of machine": "multi-GPU", "How many GPU(s)": 8, "Do you wish to use mixed precision": "bf16"}
FSDP = {**GPUS, "Do you want to use FullyShardedDataParallel": True}
ZERO = {**GPUS, "Do you want to use DeepSpeed": True}
CLIPPING = {"Do you want to use gradient clipping": True, "What is the gradient clipping value": 1.0}
# What accelerate sets for itself, for torch or for its launcher, and why flipscale need not read it.
WITHOUT_EFFECT = {
    **dict.fromkeys(("PYTHONPATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"), "read by Python and torch"),
    "ACCELERATE_CPU_AFFINITY": "read by accelerate, which flipscale starts",
    "ACCELERATE_CONFIG_DS_FIELDS": "names of settings, for accelerate's own errors",
    **dict.fromkeys((f"ACCELERATE_DYNAMO_{name}" for name in ("MODE", "USE_FULLGRAPH", "USE_DYNAMIC")), "no backend"),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "no backend",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "each process holds its shard of the first weights only, always",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "an export has bf16 weights, always",
    **dict.fromkeys(("FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_SYNC_MODULE_STATES"), "weights are broadcast, always"),
    "FSDP_STATE_DICT_TYPE": "of accelerate's checkpoints; flipscale writes its own",
    **dict.fromkeys(("FSDP_USE_ORIG_PARAMS", "FSDP_BACKWARD_PREFETCH"), "of FSDP 1"),
    "FSDP_MIN_NUM_PARAMS": "of another fsdp_auto_wrap_policy",
}


def written_by_accelerate(answers: dict[str, Any], file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that `accelerate config` writes after these answers, and its defaults elsewhere."""

    def answer(question: str, default: Any) -> Any:
        return next((given for start, given in answers.items() if question.startswith(start)), default)

    def field(question: str, convert: Any = None, default: Any = None, error_message: Any = None) -> Any:
        value = answer(question, default)
        return "" if value is None else value

    def options(question: str, among: list[Any], convert: Any = None, default: int = 0) -> Any:
        at = among.index(answer(question, among[default]))
        return at if convert is None else convert(at)

    monkeypatch.setattr(cluster, "_ask_field", field)
    monkeypatch.setattr(cluster, "_ask_options", options)
    monkeypatch.setattr(cluster, "is_deepspeed_available", lambda: True)
    cluster.get_cluster_input().to_yaml_file(file)
    return file


@pytest.mark.parametrize(("answers", "engine"), [(GPUS, "ddp"), (FSDP, "fsdp2"), (ZERO, "zero2")])
def test_every_setting_of_accelerate_s_own_files_is_known(
    answers: dict[str, Any], engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recorded(dict[str, str]):
        def get(self, name: str, *default: Any) -> Any:
            names.add(name)
            return super().get(name, *default)

        def __contains__(self, name: object) -> bool:
            names.add(str(name))
            return super().__contains__(name)

    names: set[str] = set()
    file = written_by_accelerate(answers, tmp_path / "own.yaml", monkeypatch)
    made = made_by_accelerate(file, monkeypatch)
    launch = launch_of(Recorded(made))
    assert launch == read_launch_file(file) == replace(launch, engine=engine, num_processes=8, precision="bf16")
    assert not made.keys() - os.environ.keys() - names - WITHOUT_EFFECT.keys()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({**FSDP, "Do you want to offload parameters": True}, "fsdp_offload_params is true"),
        ({**FSDP, "Do you want to enable FSDP activation": True}, "fsdp_activation_checkpointing is true"),
        ({**FSDP, "What should be your auto wrap": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy is SIZE_BASED_WRAP"),
        ({**FSDP, "Specify the comma-separated": "BertLayer"}, "fsdp_transformer_layer_cls_to_wrap is BertLayer"),
        ({**GPUS, "Do you wish to optimize": True}, "dynamo_backend is INDUCTOR.*model.compile"),
        ({**GPUS, "Should distributed operations": True}, "debug is true"),
        ({**ZERO, "How many gradient accumulation": 4}, "gradient_accumulation_steps is 4.*data.micro_batch_size"),
        ({**ZERO, **CLIPPING}, "gradient_clipping is 1.0.*optim.max_grad_norm"),
        ({**ZERO, "Where to offload optimizer": "cpu"}, "offload_optimizer_device is cpu"),
        ({**ZERO, "Where to offload parameters": "nvme"}, "offload_param_device is nvme"),
        ({**ZERO, "Do you want to enable Mixture": True, "Specify": "Moe"}, "deepspeed_moe_layer_cls_names is Moe"),
        ({**GPUS, "Do you want to use Megatron-LM": True}, "megatron_lm_config is "),
    ],
)
def test_settings_that_flipscale_does_not_have_are_refused_by_name(
    answers: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written_by_accelerate(answers, tmp_path / "own.yaml", monkeypatch)
    with pytest.raises(ValueError, match=f"(?i){message}"):
        launch_of(made_by_accelerate(file, monkeypatch))
    with pytest.raises(ValueError, match=f"(?i){message}"):
        read_launch_file(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixed_precision": False}, "mixed_precision is 'false'.*in quotes"),  # as YAML reads `no`
        ({"distributed_type": "MULTI_CPU", "use_cpu": True}, "distributed_type is MULTI_CPU for 8 processes"),
        ({"distributed_type": "NO"}, "distributed_type is NO for 8"),
        ({"distributed_type": "XLA"}, "distributed_type is XLA"),
        ({"distributed_type": "TPU"}, "'TPU' is not a valid"),
        ({"distributed_type": "MEGATRON_LM"}, "megatron_lm_config is true"),
        ({"num_machines": 3}, "num_processes is 8 on 3 machines"),
        ({"num_procs": 8}, "num_procs"),
        ({"num_processes": None}, "num_processes is missing"),
        ({"mixed_precision": None, "fp16": True}, "mixed_precision is 'fp16'"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_reshard": False}}, "fsdp_config has fsdp_reshard,"),
        ({"dynamo_config": {"backend": "INDUCTOR"}}, "dynamo_backend is INDUCTOR"),
    ],
)
def test_launch_files_that_accelerate_cannot_start_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "odd.yaml"
    settings = {**yaml.safe_load((FOLDER / "ddp.yaml").read_text()), **changes}
    file.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
    with pytest.raises(ValueError, match=message):
        read_launch_file(file)
