"""The commands that the pages show: of README, CONTRIBUTING and docs/, and of the comments of recipes and scripts."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("flipscale/recipes/*.yaml"),
        *ROOT.glob("examples/*/*.yaml"),
        *ROOT.glob("examples/*/README.md"),
        *ROOT.glob("ds_configs/*.yaml"),
        *(file for file in ROOT.glob("slurm/*") if file.is_file()),
    ]
)
PROGRAMS = "flipscale|python|pip|make|accelerate|torchrun|bash|sbatch|pre-commit|pytest"
# A program with an argument, after variables that are set for it.
COMMAND = re.compile(rf"(?:\w+=(?:\$\(|\S+ +))*(?:\.venv/bin/)?(?:{PROGRAMS}) +[^\s=.:,].*")


@dataclass(frozen=True)
class Command:
    """A command as it stands on a page. Submissions to Slurm that follow one another are one: they share variables."""

    page: str
    text: str


def typed(block: str) -> list[str]:
    """Return the commands of a block of bash, without its comments and blank lines."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def commands(page: Path) -> list[Command]:
    """Return the commands of a page in their order."""
    text = page.read_text()
    if page.suffix == ".md":
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        inline = [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", prose)]
        lines = [line for block in blocks for line in typed(block)]
    else:
        comments = re.findall(r"^# +(.*)", text, re.MULTILINE)
        lines = [line for line in comments if COMMAND.fullmatch(line)]
        inline = [code for line in comments for code in re.findall(r"`([^`]+)`", line)]
    lines += [code for code in inline if COMMAND.fullmatch(code)]
    found: list[str] = []
    for line in lines:
        if found and "slurm/" in line and "slurm/" in found[-1]:
            found[-1] += "\n" + line
        else:
            found.append(line)
    return [Command(str(page.relative_to(ROOT)), line) for line in dict.fromkeys(found)]
