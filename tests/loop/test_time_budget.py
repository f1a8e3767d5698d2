"""A run with a time budget: its schedule is a function of the share of the budget that is used, by a clock on which all
processes agree, and which goes on where a checkpoint left it."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import cut, metrics, pretrain, trained

from flipscale.cli.status import read_status
from flipscale.io.errors import UserError
from flipscale.loop.sync import StepSync
from flipscale.planning.budget import with_time_shares
from flipscale.planning.flops import pair_flops
from flipscale.recipe.optim import StageRecipe
from flipscale.recipe.schedule import BudgetProgress, Clock, Schedule, Stage, has_passed, schedule_stages, stage_of
from flipscale.start.complete_recipe import parse_recipe

STAGES = [
    StageRecipe("masked", mask_ratio=0.75, base_lr=0.16, share=0.6, warmup_share=0.1),
    StageRecipe("whole", share=0.2),
    StageRecipe("tuned", base_lr=0.016, share=0.2),
]
BUDGET = {
    "budget_minutes": 0.05,
    "stages": [
        {"name": "masked", "share": 0.6, "mask_ratio": 0.75, "base_lr": 0.012, "warmup_share": 0.1},
        {"name": "unmasked", "share": 0.4, "base_lr": 0.006},
    ],
    "save": {"every_samples": 32, "total_limit": 1000},
}


def plan() -> list[Stage]:
    return schedule_stages(STAGES, 16, 10.0)


def test_stages_and_rates_are_shares_of_the_budget() -> None:
    masked, whole, tuned = plan()
    assert [(stage.first, stage.last) for stage in plan()] == [(0, 0.6), (0.6, pytest.approx(0.8)), (whole.last, 1.0)]
    assert (whole.schedule_first, whole.schedule_last) == (0, whole.last)
    assert masked.learning_rate(0.05) == pytest.approx(0.5 * masked.peak_lr)
    assert masked.learning_rate(0.45) == pytest.approx(0.5 * masked.peak_lr)
    assert tuned.learning_rate(1.0) == pytest.approx(0.0)
    names = [stage_of(plan(), share).name for share in (0.59, 0.6, 0.81, 1.2)]
    assert names == ["masked", "whole", "tuned", "tuned"]
    assert not has_passed(0.0, 0.24, 0.25)
    assert has_passed(0.24, 0.25, 0.25)


class Clocks:
    """Two processes of one run with different clocks; the second learns the first one's."""

    def __init__(self, state: dict | None = None):
        self.seconds = [0.0, 0.0]
        schedule, state = Schedule(tuple(plan()), 600.0), state or {}
        self.clocks = [Clock(schedule, state) for _ in range(2)]
        self.syncs = []
        for rank in range(2):
            # The second one's clock was started earlier.
            watch = SimpleNamespace(trained_seconds=state.get("trained_seconds", 0.0) + 3.0 * rank)
            place = SimpleNamespace(is_main_process=rank == 0)
            start = (state.get("step", 0), 600.0, state.get("trained_seconds", 0.0))
            self.syncs.append(StepSync(place, None, watch, None, *start))
        self.unread: list[BudgetProgress] = []

    def step(self, seconds: float) -> float:
        """Take a step of so many seconds, and return its position. Its pace is read in the next step."""
        (step,) = {clock.step for clock in self.clocks}
        self.seconds = [self.seconds[0] + seconds, self.seconds[1] + 1.3 * seconds]
        for sync, spent in zip(self.syncs, self.seconds, strict=True):
            sync._watch.trained_seconds = spent
        sums = map(sum, zip(*(sync._own_progress(step) for sync in self.syncs), strict=True))
        self.unread.append(BudgetProgress(step.number, *sums))
        for clock, sync in zip(self.clocks, self.syncs, strict=True):
            clock.advance(sync.progress)
            if len(self.unread) > 1:
                sync.progress = self.unread[0]
        del self.unread[:-1]
        return step.position


def test_all_processes_are_at_one_position_by_the_first_one_s_clock() -> None:
    run, afresh, positions = Clocks(), [], []
    while not run.clocks[0].step.is_over:
        if run.clocks[0].step.resets_optimizer:
            afresh.append(run.clocks[0].step.stage.name)
        positions.append(run.step(4.0 if positions and positions[-1] < 0.6 else 9.0))
    assert positions == sorted(positions)
    # The middle of a step, but for the first few of a stage, whose length is unknown.
    assert positions[50] == pytest.approx((9 + 49 * 4 + 2) / 600, abs=0.002)
    assert run.seconds[0] == pytest.approx(600, abs=5.0), "half a step"
    assert afresh == ["masked", "tuned"]
    assert run.clocks[1].step.is_over


def test_the_clock_goes_on_where_the_checkpoint_left_it() -> None:
    run = Clocks()
    while run.step(4.0) < 0.8:
        pass
    clock = run.clocks[0]
    state = {"step": clock.step.number, **clock.schedule.state(clock.step), "trained_seconds": run.seconds[0]}
    assert Clocks(json.loads(json.dumps(state))).clocks[0].step == clock.step


def test_samples_become_shares_of_the_operations(write_recipe, tmp_path: Path) -> None:
    recipe = parse_recipe(["--config", str(write_recipe(tmp_path / "run"))])
    assert with_time_shares(recipe) is recipe, "it has no budget"
    timed = with_time_shares(replace(recipe, budget_minutes=1.0))
    flops = pair_flops(recipe)
    masked = 384 * flops["masked"] / (384 * flops["masked"] + 256 * flops["unmasked"])
    assert [stage.share for stage in timed.stages] == pytest.approx([masked, 1 - masked], abs=1e-4)
    assert timed.stages[0].warmup_share == pytest.approx(masked * 64 / 384, abs=1e-4)
    assert [stage.samples for stage in timed.stages] == [None, None]
    assert schedule_stages(timed.stages, 16, 1.0)[-1].last == 1.0
    assert with_time_shares(timed) is timed
    three = [replace(recipe.stages[0], name=str(number), samples=1600, warmup_samples=0) for number in range(3)]
    rounded = with_time_shares(replace(recipe, budget_minutes=1.0, stages=three)).stages
    assert [stage.share for stage in rounded] == pytest.approx([0.3334, 0.3333, 0.3333])
    short = [*three[:2], replace(three[2], samples=16), replace(three[2], name="long", samples=10**9)]
    with pytest.raises(UserError, match="stage '0': 1600 samples have no share of time"):
        with_time_shares(replace(recipe, budget_minutes=1.0, stages=short))


@pytest.fixture(scope="module")
def timed_run(recipe: dict, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that ends by its clock, evaluated at each third of its time."""
    folder = tmp_path_factory.mktemp("timed")
    log = {"every_share": 0.1, "report_to": []}
    evaluated = {"every_share": 1 / 3, "zero_shot": str(shards), "num_workers": 0}
    changed = {**recipe, **BUDGET, "log": log, "eval": evaluated, "output_dir": str(folder / "run")}
    (folder / "run.yaml").write_text(yaml.safe_dump(changed))
    trained(folder / "run.yaml", 2)
    return folder / "run"


def schedule_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "schedule.jsonl").read_text().splitlines()]


def assert_explained(run_dir: Path) -> list[dict]:
    """Every step is recorded with its share of the budget and its rate, which is the schedule's at that share."""
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    stages = schedule_stages([StageRecipe(**stage) for stage in recipe["stages"]], 16, recipe["budget_minutes"])
    found = schedule_of(run_dir)
    assert [step["step"] for step in found] == list(range(1, len(found) + 1))
    shares = [step["budget_used"] for step in found]
    assert shares == sorted(shares)
    assert shares[-1] < 1
    assert [step["lr"] for step in found] == [stage_of(stages, share).learning_rate(share) for share in shares]
    for record in metrics(run_dir):
        if "lr" in record:
            assert record["lr"] == found[record["step"] - 1]["lr"]
            assert record["stage"] == stage_of(stages, found[record["step"] - 1]["budget_used"]).name
    return found


def test_a_run_ends_by_its_clock_and_says_what_its_schedule_was(timed_run: Path) -> None:
    steps = assert_explained(timed_run)
    records = metrics(timed_run)
    assert records[-1]["trained_seconds"] > 0.5 * 3.0, "it ended before its time"
    evaluated = [record["step"] for record in records if "zero_shot/top1" in record]
    assert evaluated[-1] == records[-1]["step"] == len(steps)
    assert (timed_run / "DONE").exists()
    status = read_status(timed_run, 0.0)
    assert (status["total_samples"], status["samples_seen"]) == (None, 16 * len(steps))


@pytest.mark.long
def test_a_killed_run_repeats_the_lost_steps_and_its_clock_goes_on(timed_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    before = schedule_of(timed_run)
    saved = sorted(int(path.name[5:]) for path in (timed_run / "checkpoints").iterdir())
    step = saved[(len(saved) - 1) // 2]
    cut(timed_run, copy, step)
    recipe = yaml.safe_load((timed_run / "recipe.yaml").read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**recipe, "output_dir": str(copy)}))
    trained(tmp_path / "run.yaml")
    after = assert_explained(copy)
    assert after[:step] == before[:step]
    state = json.loads((timed_run / f"checkpoints/step-{step:08d}/state.json").read_text())
    assert after[step]["budget_used"] == state["budget_used"]
    assert state["budget_before"] == before[step - 1]["budget_used"]
    assert metrics(copy)[-1]["trained_seconds"] > state["trained_seconds"]
    longer = yaml.safe_dump({**recipe, "budget_minutes": 9, "output_dir": str(copy)})
    (tmp_path / "run.yaml").write_text(longer)
    changed = pretrain(tmp_path / "run.yaml")
    assert (changed.returncode, changed.stderr.count("\n")) == (2, 1)
    assert "holds a run of another recipe (budget_minutes: 0.05, now 9.0)" in changed.stderr
