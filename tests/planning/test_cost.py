"""The computed cost of runs: the paper's runs by hand, and `flipscale plan`."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from flipscale.cli import main
from flipscale.engines.launch import Launch
from flipscale.planning.cost import Gpus, planned_cost
from flipscale.recipe.outputs import CostRecipe
from flipscale.start.complete_recipe import parse_recipe

H100S = Gpus("H100", Launch("ddp", 256, "bf16"), mfu=0.45, watts=700.0)
COST = CostRecipe(device_hour_dollars=2.5, kwh_co2_grams=369.0, pue=1.1)
PLAN = ["--gpu", "h100", "--num_gpus", "2"]


# At 989 Tflop/s x 45 %, 2.5 dollars an hour, 700 W x 1.1 and 369 g a kWh.
@pytest.mark.parametrize(
    ("name", "mask_ratio", "gpu_hours", "dollars", "kwh"),
    [
        ("l16_laion400m_clip", 0.0, 3082, 7705, 2373),
        ("l16_laion400m", 0.75, 894, 2234, 688),
        ("h14_laion2b", 0.5, 8937, 22343, 6882),
    ],
)
def test_the_paper_s_runs(name: str, mask_ratio: float, gpu_hours: float, dollars: float, kwh: float) -> None:
    recipe = parse_recipe(["--config", name])
    first, *others = recipe.stages
    recipe = replace(recipe, stages=[replace(first, mask_ratio=mask_ratio), *others])
    planned = planned_cost(name, recipe, H100S, COST)
    *stages, total = planned.values()
    expected = (gpu_hours, gpu_hours / 256, dollars, kwh, kwh * 0.369)
    assert (total.gpu_hours, total.hours, total.dollars, total.kwh, total.co2_kg) == pytest.approx(expected, rel=0.02)
    for field in ("pairs", "hours", "gpu_hours", "kwh", "dollars", "co2_kg"):
        assert getattr(total, field) == pytest.approx(sum(getattr(stage, field) for stage in stages)), field


def test_a_run_that_ends_by_its_clock() -> None:
    recipe = parse_recipe(["--config", "l16_laion400m"])
    masked, whole = (replace(stage, samples=None, warmup_samples=0) for stage in recipe.stages)
    stages = [replace(masked, share=0.75), replace(whole, share=0.25)]
    timed = replace(recipe, stages=stages, budget_minutes=3000.0)
    gpus = replace(H100S, launch=Launch("ddp", 2, "bf16"))
    first, second, total = planned_cost("", timed, gpus, COST).values()
    assert (first.hours, second.hours, total.hours) == pytest.approx((37.5, 12.5, 50))
    assert (total.gpu_hours, total.dollars) == pytest.approx((100, 250))
    assert total.pairs == first.pairs + second.pairs
    by_pairs = [replace(masked, samples=first.pairs), replace(whole, samples=second.pairs)]
    assert planned_cost("", replace(recipe, stages=by_pairs), gpus, COST)["in all"].hours == pytest.approx(50, rel=1e-3)


def cells(printed: str) -> list[float | str]:
    """The cells of the only recipe's row, from its pairs on."""
    row = next(line for line in printed.splitlines() if "  100%  " in line)
    texts = [text.replace(",", "") for text in re.split(" {2,}", row)[1:]]
    return [float(text) if re.fullmatch(r"[\d.e+-]*\d", text) else text for text in texts]


def test_options_replace_the_recipe_s_prices(write_recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_recipe(tmp_path / "run", cost={"device_hour_dollars": 2e12, "kwh_co2_grams": 100.0}))
    main(["plan", file, *PLAN])
    pairs, time, gpu_time, share, kwh, by_recipe, co2, fits = cells(capsys.readouterr().out)
    assert (pairs, share, kwh, co2, fits) == (640, "100%", "-", "-", "yes")
    assert time == gpu_time == "under a minute"
    main(["plan", file, *PLAN, "--device_hour_dollars", "4e12", "--watts", "1e15", "--pue", "1.5"])
    *_, kwh, dollars, co2, _ = cells(capsys.readouterr().out)
    assert dollars == pytest.approx(2 * by_recipe, rel=0.05)
    assert kwh == pytest.approx(1e12 * dollars / 4e12 * 1.5, rel=0.05)
    assert co2 == pytest.approx(kwh * 0.1, rel=0.05)


@pytest.mark.parametrize("flags", [["--gpu", "h100"], ["--gpu", "l40s", "--node_gb_s", "25"]])
def test_the_hours_are_those_of_the_dry_run(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "b16_cc12m", "--num_gpus", "8", *flags])
    hours = next(re.split(" {2,}", line)[2:4] for line in capsys.readouterr().out.splitlines() if "100%" in line)
    main(["pretrain", "--dry_run", "--config", "b16_cc12m", "--num_processes", "8", *flags])
    printed = dict(re.findall(r"^ *(whole run|GPU-hours|fits \d+ GiB) +(.*)$", capsys.readouterr().out, re.MULTILINE))
    assert hours == [printed["whole run"], printed["GPU-hours"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "rtx_4090"], "--node_gb_s"),
        (["--gpu", "abacus"], "gpu is 'abacus'"),
        (["--num_gpus", "3"], "global_batch_size 16"),
        (["--bench", "nowhere"], "--bench nowhere"),
        (["--bench", "fast.json"], "1,978.0 Tflop/s"),
        (["--bench", "fast.json", "--mfu", "0.4"], "--mfu and --bench both give"),
        (["--pue", "0.9"], "--pue is 0.9"),
    ],
)
def test_errors_of_options(
    write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = str(write_recipe(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    Path("fast.json").write_text(json.dumps({"planning": {"step_flops_per_s": {"": 1978e12}}}))
    with pytest.raises(SystemExit) as ended:
        main(["plan", file, *PLAN, *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
