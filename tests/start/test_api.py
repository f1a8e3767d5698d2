"""Runs that a script trains by `flipscale.api`."""

import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import processes
import pytest
from attacks import ground
from conftest import losses, write_shards

from flipscale.api import Recipe, read_recipe, train
from flipscale.engines import engine
from flipscale.engines.optimizers import set_learning_rate
from flipscale.io.errors import UserError

ENDLESS = "[{name: long, samples: 16000000, mask_ratio: 0.75, base_lr: 0.012}]"


def train_in_a_thread(file: str) -> None:
    raised: list[BaseException] = []

    def work() -> None:
        try:
            train(read_recipe(file))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    sys.exit(1 if raised else 0)


def train_in_a_loop(files: list[str]) -> None:
    """Train recipes, and send SIGTERM to this process in the first run. Exit with 3 if KeyboardInterrupt ends it."""
    first = read_recipe(files[0], stages=ENDLESS)
    records = Path(first.output_dir) / "metrics.jsonl"

    def send() -> None:
        while not (records.exists() and records.read_bytes().count(b"\n") >= 2):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    try:
        for recipe in [first, *map(read_recipe, files[1:])]:
            train(recipe)
    except KeyboardInterrupt:
        sys.exit(3)


def train_twice(file: str) -> None:
    """Try to resume a run twice. Exit with 3 if both attempts are refused because of the data."""
    refusals = []
    for _ in range(2):
        try:
            train(read_recipe(file))
        except UserError as error:
            refusals.append("the data has 20" in str(error))
    sys.exit(3 if refusals == [True, True] else 1)


def train_at_once(file: str, folder: str) -> None:
    """Train a run while other threads try the same recipe, another one, and in a forked process a third, which may."""
    context = multiprocessing.get_context("fork")
    recipe, other, forked = (read_recipe(file, output_dir=f"{folder}/{name}") for name in ("first", "second", "forked"))
    outcomes: list[object] = []

    def attempt(recipe: Recipe) -> None:
        try:
            train(recipe)
        except UserError as error:
            outcomes.append("output_dir" in str(error) and recipe.output_dir in str(error))

    def meanwhile(optimizer: object, learning_rate: float) -> None:
        if not outcomes:
            outcomes.append("begun")
            threads = [threading.Thread(target=attempt, args=(one,)) for one in (recipe, other)]
            child = context.Process(target=train, args=(forked,))
            for started in (*threads, child):
                started.start()
            for started in (*threads, child):
                started.join()
            outcomes.append(child.exitcode)
        set_learning_rate(optimizer, learning_rate)

    engine.set_learning_rate = meanwhile
    train(recipe)
    engine.set_learning_rate = set_learning_rate
    # After the end, the process is free again.
    train(other)
    sys.exit(3 if outcomes == ["begun", True, True, 0] else 1)


def train_at_precisions(file: str, folder: str) -> None:
    """Train a recipe at fp32, bf16 and fp32 again, in a daemon."""
    multiprocessing.current_process()._config["daemon"] = True  # type: ignore[attr-defined]
    for number, precision in enumerate(("no", "bf16", "no")):
        os.environ["ACCELERATE_MIXED_PRECISION"] = precision
        train(read_recipe(file, output_dir=f"{folder}/{number}"))


def state_of_the_process() -> dict[str, object]:
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    collector = (gc.isenabled(), gc.get_freeze_count())
    return {
        **{"collector": collector, "environment": dict(os.environ), "handlers": handlers},
        **{"streams": (sys.stdout, sys.stderr), "warnings": list(warnings.filters)},
    }


def train_and_compare_states(file: str) -> None:
    """Train a recipe, and let another one fail after its data was opened. Exit with the fields that have changed."""
    import flipscale.pretrain  # noqa: F401, because imports of other packages change the state

    before = state_of_the_process()
    time.sleep(1.0)
    run_dir = train(read_recipe(file))
    seconds = json.loads((run_dir / "starts.jsonl").read_text())["seconds"]
    after = [state_of_the_process()]
    try:
        train(read_recipe(file, output_dir=str(run_dir.parent / "refused"), **{"hub.audit": "none.json"}))
    except UserError:
        after.append(state_of_the_process())
    changed = [name for state in after for name, value in before.items() if state[name] != value]
    print(len(after), changed, seconds, file=sys.__stderr__)
    sys.exit(3 if len(after) == 2 and not changed else 1)


ONE_STAGE = [{"name": "one", "samples": 64, "mask_ratio": 0.75, "base_lr": 0.01}]


@pytest.mark.long
def test_a_process_trains_one_recipe_at_a_time(write_recipe, tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "unused", stages=ONE_STAGE)
    assert processes.exit_codes([processes.start(train_at_once, str(file), str(tmp_path))]) == [3]
    assert losses(tmp_path / "second") == losses(tmp_path / "first") == losses(tmp_path / "forked")


def test_a_run_after_another_of_its_process_learns_as_alone(write_recipe, tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "alone", stages=ONE_STAGE, data={"num_workers": 1})
    together = processes.start(train_at_precisions, str(file), str(tmp_path))
    alone = processes.start(
        processes.call_main,
        "flipscale.pretrain",
        ["--config", str(file)],
        str(tmp_path),
        environment={"ACCELERATE_MIXED_PRECISION": "bf16"},
    )
    assert processes.exit_codes([together, alone]) == [0, 0]
    assert losses(tmp_path / "1") == losses(tmp_path / "alone") != losses(tmp_path / "0")
    assert losses(tmp_path / "2") == losses(tmp_path / "0")


def test_a_script_s_process_is_after_a_run_as_it_was_before(write_recipe, tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "run", stages=ONE_STAGE, data={"num_workers": 1})
    assert processes.exit_codes([processes.start(train_and_compare_states, str(file))]) == [3]


def test_a_run_trains_in_a_thread(write_recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    file = write_recipe(run, stages=ONE_STAGE, data={"num_workers": 1})
    assert processes.exit_codes([processes.start(train_in_a_thread, str(file))]) == [0]
    assert (run / "DONE").exists()
    assert (run / "model/config.json").exists()
    assert not (run / "run.lock").exists()
    assert json.loads((run / "heartbeat.json").read_text())["phase"] == "ended"


def test_a_signal_ends_a_loop_over_runs_after_the_save(write_recipe, tmp_path: Path) -> None:
    files = [str(write_recipe(tmp_path / name, log={"every_samples": 16})) for name in ("first", "second")]
    assert processes.exit_codes([processes.start(train_in_a_loop, files)]) == [3]
    assert [path.name[:5] for path in (tmp_path / "first/checkpoints").iterdir()] == ["step-"]
    assert not (tmp_path / "first/run.lock").exists()
    assert not (tmp_path / "second").exists()


def test_a_refused_resume_leaves_the_run_directory_to_the_next(tmp_path: Path) -> None:
    run = ground.run_of(tmp_path, up_to=4)
    shutil.rmtree(tmp_path / "data")
    write_shards(tmp_path / "data", [20])
    assert processes.exit_codes([processes.start(train_twice, str(ground.recipe(tmp_path)))]) == [3]
    assert not (run / "run.lock").exists()
