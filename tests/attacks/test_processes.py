"""Attacks by how a command is started: its arguments, its environment, its launch files, and what is around it."""

import functools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from attacks import ground
from attacks.attack import Attack, Ended, hold

import flipscale

_DEEPSPEED = "distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: zero.json\n"


def _planned(folder: Path, launch_file: bytes | None) -> list[str]:
    """Plan the recipe of the attacks with a launch file; None for one that is not there."""
    file = folder / "launch.yaml"
    if launch_file is not None:
        file.write_bytes(launch_file)
    return ["pretrain", "--config", "small_cpu", "--dry_run", "--launch_file", str(file)]


def _piped(folder: Path) -> list[str]:
    arguments = _planned(folder, None)
    os.mkfifo(folder / "launch.yaml")
    return arguments


def _launch(name: str, text: str | bytes | None, *says: str) -> Attack:
    content = text.encode() if isinstance(text, str) else text
    return Attack(f"a launch file {name}", functools.partial(_planned, launch_file=content), 2, ("launch.yaml", *says))


def _deepspeed(name: str, text: str, *says: str) -> Attack:
    def make(folder: Path) -> Sequence[str]:
        (folder / "zero.json").write_text(text)
        return _planned(folder, _DEEPSPEED.encode())

    return Attack(f"a DeepSpeed file {name}", make, 2, ("zero.json", *says))


def _typed(name: str, *arguments: str, code: int = 2, says: tuple[str, ...] = ()) -> Attack:
    return Attack(name, lambda folder: arguments, code, says)


def _trained(name: str, code: int = 0, says: tuple[str, ...] = (), **environment: str) -> Attack:
    check = _is_done if code == 0 else None
    return Attack(name, _pretrain, code, says, check, environment=environment)


def _pretrain(folder: Path) -> list[str]:
    ground.shards(folder)
    return ground.pretrain(folder)


def _is_done(folder: Path, ended: Ended) -> None:
    assert (folder / "run/DONE").exists(), ended


def _status_of_a_folder(folder: Path) -> list[str]:
    (folder / "run/recipe.yaml").mkdir(parents=True)
    return ["status", "run"]


def _sheet_to_a_pipe(folder: Path) -> list[str]:
    ground.shards(folder)
    os.mkfifo(folder / "sheet.png")
    return ["prepare", "inspect", "data", "--sheet", "sheet.png"]


def _foreign_names(folder: Path) -> list[str]:
    data = ground.shards(folder)
    for number, shard in enumerate(sorted(data.glob("*.tar"))):
        shard.rename(data / f"ünï-{number}-数据.tar")
    return [*ground.pretrain(folder), "--output_dir", str(folder / "run")]


def _file_where_files_go(folder: Path) -> list[str]:
    (folder / "there").write_text("mine")
    return ["launch_files", "there"]


def _link_to_nothing(folder: Path) -> list[str]:
    (folder / "there").symlink_to("nowhere")
    return ["launch_files", "there"]


def _pipe(folder: Path) -> list[str]:
    (folder / "slurm").mkdir()
    os.mkfifo(folder / "slurm/run.bash")
    return ["launch_files", "."]


def _edited(folder: Path) -> list[str]:
    shutil.copytree(Path(flipscale.__file__).parents[1] / "slurm", folder / "slurm")
    (folder / "slurm/run.bash").write_text("mine")
    return ["launch_files", "."]


def _is_mine(folder: Path, ended: Ended) -> None:
    assert (folder / "slurm/run.bash").read_text() == "mine"
    assert not (folder / "ds_configs").exists()


_ALONE = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
ATTACKS = [
    _typed("no verb", says=("the following arguments are required: VERB",)),
    _typed("a verb that is none", "trian", says=("invalid choice: 'trian'",)),
    _typed("a verb of a megabyte", "x" * 100_000, says=(" ... ",)),
    _typed("a verb of control characters", "\x1b[2J\x07", says=("\\x1b[2J",)),
    _typed("a flag that is none", "status", "run", "--fast", says=("unrecognized arguments: --fast",)),
    _typed("a flag without its value", "evaluate", "model", "--batch_size", says=("expected one argument",)),
    _typed("a run of no name", "status", "", says=("is not a run directory",)),
    _typed("a run whose name has lines", "status", "a\nb", says=("a b is not a run directory",)),
    _typed("a run whose name is no text", "status", "\udcff", says=("\\udcff is not a run directory",)),
    Attack("a recipe copy that is a folder", _status_of_a_folder, 2, ("is not the recipe that the run began with",)),
    Attack("a contact sheet to a pipe", _sheet_to_a_pipe, 2, ("sheet.png is no plain file; move it away",)),
    _launch("that is not there", None, "cannot be read"),
    _launch("that is empty", "", "cannot be read"),
    Attack("a launch file that is a pipe", _piped, 2, ("launch.yaml", "is no plain file")),
    _launch("that is a list", "- 1\n- 2\n", "cannot be read"),
    _launch("of bytes that are no text", b"\xff\xfe\x00distributed_type", "cannot be read"),
    _launch("that runs code", "distributed_type: !!python/object/apply:os.system ['touch ran']\n", "has the tag"),
    _launch("nested 10,000 deep", "distributed_type: " + "[" * 10_000, "maximum nesting depth"),
    _launch("of no machine", "distributed_type: MULTI_GPU\nnum_machines: 0\n", "num_machines is '0'"),
    _launch("of less than no process", "distributed_type: MULTI_GPU\nnum_processes: -8\n", "num_processes is '-8'"),
    _launch("of two and a half processes", "distributed_type: MULTI_GPU\nnum_processes: 2.5\n", "is '2.5'"),
    _launch("of a date that is none", "distributed_type: 2020-99-99\n", "cannot be read"),
    _launch("whose FSDP is a word", "distributed_type: FSDP\nfsdp_config: fast\n", "fsdp_config is 'fast'"),
    _launch("whose DeepSpeed is a list", "distributed_type: DEEPSPEED\ndeepspeed_config: [1]\n", "is '[1]'"),
    _launch("whose parallelism is a number", "distributed_type: FSDP\nparallelism_config: 5\n", "is '5'"),
    _deepspeed("that is a list", "[1, 2]", "write settings in braces"),
    _deepspeed("nested 100,000 deep", "[" * 100_000, "cannot be read"),
    _deepspeed("whose stage is true", json.dumps({"zero_optimization": {"stage": True}}), "stage is True"),
    _deepspeed("whose settings of ZeRO are a number", json.dumps({"zero_optimization": 5}), "stage is 5"),
    _trained("a rank that is a word", 2, ("RANK='first'",), RANK="first"),
    _trained("a world that is a word", 2, ("WORLD_SIZE='many'",), WORLD_SIZE="many"),
    _trained("a number of processes that is a word", 2, ("FLIPSCALE_NUM_PROCESSES='x'",), FLIPSCALE_NUM_PROCESSES="x"),
    _trained("a switch of accelerate's that is a word", 2, ("unset its ACCELERATE_",), ACCELERATE_USE_CPU="perhaps"),
    _trained("a port that is a word", 2, ("is not one that a launcher sets",), **_ALONE, MASTER_PORT="x"),
    _trained("a count of Slurm's that is a word", SLURM_JOB_ID="\x1b[31m", SLURM_RESTART_COUNT="x"),
    _trained("a stop file whose name is too long", FLIPSCALE_STOP_FILE="x" * 5_000),
    _trained("a terminal of one column", COLUMNS="1", TERM="dumb"),
    _trained("no folder of temporary files", TMPDIR="/nowhere", TEMP="/nowhere"),
    _trained("no home", HOME="/nowhere"),
    Attack("shards whose names are not ASCII", _foreign_names, check=_is_done),
    Attack("launch files into a file", _file_where_files_go, 2, ("there is a file: name another folder",)),
    Attack("launch files into a link to nothing", _link_to_nothing, 2, ("is a link to nowhere, which is not there",)),
    Attack("launch files over a pipe", _pipe, 2, ("run.bash exists and differs",)),
    Attack("launch files over one that was edited", _edited, 2, ("run.bash exists and differs",), _is_mine),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_attack(attack: Attack, tmp_path: Path) -> None:
    hold(attack, tmp_path)
