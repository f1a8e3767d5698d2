"""The README's commands run on a folder of small data, and the commands of all pages are parsed.

A command without a rule fails. Verbs run in this process, in the order of their page.
"""

import contextlib
import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from cli.pages import PAGES, ROOT, Command, commands
from setuptools.config.setupcfg import read_configuration
from torch.distributed.run import get_args_parser

import flipscale
from flipscale import cli
from flipscale.bench import BenchGpu
from flipscale.check import Check
from flipscale.io.command_line import parse_known
from flipscale.planning.dry_run import DryRun
from flipscale.recipe.recipe import parse_fields
from flipscale.runs.complete_recipe import parse_recipe
from flipscale.study import Budget

# Sizes and names of the README's commands, which run on the site's data; commands of other pages are parsed.
SUBSTITUTES = {
    r"(convert flip .*)--size l16": r"\1--image_heads 4 --text_heads 4",
    r"(convert \w+) models/flip-l16 ": r"\1 runs/demo/model ",
    r"open_clip:ViT-B-16,laion2b_s34b_b88k": "open_clip:peer.json,peer.safetensors",
    r"ORG/NAME": "org/name",
    r"--minutes 15\b": "--minutes 0.05",
    r"--config h14_laion2b --dry_run": "--config examples/demo/demo.yaml --optim.name adamw --dry_run",
}
PROSE = {"accelerate launch", "flipscale VERB"}  # named in sentences, not typed


@contextlib.contextmanager
def ends_well(command: str, capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Assert that a command exits with code 0, if it exits."""
    code = None
    try:
        yield
    except SystemExit as ended:
        code = ended.code
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not code, f"{command}\n{capsys.readouterr().err}"


def verb(words: list[str]) -> None:
    """Run `flipscale VERB`."""
    expanded = [name for word in words[1:] for name in (sorted(glob.glob(word)) if "*" in word else [word])]
    cli.main(expanded)


def verb_s_help(words: list[str]) -> None:
    """Print the help of a verb that a sentence names without its arguments."""
    cli.main([*words[1:], "--help"])


def verb_s_arguments(words: list[str]) -> None:
    """Parse the arguments, and the recipes that they name. Plan studies, because a later command submits their runs."""
    if words[1] == "check":
        parse_fields(parse_known(Check, words[2:], "check")[1])
        return
    if words[1:3] == ["bench", "gpu"]:
        parsed, flags = parse_known(BenchGpu, words[3:], "bench gpu")
        for recipe in parsed.config:
            parse_fields(["--config", recipe, *flags])
        return
    if words[1:4] == ["study", "plan", "masks.yaml"]:
        verb(words)
        return
    parsed = cli.parse(words[1:])
    for recipe in getattr(parsed, "recipes", []):
        parse_recipe(["--config", recipe])
    if isinstance(parsed, Budget):
        assert parsed.search.is_file()


def training(words: list[str]) -> None:
    """Read the launch file and the recipe. Launchers' parsers read their part."""
    if words[0] == "accelerate":
        parsed = launch_command_parser().parse_args(words[2:])
        assert load_config_from_file(parsed.config_file).num_processes == 8
        words = [parsed.training_script, *parsed.training_script_args]
        if words[0] == "flipscale.cli":
            cli.parse(words[1:])
            return
    elif words[0] == "torchrun":
        parsed = get_args_parser().parse_args(words[1:])
        words = [parsed.training_script, *parsed.training_script_args]
    flags = words[words.index("flipscale.pretrain") + 1 :] if "flipscale.pretrain" in words else words[2:]
    if "--dry_run" in flags:
        flags = parse_known(DryRun, flags, "dry_run")[1]
    parse_fields([flag for flag in flags if flag != "--print_config"])


def submission(script: str) -> None:
    """Submit to an sbatch that prints a number and notes the job, whose flags are parsed as flags of its verb.

    tests/slurm runs the batch scripts on a real Slurm.
    """
    Path("bin").mkdir(exist_ok=True)
    Path("bin/sbatch").write_text(
        '#!/bin/bash\nprintf "%s\\t" "${WHAT:+$WHAT $SHARDS $TO}$RECIPE$RECIPES" "$@" >> jobs; echo >> jobs; echo 7\n'
    )
    Path("bin/sbatch").chmod(0o755)
    shutil.copyfile("/bin/true", "bin/squeue")  # nothing is in the queue
    Path("bin/squeue").chmod(0o755)
    Path("jobs").unlink(missing_ok=True)
    path = f"{Path('bin').absolute()}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "JOB": "7"}
    if "SUITE=" in script:
        variables["PYTHON"] = "no_python"  # whose check would miss prepared tasks
    script = re.sub(r"\bRUN=runs/h14\b", "RUN=runs/h14_submitted", script)  # runs/h14 is a run of the site
    done = subprocess.run(["bash", "-euc", script], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if script.endswith(" --help"):
        return
    for job in Path("jobs").read_text().splitlines():
        recipes, *arguments = job.split("\t")[:-1]
        at = next(number for number, word in enumerate(arguments) if word.startswith("slurm/"))
        assert all(option.startswith("--") for option in arguments[:at])
        if arguments[at] == "slurm/evaluate.sh":
            cli.parse(["evaluate", "MODEL", *arguments[at + 1 :]])
            continue
        if arguments[at] == "slurm/prepare.sh":
            what, shards, folder = recipes.split()
            to = ["--output_dir", folder] if what == "audit" else [folder]
            cli.parse(["prepare", what, shards, *to, *arguments[at + 1 :]])
            continue
        for recipe in recipes.split():
            parse_recipe(["--config", recipe, *arguments[at + 1 :]])


def installation(words: list[str]) -> None:
    """Look for the named extras and files; test_launch_files builds the wheel."""
    extras = read_configuration(ROOT / "setup.cfg")["options"]["extras_require"]
    for word in words[2:]:
        name, _, asked = word.partition("[")
        assert set(filter(None, asked.rstrip("]").split(","))) <= extras.keys(), word
        version = flipscale.__version__
        known = {".", "flipscale", "dist", f"dist/flipscale-{version}-py3-none-any.whl", "pre-commit"}
        assert name.startswith("-") or name in known, word


def target(words: list[str]) -> None:
    """Let make print all commands of the target, and run each by its rule."""
    # `make test` runs this, and its variables must not reach this make.
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", "-nB", *words[1:]]  # -B: the same whether or not it is set up
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        text = re.sub(r"\.venv(-cuda)?/bin/", "", line)
        if not re.match(r"(touch|python3 -m venv) ", text):
            run(Command("Makefile", text))


def tool(words: list[str]) -> None:
    """Check that `make setup` installs the tool."""
    needed = " ".join(read_configuration(ROOT / "setup.cfg")["options"]["extras_require"]["tests"])
    assert words[0].removeprefix(".venv/bin/") in needed or words[0] == "pre-commit"
    for word in words[1:]:
        assert "/" not in word or (ROOT / word.split("::")[0]).exists(), word


def script_s_help(words: list[str]) -> None:
    """Print the help of a script or module that works for minutes."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/tests"}
    script = words[1:3] if words[1] == "-m" else words[1:2]
    command = [sys.executable, *script, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def other_program(words: list[str]) -> None:
    """Run nothing, because it needs its own environment: test_harnesses.py and `make cuda` make them."""


# The first rule that matches a command, without the variables set before it, runs it.
RULES: dict[str, Callable[[list[str]], None]] = {
    r"(bash|sbatch) slurm/|\w+=\$\(": submission,  # type: ignore[dict-item]  # the whole script, not its words
    r"python3 -m venv |pip install (.* torch===|git)": other_program,
    r"(python clip_benchmark_flip\.py|clip_benchmark) eval ": other_program,
    r"flipscale (\w+|(convert|prepare|bench|study) \w+)$|flipscale (--help|pretrain .*--help)": verb_s_help,
    r"nsys profile ": lambda words: training(words[words.index("accelerate") :]),
    r"srun (--\S+ )+flipscale bench gpu$": lambda words: verb_s_help(words[words.index("flipscale") :]),
    r"(flipscale|python -m flipscale\.)pretrain |flipscale (pretrain|finetune) .": training,
    r"(accelerate launch|torchrun) .*-m flipscale\.(pretrain|cli (evaluate|prepare)) ": training,
    r"flipscale \w+ ": verb_s_arguments,
    r"(\.venv/bin/)?pip (install|wheel) ": installation,
    r"make \w+": target,
    r"(\.venv/bin/)?(pytest|ruff|mypy|pre-commit)\b": tool,
    r"python (-m (fuzz|simulated\.world) |(examples|benchmarks|tests)/\w+(/\w+)?\.py)": script_s_help,
}


def rule_of(command: str) -> Callable[[list[str]], None] | None:
    """Return the rule of a command without variables, or None."""
    return next((rule for pattern, rule in RULES.items() if re.match(pattern, command)), None)


def parted(command: str) -> tuple[dict[str, str], str]:
    """Return a command's variables and the rest."""
    variables, rest = {}, command
    while match := re.match(r"([A-Z_]+)=([^\s$]+) +", rest):
        variables[match[1]] = match[2]
        rest = rest[match.end() :]
    return variables, rest


def run(command: Command, is_real: bool = False) -> None:
    """Run a command by its rule, or, if `is_real`, a verb with all its work."""
    variables, text = parted(command.text)
    rule = rule_of(text)
    assert rule is not None, f"no rule of test_pages.py covers this command of {command.page}: {command.text}"
    if rule is submission:
        return submission(command.text)  # type: ignore[arg-type]
    if is_real and (rule is verb_s_arguments or "--dry_run" in text):
        for shown, small in SUBSTITUTES.items():
            text = re.sub(shown, small, text)
        rule = verb
    os.environ.update(variables)
    rule(shlex.split(text, comments=True))


# docs/your_pictures.md has its own test, on its own pictures.
PAGES_HERE = [
    pytest.param(page, id=str(page.relative_to(ROOT)), marks=[] if page == ROOT / "README.md" else pytest.mark.long)
    for page in PAGES
    if page.name != "your_pictures.md"
]


@pytest.mark.parametrize("page", PAGES_HERE)
def test_commands_of_a_page(
    page: Path, in_site: Path, logged_in: None, capsys: pytest.CaptureFixture[str], subtests: pytest.Subtests
) -> None:
    for command in commands(page):
        if command.text in PROSE:
            continue
        with subtests.test(command.text), ends_well(command.text, capsys):
            run(command, is_real=page.name == "README.md" and page.parent == ROOT)


def test_every_recipe_says_how_it_is_launched() -> None:
    shown = {
        page.stem: [c.text for c in commands(page) if "flipscale" in c.text]
        for page in PAGES
        if page.parent == ROOT / "flipscale/recipes"
    }
    for name, lines in shown.items():
        assert any(re.search(rf"\b{name}\b", line) for line in lines), name


def test_a_rule_covers_every_command() -> None:
    """The pages themselves run as long tests."""
    for page in PAGES:
        for command in commands(page):
            assert command.text in PROSE or rule_of(parted(command.text)[1]), f"{command.page}: {command.text}"


def test_pre_commit_checks_what_the_gate_checks() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    linting = (ROOT / "Makefile").read_text().split("lint: setup\n")[1].split("\n\n")[0]
    assert [hook["entry"] for hook in local["hooks"]] == linting.replace("$(BIN)", ".venv/bin").replace(
        "\t", ""
    ).splitlines()


def test_a_command_without_a_rule_fails() -> None:
    for text in ("flipscale_of_another_kind evaluate MODEL", "pip uninstall flipscale", "A=1 python other.py"):
        with pytest.raises(AssertionError, match=r"no rule of test_pages\.py covers this command of a page: "):
            run(Command("a page", text))
