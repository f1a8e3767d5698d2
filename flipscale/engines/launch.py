"""Where a run runs: one value, read from a launch file or from the environment that a launcher made of it.

`accelerate launch --config_file FILE` turns the file into environment variables. The dry run turns it into the same
variables, and one parser reads them for both.

accelerate has words for data parallelism, FSDP and DeepSpeed. An engine that it has no word for is named by the
workers' role, which `torchrun --role NAME` and `accelerate launch --role NAME` hand on to every process. A launch file
writes `role: NAME` inside one of its sections, such as `mpirun_config`: accelerate refuses keys that it does not know
at the top of the file, and takes those inside a section as its flags.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from flipscale.engines.device import default_precision, is_faster_in_bf16
from flipscale.io.errors import UserError
from flipscale.io.files import read_text
from flipscale.io.yaml_text import check_yaml

# What launchers set from a launch file's mixed_precision, and who starts without one may set.
PRECISION = "ACCELERATE_MIXED_PRECISION"
# torchrun's own role where none was chosen.
_NO_ROLE = "default"
_MAX_DIGITS = 9
# The parallelism that accelerate knows; flipscale has the first two.
_PARALLELISM = ("dp_replicate", "dp_shard", "tp", "cp", "sp")
# DeepSpeed's settings that the recipe or the launch file's mixed_precision decides.
_DECIDED_ELSEWHERE = (
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "amp",
    "gradient_clipping",
    "gradient_accumulation_steps",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
)


@dataclass(frozen=True)
class Launch:
    """Where a recipe runs.

    Args:
        engine: a name in `flipscale.engines.start.engine_classes`.
        num_processes: of the whole run.
        precision: of matrix products, in accelerate's words; `no` is fp32. Weights, moments and the loss are fp32
            with either.
        shard_size: neighbouring processes that share one copy of the weights under `fsdp2`; None for all of them.
        deepspeed: DeepSpeed's settings, for the ZeRO engines.
        processes_per_node: of each machine; None where the launcher does not say.
    """

    engine: str = "ddp"
    num_processes: int = 1
    precision: Literal["no", "bf16"] = "no"
    shard_size: int | None = None
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    processes_per_node: int | None = None

    @property
    def bf16(self) -> bool:
        """Whether matrix products are in bf16."""
        return self.precision == "bf16"

    @property
    def neighbours(self) -> int:
        """How many processes, on one machine, share work whose results each of them needs whole."""
        # Where nothing is known of machines, 8 is what most have.
        count = math.gcd(self.num_processes, self.processes_per_node or 8)
        return count if count > 1 else self.num_processes

    def using(self, **changes: Any) -> "Launch":
        """Return the same launch but for `changes`."""
        return replace(self, **changes)


def place_in_world(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return the number of this process, and how many there are, as a launcher says.

    Raises:
        ValueError: the environment has no such numbers.
    """
    rank, world = whole_number(environment, "RANK", 0), whole_number(environment, "WORLD_SIZE", 1)
    if not 0 <= rank < world:
        raise UserError(f"the environment has RANK={rank} and WORLD_SIZE={world}; a launcher sets 0 to {world - 1}")
    return rank, world


def whole_number(environment: Mapping[str, str], name: str, default: int) -> int:
    """Return a launcher's variable.

    Raises:
        ValueError: it is no whole number.
    """
    text = environment.get(name, str(default))
    if not text.isdecimal() or len(text) > _MAX_DIGITS:
        raise UserError(
            f"the environment has {name}={text[:60]!r}; it must be a whole number; unset it, or use a launcher"
        )
    return int(text)


def launch_of(environment: Mapping[str, str]) -> Launch:
    """Return the launch that made `environment`: accelerate's, torchrun's, or that of a plain process.

    Raises:
        ValueError: the launch asks for something that flipscale does not do, or for what the recipe decides.
    """
    num_processes = whole_number(environment, "WORLD_SIZE", 1)
    per_node = whole_number(environment, "LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in environment else None
    launch = Launch(
        num_processes=num_processes,
        precision=launched_precision(environment),
        shard_size=_shard_size(environment, num_processes, per_node),
        processes_per_node=per_node,
    )
    if _is_set(environment, "ACCELERATE_USE_DEEPSPEED"):
        settings = _deepspeed_settings(environment)
        launch = launch.using(engine=f"zero{settings['zero_optimization']['stage']}", deepspeed=settings)
    elif _is_set(environment, "ACCELERATE_USE_FSDP"):
        version = environment.get("FSDP_VERSION", "1")
        if version != "2":
            raise UserError(
                f"the launch file's fsdp_version is {version}; write fsdp_version: 2, as in {shipped('fsdp2')}"
            )
        launch = launch.using(engine="fsdp2")
    role = environment.get("ROLE_NAME", _NO_ROLE)
    return launch if role == _NO_ROLE else launch.using(engine=role)


def read_launch_file(file: Path, num_processes: int | None = None) -> Launch:
    """Return the launch that `accelerate launch --config_file FILE` makes, on `num_processes` or as many as it says.

    Raises:
        ValueError: the file cannot be read, or asks for something that flipscale does not do.
    """
    return launch_of(launch_environment(file, num_processes))


def launch_environment(file: Path, num_processes: int | None = None) -> dict[str, str]:
    """Return the variables that accelerate sets for a launch file, those that `launch_of` reads.

    Raises:
        ValueError: the file cannot be read as accelerate's.
    """
    settings = _read_settings(file)
    kind = settings["distributed_type"]
    sections = [section for section in settings.values() if isinstance(section, dict)]
    of_file, num_machines = (_count(file, settings, name) for name in ("num_processes", "num_machines"))
    world = num_processes or of_file
    environment = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(min(world, max(of_file // num_machines, 1))),
        PRECISION: str(settings.get("mixed_precision") or "no"),
        "ROLE_NAME": str(next((section["role"] for section in sections if "role" in section), _NO_ROLE)),
    }
    if kind == "FSDP":
        fsdp = _section(file, settings, "fsdp_config")
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": str(fsdp.get("fsdp_version", 1))}
    elif kind == "DEEPSPEED":
        deepspeed = _section(file, settings, "deepspeed_config")
        environment["ACCELERATE_USE_DEEPSPEED"] = "true"
        if "zero_stage" in deepspeed:
            environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(deepspeed["zero_stage"])
        if "deepspeed_config_file" in deepspeed:
            named = _beside(file, str(deepspeed["deepspeed_config_file"]))
            environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(named)
    if settings.get("parallelism_config"):
        environment["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
        parallelism = _section(file, settings, "parallelism_config")
        environment |= {str(name).upper(): str(value) for name, value in parallelism.items()}
    return environment


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        text = read_text(file)
        check_yaml(text, str(file))
        settings = yaml.safe_load(text)
        settings["distributed_type"]
        return dict(settings)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"launch file {file} cannot be read as accelerate's ({error!r}); use one such as {shipped('ddp')}"
        ) from error


def _section(file: Path, settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = settings.get(name) or {}
    if not isinstance(section, dict):
        raise UserError(
            f"launch file {file}: {name} is {str(section)[:60]!r}; write settings below it, or leave it out"
        )
    return section


def _count(file: Path, settings: Mapping[str, Any], name: str) -> int:
    count = settings.get(name, 1)
    if type(count) is not int or not 1 <= count < 10**_MAX_DIGITS:
        raise UserError(f"launch file {file}: {name} is {str(count)[:60]!r}; it must be a whole number of 1 or more")
    return count


def shipped(name: str) -> str:
    """Return what messages call one of flipscale's launch files: its path, and how to get it where it is not there."""
    path = f"ds_configs/{name}.yaml"
    return path if Path(path).exists() else f"{path} (`flipscale launch_files .` writes it)"


def launched_precision(environment: Mapping[str, str]) -> Literal["no", "bf16"]:
    """Return the precision that the launch asks for; where it asks for none, bf16 on a GPU that has it, or else fp32.

    Raises:
        ValueError: it is neither bf16 nor fp32.
    """
    precision = environment.get(PRECISION, "").lower() or default_precision()
    if precision not in ("no", "bf16"):
        raise UserError(f"mixed_precision is {precision!r}; the loss is fp32 and needs 'bf16' or 'no'")
    return cast('Literal["no", "bf16"]', precision)


def precision_in_words(environment: Mapping[str, str]) -> str:
    """Return what the precision of a launch is here, and who chose it, for the start of a run; where bf16 would be
    faster, that too. Takes a tenth of a second on a CPU, which is tried.

    Raises:
        ValueError: as `launched_precision`.
    """
    bf16 = launched_precision(environment) == "bf16"
    what = "bf16 products, fp32 weights and loss" if bf16 else "fp32"
    chosen = "by mixed_precision of the launch" if environment.get(PRECISION) else "the default here"
    faster = "" if bf16 or not is_faster_in_bf16() else f"; {PRECISION}=bf16 is faster here"
    return f"{what} ({chosen}{faster})"


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    """Return whether a flag is set, in any of the words that accelerate takes for true."""
    return environment.get(name, "").lower() in ("1", "true", "t", "yes", "y", "on")


def _shard_size(environment: Mapping[str, str], num_processes: int, per_node: int | None) -> int | None:
    """Return how many processes share one copy of the weights, where the launch file's parallelism_config says so.

    Raises:
        ValueError: a parallelism_config without FSDP, with other parallelism, whose sizes do not make the processes, or
            whose copies would be cut by the machines.
    """
    if not _is_set(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return None
    if not _is_set(environment, "ACCELERATE_USE_FSDP"):
        raise UserError(
            "the launch file has a parallelism_config, but no distributed_type: FSDP; leave it out, or use "
            f"{shipped('hsdp')}"
        )
    sizes = {kind: whole_number(environment, f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", 1) for kind in _PARALLELISM}
    for kind in _PARALLELISM[2:]:
        if sizes[kind] != 1:
            raise UserError(
                f"the launch file's parallelism_config_{kind}_size is {sizes[kind]}; leave it out: flipscale has only "
                "dp_replicate and dp_shard"
            )
    num_replicas, shard_size = sizes["dp_replicate"], sizes["dp_shard"]
    # accelerate sets 1 where the launch file says nothing; the number of replicas then follows from the processes.
    follows = num_replicas == 1 and shard_size > 1 and num_processes % shard_size == 0
    if num_replicas * shard_size != num_processes and not follows:
        raise UserError(
            f"the launch file's parallelism_config_dp_replicate_size {num_replicas} times "
            f"parallelism_config_dp_shard_size {shard_size} is not the number of processes, {num_processes}; use a "
            "dp_shard_size above 1 that divides it, and no dp_replicate_size, which follows"
        )
    if per_node is not None and per_node % shard_size and shard_size % per_node:
        raise UserError(
            f"the launch file's parallelism_config_dp_shard_size is {shard_size} and a machine has {per_node} "
            "processes, so that a copy of the weights would lie on parts of machines; use a dp_shard_size that divides "
            f"them, as {shipped('hsdp')} has it, or is a multiple of them"
        )
    return shard_size


def _deepspeed_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return DeepSpeed's settings: those of its JSON file, or the stage that the launch file names.

    Raises:
        ValueError: there is no such file, no ZeRO stage, or a setting that the recipe decides.
    """
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        settings: dict[str, Any] = {
            "zero_optimization": {"stage": whole_number(environment, "ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)}
        }
        file = "deepspeed_config"
    else:
        settings = _read_deepspeed_file(Path(file))
    for name in _DECIDED_ELSEWHERE:
        if name in settings:
            raise UserError(
                f"{file}: {name} is {settings[name]}; leave it out: the recipe and the launch file's mixed_precision "
                "decide it"
            )
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage") if isinstance(zero, dict) else zero
    if type(stage) is not int or stage not in (1, 2, 3):
        raise UserError(f"{file}: zero_optimization.stage is {stage}; use 1, 2 or 3, or {shipped('ddp')}")
    return settings


def _read_deepspeed_file(file: Path) -> dict[str, Any]:
    try:
        given = json.loads(read_text(file))
    except FileNotFoundError as error:
        raise UserError(
            f"deepspeed_config_file {file} is not there, seen from {Path.cwd()}; start in the folder that has it "
            "(`flipscale launch_files .` writes ds_configs/), or give its absolute path in the launch file"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"deepspeed_config_file {file} cannot be read ({error}); write JSON, in UTF-8") from error
    if not isinstance(given, dict):
        raise UserError(f"deepspeed_config_file {file} is {str(given)[:60]!r}; write settings in braces")
    return {name: value for name, value in given.items() if value != "auto"}


def _beside(launch_file: Path, named: str) -> Path:
    """Return the path of a file that a launch file names: as it stands, or else in the launch file's own folder."""
    beside = launch_file.parent / Path(named).name
    return Path(named) if Path(named).exists() or not beside.exists() else beside
