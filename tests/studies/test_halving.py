"""`flipscale study budget`: a small search, and the errors of its file."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import changed_recipe

from flipscale.cli import main
from flipscale.evaluation.suite import planned_tasks
from flipscale.runs.complete_recipe import parse_recipe
from flipscale.studies.halving import path_recipes, read_search

MASKED = [{"name": "masked", "mask_ratio": 0.75}, {"name": "tuned"}]
SMALL = [{"name": "small", "image_size": 16}, {"name": "tuned"}]
RUNGS = {"rungs": [0.01], "keep": [1]}
PATHS = {
    "whole": {"stages": [{"name": "whole"}]},
    "masked": {"mask.kind": "grid", "stages": MASKED},
    "small": {"stages": SMALL},
}


@pytest.fixture
def base(recipe: dict, shards: Path, tmp_path: Path) -> Path:
    tasks = [
        {"kind": "zero_shot", "data": str(shards)},
        {"kind": "zero_shot", "data": str(shards), "name": "chosen_by", "every_samples": 16},
    ]
    file = tmp_path / "base.yaml"
    file.write_text(yaml.safe_dump(changed_recipe(recipe, {"eval": {"num_workers": 0, "tasks": tasks}})))
    return file


@pytest.fixture
def search_file(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a search with these fields; returns the file."""

    def write(**fields: object) -> Path:
        file = tmp_path / "search.yaml"
        content = {"base": base.name, "minutes": 0.02, "validation": "chosen_by", "paths": PATHS, **RUNGS, **fields}
        file.write_text(yaml.safe_dump({n: v for n, v in content.items() if v is not None}, sort_keys=False))
        return file

    return write


def results(run_dir: Path) -> dict[tuple[str, str], float]:
    """The results of a run by task and metric."""
    lines = [json.loads(line) for line in (run_dir / "results.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == 1, "evaluated once"
    return {(line["task"], line["metric"]): line["value"] for line in lines}


@pytest.mark.long
def test_a_search_to_its_winner(
    search_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    out, broken = tmp_path / "out", {"data.shards": "nowhere", "stages": [{"name": "whole"}]}
    paths = {"masked": PATHS["masked"], "small": PATHS["small"], "broken": broken}
    words = [str(search_file(paths=paths, tuning=[0.4])), "--output_dir", str(out)]
    main(["study", "budget", *words])
    printed = capsys.readouterr().out
    assert printed.startswith("3 paths: 3 for 0.01 min, 1 for 0.02 min; 0 minutes of training by 1 side by side\n")
    assert "broken: ended with exit code 2: " in printed, "a path that fails is out, and the others go on"
    # The best advances, by the named evaluation. No other is run.
    ends = {name: results(out / "rung1" / name) for name in ("masked", "small")}
    assert all({task for task, _ in lines} == {"chosen_by"} for lines in ends.values())
    winner = max(ends, key=lambda name: ends[name]["chosen_by", "top1"])
    assert [run.parent.name for run in out.glob("rung2/*/DONE")] == [winner]

    recipe = parse_recipe(["--config", str(out / "winner.yaml")])
    kept = parse_recipe(["--config", str(out / "rung2" / f"{winner}.yaml")])
    assert (recipe.stages, recipe.mask, recipe.budget_minutes) == (kept.stages, kept.mask, 0.02)
    assert [task.name for task in planned_tasks(recipe.eval)] == ["zero_shot", "chosen_by"]
    assert f"# {winner}, of 3 paths the best by chosen_by top-1, " in (out / "winner.yaml").read_text()
    report = (out / "report.md").read_text()
    assert re.search(rf"^\| {winner} +\| +\*\*.*\*\* \| +\*\*.*\*\* \|$", report, re.MULTILINE)
    assert "- broken, 0.01 min: ended with exit code 2: " in report
    assert (out / "front.png").read_bytes().startswith(b"\x89PNG")

    # A stopped run continues. Finished and failed runs are not repeated.
    (out / "rung2" / winner / "DONE").unlink()
    main(["study", "budget", *words])
    again = capsys.readouterr().out
    assert f"rung 2 of 2: 0.02 min\n0 of 1 runs are done\n{winner}: done\n" in again
    assert "2 of 2 runs are done" in again
    assert len((out / "rung1" / winner / "starts.jsonl").read_text().splitlines()) == 1

    for name in ends:
        (out / "rung1" / f"{name}.failed").write_text("ended by SIGKILL: no output")
    with pytest.raises(SystemExit, match="1"):
        main(["study", "budget", *words])
    line = capsys.readouterr().err
    assert "no path of rung 1 could be trained: masked: ended by SIGKILL: no output; small: ended by" in line
    line = refused("study", "budget", search_file(paths=paths, rungs=[0.005], tuning=[0.4]), "--output_dir", out)
    assert re.search(r"holds another search than .*rungs: \[0.01\], now \[0.005\]", line)
    base = tmp_path / "base.yaml"
    base.write_text(base.read_text() + "seed: 5\n")
    line = refused("study", "budget", search_file(paths=paths, tuning=[0.4]), "--output_dir", out)
    assert "rung1/masked.yaml differs from this study (seed: 0, now 5)" in line


def test_the_paths_of_a_search(search_file: Callable[..., Path]) -> None:
    three = [{"name": "a", "share": 3, "image_size": 16}, {"name": "b", "base_lr": "1e-3"}, {"name": "c"}]
    recipes = path_recipes(read_search(search_file(tuning=[0.1, 0.25], paths={**PATHS, "three": {"stages": three}})))
    assert list(recipes) == [
        "whole",
        *(f"{n}+tuned{share}" for n in ("masked", "small", "three") for share in (0.1, 0.25)),
    ]
    stages = recipes["small+tuned0.25"].stages
    assert [(s.image_size, s.share, s.base_lr, s.warmup_share) for s in stages] == [
        (16, 0.75, 0.012, 0.05), (None, 0.25, None, 0.0),
    ]  # fmt: skip
    assert recipes["masked+tuned0.1"].mask.kind == "grid"
    assert [stage.share for stage in recipes["three+tuned0.1"].stages] == [0.675, 0.225, 0.1]


ODD = {"stages": [{"name": "odd", "image_size": 20}]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"minutes": 0}, "minutes is 0"),
        ({"validation": None}, "required: validation"),
        ({"validation": "val"}, "validation is 'val'"),
        ({"paths": {"whole": PATHS["whole"]}}, "keep is [1] of 1 paths"),
        ({"paths": {**PATHS, 32: PATHS["whole"]}}, "search.yaml: '32' names runs"),
        ({"paths": {**PATHS, "x": {}}}, "path x: stages must be a list"),
        ({"tuning": [0.5, 0.5]}, "two paths are called masked+tuned0.5"),
        ({"rungs": [0.03]}, "rungs is [0.03] of 0.02 minutes"),
        ({"keep": [2, 1]}, "keep is [2, 1], and rungs is [0.01]"),
        ({}, "path masked: stage 'masked' has no share"),
        ({"paths": {**PATHS, "odd": ODD}, "tuning": [0.5]}, "path odd: stage 'odd': image_size 20"),
        ({"paths": {**PATHS, "x": {**PATHS["whole"], "eval.tasks": []}}, "tuning": [0.5]}, "path x changes eval.tasks"),
        ({"paths": {**PATHS, "x": {**PATHS["whole"], "mask.kin": "grid"}}, "tuning": [0.5]}, "paths.x: mask.kin"),
    ],
)
def test_errors_of_a_file(
    search_file: Callable[..., Path], tmp_path: Path, refused: Callable[..., str], fields: dict, message: str
) -> None:
    assert message in refused("study", "budget", search_file(**fields), "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_errors_of_a_folder(search_file: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    file = search_file(tuning=[0.5])
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis").touch()
    assert "mine holds thesis, which no search wrote" in refused("study", "budget", file, "--output_dir", mine)
    file.write_text(file.read_text().replace("paths:\n", "paths:\n  whole: {stages: [{name: again}]}\n"))
    assert "search.yaml gives whole twice" in refused("study", "budget", file)
