"""The README's commands run on a folder of small data, and the commands of all pages are parsed.

A command without a rule fails. Verbs run in this process, in the order of their page.
"""

import contextlib
import functools
import glob
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from cli.pages import PAGES, ROOT, Command, commands
from setuptools.config.setupcfg import read_configuration
from torch.distributed.run import get_args_parser

from flipscale import cli
from flipscale.io.command_line import parse_known
from flipscale.planning.dry_run import DryRun
from flipscale.recipe.recipe import parse_fields
from flipscale.start.complete_recipe import parse_recipe

# Sizes and names of the README's commands, which run on the site's data; commands of other pages are parsed.
SUBSTITUTES = {
    r"(convert flip .*)--size l16": r"\1--image_heads 4 --text_heads 4",
    r"(convert \w+) models/flip-l16 ": r"\1 runs/demo/model ",
    r"open_clip:ViT-B-16,laion2b_s34b_b88k": "open_clip:peer.json,peer.safetensors",
    r"ORG/NAME": "org/name",
    r"prepare pairs cc3m data/cc3m": "prepare pairs --list",
    r"--minutes 15\b": "--minutes 0.05",
    r"--config h14_laion2b --dry_run": "--config examples/demo/demo.yaml --optim.name adamw --dry_run",
}
# Named in sentences, not typed; programs in environments of their own, which test_harnesses.py runs; and the Hub's own.
ELSEWHERE = (
    r"accelerate launch$|flipscale VERB$|python3 -m venv |(python clip_benchmark_flip\.py|clip_benchmark) eval "
    r"|hf download |export HF_HOME="
)
# Parsed by `make test`, because it takes as long as most of the README; tests/hub/test_convert_onnx.py runs it.
NIGHTLY = r"flipscale convert onnx "


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
    cli.main([name for word in words[1:] for name in (sorted(glob.glob(word)) if "*" in word else [word])])


def verb_s_help(words: list[str]) -> None:
    """Print the help of a verb that a sentence names without its arguments."""
    cli.main([*words[1:], "--help"])


def verb_s_arguments(words: list[str]) -> None:
    """Parse the arguments, and the recipes that they name. Plan studies, because a later command submits their runs."""
    if words[1:4] == ["study", "plan", "masks.yaml"]:
        return verb(words)
    parsed: Any = cli.parse(words[1:])
    if words[1] == "check":
        recipes, flags = [name for names in parsed.config for name in names], parsed.flags
    elif words[1] == "bench":
        recipes, flags = parsed.config, parsed.fields
    else:
        recipes, flags = getattr(parsed, "recipes", []), []
    for recipe in recipes:
        parse_recipe(["--config", recipe, *flags])


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


def submission(script: str, is_checked: bool = False) -> None:
    """Submit to an sbatch that prints a number and notes the job, whose flags are parsed as flags of its verb.

    A check before takes seconds. tests/slurm runs the batch scripts on a real Slurm.
    """
    Path("bin").mkdir(exist_ok=True)
    Path("bin/sbatch").write_text(
        '#!/bin/bash\nprintf "%s\\t" "${WHAT:+$WHAT $SHARDS $TO}$RECIPE$RECIPES" "$@" >> jobs; echo >> jobs; echo 7\n'
    )
    Path("bin/unchecking").write_text(f'#!/bin/bash\n[ "$1" = -c ] && exec {sys.executable} "$@"\nexit 3\n')
    shutil.copyfile("/bin/true", "bin/squeue")  # nothing is in the queue
    for program in Path("bin").iterdir():
        program.chmod(0o755)
    Path("jobs").write_text("")
    path = f"{Path('bin').absolute()}:{os.environ['PATH']}"
    python = sys.executable if is_checked else str(Path("bin/unchecking").absolute())
    variables = {**os.environ, "PATH": path, "PYTHON": python, "PYTHONPATH": str(ROOT), "JOB": "7"}
    script = re.sub(r"\bRUN=runs/h14\b", "RUN=runs/h14_submitted", script)  # runs/h14 is a run of the site
    done = subprocess.run(["bash", "-euc", script], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for job in Path("jobs").read_text().splitlines():
        recipes, *arguments = job.split("\t")[:-1]
        at = next(number for number, word in enumerate(arguments) if word.startswith("slurm/"))
        assert all(option.startswith("--") for option in arguments[:at])
        flags = arguments[at + 1 :]
        if arguments[at] == "slurm/evaluate.sh":
            cli.parse(["evaluate", "MODEL", *flags])
        elif arguments[at] == "slurm/prepare.sh":
            what, shards, folder = recipes.split()
            cli.parse(["prepare", what, shards, *(["--output_dir"] if what == "audit" else []), folder, *flags])
        else:
            for recipe in recipes.split():
                parse_recipe(["--config", recipe, *flags])


def installation(words: list[str]) -> None:
    """Look for the named extras and files; test_release.py builds the wheel."""
    extras = read_configuration(ROOT / "setup.cfg")["options"]["extras_require"]
    for word in words[1:]:
        name, _, asked = word.partition("[")
        assert set(filter(None, asked.rstrip("]").split(","))) <= extras.keys(), word
        assert "/" not in name or name.startswith(("dist/", "git+")) or (ROOT / name).exists(), word


def target(words: list[str]) -> None:
    """Let make print the commands of the target."""
    # `make test` runs this, and its variables must not reach this make.
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    subprocess.run(["make", "-nB", *words[1:]], cwd=ROOT, env=outside, capture_output=True, check=True)


def script_s_help(words: list[str]) -> None:
    """Print the help of a script or module that works for minutes."""
    if words[0] == "accelerate":
        parsed = launch_command_parser().parse_args(words[2:])
        assert load_config_from_file(parsed.config_file).num_processes == 8
        words = ["python", parsed.training_script]
    print_help(words[2] if words[1] == "-m" else str(ROOT / words[1]))


@functools.cache  # many pages name the same script
def print_help(script: str) -> None:
    run = runpy.run_path if script.endswith(".py") else runpy.run_module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit) as ended:
            run(script, run_name="__main__")
    assert not ended.value.code


# The first rule that matches a command, without the variables set before it and what launches it, runs it.
RULES: dict[str, Callable[[list[str]], None]] = {
    r"(bash|sbatch) slurm/|\w+=\$\(": submission,  # type: ignore[dict-item]  # the whole script, not its words
    r"flipscale (\w+|(convert|prepare|bench|study) \w+)$|flipscale (--help|pretrain .*--help)": verb_s_help,
    r"(flipscale|python -m flipscale\.)pretrain |flipscale (pretrain|finetune) .": training,
    r"(accelerate launch|torchrun) .*-m flipscale\.(pretrain|cli (evaluate|prepare)) ": training,
    r"flipscale \w+ ": verb_s_arguments,
    r"(\.venv/bin/)?(pip (install|wheel)|pytest|pre-commit) ": installation,
    r"make \w+": target,
    r"python (-m (fuzz|simulated\.world) |(examples|benchmarks|tests)/\w+(/\w+)?\.py)": script_s_help,
    r"accelerate launch .* benchmarks/\w+\.py ": script_s_help,
}


def parted(command: str) -> tuple[dict[str, str], str]:
    """Return a command's variables and the rest, without a program that launches it."""
    variables, rest = {}, command
    while match := re.match(r"([A-Z_]+)=([^\s$]+) +", rest):
        variables[match[1]] = match[2]
        rest = rest[match.end() :]
    return variables, re.sub(r"^(srun|nsys profile) (--\S+ )+", "", rest)


def rule_of(text: str) -> Callable[[list[str]], None] | None:
    """Return the rule of a command without variables, or None."""
    return next((rule for pattern, rule in RULES.items() if re.match(pattern, text)), None)


def run(command: Command, is_real: bool = False) -> None:
    """Run a command by its rule, or, if `is_real`, a verb with all its work."""
    variables, text = parted(command.text)
    rule = rule_of(text)
    assert rule is not None, f"no rule of test_pages.py covers this command of {command.page}: {command.text}"
    if rule is submission:
        return submission(command.text, is_real)  # type: ignore[arg-type]
    is_due = os.environ["FLIPSCALE_LONG"] == "all" or not re.match(NIGHTLY, text)
    if is_real and is_due and (rule is verb_s_arguments or "--dry_run" in text):
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
        if not re.match(ELSEWHERE, command.text):
            with subtests.test(command.text), ends_well(command.text, capsys):
                run(command, is_real=page == ROOT / "README.md")


def test_a_rule_covers_every_command() -> None:
    """The pages themselves run as long tests."""
    for page in PAGES:
        for command in commands(page):
            covered = re.match(ELSEWHERE, command.text) or rule_of(parted(command.text)[1])
            assert covered, f"no rule of test_pages.py covers this command of {command.page}: {command.text}"
