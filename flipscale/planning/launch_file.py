"""How a launch lays a model on its processes, read from a launch file or from the environment that one makes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from flipscale.engines.launch import launched_shard_size

# DeepSpeed's own values, elements, where its settings leave them out.
_BUCKET, _MAX_LIVE = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class Launch:
    """Where a recipe runs, as far as memory goes.

    Args:
        engine: `ddp`, `fsdp2`, `zero1`, `zero2` or `zero3`.
        bf16: products in bf16; otherwise in fp32.
        shard_size: processes that share one copy of the weights under `fsdp2`; None for all of them.
        zero: DeepSpeed's `zero_optimization` settings.
    """

    engine: str = "ddp"
    num_processes: int = 1
    bf16: bool = False
    shard_size: int | None = None
    zero: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bucket_elements(self) -> int:
        """Gradients that DeepSpeed has on their way at once: a bucket, and the next one where it need not wait."""
        return int(self.zero.get("reduce_bucket_size", _BUCKET)) * (2 if self.zero.get("overlap_comm") else 1)

    @property
    def live_elements(self) -> int:
        """Weights that ZeRO-3 keeps gathered at once."""
        return int(self.zero.get("stage3_max_live_parameters", _MAX_LIVE))

    def using(self, **changes: Any) -> "Launch":
        """The same launch but for `changes`."""
        return replace(self, **changes)


def read_launch_file(file: Path, num_processes: int | None) -> Launch:
    """The launch of an accelerate configuration, on `num_processes` or as many as it says.

    Raises:
        ValueError: the file cannot be read, or asks for what flipscale does not do.
    """
    try:
        settings = yaml.safe_load(file.read_text())
        kind = settings["distributed_type"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"launch file {file} cannot be read as accelerate's ({error!r}); see ds_configs/") from error
    environment = {
        "WORLD_SIZE": str(num_processes or settings.get("num_processes", 1)),
        "ACCELERATE_MIXED_PRECISION": str(settings.get("mixed_precision", "no")),
    }
    if kind == "FSDP":
        version = settings.get("fsdp_config", {}).get("fsdp_version", 1)
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": str(version)}
    elif kind == "DEEPSPEED":
        deepspeed = settings.get("deepspeed_config", {})
        environment["ACCELERATE_USE_DEEPSPEED"] = "true"
        environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = deepspeed.get("deepspeed_config_file", "none")
        environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(deepspeed.get("zero_stage", 2))
    if settings.get("parallelism_config"):
        environment["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
        environment |= {name.upper(): str(value) for name, value in settings["parallelism_config"].items()}
    return launch_of(environment)


def launch_of(environment: Mapping[str, str]) -> Launch:
    """The launch that made `environment`: accelerate's, torchrun's, or none.

    Raises:
        ValueError: FSDP of version 1, a parallelism_config that flipscale does not do, or DeepSpeed settings that
            cannot be read.
    """
    num_processes = int(environment.get("WORLD_SIZE", "1"))
    launch = Launch(
        num_processes=num_processes,
        bf16=environment.get("ACCELERATE_MIXED_PRECISION") == "bf16",
        shard_size=launched_shard_size(environment, num_processes),
    )
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if environment.get("FSDP_VERSION") != "2":
            raise ValueError("the launch asks for FSDP of version 1; write fsdp_version: 2 (ds_configs/fsdp2.yaml)")
        return launch.using(engine="fsdp2")
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        zero = _zero_settings(environment)
        return launch.using(engine=f"zero{zero['stage']}", zero=zero)
    return launch


def _zero_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        return {"stage": int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
    try:
        zero = json.loads(Path(file).read_text())["zero_optimization"]
        if zero["stage"] not in (1, 2, 3):
            raise KeyError("stage")
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{file} cannot be read as DeepSpeed's settings of ZeRO-1, 2 or 3 ({error!r})") from error
    return zero
