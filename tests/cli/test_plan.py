"""`flipscale plan`: a table on stdout, or one line of what is wrong."""

import json
from pathlib import Path

import pytest
import yaml

from flipscale.cli import main
from flipscale.planning.flops import pair_flops
from flipscale.training.recipe import parse_recipe

PLAN = ["--gpu", "h100", "--num_gpus", "2"]


def total(printed: str) -> list[str]:
    """The cells of the last recipe's row, from its pairs on."""
    return printed.splitlines()[-1].partition("in all")[2].split()


def test_flags_take_the_place_of_the_recipe_s_own(
    write_recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write_recipe(tmp_path / "run", budget_minutes=0.0))
    assert "budget_minutes is 0.0; it must be above 0" in refusal([file, *PLAN], capsys)
    file = str(write_recipe(tmp_path / "run", cost={"device_hour_dollars": 2e12, "kwh_co2_grams": 100.0}))
    main(["plan", file, *PLAN])
    pairs, _, _, share, kwh, dollars, co2 = total(capsys.readouterr().out)
    assert (pairs, share, kwh, co2) == ("640", "1.00", "-", "-")
    by_recipe = float(dollars.replace(",", ""))
    assert by_recipe > 0.0
    main(["plan", file, *PLAN, "--device_hour_dollars", "4e12", "--watts", "1e15", "--pue", "1.5"])
    *_, kwh, dollars, co2 = (float(cell.replace(",", "")) for cell in total(capsys.readouterr().out))
    assert dollars == pytest.approx(2 * by_recipe, rel=0.05)
    assert kwh == pytest.approx(1e12 * dollars / 4e12 * 1.5, rel=0.05)
    assert co2 == pytest.approx(kwh * 0.1, rel=0.05)


def test_the_speed_that_was_measured(write_recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_recipe(tmp_path / "run"))
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps({"flops_per_pair": 989e9, "images_per_s": 500.0}))
    main(["plan", file, *PLAN, "--bench", str(bench)])
    assert "2 x H100, each at an MFU of 50.0% of 989 Tflop/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "abacus"], "gpu is 'abacus'; use one of h100, h100_pcie, "),
        (["--num_gpus", "0"], "--num_gpus is 0; it must be at least 1 and at most 1,000,000,000"),
        (["--num_gpus", "3"], "global_batch_size 16 is not divisible by 3 processes; use 2 or 4 processes"),
        (["--mfu", "1.2"], "--mfu is 1.2; it must be above 0 and at most 1"),
        (["--mfu", "0"], "--mfu is 0; it must be above 0 and at most 1"),
        (["--bench", "nowhere"], "--bench nowhere is not a JSON line of `flipscale bench step --json`"),
        (["--bench", "fast.json"], "--bench fast.json has 1,978.0 Tflop/s, and the GPU's peak is 989; measure"),
        (["--bench", "fast.json", "--mfu", "0.4"], "--mfu and --bench both say what share of its peak a GPU reaches;"),
        (["--device_hour_dollars", "-2.5"], "--device_hour_dollars is -2.5; it must be at least 0"),
        (["--watts", "0"], "--watts is 0; it must be above 0"),
        (["--pue", "0.9"], "--pue is 0.9; it must be at least 1 and at most 10"),
        (["--kwh_co2_grams", "nan"], "--kwh_co2_grams is nan; it must be at least 0"),
    ],
)
def test_a_mistake_is_one_line(
    write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = str(write_recipe(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    Path("fast.json").write_text(json.dumps({"flops_per_pair": 989e9, "images_per_s": 2000.0}))
    assert message in refusal([file, *PLAN, *options], capsys)


def test_a_recipe_that_cannot_be_trained(write_recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the following arguments are required: --gpu; see flipscale plan --help" in refusal(["small_cpu"], capsys)
    assert "recipe 'nowhere' is neither a file nor one of " in refusal(["nowhere", *PLAN], capsys)
    file = str(write_recipe(tmp_path / "run", stages=[{"name": "one", "samples": 0, "base_lr": 0.1}]))
    assert "stages[0].samples is 0; it must be at least 1" in refusal([file, *PLAN], capsys)
    file = str(write_recipe(tmp_path / "run", cost={"device_hour_dollars": -1.0}))
    assert "cost.device_hour_dollars is -1.0; it must be at least 0" in refusal([file, *PLAN], capsys)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that must end with exit code 2 writes: one line."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("flipscale: error: ")
    return line


def test_the_operations_are_those_of_a_run(write_recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_recipe(tmp_path / "run"))
    recipe = parse_recipe(["--config", file])
    flops = pair_flops(recipe)
    operations = sum(stage.samples // 16 * 16 * flops[stage.name] for stage in recipe.stages)
    main(["plan", file, "--gpu", "l4", "--device_hour_dollars", "1e9"])
    *_, dollars, _ = total(capsys.readouterr().out)
    assert float(dollars.replace(",", "")) == pytest.approx(1e9 * operations / (121e12 * 0.4) / 3600, rel=0.05)
    assert yaml.safe_load(Path(file).read_text())["stages"]
