"""A failed process ends the whole job at once with one message, whatever the other processes do."""

import errno
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import processes
import pytest
import torch
from clock import Clock
from conftest import launch
from distributed.crowd import ENVIRONMENTS, start_ranks
from loop.troubled import trouble

from flipscale.io.errors import UserError

# On a free machine they take eleven; what they would wait for otherwise takes ten minutes.
ALL_END_WITHIN_SECONDS = 120
# What flipscale itself raises, and says so in a sentence.
SENTENCES = {
    "ValueError": "flipscale: error: data.lanes 5 does not divide data.global_batch_size 16; use 4 or 8",
    "OSError": "/run is full ([Errno 28] No space left on device); its checkpoints ",
}


def raise_own(error: str) -> None:
    if error == "ValueError":
        raise UserError(SENTENCES[error].removeprefix("flipscale: error: "))
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if error == "OSError" else RuntimeError("upside down")


def fail(file: str, folder: str, where: str, error: str) -> None:
    """Train on two processes; rank 1 fails in a step, an evaluation or a save, and rank 0 is stuck there."""
    from flipscale.engines.checkpoint import CheckpointWriter
    from flipscale.loop import loop

    def fails(*arguments: object) -> None:
        Path(folder, "failed_at").write_text(str(time.time()))
        raise_own(error)

    def stays(*arguments: object) -> None:
        time.sleep(600)

    is_first, true_consume, calls = os.environ["RANK"] == "0", loop.forward_backward, []

    def consume(*arguments: object) -> object:
        calls.append(1)
        return fails() if len(calls) == 3 and not is_first else true_consume(*arguments)

    if where == "step":
        loop.forward_backward = consume
    if where == "evaluation":
        loop.Evaluations.run = stays if is_first else fails
    if where == "commit":
        # Rank 0 waits for its thread, which is stuck in the file system.
        CheckpointWriter._write = stays
        CheckpointWriter.commit = CheckpointWriter.commit if is_first else fails
    processes.call_main("flipscale.pretrain", ["--config", file], folder)


def ended(file: Path, folder: Path, where: str, error: str) -> tuple[list[int | None], str]:
    """Return the exit codes and the output of two ranks without a launcher."""
    codes = processes.exit_codes(start_ranks(2, fail, str(file), str(folder), where, error))
    seconds = time.time() - float(Path(folder, "failed_at").read_text())
    assert seconds < ALL_END_WITHIN_SECONDS
    return codes, Path(folder, "stderr").read_text()


@pytest.mark.parametrize("where", ["step", pytest.param("evaluation", marks=pytest.mark.long), "commit"])
def test_a_user_s_mistake_on_one_rank_ends_all(write_recipe, shards: Path, tmp_path: Path, where: str) -> None:
    tasks = [{"kind": "zero_shot", "data": str(shards), "every_samples": 32}]
    file = write_recipe(tmp_path / "run", eval={"tasks": tasks}, save={"every_samples": 32}, data={"num_workers": 1})
    error = "OSError" if where == "commit" else "ValueError"
    codes, printed = ended(file, tmp_path, where, error)
    assert codes == [1, 1 if where == "commit" else 2]
    assert printed.count(SENTENCES[error]) == printed.count("flipscale: error: ") == 1
    assert printed.count("flipscale: rank 0 ends too, as rank 1 on ") == 1
    assert "Traceback" not in printed


def test_our_own_mistake_is_one_sentence_and_a_file(write_recipe, tmp_path: Path) -> None:
    codes, printed = ended(write_recipe(tmp_path / "run"), tmp_path, "step", "RuntimeError")
    assert codes == [1, 1]
    assert printed.count("flipscale: error: RuntimeError: upside down, in ") == printed.count("flipscale: error: ") == 1
    assert "Traceback" not in printed
    (file,) = (tmp_path / "run/errors").iterdir()
    assert f"; its traceback is in {file}\n" in printed
    text = file.read_text()
    assert text.endswith("RuntimeError: upside down\n")
    assert "rank 1 of 2 on " in text
    assert "in raise_own\n" in text


def differ(file: str, folder: str, *flags: str) -> None:
    """Train on two processes; rank 1 has further flags."""
    from flipscale.process import lock

    lock.STALE_SECONDS = 1.0  # no other machine holds the lock
    flags = flags if os.environ["RANK"] == "1" else ()
    processes.call_main("flipscale.pretrain", ["--config", file, *flags], folder)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed", "1"], "(seed: 0, now 1)"),
        (["--save.every_samples", "32", "--optim.weight_decay", "0.1"], "save.every_samples: 0, now 32"),
        (["--output_dir", "elsewhere"], "process 0 on"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_processes_of_unlike_starts_do_not_train(write_recipe, tmp_path: Path, flags: list[str], words: str) -> None:
    codes = processes.exit_codes(start_ranks(2, differ, str(write_recipe(tmp_path / "run")), str(tmp_path), *flags))
    printed = (tmp_path / "stderr").read_text()
    assert codes == [2, 2]
    (line,) = [line for line in printed.splitlines() if "flipscale: error: " in line]
    assert "1 on " in line
    assert words in line
    assert not (tmp_path / "run").exists()


def die_after_the_start(file: str, folder: str) -> None:
    """Train on two processes; the first, which keeps the store, is killed before the first step."""
    from flipscale import pretrain

    train = pretrain.train

    def dies(*arguments: object) -> object:
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1.0)
        return train(*arguments)

    pretrain.train = dies
    processes.call_main("flipscale.pretrain", ["--config", file], folder)


def test_the_first_process_may_die_before_a_step(write_recipe, tmp_path: Path) -> None:
    ranks = start_ranks(2, die_after_the_start, str(write_recipe(tmp_path / "run")), str(tmp_path))
    ends = processes.exit_codes(ranks)
    ranks[1].kill()
    assert ends == [-signal.SIGKILL, 1]
    assert "Traceback" not in (tmp_path / "stderr").read_text()


def be_killed(file: str, folder: str) -> None:
    """Train on three processes; rank 1 is killed in a step, in which the others are stuck, as behind a GPU."""
    from flipscale.loop import loop

    def stays_or_dies(*arguments: object) -> None:
        Path(folder, f"in_step-{os.environ['RANK']}").touch()
        while not all(Path(folder, f"in_step-{rank}").exists() for rank in range(3)):
            time.sleep(0.01)
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    loop.forward_backward = stays_or_dies
    processes.call_main("flipscale.pretrain", ["--config", file], folder)


def test_all_end_after_a_kill_although_they_are_stuck(write_recipe, tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "run", data={"global_batch_size": 12})
    assert processes.exit_codes(start_ranks(3, be_killed, str(file), str(tmp_path))) == [1, -signal.SIGKILL, 1]
    printed = (tmp_path / "stderr").read_text()
    assert printed.count("flipscale: rank 0 ends too, as rank 1 on ") == printed.count(" was killed\n") == 1
    assert "flipscale: error: " not in printed


def fail_together(file: str, folder: str, last: int) -> None:
    """Train on two processes that fail alike at the first batch; the rank `last` knows of the other's failure."""
    from flipscale.loop import loop
    from flipscale.process import watchdog

    def fails(*arguments: object) -> None:
        if os.environ["RANK"] == str(last):
            store = watchdog.own_store()
            while not store.check([watchdog._FAILED]):
                time.sleep(0.01)
        raise_own("OSError")

    loop.forward_backward = fails
    processes.call_main("flipscale.pretrain", ["--config", file], folder)


@pytest.mark.parametrize("last", [1, pytest.param(0, marks=pytest.mark.long)])
def test_what_all_have_to_say_is_said_once(write_recipe, tmp_path: Path, last: int) -> None:
    file = str(write_recipe(tmp_path / "run"))
    assert processes.exit_codes(start_ranks(2, fail_together, file, str(tmp_path), last)) == [1, 1]
    # The block that a run begins with has a time in front, and goes on behind two spaces.
    lines = (tmp_path / "stderr").read_text().splitlines()
    (line,) = [line for line in lines if not re.match(r"\d{4}-|  ", line)]
    assert SENTENCES["OSError"] in line


def diverge(file: str, folder: str) -> None:
    """Train on two processes until rank 1's loss is not finite, while its part of the save after step 5 is unwritten
    and rank 0's disk is slow."""
    from flipscale.engines.checkpoint import CheckpointWriter

    write, write_text, commit = (getattr(CheckpointWriter, name) for name in ("_write", "_write_text", "commit"))
    is_waited_for = threading.Event()

    def write_late(writer: CheckpointWriter, *arguments: object) -> None:
        is_waited_for.wait(60)
        write(writer, *arguments)

    def commit_late(writer: CheckpointWriter) -> int | None:
        if writer.is_open:
            is_waited_for.set()
        return commit(writer)

    def write_slowly(writer: CheckpointWriter, name: str, text: str) -> object:
        if name == "digests.json":
            time.sleep(5.0)  # longer than a process goes on after another has failed
        return write_text(writer, name, text)

    CheckpointWriter._write_text = write_slowly
    if os.environ["RANK"] == "1":
        CheckpointWriter._write, CheckpointWriter.commit = write_late, commit_late
    with trouble(poisoned=range(5, 11)):
        processes.call_main("flipscale.pretrain", ["--config", file], folder)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_a_run_that_diverges_first_ends_its_open_save(write_recipe, tmp_path: Path, engine: str) -> None:
    file = str(write_recipe(tmp_path / "run", save={"every_samples": 80}))
    environment = {**ENVIRONMENTS[engine], "ACCELERATE_USE_CPU": "1"}
    assert processes.exit_codes(start_ranks(2, diverge, file, str(tmp_path), **environment)) == [1, 1]
    printed = (tmp_path / "stderr").read_text()
    assert printed.count("flipscale: error: ") == printed.count(" was not finite in 5 steps in a row") == 1
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000005"]


UNDER_A_LAUNCHER = """
import sys
sys.path[:0] = sys.argv[3:]
from distributed.test_failures import fail
fail(sys.argv[1], sys.argv[2], "step", "ValueError")
"""


@pytest.mark.long
def test_under_torchrun_no_worker_is_left(write_recipe, tmp_path: Path) -> None:
    (tmp_path / "fail.py").write_text(UNDER_A_LAUNCHER)
    file = write_recipe(tmp_path / "run", data={"num_workers": 2})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(tmp_path / "fail.py"), str(file), str(tmp_path), str(Path(__file__).parents[1])]
    environment = {"ACCELERATE_USE_CPU": "1", **ENVIRONMENTS["fsdp2"], "ONLY_THIS_RUN": str(tmp_path)}
    done = launch(command, **environment)
    assert done.returncode == 1
    assert time.time() - float((tmp_path / "failed_at").read_text()) < ALL_END_WITHIN_SECONDS
    printed = (tmp_path / "stderr").read_text()
    assert printed.count(SENTENCES["ValueError"]) == 1, printed + done.stderr
    assert not _processes_of(f"ONLY_THIS_RUN={tmp_path}")


def _processes_of(variable: str) -> list[str]:
    """Return the command lines of processes with a variable."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


def stop(file: str, folder: str, where: str) -> None:
    """Train on two processes; rank 1 is stopped outside of a step."""
    from flipscale.process import watchdog
    from flipscale.start import evaluations
    from flipscale.start import processes as stages

    # Nothing before it takes too long.
    watchdog.time = clock = Clock()
    owner, name = {
        "the start of the processes": (stages, "start_accelerator"),
        "an evaluation": (evaluations, "evaluated"),
    }[where]
    true = getattr(owner, name)

    def stops(*arguments: object, **named: object) -> object:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        clock.start()
        return true(*arguments, **named)

    setattr(owner, name, stops)
    processes.call_main("flipscale.pretrain", ["--config", file], folder)


@pytest.mark.parametrize(
    ("where", "silent"),
    [
        ("the start of the processes", ""),
        pytest.param("an evaluation", "; rank 1 does not run any more", marks=pytest.mark.long),
    ],
)
def test_a_process_that_was_stopped_is_not_waited_for(
    write_recipe, shards: Path, tmp_path: Path, where: str, silent: str
) -> None:
    tasks = [{"kind": "zero_shot", "data": str(shards), "every_samples": 32}]
    file = write_recipe(tmp_path / "run", eval={"tasks": tasks}, log={"hang_seconds": 2})
    ranks = start_ranks(2, stop, str(file), str(tmp_path), where)
    ranks[0].join(300)
    code = ranks[0].exitcode
    for rank in ranks:
        rank.kill()
        rank.join()
    printed = (tmp_path / "stderr").read_text()
    assert code == 1, printed
    (line,) = [line for line in printed.splitlines() if line.startswith("flipscale: error: ")]
    assert line.startswith(f"flipscale: error: {where} "), line
    assert f" (log.hang_seconds){silent}; the stacks " in line
    assert (tmp_path / "run/stacks/rank-00000.txt").exists()


def write_timeouts(folder: str) -> None:
    """Join four processes as a training does, make all groups of hsdp and of Muon, and write how long each waits."""
    import torch.distributed as dist

    from flipscale.engines.build_engine import build_engine, start_accelerator
    from flipscale.engines.launch import Launch
    from flipscale.recipe.optim import OptimRecipe

    accelerator = start_accelerator([], folder, is_watched=True)
    build_engine(accelerator, Launch("fsdp2", 4, shard_size=2), OptimRecipe(), 4)
    build_engine(accelerator, Launch("ddp", 4, processes_per_node=2), OptimRecipe(name="muon"), 4)._muon_group()
    backends = [group._get_backend(torch.device("cpu")) for group in dist.distributed_c10d._world.pg_map]
    Path(folder, os.environ["RANK"]).write_text(json.dumps([one.options._timeout.total_seconds() for one in backends]))
    dist.destroy_process_group()


@pytest.mark.long
def test_only_the_watchdog_ends_a_wait(tmp_path: Path) -> None:
    """NCCL would end it after ten minutes, even while the process waited for is at work."""
    assert processes.exit_codes(start_ranks(4, write_timeouts, str(tmp_path))) == [0] * 4
    waits = [json.loads((tmp_path / rank).read_text()) for rank in "0123"]
    assert waits == [[86400.0] * 4] * 4  # the world, the rows and columns of hsdp, and Muon's neighbours
