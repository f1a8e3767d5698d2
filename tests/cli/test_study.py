"""`flipscale study plan`, `run` and `report`: a small study, and what each says of a mistake."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import changed_recipe

from flipscale.cli import main
from flipscale.studies.design import STUDIES, MoreSeeds, Study, plan, read_study
from flipscale.studies.design import study_file as packaged
from flipscale.studies.folder import read_plan
from flipscale.studies.pool import train_missing
from flipscale.studies.runs import StudyRun
from flipscale.training.recipe import parse_recipe

AXES = {
    "model": {"wide": {"model.vision_config.hidden_size": 64}},
    "length": {"double": {"stages.0.samples": "6.4e1"}},
}


@pytest.fixture
def base(recipe: dict, shards: Path, tmp_path: Path) -> Path:
    stages = [{"name": "masked", "samples": 32, "mask_ratio": 0.75, "base_lr": 0.012}]
    evaluated = {"num_workers": 0, "every_samples": 16, "tasks": [{"kind": "zero_shot", "data": str(shards)}]}
    file = tmp_path / "base.yaml"
    file.write_text(yaml.safe_dump(changed_recipe({**recipe, "stages": stages}, {"eval": evaluated})))
    return file


@pytest.fixture
def study_file(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a study with these fields; returns the file."""

    def write(**fields: object) -> Path:
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump({"base": str(base), "axes": AXES, "seeds": [0], **fields}, sort_keys=False))
        return file

    return write


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as raised:
        main(["study", *map(str, words)])
    assert raised.value.code in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_star_and_a_grid() -> None:
    axes = {"a": {"x": {"p": 1}, "y": {"p": 2}}, "b": {"z": {"q": 1}}, "c": {"w": {"r": 1}}}
    assert list(Study("base", axes, "star", [3]).runs()) == [
        "base-seed3", "x-seed3", "y-seed3", "z-seed3", "w-seed3", "y+z-seed3", "y+z+w-seed3",
    ]  # fmt: skip
    assert len(Study("base", axes, "grid", [0, 1]).runs()) == 3 * 2 * 2 * 2


def test_a_level_that_changes_nothing_is_the_base_s_name() -> None:
    axes = {"a": {"x": {"p": 1}, "y": {}}, "b": {"z": {"q": 1}}, "c": {"w": {"r": 1}, "v": {}}}
    star = Study("base", axes, "star", [3], more_seeds=MoreSeeds([4], {"a": ["y"], "c": ["w"]}))
    assert list(star.runs()) == [
        *("y+v-seed3", "x+v-seed3", "y+z+v-seed3", "y+w-seed3", "x+z+v-seed3", "x+z+w-seed3"), "y+w-seed4",
    ]  # fmt: skip
    assert [dict(levels) for levels in star.combinations()][:3] == [{}, {"a": "x"}, {"b": "z"}]
    assert len(Study("base", axes, "grid", [0]).runs()) == 2 * 2 * 2


def test_one_seed_comes_after_the_other_and_further_ones_are_of_a_part() -> None:
    axes = {"a": {"x": {"p": 1}, "y": {"p": 2}}, "b": {"z": {"q": 1}}}
    more = MoreSeeds([5], {"a": ["base", "y"]})
    assert list(Study("base", axes, "grid", [3, 4], more_seeds=more).runs()) == [
        *("base-seed3", "z-seed3", "x-seed3", "x+z-seed3", "y-seed3", "y+z-seed3"),
        *("base-seed4", "z-seed4", "x-seed4", "x+z-seed4", "y-seed4", "y+z-seed4"),
        *("base-seed5", "z-seed5", "y-seed5", "y+z-seed5"),
    ]


PACKAGED = sorted(file.stem for file in STUDIES.glob("*.yaml") if not file.stem.startswith("budget_"))


@pytest.mark.parametrize("name", PACKAGED)
def test_a_study_of_the_package_can_be_planned_and_has_as_many_runs_as_it_says(name: str, tmp_path: Path) -> None:
    file = packaged(name)
    comment = file.read_text(encoding="utf-8").split("\n# flipscale ")[0].replace("\n# ", " ")
    count = len(plan(read_study(file), tmp_path))
    assert {int(said) for said in re.findall(r"(\d+) runs", comment)} <= {count}


def test_where_all_runs_fail_no_other_is_called_done(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """There is no file of the recipe that its process could read."""
    run = StudyRun("none", parse_recipe(["--config", str(write_recipe(tmp_path / "run"))]))
    with pytest.raises(OSError, match="1 of 1 runs failed: none; the same command tries these again"):
        train_missing([run], 1)


def test_a_study_from_its_plan_to_its_report(
    base: Path, study_file: Callable[..., Path], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tested_twice = yaml.safe_load(base.read_text())
    tested_twice["eval"]["tasks"].append({"kind": "zero_shot", "data": str(shards), "name": "again"})
    base.write_text(yaml.safe_dump(tested_twice))
    out = tmp_path / "out"
    common = {"optim.weight_decay": 0.25}
    main(["study", "plan", str(study_file(changes=common)), "--output_dir", str(out)])
    assert capsys.readouterr().out.splitlines()[:4] == [
        "base-seed0", "wide-seed0", "double-seed0", "wide+double-seed0",
    ]  # fmt: skip
    runs = {run.name: run.recipe for run in read_plan(out)[1]}
    assert runs["wide+double-seed0"].stages[0].samples == 64
    assert runs["wide+double-seed0"].model.vision_config["hidden_size"] == 64
    assert {recipe.optim.weight_decay for recipe in runs.values()} == {0.25}

    # An arm that fails stops no other.
    broken = out / "runs/wide-seed0.yaml"
    whole = broken.read_text()
    broken.write_text(whole.replace(f"shards: {runs['wide-seed0'].data.shards}", f"shards: {tmp_path / 'nowhere'}"))
    line = refused(capsys, "run", out)
    assert "1 of 4 runs failed: wide-seed0; the others are done, and the same command tries these again" in line
    assert (out / "runs/double-seed0/DONE").exists()
    broken.write_text(whole)
    main(["study", "run", str(out), "--workers", "1"])
    assert capsys.readouterr().out.splitlines() == ["3 of 4 runs are done", "wide-seed0: done"]
    starts = (out / "runs/base-seed0/starts.jsonl").read_text().splitlines()
    assert [json.loads(start)["step"] for start in starts] == [0], "what is done was done again"

    main(["study", "report", str(out), "--resamples", "10"])
    said = capsys.readouterr().out
    assert "| wide+double |     1 |         64 |" in said
    report = (out / "report.md").read_text()
    assert "The base is `base.yaml`, of which all runs change `optim.weight_decay`." in report.replace(
        f"{tmp_path}/", ""
    )
    assert "No fit, or no prediction: power law: " in report
    assert "are too few for 2 parameters, which take 4" in report
    assert "## Laws of zero_shot top-1, again top-1\n" in report, "the same refusals are said of each result"
    assert "One seed a run, so there are no intervals" in (out / "transfer.md").read_text()
    for name in ("results", "scaling", "accuracy", "transfer", "fits_zero_shot_top1"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    # What is evaluated afterwards, on masked images too, has a table.
    assert "masked" not in report
    assert not (out / "masking_map.png").exists()
    masks = ["--mask_ratio", "0", "0.5", "--mask_views", "1", "2", "--num_workers", "0"]
    main(["evaluate", str(out / "runs/base-seed0/model"), "--zero_shot", str(shards), *masks])
    main(["study", "report", str(out), "--resamples", "10"])
    table = (out / "report.md").read_text().split("## On masked images\n\n")[1].split("\n\n")[0]
    kinds = [line.split("|")[2].strip() for line in table.splitlines()]
    assert kinds[0::2] == ["image", "whole", "2 views of 50 % random"]
    assert table.count("| base |") == 3
    assert all(line.rstrip(" |").endswith("%") for line in table.splitlines()[2:])

    # A study may grow; what is planned stays as it is.
    main(["study", "plan", str(study_file(changes=common, seeds=[0, 1])), "--output_dir", str(out)])
    assert "8 runs are planned" in capsys.readouterr().out
    changed = {**AXES, "length": {"double": {"stages.0.samples": 80}}}
    line = refused(capsys, "plan", study_file(changes=common, axes=changed, seeds=[0, 1]), "--output_dir", out)
    assert "was planned otherwise than" in line
    assert "stages[0].samples: 64, now 80" in line
    line = refused(capsys, "plan", study_file(changes=common), "--output_dir", out)
    assert "was planned with a run base-seed1, which" in line


def test_a_study_whose_runs_end_by_their_clock(study_file: Callable[..., Path], tmp_path: Path) -> None:
    axes = {"tokens": {"two": {"stages": [{"name": "a", "share": 0.5, "base_lr": 0.01}, {"name": "b", "share": 0.5}]}}}
    main(["study", "plan", str(study_file(axes=axes, minutes=0.5)), "--output_dir", str(tmp_path / "out")])
    study, runs = read_plan(tmp_path / "out")
    assert study.minutes == 0.5
    assert [run.recipe.budget_minutes for run in runs] == [0.5, 0.5]
    assert [[stage.share for stage in run.recipe.stages] for run in runs] == [[1.0], [0.5, 0.5]]


def test_where_masking_pays_is_told_of_a_study_of_data_time_and_masks(
    study_file: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    axes = {"mask": {"whole": {"stages.0.mask_ratio": 0.0}}}
    main(["study", "plan", str(study_file(axes=axes, minutes=0.01)), "--output_dir", str(out)])
    main(["study", "run", str(out)])
    main(["study", "report", str(out), "--resamples", "10"])
    section = (out / "report.md").read_text().split("## Where masking pays\n\n")[1].split("\n\n## ")[0]
    (row,) = [line for line in section.splitlines() if line.startswith("| all")]
    assert [cell.strip() for cell in row.split("|")[1:5]] == ["all", "0.01", "75%", "1"]
    # Beside the class token, 4 of 16 patches are left. Two layers have 2 (16,384 + 128 n) operations for each of n
    # tokens, and the embedding 12,288 for each patch: 219,392 of 827,648.
    assert " times as fast, with 27% of the image tower's operations: the tower is " in section
    assert (out / "masking_map.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"minutes": 0}, "minutes is 0; it must be above 0 and at most 1,000,000"),
        ({"minutes": "ten"}, "minutes is 'ten'; it must be a number, such as 10"),
        (
            {"axes": {"m": {"x": {"model.sise": "b16"}}}},
            "axes.m.x: model.sise is no field of the recipe: model has",
        ),
        ({"axes": {"m": {"x": {"stages.7.samples": 64}}}}, "stages.7.samples is no field of the recipe: stages has no"),
        ({"axes": {"m": {"x": {"modle": 1}}}}, "axes.m.x: modle is no field of the recipe: it has model, data,"),
        ({"axes": {"m": {"x": {"data.crop_scale": [2, 1]}}}}, "run x-seed0: data.crop_scale"),
        ({"axes": {"m": {"x": {"data.lanes": "many"}}}}, "run x-seed0: data.lanes: "),
        (
            {"axes": {"m": {"x": {"data": {}}}}},
            "axes.m.x: data is a whole section of the recipe; change its fields, suc",
        ),
        ({"axes": {"m": {"x": {"seed": 1}}}}, "axes.m.x: seed is the study's own; list the seeds in seeds"),
        ({"changes": {"output_dir": "x"}}, "changes: output_dir is the study's own; its runs lie in its folder"),
        ({"axes": {"m": {"x": {"stages.0.samples": 1}}}}, "run x-seed0: stage 'masked': 1 samples are less than one"),
        (
            {"axes": {"m": {"x": {"optim.lr": 1}}, "n": {"x": {"optim.lr": 2}}}},
            "two runs are called x-seed0; give each level",
        ),
        ({"seeds": [1, 1]}, "two runs are called base-seed1; give each level a name of its own, and each seed once"),
        ({"seeds": []}, "seeds is []; it must be a list of whole numbers, such as [0, 1, 2]"),
        ({"seeds": [-1]}, "seeds is [-1]; it must be a list of whole numbers"),
        ({"design": "stern"}, "design is 'stern'; use star or grid"),
        ({"axes": {"m": {}}}, "axes must have levels, and these changes"),
        ({"axes": {"m": {"x": {}}}}, "one level beside them may have none, {}, and names the base"),
        ({"axes": {"m": {"x": {}, "y": {}, "z": {"optim.lr": 1}}}}, "one level beside them may have none, {}, and nam"),
        ({"axes": {"m": {"a b": {"optim.lr": 1}}}}, "'a b' names runs; use letters, digits and . _ -"),
        ({"changes": [1]}, "changes is '[1]'; it must be as 'changes: {data.fraction: 0.5}'"),
        ({"changes": {"data.fracton": 0.5}}, "changes: data.fracton is no field of the recipe: data has shards,"),
        ({"more_seeds": [1]}, "more_seeds must have seeds, and levels of axes: 'more_seeds: {seeds: [1, 2], of: {"),
        ({"more_seeds": {"seeds": [], "of": {}}}, "more_seeds.seeds is []; it must be a list of whole numbers"),
        ({"more_seeds": {"seeds": [1], "of": {"m": ["x"]}}}, "more_seeds.of has 'm'; the axes are model, length"),
        ({"more_seeds": {"seeds": [1], "of": {"model": ["x"]}}}, "more_seeds.of.model is ['x']; list some of base, w"),
        (
            {"axes": {"m": {"x": {"optim.lr": 1}, "y": {}}}, "more_seeds": {"seeds": [1], "of": {"m": ["base"]}}},
            "more_seeds.of.m is ['base']; list some of y, x",
        ),
        ({"base": "none"}, "recipe 'none' is neither a file nor one of"),
        (
            {"sedes": [1]},
            "is no study, it has 'sedes'; a study has base, changes, axes, design, seeds, more_seeds, minutes",
        ),
    ],
)
def test_a_mistake_in_a_study(
    study_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict, message: str
) -> None:
    assert message in refused(capsys, "plan", study_file(**fields), "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_study_without_a_file_or_in_another_s_folder(
    study_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "none.yaml is no plain file" in refused(capsys, "plan", tmp_path / "none.yaml")
    line = refused(capsys, "plan", "table_2")
    assert (
        "study 'table_2' is neither a file nor one of budget_icons, equal_tokens, masked_captions, masking_map, "
        in line
    )
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis").touch()
    assert "mine holds thesis, which no study wrote" in refused(capsys, "plan", study_file(), "--output_dir", mine)
    assert "mine holds no planned study; write one there" in refused(capsys, "run", mine)
    assert "mine holds no planned study; write one there" in refused(capsys, "report", mine)
    assert "--workers is 0; it must be at least 1" in refused(capsys, "run", mine, "--workers", "0")
    assert "--workers is 9999, and there are" in refused(capsys, "run", mine, "--workers", "9999")


def test_a_report_of_no_finished_run(
    study_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main(["study", "plan", str(study_file()), "--output_dir", str(out)])
    capsys.readouterr()
    line = refused(capsys, "report", out)
    assert "out has 0 finished runs of 4, none of the base, which the others are compared with; train them:" in line
    (out / "runs/wide-seed0.yaml").unlink()
    assert "wide-seed0.yaml is missing; plan the study again" in refused(capsys, "run", out)
