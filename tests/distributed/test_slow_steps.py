"""A slow rank is named with its slow phase, under every engine."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
from distributed.crowd import ENVIRONMENTS, start_ranks

# The step in which a rank sleeps in each place.
STEPS = {"data": 13, "forward": 17, "backward": 21, "update": 25}
TOGETHER = 29


def train_with_sleeps(file: str, folder: str, places: list[str]) -> None:
    """Train while rank 1 sleeps in some steps, and all ranks in one step, far longer than a usual step."""
    from flipscale import pretrain
    from flipscale.loop import loop

    watches, at = [], SimpleNamespace(step=-1)

    class Watch(pretrain.StepWatch):
        def __init__(self, *arguments, **parameters):
            super().__init__(*arguments, **parameters)
            watches.append(self)

    def sleep(place: str) -> None:
        if place in places and STEPS[place] == at.step and os.environ["RANK"] == "1":
            time.sleep(max(1.5, 8 * watches[0]._usual))

    true_batches, true_consume = loop.step_batches, loop.forward_backward

    def batches(plan, clock, accelerator) -> Iterator[object]:
        for at.step, batch in enumerate(true_batches(plan, clock, accelerator), clock.step.number):
            sleep("data")
            yield batch

    def consume(engine, batch, objective):
        hooks = [engine.model.text_model.register_forward_pre_hook(lambda *_: sleep("forward"))]
        backward, engine._backward = engine._backward, lambda loss: (loss.register_hook(asleep), backward(loss))
        try:
            return true_consume(engine, batch, objective)
        finally:
            engine._backward = backward
            for hook in hooks:
                hook.remove()

    def asleep(gradient) -> None:
        sleep("backward")

    class Sync(loop.StepSync):
        def __init__(self, accelerator, *others):
            super().__init__(accelerator, *others)
            reduce = accelerator.reduce
            accelerator.reduce = lambda *given: (sleep("update"), reduce(*given), self.sleep_together())[1]

        def sleep_together(self) -> None:
            if "together" in places and at.step == TOGETHER:
                time.sleep(max(1.5, 8 * watches[0]._usual))

    loop.step_batches, loop.forward_backward = batches, consume
    pretrain.StepWatch, loop.StepSync = Watch, Sync
    processes.call_main("flipscale.pretrain", ["--config", file], folder)


def slow_steps(write_recipe, folder: Path, engine: str, places: list[str], **more: str):
    """Return the records of such a run by their step, and its output."""
    stages = [{"name": "masked", "samples": 16 * (TOGETHER + 3), "mask_ratio": 0.75, "base_lr": 0.012}]
    file = write_recipe(folder / "run", stages=stages)
    environment = {**ENVIRONMENTS[engine], "ACCELERATE_USE_CPU": "1", **more}
    codes = processes.exit_codes(start_ranks(2, train_with_sleeps, str(file), str(folder), places, **environment))
    printed = (folder / "stderr").read_text()
    assert codes == [0, 0], printed
    lines = (folder / "run/slow_steps.jsonl").read_text().splitlines()
    return {record["step"]: record for record in map(json.loads, lines)}, printed


@pytest.mark.long
def test_the_late_rank_and_what_it_was_in(write_recipe, tmp_path: Path) -> None:
    records, printed = slow_steps(write_recipe, tmp_path, "fsdp2", [*STEPS, "together"])
    for phase, step in STEPS.items():
        record = records[step]
        assert (record["late_rank"], record["phase"]) == (1, phase), record
        assert record["step_s"] > record["late_s"] > 5 * record["usual_s"]
        assert "rank 1 on " in next(line for line in printed.splitlines() if f"step {step} took" in line)
    record = records[TOGETHER]
    assert (record["late_rank"], record["phase"]) == (None, "update"), record
    assert record["collective"].endswith("all_reduce")


@pytest.mark.long
def test_without_a_recorder_the_times_are_there(write_recipe, tmp_path: Path) -> None:
    records, _ = slow_steps(write_recipe, tmp_path, "ddp", ["data"], TORCH_FR_BUFFER_SIZE="0")
    record = records[STEPS["data"]]
    assert (record["late_rank"], record["phase"]) == (None, None)
    assert record["ranks"][1]["data_s"] > 1.4 > record["ranks"][0]["data_s"]
    assert record["ranks"][1]["data_s"] > 5 * record["usual_s"]
