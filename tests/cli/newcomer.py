"""Act as a new user in a clone: install by the README, and type docs/your_pictures.md from top to bottom.

    PYTHONPATH=.:tests python tests/cli/newcomer.py [--python PYTHON] [--minutes MINUTES]

All commands are read from the pages and printed with their seconds. The user has 300 pictures in a folder. Commands
that need an account are left out and printed. After the page, the user makes the mistakes of a second run,
and evaluates the model with CLIP_benchmark by docs/evaluation.md. test_your_pictures.py types the page in the tests, at
a small size.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cli.pages import ROOT, typed


def steps(page: Path) -> Iterator[tuple[str, str]]:
    """Yield the bash commands and Python snippets of a page in order."""
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        yield from ((language, line) for line in (typed(block) if language == "bash" else [block]))


def install(home: Path) -> Path:
    """Clone the repository, install it by the README into a new environment, and return its Python."""
    timed("git clone", ["git", "clone", "--quiet", str(ROOT), str(home / "clone")], home, dict(os.environ))
    subprocess.run([sys.executable, "-m", "venv", home / "venv"], check=True)
    environment = {**os.environ, "PATH": f"{home}/venv/bin:{os.environ['PATH']}"}
    command = next(text for _, text in steps(home / "clone/README.md") if text.startswith("pip install"))
    timed(command, ["bash", "-euc", command], home / "clone", environment)
    return home / "venv/bin/python"


def timed(said: str, command: list[str], folder: Path, environment: dict[str, str], code: int = 0) -> str:
    """Run a command to its end, print its seconds, and return its errors. End this program on another exit code."""
    began = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    print(f"{time.monotonic() - began:7.1f} s  {said}", flush=True)
    if done.returncode != code:
        sys.exit(f"exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stderr


def second_hour(folder: Path, environment: dict[str, str]) -> None:
    """Make the mistakes of a second run, and type the commands that the errors print."""

    def typed_in(text: str, code: int = 0) -> str:
        return timed(text, ["bash", "-euc", text], folder, environment, code)

    changed = "flipscale pretrain --config mine.yaml --stages.masked.base_lr 0.002 --budget_minutes 0.1"
    typed_in(changed.replace("stages.masked.base_lr", "lr"), code=2)
    flags = typed_in(changed, code=2).rstrip().split("; to train its model on with this recipe, add ")[1]
    typed_in(f"{changed} {flags}")
    init = "flipscale init csv.yaml --tokenizer data/mine/tokenizer --minutes 1 --shards"
    command = typed_in(f"{init} list.csv", code=2).split("`")[1]
    typed_in(command)
    typed_in(f"{init} {command.split()[-1]}")


def benchmark(pages: Path, folder: Path, environment: dict[str, str]) -> None:
    """Evaluate the page's model with CLIP_benchmark, by the script and the commands of docs/evaluation.md."""
    section = (pages / "evaluation.md").read_text().split("\n### CLIP_benchmark\n")[1].split("\n## ")[0]
    script, *commands = re.findall(r"^```\w+\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    (folder / "clip_benchmark_flip.py").write_text(script)
    for command in commands:
        timed(typed(command)[0], ["bash", "-euc", command], folder, environment)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Type what the pages say as a new user, and print how long each takes."
    )
    parser.add_argument("--python", type=Path, help="An environment that has flipscale; by default one is made.")
    parser.add_argument("--minutes", help="Minutes of training, in place of the page's.")
    args = parser.parse_args()
    from cli.own_pictures import lay_out  # with all that draws them

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        python = args.python.absolute() if args.python else install(home)
        page = (ROOT if args.python else home / "clone") / "docs/your_pictures.md"
        folder = home / "work"
        folder.mkdir()
        lay_out(folder)
        # What a terminal has in which the environment was activated.
        environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}
        for language, text in steps(page):
            if "ORG/NAME " in text:
                print(f"         left out, it needs an account: {text}")
                continue
            if args.minutes:
                text = re.sub(r"--minutes \S+", f"--minutes {args.minutes}", text)
            command = ["bash", "-euc", text] if language == "bash" else [str(python), "-c", text]
            in_clone = text.startswith("pip install -e")
            if in_clone and args.python:
                continue
            where = home / "clone" if in_clone else folder
            timed(text if language == "bash" else "the Python of the page", command, where, environment)
        second_hour(folder, environment)
        if not args.python:
            extra = "pip install -e '.[harnesses]'"
            timed(extra, ["bash", "-euc", extra], home / "clone", environment)
        benchmark(page.parent, folder, environment)
    print(f"{time.monotonic() - began:7.1f} s  in all")


if __name__ == "__main__":
    main()
