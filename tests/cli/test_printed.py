"""Tables and outputs of the pages that commands print: each figure is the command's."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from cli.pages import ROOT

from flipscale import cli
from flipscale.evaluation.suite import planned_tasks
from flipscale.evaluation.task_page import suite_pages
from flipscale.recipe.outputs import EvalRecipe

EVALUATION = (ROOT / "docs/evaluation.md").read_text()


def printed(capsys: pytest.CaptureFixture[str], page: str, words: str, flags: str = "") -> list[str]:
    """Return the lines that the first command of a page with these words prints in the repository."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    command = next(line for line in lines if words in line).removeprefix("flipscale ") + flags
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        expanded = [str(path) for word in shlex.split(command) for path in sorted(ROOT.glob(word)) or [word]]
        cli.main([word.removeprefix(f"{ROOT}/") for word in expanded])
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_the_table_of_attacks_adds_up() -> None:
    rows = re.findall(r"^\| ([a-zA-Z ,]+)((?: \| \d+){4}) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    counts = [[int(count) for count in cells.split(" | ")[1:]] for _, cells in rows]
    assert rows[-1][0] == "all"
    assert counts[-1] == [sum(column) for column in zip(*counts[:-1], strict=True)]
    assert all(row[0] == sum(row[1:]) for row in counts)


@pytest.mark.long
def test_memory_of_256_processes(capsys: pytest.CaptureFixture[str]) -> None:
    recomputed = "--stages.masked.gradient_checkpointing true"
    rows = {
        "H/14, global batch 65,536": ("", ["README.md", "docs/training.md"]),
        f"G/14, the same, with `{recomputed}`": (f" --model.size g14 {recomputed}", ["docs/training.md"]),
    }
    for name, (flags, pages) in rows.items():
        lines = dict(line.split(" ", 1) for line in printed(capsys, "README.md", "--dry_run", flags) if " " in line)
        assert lines["processes"].split() == ["256"] * 6
        figures = " | ".join(f"{float(figure):.1f}" for figure in lines["total"].split())
        for page in pages:
            text = re.sub(" +", " ", (ROOT / page).read_text())
            assert f"| {name} | {figures} |" in text, page


@pytest.mark.long
@pytest.mark.parametrize(
    ("page", "words", "first"),
    [
        ("docs/planning.md", "h14_laion2b --dry_run", "h14: 966,394,881 parameters"),
        ("docs/planning.md", "flipscale plan", "computed, for 256 x H100"),
        ("docs/efficiency.md", "b16_datacomp_node --dry_run", "b16: 139,776,513 parameters"),
        ("docs/efficiency.md", "align_cc12m_day --dry_run", "towers: 715,935,745 parameters"),
    ],
)
def test_outputs(page: str, words: str, first: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A page may leave out lines, not change them."""
    block = (ROOT / page).read_text().partition(f"```\n{first}")[2].partition("\n```")[0]
    lines = printed(capsys, page, words)
    assert [line for line in f"{first}{block}".splitlines() if " ".join(line.split()) not in lines] == []


@pytest.mark.long
def test_the_table_of_computed_speed() -> None:
    command = [sys.executable, "benchmarks/planned_speed.py"]
    table = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    ).stdout
    assert table in (ROOT / "docs/speed.md").read_text()


def test_the_table_of_tasks_is_what_their_pages_say() -> None:
    shown = re.findall(r"^\| `(\w+)` \|[^|]*\| `(\S+)` \| ([^|]*) \| ([\d,]+) \|", EVALUATION, re.MULTILINE)
    pages = suite_pages("all")
    assert shown == [(page.name, page.source.repo, ", ".join(page.suites), f"{page.images:,}") for page in pages]


def test_the_recipe_of_evaluations_is_one() -> None:
    (shown,) = re.findall(r"```yaml\n(eval:\n.*?)```", EVALUATION, re.DOTALL)
    planned = {task.name: task.every_samples for task in planned_tasks(EvalRecipe(**yaml.safe_load(shown)["eval"]))}
    assert planned == {"imagenet1k": 1_000_000_000, "cars": 200_000_000, "mine": 1_000_000_000}
