"""Make easy-VQA's data: 48,248 questions about 5,000 drawings of a shape in a colour, with 13 answers.

    python examples/questions/easy_vqa.py data/easy_vqa

Pictures and questions are in the Python package easy-vqa (Victor Zhou, MIT). Its version and digest are pinned, so
everybody's shards have the same bytes.
"""

import importlib.util
import json
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.shared import read_report, run_program, write_shard
from flipscale.data.tokenizers import train_sentencepiece
from flipscale.io.atomic import atomic_write
from flipscale.io.command_line import OutputFolder, parse_command
from flipscale.io.errors import UserError
from flipscale.process.console import report_user_errors, start_logging

PACKAGE = "easy-vqa==1.0"
DIGEST = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"  # SHA-256
MADE_BY = "examples/questions/easy_vqa.py"  # marks a folder that this script wrote
MAX_LENGTH = 16  # tokens; the longest question has 10
_VOCAB_SIZE = 1000  # at most: the questions have 26 different words
_QUESTIONS_PER_SHARD = 5000


def prepare_easy_vqa(out_dir: Path, digest: str = DIGEST) -> None:
    """Download easy-VQA and write train/, test/, the answers and a tokenizer; leave a complete folder as it is.

    Args:
        out_dir: folder to write.
        digest: SHA-256 of the package.

    Raises:
        UserError: the folder has other files, or pip is missing or cannot download the package.
        OSError: pip does not answer, or downloads another package.
    """
    out_dir = out_dir.absolute()
    if read_report(out_dir, MADE_BY, "easy-VQA"):
        print(f"{out_dir} is complete: nothing to do")
        return
    with tempfile.TemporaryDirectory() as downloads:
        counts = _write(out_dir, _download(Path(downloads), digest))
    print("\n".join(f"{out_dir / part}: {count:,} questions" for part, count in counts.items()))


def _write(out_dir: Path, wheel: Path) -> dict[str, int]:
    """Write the set aside, rename it to `out_dir`, and return the number of questions of each part."""
    with atomic_write(out_dir) as folder, zipfile.ZipFile(wheel) as package:
        folder.mkdir(parents=True)
        answers = _text(package, "easy_vqa/data/answers.txt").split()
        counts = {part: _write_part(folder, part, package, answers) for part in ("train", "test")}
        (folder / "classnames.txt").write_text("".join(f"{answer}\n" for answer in answers), encoding="utf-8")
        texts = [text for text, _, _ in json.loads(_text(package, "easy_vqa/data/train/questions.json"))]
        train_sentencepiece(texts, folder / "tokenizer", _VOCAB_SIZE, MAX_LENGTH)
        licence = _text(package, next(name for name in package.namelist() if name.endswith(".dist-info/LICENSE")))
        (folder / "LICENSES.txt").write_text(f"easy-VQA, the Python package {PACKAGE}:\n\n{licence}", encoding="utf-8")
        report = {"made_by": MADE_BY, "package": PACKAGE, "licence": "MIT", "questions": counts}
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return counts


def _write_part(folder: Path, part: str, package: zipfile.ZipFile, answers: Sequence[str]) -> int:
    """Write `PART/N.tar`: KEY.png, KEY.txt with the question, and KEY.cls with the number of the answer."""
    questions = json.loads(_text(package, f"easy_vqa/data/{part}/questions.json"))
    (folder / part).mkdir()
    starts = range(0, len(questions), _QUESTIONS_PER_SHARD)
    for shard, start in enumerate(starts):
        samples = (
            (
                f"q{number:08d}",
                {
                    "png": package.read(f"easy_vqa/data/{part}/images/{image}.png"),
                    "txt": text.encode(),
                    "cls": str(answers.index(answer)).encode(),
                },
            )
            for number, (text, answer, image) in enumerate(questions[start : start + _QUESTIONS_PER_SHARD], start)
        )
        write_shard(folder / part / f"{shard}.tar", samples)
    (folder / part / "nshards.txt").write_text(str(len(starts)), encoding="utf-8")
    return len(questions)


def _text(package: zipfile.ZipFile, name: str) -> str:
    return package.read(name).decode("utf-8")


def _download(directory: Path, digest: str) -> Path:
    """Return the wheel that pip downloads into `directory`."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"pip, which downloads {PACKAGE}, is not in this Python; run: python -m ensurepip")
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{digest}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "--dest", str(directory), "-r", str(requirements)]
    done = run_program(command, f"pip for {PACKAGE}")
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise OSError(f"pip downloaded another package for {PACKAGE}; check its index (pip config list)")
    wheel = next(directory.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        raise UserError(
            f"pip could not download {PACKAGE} ({lines[-1].removeprefix('ERROR: ')}); check that pip reaches its index"
        )
    return wheel


@dataclass(frozen=True)
class Options:
    """Download easy-VQA: questions about drawings of shapes, and a tokenizer.

    Args:
        directory: Folder to write, data/easy_vqa in the recipe.
    """

    directory: OutputFolder


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the data that the command line asks for."""
    with report_user_errors():
        start_logging()
        prepare_easy_vqa(parse_command(Options, arguments).directory)


if __name__ == "__main__":
    main()
