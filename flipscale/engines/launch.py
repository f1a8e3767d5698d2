"""The launch of a run: its engine, processes and precision, read from a launch file or a launcher's environment.

`accelerate launch --config_file FILE` turns the file into environment variables. The dry run makes the same variables
from the file, and one parser reads them for both.

accelerate knows data parallelism, FSDP and DeepSpeed. Other engines are named by the role of the workers, which
`torchrun --role NAME` and `accelerate launch --role NAME` pass to every process. In a launch file, write `role: NAME`
inside a section such as `mpirun_config`. accelerate refuses other keys at the top, and takes keys of sections as flags.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from flipscale.engines.device import default_precision, is_faster_in_bf16
from flipscale.io.errors import UserError
from flipscale.io.paths import read_text
from flipscale.io.yaml_text import check_yaml
from flipscale.process.world import MAX_DIGITS, whole_number

# Variable that launchers set from a launch file's mixed_precision. Users may set it without a launcher.
PRECISION = "ACCELERATE_MIXED_PRECISION"
# How long a process of a training waits for another, in any group. The watchdog ends a hanging run much earlier.
PATIENCE = timedelta(days=1)
# torchrun's default role.
_NO_ROLE = "default"
# The role that sums gradients in bf16; accelerate passes no setting of its own for this.
BF16_REDUCE = "fsdp2_bf16_reduce"
# Sections of a launch file.
_SECTIONS = ("fsdp_config", "deepspeed_config", "parallelism_config")
# Sections whose settings accelerate reads with and without the section's prefix.
_PREFIXED = ("fsdp_config", "fp8_config", "dynamo_config")
# Values of distributed_type that start several processes, and those that start one. Megatron's settings are refused.
_TYPES, _ALONE = ("MULTI_GPU", "FSDP", "DEEPSPEED", "MEGATRON_LM"), ("NO", "MULTI_CPU")
# accelerate's kinds of parallelism; flipscale has the first two.
_PARALLELISM = ("dp_replicate", "dp_shard", "tp", "cp", "sp")
_FALSE = ("", "0", "false", "f", "no", "n", "off")
_TRUE = ("1", "true", "t", "yes", "y", "on")
_RECOMPUTES = "gradient_checkpointing of the recipe's model or of a stage recomputes activations"
_BLOCKS = "each block is sharded"
_STAYS = "weights and moments stay on the GPU; shard over more GPUs"
_OFFLOAD = "ACCELERATE_DEEPSPEED_OFFLOAD"
# Settings of launch files that flipscale does not have: accelerate's variable, its values without effect, the fix.
_UNSUPPORTED = {
    "dynamo_backend": ("ACCELERATE_DYNAMO_BACKEND", ("", "no"), "the recipe's model.compile compiles the blocks"),
    "gradient_accumulation_steps": ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("", "1"), "use data.micro_batch_size"),
    "gradient_clipping": ("ACCELERATE_GRADIENT_CLIPPING", ("", "none"), "use the recipe's optim.max_grad_norm"),
    "debug": ("ACCELERATE_DEBUG_MODE", _FALSE, "TORCH_DISTRIBUTED_DEBUG=DETAIL checks collectives"),
    "megatron_lm_config": ("ACCELERATE_USE_MEGATRON_LM", _FALSE, "use distributed_type FSDP"),
    "fsdp_offload_params": ("FSDP_OFFLOAD_PARAMS", _FALSE, _STAYS),
    "fsdp_activation_checkpointing": ("FSDP_ACTIVATION_CHECKPOINTING", _FALSE, _RECOMPUTES),
    "fsdp_activation_checkpointing_offload": ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", _FALSE, _RECOMPUTES),
    "fsdp_auto_wrap_policy": ("FSDP_AUTO_WRAP_POLICY", ("", "transformer_based_wrap"), _BLOCKS),
    "fsdp_transformer_layer_cls_to_wrap": ("FSDP_TRANSFORMER_CLS_TO_WRAP", ("",), _BLOCKS),
    "fsdp_ignored_modules": ("FSDP_IGNORED_MODULES", ("",), _BLOCKS),
    "fsdp_sharding_strategy": ("FSDP_SHARDING_STRATEGY", ("", "full_shard", "1"), "use fsdp_reshard_after_forward"),
    "offload_optimizer_device": (f"{_OFFLOAD}_OPTIMIZER_DEVICE", ("", "none"), _STAYS),
    "offload_param_device": (f"{_OFFLOAD}_PARAM_DEVICE", ("", "none"), _STAYS),
    "deepspeed_moe_layer_cls_names": ("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", ("",), "no model has experts"),
}
# DeepSpeed's settings that the recipe or the launch file's mixed_precision sets.
_DECIDED_ELSEWHERE = (
    *("optimizer", "scheduler", "fp16", "bf16", "amp", "gradient_clipping", "gradient_accumulation_steps"),
    *("train_batch_size", "train_micro_batch_size_per_gpu"),
)


@dataclass(frozen=True)
class Launch:
    """The engine, processes and precision of a run.

    Args:
        engine: name in `flipscale.engines.build_engine.engine_classes`.
        num_processes: number of processes of the run.
        precision: precision of matrix products, in accelerate's words; `no` is fp32. The rest is fp32 with either.
        shard_size: number of neighbouring processes that share one copy of the weights under `fsdp2`; None for all.
        reshard_after_forward: whether `fsdp2` drops gathered weights after the forward pass, and gathers them again for
            the backward pass. False takes the memory of all weights in the products' precision.
        prefetches: whether `fsdp2` begins to gather the next block before a block computes.
        reduce_in_bf16: whether `fsdp2` sums gradients in bf16: half the bytes, and rounding that grows with the number
            of processes.
        deepspeed: DeepSpeed's settings, for the ZeRO engines.
        processes_per_node: number of processes on each machine; None if unknown.
    """

    engine: str = "ddp"
    num_processes: int = 1
    precision: Literal["no", "bf16"] = "no"
    shard_size: int | None = None
    reshard_after_forward: bool = True
    prefetches: bool = False
    reduce_in_bf16: bool = False
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    processes_per_node: int | None = None

    @property
    def bf16(self) -> bool:
        return self.precision == "bf16"

    @property
    def neighbours(self) -> int:
        """Number of processes on one machine that share work whose whole result each process needs."""
        # By default 8, the most common number of GPUs in a machine.
        count = math.gcd(self.num_processes, self.processes_per_node or 8)
        return count if count > 1 else self.num_processes


def launch_of(environment: Mapping[str, str]) -> Launch:
    """Return the launch that made `environment`: accelerate's, torchrun's, or that of a plain process.

    Raise UserError if flipscale does not support the launch, or it sets a value that the recipe sets."""
    for setting, (variable, ignored, fix) in _UNSUPPORTED.items():
        if (value := environment.get(variable, "")).lower() not in ignored:
            raise UserError(f"the launch file's {setting} is {value[:60]}; leave it out, or unset {variable}: {fix}")
    per_node = whole_number(environment, "LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in environment else None
    launch = Launch(
        num_processes=whole_number(environment, "WORLD_SIZE", 1),
        precision=launched_precision(environment),
        processes_per_node=per_node,
    )
    if _is_set(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        launch = replace(launch, shard_size=_shard_size(environment, launch.num_processes, per_node))
    if _is_set(environment, "ACCELERATE_USE_DEEPSPEED"):
        settings = _deepspeed_settings(environment)
        launch = replace(launch, engine=f"zero{settings['zero_optimization']['stage']}", deepspeed=settings)
    elif _is_set(environment, "ACCELERATE_USE_FSDP"):
        version = environment.get("FSDP_VERSION", "1")
        if version != "2":
            raise UserError(f"the launch file's fsdp_version is {version}; write 2, as in {shipped('fsdp2')}")
        reshard_after_forward = _is_set(environment, "FSDP_RESHARD_AFTER_FORWARD", "true")
        prefetches = _is_set(environment, "FSDP_FORWARD_PREFETCH")
        launch = replace(launch, engine="fsdp2", reshard_after_forward=reshard_after_forward, prefetches=prefetches)
    role = environment.get("ROLE_NAME", _NO_ROLE)
    if role == BF16_REDUCE:
        return replace(launch, engine="fsdp2", reduce_in_bf16=True)
    return launch if role == _NO_ROLE else replace(launch, engine=role)


def read_launch_file(file: Path, num_processes: int | None = None, num_machines: int | None = None) -> Launch:
    """Return the launch of `accelerate launch --config_file FILE`, by default of the file's number of processes.

    Raise UserError if the file cannot be read, or flipscale does not support it."""
    return launch_of(launch_environment(file, num_processes, num_machines))


def launch_environment(file: Path, num_processes: int | None = None, num_machines: int | None = None) -> dict[str, str]:
    """Return the variables that accelerate sets for a launch file, as far as `launch_of` reads them."""
    settings = _read_settings(file, num_processes)
    flags = {name: value for name, value in _flags(file, settings).items() if value not in (None, {})}
    world = num_processes or settings["num_processes"]
    kind, precision = settings.get("distributed_type"), settings.get("mixed_precision")
    if kind not in _TYPES and (world > 1 or kind not in _ALONE):
        raise UserError(
            f"launch file {file}: distributed_type is {kind} for {world} processes; expected MULTI_GPU, FSDP or "
            "DEEPSPEED. Fix: change it; on CPUs, use MULTI_GPU and set ACCELERATE_USE_CPU=1 in the environment"
        )
    of_machines = (world, num_machines) if num_machines else (settings["num_processes"], settings["num_machines"])
    if of_machines[0] % of_machines[1]:
        raise UserError(
            f"launch file {file}: num_processes is {of_machines[0]} on {of_machines[1]} machines; expected equally "
            "many on each. Fix: change num_processes or num_machines"
        )
    environment = {
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": min(world, of_machines[0] // of_machines[1]),
        PRECISION: "no" if precision is None else precision,
        "ROLE_NAME": flags.get("role", _NO_ROLE),
    }
    for name, (variable, ignored, _) in _UNSUPPORTED.items():
        if str(flags.get(name, "")).lower() not in ignored:
            environment[variable] = flags[name]
    if kind == "FSDP":
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": flags.get("fsdp_version", 1)}
        for name, default in (("reshard_after_forward", True), ("forward_prefetch", False)):
            environment[f"FSDP_{name.upper()}"] = str(flags.get(f"fsdp_{name}", default)).lower()
    elif kind == "MEGATRON_LM":
        environment["ACCELERATE_USE_MEGATRON_LM"] = "true"
    elif kind == "DEEPSPEED":
        environment["ACCELERATE_USE_DEEPSPEED"] = "true"
        if "zero_stage" in flags:
            environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = flags["zero_stage"]
        if "deepspeed_config_file" in flags:
            # The path is relative to the current folder; otherwise the file may lie next to the launch file.
            named = Path(str(flags["deepspeed_config_file"]))
            beside = file.parent / named.name
            path = beside if not named.exists() and beside.exists() else named
            environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = path
    if parallelism := settings["parallelism_config"]:
        environment |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
        environment |= {str(name).upper(): value for name, value in parallelism.items()}
    return {name: str(value) for name, value in environment.items()}


def _flags(file: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a launch file and of its sections, which accelerate reads as flags of its command line.

    Raise UserError for a setting of `_SECTIONS` that is not a flag. accelerate would drop it."""
    from accelerate.commands.launch import launch_command_parser

    known, flags = vars(launch_command_parser().parse_args(["flipscale"])), dict(settings)
    for section, values in settings.items():
        prefix = section.removesuffix("config") if section in _PREFIXED else ""
        for name, value in values.items() if isinstance(values, dict) else ():
            flag = str(name) if str(name).startswith(prefix) else f"{prefix}{name}"
            if section in _SECTIONS and flag not in known and flag not in _UNSUPPORTED:
                raise UserError(
                    f"launch file {file}: {section} has {str(name)[:60]}, which accelerate does not know. Fix: correct "
                    "or remove it; `accelerate launch --help` lists the names"
                )
            flags[flag] = value
    return flags


def _read_settings(file: Path, num_processes: int | None) -> dict[str, Any]:
    """Return the settings of a launch file as accelerate reads them, with all of `_SECTIONS`, and with valid numbers.

    A file without a number of processes gets `num_processes`."""
    from accelerate.commands.config.config_args import ClusterConfig

    try:
        text = read_text(file)
        check_yaml(text, str(file))
        # Raises for unknown settings and types, and leaves out settings without a value.
        settings = ClusterConfig.from_yaml_file(file).to_dict()
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"launch file {file} cannot be read ({error!r}); use such as {shipped('ddp')}") from error
    for name in _SECTIONS:
        settings[name] = settings.get(name) or {}
        if not isinstance(settings[name], dict):
            raise UserError(f"launch file {file}: {name} is {str(settings[name])[:60]!r}; write settings below it")
    if settings.get("num_processes") in (None, -1):  # accelerate's -1 means missing, and is refused by it too
        settings["num_processes"] = num_processes
    for name in ("num_processes", "num_machines"):
        value = settings.get(name)
        if type(value) is not int or not 1 <= value < 10**MAX_DIGITS:
            shown = "missing" if value is None else repr(str(value)[:60])
            raise UserError(f"launch file {file}: {name} is {shown}; use a whole number above 0")
    return settings


def shipped(name: str) -> str:
    """Return the path of a shipped launch file for messages, and how to write it if it is not there."""
    path = f"ds_configs/{name}.yaml"
    return path if Path(path).exists() else f"{path} (`flipscale launch_files .` writes it)"


def launched_precision(environment: Mapping[str, str]) -> Literal["no", "bf16"]:
    """Return the precision of a launch, by default the device's `default_precision`."""
    precision = environment.get(PRECISION, "").lower() or default_precision()
    if precision not in ("no", "bf16"):
        raise UserError(f"mixed_precision is {precision!r}; the loss is fp32 and needs 'bf16' or 'no', in quotes")
    return cast('Literal["no", "bf16"]', precision)


def precision_in_words(environment: Mapping[str, str]) -> str:
    """Describe the precision of a launch and its origin, for the log."""
    bf16 = launched_precision(environment) == "bf16"
    precision = "bf16 products, fp32 weights and loss" if bf16 else "fp32"
    return f"{precision} ({'by mixed_precision of the launch' if environment.get(PRECISION) else 'the default here'})"


def faster_precision(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variable that makes a launch faster on this device; empty if none does, or if one is chosen.

    Takes a tenth of a second on a CPU, for a measurement.
    """
    is_slow = not environment.get(PRECISION) and default_precision() == "no" and is_faster_in_bf16()
    return {PRECISION: "bf16"} if is_slow else {}


def _is_set(environment: Mapping[str, str], name: str, default: str = "") -> bool:
    """Return whether a flag has one of accelerate's words for true."""
    value = environment.get(name, default).lower()
    if value not in (*_TRUE, *_FALSE):
        raise UserError(f"the launch has {name}={value[:60]}; write true or false in the launch file")
    return value in _TRUE


def _shard_size(environment: Mapping[str, str], num_processes: int, per_node: int | None) -> int:
    """Return the number of processes that share one copy of the weights, of a parallelism_config."""
    if not _is_set(environment, "ACCELERATE_USE_FSDP"):
        raise UserError(f"the launch file has parallelism_config, but no distributed_type: FSDP; use {shipped('hsdp')}")
    sizes = {kind: whole_number(environment, f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", 1) for kind in _PARALLELISM}
    num_replicas, shard_size = sizes.pop("dp_replicate"), sizes.pop("dp_shard")
    for kind, size in sizes.items():
        if size != 1:
            raise UserError(
                f"the launch file's parallelism_config_{kind}_size is {size}; leave it out: flipscale has only "
                "dp_replicate and dp_shard"
            )
    # accelerate sets 1 replica by default; the number then follows from the number of processes.
    follows = num_replicas == 1 and shard_size > 1 and num_processes % shard_size == 0
    if num_replicas * shard_size != num_processes and not follows:
        raise UserError(
            f"the launch file's parallelism_config has dp_replicate_size {num_replicas} and dp_shard_size {shard_size} "
            f"for {num_processes} processes; use a dp_shard_size above 1 that divides them, and no dp_replicate_size"
        )
    if per_node is not None and per_node % shard_size and shard_size % per_node:
        raise UserError(
            f"the launch file's parallelism_config_dp_shard_size is {shard_size} and a machine has {per_node} "
            f"processes; use a divisor of these as in {shipped('hsdp')}, or a multiple, so that machines hold whole "
            "copies of the weights"
        )
    return shard_size


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value != "auto"}


def _deepspeed_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return DeepSpeed's settings: the content of its JSON file, or the launch file's stage."""
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        launched = whole_number(environment, "ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)
        file, settings = "deepspeed_config", {"zero_optimization": {"stage": launched}}
    else:
        try:
            settings = {**json.loads(read_text(Path(file)), object_hook=_without_auto)}
        except FileNotFoundError as error:
            raise UserError(
                f"deepspeed_config_file {file} does not exist in {Path.cwd()}; start in its folder, or write its "
                "absolute path in the launch file (`flipscale launch_files .` writes ds_configs/)"
            ) from error
        except (OSError, ValueError, RecursionError, TypeError) as error:
            raise UserError(
                f"deepspeed_config_file {file} cannot be read ({error}); write settings in braces, as JSON in UTF-8"
            ) from error
    for name in _DECIDED_ELSEWHERE:
        if name in settings:
            raise UserError(f"{file}: {name} is {settings[name]}; leave it out: recipe and mixed_precision decide it")
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"{file}: zero_optimization is {zero}; write its settings in braces, with stage 1, 2 or 3")
    stage = zero.get("stage")
    if type(stage) is not int or stage not in (1, 2, 3):
        raise UserError(f"{file}: zero_optimization.stage is {stage}; use 1, 2 or 3, or {shipped('ddp')}")
    for name in ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_params"):
        value = zero.get(name)
        if (value.get("device", "none") if isinstance(value, dict) else value) not in (None, False, "none"):
            raise UserError(f"{file}: zero_optimization.{name} is {value}; leave it out: {_STAYS}")
    return settings
