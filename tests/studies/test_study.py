"""`flipscale study plan`, `run` and `report` of a small study, and the errors of its file."""

import dataclasses
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import changed_recipe

from flipscale.cli import main
from flipscale.pretrain import pretrain
from flipscale.recipe.recipe import Recipe
from flipscale.start.complete_recipe import parse_recipe
from flipscale.studies.design import MoreSeeds, Study, read_plan
from flipscale.studies.runs import StudyRun, longest_queue, train_runs

AXES = {
    "model": {"wide": {"model.vision_config.hidden_size": 64}},
    "length": {"double": {"stages.0.samples": "6.4e1"}},
}


@pytest.fixture
def base(recipe: dict, shards: Path, tmp_path: Path) -> Path:
    stages = [{"name": "masked", "samples": 32, "mask_ratio": 0.75, "base_lr": 0.012}]
    tasks = [{"kind": "zero_shot", "data": str(shards)}, {"kind": "zero_shot", "data": str(shards), "name": "again"}]
    evaluated = {"num_workers": 0, "every_samples": 16, "tasks": tasks}
    file = tmp_path / "base.yaml"
    file.write_text(yaml.safe_dump(changed_recipe({**recipe, "stages": stages}, {"eval": evaluated})))
    return file


@pytest.fixture
def study_file(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a study with these fields; returns the file."""

    def write(**fields: object) -> Path:
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump({"base": base.name, "axes": AXES, "seeds": [0], **fields}, sort_keys=False))
        return file

    return write


def test_names_of_runs_in_order() -> None:
    axes = {"a": {"x": {"p": 1}, "y": {"p": 2}}, "b": {"z": {"q": 1}}, "c": {"w": {"r": 1}}}
    assert list(Study("base", axes, "star", [3]).runs()) == [
        "base-seed3", "x-seed3", "y-seed3", "z-seed3", "w-seed3", "y+z-seed3", "y+z+w-seed3",
    ]  # fmt: skip
    # A level without changes names the base. One seed comes after the other, further seeds last.
    axes = {"a": {"x": {"p": 1}, "y": {}}, "b": {"z": {"q": 1}}, "c": {"w": {"r": 1}, "v": {}}}
    star = Study("base", axes, "star", [3], more_seeds=MoreSeeds([4], {"a": ["y"], "c": ["w"]}))
    assert list(star.runs()) == [
        *("y+v-seed3", "x+v-seed3", "y+z+v-seed3", "y+w-seed3", "x+z+v-seed3", "x+z+w-seed3"), "y+w-seed4",
    ]  # fmt: skip
    axes = {"a": {"x": {"p": 1}, "y": {"p": 2}}, "b": {"z": {"q": 1}}}
    assert list(Study("base", axes, "grid", [3, 4], more_seeds=MoreSeeds([5], {"a": ["base", "y"]})).runs()) == [
        *("base-seed3", "z-seed3", "x-seed3", "x+z-seed3", "y-seed3", "y+z-seed3"),
        *("base-seed4", "z-seed4", "x-seed4", "x+z-seed4", "y-seed4", "y+z-seed4"),
        *("base-seed5", "z-seed5", "y-seed5", "y+z-seed5"),
    ]


def test_report_of_the_finished_runs(
    study_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main(["study", "plan", str(study_file(axes={"model": AXES["model"]})), "--output_dir", str(out)])
    pretrain(read_plan(out)[1][0].recipe)
    capsys.readouterr()

    main(["study", "report", str(out), "--resamples", "10"])
    table, rest = (out / "report.md").read_text().split("\n\nNot finished: wide-seed0.\n\n")
    assert re.search(r"\n\| base +\| +1 \| +32 \|.* %", table)
    assert "too few for 2 parameters" in rest
    assert "there are no effects" in (out / "transfer.md").read_text()
    assert table.splitlines()[-1] in capsys.readouterr().out
    for name in ("results", "scaling", "accuracy", "fits_zero_shot_top1"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_from_plan_to_report(
    study_file: Callable[..., Path],
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    refused: Callable[..., str],
) -> None:
    out = tmp_path / "out"
    common = {"optim.weight_decay": 0.25}
    main(["study", "plan", str(study_file(changes=common, axes={"model": AXES["model"]})), "--output_dir", str(out)])
    assert capsys.readouterr().out.splitlines()[:2] == ["base-seed0", "wide-seed0"]
    runs = {run.name: run.recipe for run in read_plan(out)[1]}

    # A failed run stops no other, and is tried again.
    broken = out / "runs/wide-seed0.yaml"
    whole = broken.read_text()
    broken.write_text(whole.replace(f"shards: {runs['wide-seed0'].data.shards}", f"shards: {tmp_path / 'nowhere'}"))
    with pytest.raises(SystemExit, match="1"):
        main(["study", "run", str(out)])
    assert "1 of 2 runs failed: wide-seed0; the others are done" in capsys.readouterr().err
    broken.write_text(whole)
    main(["study", "run", str(out), "--workers", "1"])
    assert capsys.readouterr().out.splitlines() == ["1 of 2 runs are done", "wide-seed0: done"]
    starts = (out / "runs/base-seed0/starts.jsonl").read_text().splitlines()
    assert [json.loads(start)["step"] for start in starts] == [0], "a finished run was trained again"

    main(["study", "report", str(out), "--resamples", "10"])
    assert re.search(r"\| wide +\| +1 \| +32 \|", capsys.readouterr().out)
    report = (out / "report.md").read_text()
    assert "base.yaml`, of which all runs change `optim.weight_decay`." in report
    assert re.search(r"No fit, or no prediction: power law: .*, too few for 2 parameters", report)
    shared = re.search(r"## Laws of zero_shot top-1, .*again top-1", report)
    assert shared, "results refused for one reason share a section"
    assert "One seed a run" in (out / "transfer.md").read_text()
    for name in ("results", "scaling", "accuracy", "transfer", "fits_zero_shot_top1"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    # Evaluations on masked images add a table.
    assert "masked" not in report
    masks = ["--mask_ratio", "0", "0.5", "--mask_views", "1", "2", "--num_workers", "0"]
    main(["evaluate", str(out / "runs/base-seed0/model"), "--zero_shot", str(shards), *masks])
    main(["study", "report", str(out), "--resamples", "10"])
    table = (out / "report.md").read_text().split("## On masked images\n\n")[1].split("\n\n")[0]
    kinds = [line.split("|")[2].strip() for line in table.splitlines()]
    assert kinds[0::2] == ["image", "whole", "2 views of 50 % random"]
    assert table.count("| base |") == 3
    assert all(line.rstrip(" |").endswith("%") for line in table.splitlines()[2:])

    # Planned runs do not change, but a study may be planned with others.
    capsys.readouterr()
    main(["study", "plan", str(study_file(changes=common)), "--output_dir", str(out)])
    assert "4 runs are planned" in capsys.readouterr().out
    both = {run.name: run.recipe for run in read_plan(out)[1]}["wide+double-seed0"]
    assert (both.stages[0].samples, both.model.vision_config["hidden_size"]) == (64, 64)
    assert both.optim.weight_decay == 0.25
    changed = {**AXES, "length": {"double": {"stages.0.samples": 80}}}
    line = refused("study", "plan", study_file(changes=common, axes=changed), "--output_dir", out)
    assert re.search(r"double-seed0.yaml differs from this study \(stages\[0\].samples: 64, now 80\)", line)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"axes": {"m": {"x": {"stages.7.samples": 64}}}}, "stages.7.samples is not a field of the recipe"),
        ({"axes": {"m": {"x": {"modle": 1}}}}, "axes.m.x: modle is not a field of the recipe"),
        ({"axes": {"m": {"x": {"data.crop_scale": [2, 1]}}}}, "run x-seed0: data.crop_scale"),
        ({"changes": {"output_dir": "x"}}, "changes: output_dir is the study's own"),
        ({"axes": {"m": {"x": {"optim.lr": 1}}, "n": {"x": {"optim.lr": 2}}}}, "two runs are called x-seed0"),
        ({"seeds": []}, "seeds is []"),
        ({"axes": {"m": {"x": {}, "y": {}, "z": {"optim.lr": 1}}}}, "axes.m is "),
        ({"axes": {"m": {"a b": {"optim.lr": 1}}}}, "'a b' names runs"),
        ({"more_seeds": {"seeds": [1], "of": {"m": ["x"]}}}, "more_seeds.of has 'm'; the axes are model, length"),
        ({"more_seeds": {"seeds": [1], "of": {"model": ["x"]}}}, "more_seeds.of.model is ['x']; list some of base, w"),
        ({"sedes": [1]}, "'sedes'"),
    ],
)
def test_errors_of_a_file(
    study_file: Callable[..., Path], tmp_path: Path, refused: Callable[..., str], fields: dict, message: str
) -> None:
    assert message in refused("study", "plan", study_file(**fields), "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_time_budgets_and_names_of_stages(study_file: Callable[..., Path], base: Path, tmp_path: Path) -> None:
    def planned(name: str, **fields: object) -> list[Recipe]:
        main(["study", "plan", str(study_file(**fields)), "--output_dir", str(tmp_path / name)])
        return [run.recipe for run in read_plan(tmp_path / name)[1]]

    two = {"stages": [{"name": "a", "share": 0.5, "base_lr": 0.01}, {"name": "b", "share": 0.5}]}
    recipes = planned("timed", axes={"tokens": {"two": two}}, minutes=0.5)
    assert [recipe.budget_minutes for recipe in recipes] == [0.5, 0.5]
    assert [[stage.share for stage in recipe.stages] for recipe in recipes] == [[1.0], [0.5, 0.5]]
    recipes = planned("an arm in time", axes={"time": {"long": {"budget_minutes": 2}}})
    assert [(recipe.budget_minutes, recipe.stages[0].share) for recipe in recipes] == [(None, None), (2, 1.0)]
    content = yaml.safe_load(base.read_text())
    content["stages"][0]["name"] = "half masked, v1.5"
    base.write_text(yaml.safe_dump(content))
    rates = {"named": {"stages.half masked, v1.5.base_lr": 0.5}, "numbered": {"stages.0.base_lr": 0.5}}
    assert [recipe.stages[0].base_lr for recipe in planned("rates", axes={"rate": rates})] == [0.012, 0.5, 0.5]


def test_errors_of_a_folder(study_file: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "none.yaml is not a plain file" in refused("study", "plan", tmp_path / "none.yaml")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis").touch()
    assert "mine holds thesis, which no study wrote" in refused("study", "plan", study_file(), "--output_dir", mine)
    assert "mine holds no planned study" in refused("study", "report", mine)
    out = tmp_path / "out"
    main(["study", "plan", str(study_file()), "--output_dir", str(out)])
    assert "out has 0 finished runs of 4, none of the base" in refused("study", "report", out)
    (out / "runs/wide-seed0.yaml").unlink()
    assert "wide-seed0.yaml is missing; plan the study again" in refused("study", "run", out)


@pytest.mark.parametrize(
    ("script", "error", "says"),
    [("exit 0", OSError, "base-seed0 stopped before"), ("kill -USR1 $PPID; exec sleep 600", SystemExit, "138")],
    ids=["a run stops by itself", "the study is asked to stop"],
)
def test_stopped_runs_are_not_done(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, error: type[BaseException], says: str
) -> None:
    started = []

    def start(*about: object) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sh", "-c", script]))
        return started[-1]

    monkeypatch.setattr("flipscale.studies.runs._start", start)
    recipe = dataclasses.replace(parse_recipe(["--config", str(base)]), output_dir=str(tmp_path / "base-seed0"))
    with pytest.raises(error, match=says):
        train_runs([StudyRun("base-seed0", recipe)], workers=1)
    assert started[0].returncode is not None


def test_the_time_left_is_that_of_the_longest_queue() -> None:
    assert longest_queue([100, 100, 100], workers=2) == 200, "the third run waits"
    assert longest_queue([20, 60, 100], workers=2) == 120, "it starts when the first has ended"
    assert longest_queue([0, 30], workers=3) == 30
    assert longest_queue([], workers=3) == 0
