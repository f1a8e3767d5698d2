"""Attacks by the start of a command: its arguments, environment, launch files and folder."""

import json
import shutil
from pathlib import Path
from typing import Any

from attacks import ground
from attacks.attack import Attack, Change, Ended, later, refused, survived, test_of
from attacks.changes import exists, kept, lacks, pipe

import flipscale

DEEPSPEED = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config:\n  deepspeed_config_file: zero.json\n"
FSDP = "distributed_type: FSDP\n"
GPUS = "distributed_type: MULTI_GPU\n"
ALONE = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def typed(name: str, *arguments: str, says: str) -> Attack:
    return refused(name, lambda folder: arguments, says)


def planned(folder: Path, launch_file: str | bytes | None) -> list[str]:
    """Plan a recipe with a launch file; None for a missing file."""
    if launch_file is not None:
        (folder / "launch.yaml").write_bytes(launch_file if isinstance(launch_file, bytes) else launch_file.encode())
    return ["pretrain", "--config", "small_cpu", "--dry_run", "--launch_file", str(folder / "launch.yaml")]


def launch(name: str, content: str | bytes | None, *says: str) -> Attack:
    return refused(f"a launch file {name}", lambda folder: planned(folder, content), "launch.yaml", *says)


def deepspeed(name: str, settings: Any, *says: str) -> Attack:
    def make(folder: Path) -> list[str]:
        (folder / "zero.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
        return planned(folder, DEEPSPEED)

    return refused(f"a DeepSpeed file {name}", make, "zero.json", *says)


def trained(folder: Path) -> list[str]:
    ground.shards(folder)
    return ground.pretrain(folder)


def started(name: str, says: str, **environment: str) -> Attack:
    """A run in an environment in which it cannot start."""
    return refused(name, trained, says, environment=environment, alone=True)


def odd(name: str, **environment: str) -> Attack:
    """A run in an environment that is odd and harmless."""
    return survived(name, trained, check=exists("run/DONE"), environment=environment)


def foreign_names(folder: Path) -> list[str]:
    data = ground.shards(folder)
    for number, shard in enumerate(sorted(data.glob("*.tar"))):
        shard.rename(data / f"ünï-{number}-数据.tar")
    return [*ground.pretrain(folder), "--output_dir", str(folder / "run")]


@later
def after(folder: Path, change: Change, *words: str) -> list[str]:
    """A command in a folder after `change`."""
    change(folder)
    return list(words)


def edited(folder: Path) -> None:
    shutil.copytree(Path(flipscale.__file__).parents[1] / "slurm", folder / "slurm")
    (folder / "slurm/run.bash").write_text("mine")


def is_kept(folder: Path, ended: Ended) -> None:
    kept("slurm/run.bash")(folder, ended)
    lacks("ds_configs")(folder, ended)


ATTACKS = [
    typed("no verb", says="VERB"),
    typed("a verb that is none", "trian", says="'trian'"),
    typed("a verb of a megabyte", "x" * 100_000, says=" ... "),
    typed("a verb of control characters", "\x1b[2J\x07", says="\\x1b[2J"),
    typed("a flag that is none", "status", "run", "--fast", says="--fast"),
    typed("a flag without its value", "evaluate", "model", "--batch_size", says="--batch_size"),
    typed("a run of no name", "status", "", says="run directory"),
    typed("a run whose name has lines", "status", "a\nb", says="a b"),
    typed("a run whose name is no text", "status", "\udcff", says="\\udcff"),
    refused(
        "a recipe copy that is a folder", after(lambda f: (f / "run/recipe.yaml").mkdir(parents=True), "status", "run"),
        "recipe.yaml",
    ),
    refused(
        "a contact sheet to a pipe",
        after(lambda f: [ground.shards(f), pipe("s.png")(f)], "prepare", "inspect", "data", "--sheet", "s.png"),
        "s.png",
    ),
    launch("that is not there", None),
    launch("that is empty", ""),
    refused("a launch file that is a pipe", lambda f: [pipe("launch.yaml")(f), planned(f, None)][1], "launch.yaml"),
    launch("that is a list", "- 1\n- 2\n"),
    launch("of bytes that are no text", b"\xff\xfe\x00distributed_type"),
    launch("that runs code", "distributed_type: !!python/object/apply:os.system ['touch ran']\n", "tag"),
    launch("nested 10,000 deep", "distributed_type: " + "[" * 10_000),
    launch("of no machine", f"{GPUS}num_processes: 2\nnum_machines: 0\n", "num_machines", "'0'"),
    launch("without values", "distributed_type:\nnum_processes:\nnum_machines:\ndebug:\n", "num_processes", "missing"),
    launch("of less than no process", f"{GPUS}num_processes: -8\n", "num_processes", "'-8'"),
    launch("of two and a half processes", f"{GPUS}num_processes: 2.5\n", "'2.5'"),
    launch("of a date that is none", "distributed_type: 2020-99-99\n"),
    launch("whose FSDP is a word", f"{FSDP}fsdp_config: fast\n", "fsdp_config", "'fast'"),
    launch("whose DeepSpeed is a list", "distributed_type: DEEPSPEED\ndeepspeed_config: [1]\n", "'[1]'"),
    launch("whose parallelism is a number", f"{FSDP}parallelism_config: 5\n", "'5'"),
    deepspeed("that is a list", "[1, 2]"),
    deepspeed("nested 100,000 deep", "[" * 100_000),
    deepspeed("whose stage is true", {"zero_optimization": {"stage": True}}, "stage", "True"),
    deepspeed("whose settings of ZeRO are a number", {"zero_optimization": 5}, "5"),
    started("a rank that is a word", "RANK='first'", RANK="first"),
    started("a world that is a word", "WORLD_SIZE='many'", WORLD_SIZE="many"),
    started("a number of processes that is a word", "FLIPSCALE_NUM_PROCESSES='x'", FLIPSCALE_NUM_PROCESSES="x"),
    started("a switch of accelerate's that is a word", "ACCELERATE_", ACCELERATE_USE_CPU="perhaps"),
    started("a port that is a word", "MASTER_", **ALONE, MASTER_PORT="x"),
    odd("a count of Slurm's that is a word", SLURM_JOB_ID="\x1b[31m", SLURM_RESTART_COUNT="x"),
    odd("a stop file whose name is too long", FLIPSCALE_STOP_FILE="x" * 5_000),
    odd("a terminal of one column", COLUMNS="1", TERM="dumb"),
    odd("no folder of temporary files", TMPDIR="/nowhere", TEMP="/nowhere"),
    odd("no home", HOME="/nowhere"),
    survived("shards whose names are not ASCII", foreign_names, check=exists("run/DONE")),
    refused("launch files into a file", after(lambda f: (f / "there").touch(), "launch_files", "there"), "there"),
    refused(
        "launch files into a link to nothing",
        after(lambda f: (f / "there").symlink_to("nowhere"), "launch_files", "there"), "nowhere",
    ),
    refused("launch files over a pipe", after(pipe("slurm/run.bash"), "launch_files", "."), "run.bash"),
    refused(
        "launch files over one that was edited", after(edited, "launch_files", "."), "run.bash", check=is_kept
    ),
]  # fmt: skip

test_attack = test_of(ATTACKS)
