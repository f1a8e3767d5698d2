"""Log lines of a run, and the commands in them."""

import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from flipscale.evaluation.presentation.last_lines import draw_figures, evaluation_flags, last_block
from flipscale.evaluation.results import BEFORE, Result
from flipscale.recipe.optim import StageRecipe
from flipscale.recipe.schedule import Schedule, schedule_stages
from flipscale.records.run_directory import typed_command
from flipscale.start.complete_recipe import parse_recipe

STAGES = schedule_stages(
    [StageRecipe("masked", 160, mask_ratio=0.75, base_lr=0.1), StageRecipe("whole", 80), StageRecipe("last", 80)], 8
)


@pytest.mark.parametrize(("step", "seconds"), [(1, 19 + 80), (20, 80), (21, 4.75), (40, 0)])
def test_the_time_left_follows_the_operations_of_each_stage(step: int, seconds: float) -> None:
    step_seconds = 1.0 if step <= 20 else 0.25
    left = Schedule(tuple(STAGES)).seconds_left(step, step, step_seconds, {"masked": 10, "whole": 40, "last": 40})
    assert left == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (["python", "-m", "flipscale.pretrain", "--seed", "1"], "python -m flipscale.pretrain --seed 1"),
        (["/env/bin/python3", "BIN/flipscale", "pretrain", "--config", "a b"], "flipscale pretrain --config 'a b'"),
        (["/env/bin/python3", "OTHER/flipscale", "pretrain"], "OTHER/flipscale pretrain"),
        (["python", "-c", "from multiprocessing import ..."], None),
    ],
)
def test_the_command_is_the_one_that_was_typed(
    words: list[str], typed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BIN", "OTHER"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "flipscale").touch(0o755)
    monkeypatch.setattr(os, "environ", {"PATH": str(tmp_path / "BIN")})
    monkeypatch.setattr(sys, "orig_argv", [re.sub("^(BIN|OTHER)", rf"{tmp_path}/\1", word) for word in words])
    assert typed_command() == (typed and typed.replace("OTHER", f"{tmp_path}/OTHER"))


def test_the_next_commands_are_words_of_a_shell(write_recipe, tmp_path: Path) -> None:
    recipe = parse_recipe(["--config", str(write_recipe(tmp_path / "my 'run' $(x)"))])
    lines = last_block(recipe, 40, 3.0, [], []).splitlines()
    assert not any("pip install" in line for line in lines), "matplotlib is installed, and there are no records"
    commands = [shlex.split(line.split("flipscale ", 1)[1]) for line in lines if " flipscale " in line]
    model = f"{tmp_path}/my 'run' $(x)/model"
    assert [words[:2] for words in commands[:2]] == [["evaluate", model], ["search", model]]
    assert commands[2] == ["push", f"{tmp_path}/my 'run' $(x)", "ORG/NAME"]
    recipe.eval.tasks.append({"kind": "retrieval", "data": "data/mine/test"})
    assert "/model' --retrieval data/mine/test" in last_block(recipe, 40, 3.0, [], [])
    recipe = replace(recipe, model=replace(recipe.model, init_from="my start"))
    lost = Result(task="old", kind="zero_shot", metric="top1", value=30.0, low=28.0, high=32.0)
    before = replace(lost, value=50.0, low=48.0, high=52.0, who=BEFORE)
    (line,) = [line for line in last_block(recipe, 40, 3.0, [], [lost, before]).splitlines() if " export " in line]
    assert shlex.split(line.split("flipscale ", 1)[1])[1:4] == [recipe.output_dir, "--interpolate", "my start"]
    assert "--interpolate" not in last_block(recipe, 40, 3.0, [], [before, replace(lost, value=60.0, low=58, high=62)])
    for data in ("a b", "it's", "a, b: {c}", "-x"):
        assert shlex.split(evaluation_flags("retrieval", data))[1].removeprefix("./") == data
        assert yaml.safe_load(shlex.split(evaluation_flags("captioning", data))[1])["data"] == data


def test_a_broken_matplotlib_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "recipe.yaml").write_text("stages: [{name: masked, mask_ratio: 0.5}]\n")
    place = '"samples_seen": 16, "trained_seconds": 1.0, "loss": 1.0, "stage": "masked"'
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, {place}}}\n' for step in (1, 2)))
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "matplotlib.py").write_text("raise AttributeError('_ARRAY_API not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    with caplog.at_level("WARNING", "flipscale"):
        assert draw_figures(tmp_path) == {}
    assert "_ARRAY_API" in caplog.text
