"""Tables and outputs of the pages that a dry run or `flipscale plan` prints: each figure is the command's."""

import re
import shlex

import pytest
from cli.pages import ROOT

from flipscale import cli


def printed(capsys: pytest.CaptureFixture[str], command: str) -> list[str]:
    """Return the lines that a command prints in the repository."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        words = [str(path) for word in shlex.split(command) for path in sorted(ROOT.glob(word)) or [word]]
        cli.main([word.removeprefix(f"{ROOT}/") for word in words])
    return capsys.readouterr().out.splitlines()


def figures(lines: list[str], name: str) -> list[str]:
    """Return the figures of the first row of this name."""
    row = next(line for line in lines if line.strip().startswith(name))
    return row.strip().removeprefix(name).split()


def rows(page: str, head: str) -> dict[str, list[str]]:
    """Return the cells of a page's table by the first cell of their row; `head` begins its head."""
    table = (ROOT / page).read_text().partition(f"| {head}")[2].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {first: others for first, *others in cells}


def commands(page: str, *words: str) -> str:
    """Return the first command of a page that has these words."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return next(line for line in lines if all(word in line for word in words)).removeprefix("flipscale ")


@pytest.mark.long
def test_memory_of_256_processes(capsys: pytest.CaptureFixture[str]) -> None:
    command = commands("README.md", "--dry_run")
    assert command == commands("docs/training.md", "h14_laion2b --dry_run")
    tables = {"README.md": rows("README.md", "GiB for each of 256 processes")}
    tables["docs/training.md"] = rows("docs/training.md", "computed GiB per process, 256 processes")
    recomputed = "--stages.masked.gradient_checkpointing true"
    largest = {f"G/14, the same, with `{recomputed}`": f" --model.size g14 {recomputed}"}
    flags_of = {"H/14, global batch 65,536": "", **largest}
    for name, flags in flags_of.items():
        lines = printed(capsys, f"{command}{flags}")
        assert figures(lines, "processes") == ["256"] * 6
        expected = [f"{float(figure):.1f}" for figure in figures(lines, "total")]
        assert [table[name] for table in tables.values() if name in table] == [expected] * (1 if flags else 2)


@pytest.mark.long
@pytest.mark.parametrize(
    ("page", "words", "first"),
    [
        ("docs/planning.md", ["h14_laion2b", "--dry_run"], "h14: 966,394,881 parameters"),
        ("docs/planning.md", ["flipscale plan"], "computed, for 256 x H100"),
        ("docs/efficiency.md", ["b16_datacomp_node --dry_run"], "b16: 139,776,513 parameters"),
    ],
)
def test_outputs(page: str, words: list[str], first: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A page may leave out lines, not change them."""
    shown = (ROOT / page).read_text().partition(f"```\n{first}")[2].partition("\n```")[0]
    lines = [re.sub(r"\s+", " ", line) for line in printed(capsys, commands(page, *words))]
    assert lines[0].startswith(first)
    missing = [line for line in f"{first}{shown}".splitlines() if re.sub(r"\s+", " ", line) not in lines]
    assert missing == []
