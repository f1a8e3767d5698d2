"""`flipscale compare`: differing fields, differences of results, its page, and its errors for bad input."""

import json
import re
import shutil
import tarfile
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
import yaml
from pages.browser import check_accessible, check_offline, look

from flipscale import cli
from flipscale.evaluation.results import latest, read_results
from flipscale.pages import comparison
from flipscale.pages.comparison import Comparison


@pytest.fixture
def other(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run with another rate and seed, and with other figures at the last evaluation."""
    run_dir = Path(shutil.copytree(trained, tmp_path / "other <b>'s"))
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    recipe["stages"][0]["base_lr"], recipe["seed"], recipe["output_dir"] = 0.5, 7, str(run_dir)
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lines = [json.loads(line) for line in (run_dir / "results.jsonl").open()]
    for line in lines:
        if line["task"] == "zero_shot" and line["metric"] == "top1":
            line |= {"value": 95.0, "low": 90.0, "high": 98.0, "outcomes": ""}
        if line["task"] == "zero_shot" and line["metric"] == "mean_per_class":
            line["outcomes"] = "an editor's"
        if line["task"] == "retrieval":
            line["n"] = 39
    (run_dir / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


def compare(*arguments: str | Path) -> None:
    cli.main(["compare", *map(str, arguments)])


@pytest.mark.long
def test_what_differs_is_listed(trained: Path, other: Path) -> None:
    compared = Comparison.of([trained, other])
    (_, *fields), (head, *results) = compared.fields, compared.results
    assert sorted(fields) == [["seed", "0", "7", "0"], ["stages.masked.base_lr", "0.012", "0.5", "null"]]
    shared = {row[0]: row[1:] for row in compared.shared[1:]}
    assert shared["stages.whole </table>.samples"] == ["32", "null"]
    assert not shared.keys() & {"output_dir", "seed", "optim.name", "stages.masked.base_lr", "stages.masked.frozen"}
    assert head == ["result", "run", other.name, f"{other.name} against run"]
    (top1,) = [result for result in latest(read_results(trained)) if result.name == "zero_shot/top1"]
    rows = {row[0]: row[1:] for row in results}
    own, theirs, change = rows["zero_shot top-1"]
    assert (own, theirs) == (top1.estimate_text, "95.0 % (90.0 to 98.0)")
    value, low, high = map(float, re.fullmatch(r"(\S+) points \((\S+) to (\S+)\), won", change).groups())
    assert value == pytest.approx(95 - top1.value, abs=0.051)
    assert low == pytest.approx(95 - top1.value - ((95 - 90) ** 2 + (top1.high - top1.value) ** 2) ** 0.5, abs=0.051)
    assert high == pytest.approx(95 - top1.value + ((98 - 95) ** 2 + (top1.value - top1.low) ** 2) ** 0.5, abs=0.051)
    bits = int(top1.outcomes, 16)
    assert bits.bit_count() == round(top1.value * top1.n / 100)
    assert len(top1.outcomes) == 2 * -(-top1.n // 8)
    # A test with another number of queries is another test.
    assert {row[2] for name, row in rows.items() if name.startswith("retrieval")} == {"-"}


def test_the_order_of_stages_is_a_difference(trained: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(trained, tmp_path / "other"))
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "stages": recipe["stages"][::-1]}))
    first, last = "masked", "whole </table>"
    compared = Comparison.of([trained, run_dir])
    assert [row[:3] for row in compared.fields[1:]] == [["stages", f"{first}, {last}", f"{last}, {first}"]]
    # A stage that a run lacks is shown by its name and by what differs from the defaults.
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "stages": recipe["stages"][:1]}))
    assert [row[:3] for row in Comparison.of([trained, run_dir]).fields[1:]] == [
        ["stages", f"{first}, {last}", first],
        [f"stages.{last}.samples", "32", "-"],
        [f"stages.{last}.base_lr", "0.006", "-"],
    ]


def test_results_of_one_test_are_compared_whatever_its_name_and_folder(
    trained: Path, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    """The set of `trained` again in another folder, and another set with the same names, sizes and captions."""
    shutil.copytree(trained.parent / "test", tmp_path / "copy")
    other = Path(shutil.copytree(trained.parent / "test", tmp_path / trained.parent.name / "test"))
    shard = other / "00000.tar"
    content = shard.read_bytes()
    with tarfile.open(shard) as tar:
        label = next(member for member in tar if member.name.endswith(".cls") and member.size == 1)
    at = label.offset_data
    shard.write_bytes(content[:at] + (b"1" if content[at : at + 1] == b"0" else b"0") + content[at + 1 :])
    tasks = [
        {"kind": "zero_shot", "data": str(other)},
        {"kind": "zero_shot", "name": "own", "data": str(tmp_path / "copy")},
        {"kind": "retrieval", "name": "pairs", "data": str(tmp_path / "copy")},
        {"kind": "zero_shot", "name": "prompted", "data": str(tmp_path / "copy"), "templates": ["{c}"]},
    ]
    stages = [{"name": "a", "samples": 16, "base_lr": 0.01}]
    cli.main(["pretrain", "--config", str(write_recipe(tmp_path / "run2", stages=stages, eval={"tasks": tasks}))])
    compared = Comparison.of([trained, tmp_path / "run2"])
    rows = {row[0]: row[1:] for row in compared.results[3:]}
    for name in ("zero_shot (2) top-1", "prompted top-1"):
        assert rows.get(name, ["", "", ""])[::2] == ["-", "-"]
    for name in ("zero_shot top-1", "retrieval image to text R@1"):
        assert "-" not in rows[name]
    notes = " ".join(compared.notes)
    assert "zero_shot is own of run2, with the same" in notes
    assert "zero_shot (2) is zero_shot of run2, with other" in notes

    # Results of an earlier version do not say which test they are of.
    old = Path(shutil.copytree(trained, tmp_path / "old"))
    lines = [{**json.loads(line), "test": ""} for line in (old / "results.jsonl").open()]
    (old / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    compared = Comparison.of([old, Path(shutil.copytree(old, tmp_path / "old too"))])
    assert {row[3] for row in compared.results[3:]} == {"-"}
    assert "-" not in {cell for row in compared.results[3:] for cell in row[1:3]}
    assert "old did not record the test of zero_shot" in " ".join(compared.notes)
    assert "times as fast" not in " ".join(compared.notes)


def test_a_browser_shows_the_curves(
    trained: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "out/a.html"
    compare(trained, other, "--out", page)
    assert "stages.masked.base_lr" in capsys.readouterr().out
    opened = look(page, tmp_path, 390, dark=True)
    check_offline(opened)
    check_accessible(opened)
    # The loss and a result of each of two tasks, against samples and against time.
    assert len(opened.facts["pictures"]) == 6
    assert "<b>" not in page.read_text()
    assert "other <b>'s" in unescape(page.read_text())
    monkeypatch.setattr(comparison, "can_draw", lambda: False)
    compare(trained, other, "--out", page)
    assert "flipscale[plots]" in page.read_text()
    assert "<img" not in page.read_text()
