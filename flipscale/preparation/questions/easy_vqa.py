"""easy-VQA, a small set of real questions: 48,248 about 5,000 drawings of a shape in a colour, with 13 answers.

Pictures and questions are in the Python package easy-vqa (Victor Zhou, MIT), which pip downloads by its name, pinned
version and digest: everybody's shards have the same bytes.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from flipscale.data.tokenizers import train_sentencepiece
from flipscale.io.atomic import atomic_write, write_text
from flipscale.io.errors import UserError
from flipscale.preparation.questions.question_set import Question, write_answers, write_questions

PACKAGE = "easy-vqa==1.0"
DIGEST = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"  # SHA-256; another package is not believed
MAX_LENGTH = 16  # tokens; the longest question has 10
_VOCAB_SIZE = 1000  # at most: the questions have 26 different words
_REPORT, _MADE_BY = "report.json", "flipscale prepare easy_vqa"
_MOST_SECONDS = 600


def prepare_easy_vqa(out_dir: Path, digest: str = DIGEST) -> None:
    """Download easy-VQA and write it to `out_dir`: the shards of train/ and test/, a sample for each question, the
    answers, and a tokenizer for the questions. A folder that is already complete is left as it is.

    Args:
        digest: of the package.

    Raises:
        ValueError: the folder has other files, or pip is missing or finds no such package.
        OSError: the package is another one than it was, or pip hangs.
    """
    out_dir = out_dir.absolute()
    if _is_complete(out_dir):
        print(f"{out_dir} is complete: nothing to do")
        return
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise UserError(f"{out_dir} holds something that is not easy-VQA; name a new folder, or an empty one")
    with tempfile.TemporaryDirectory() as downloads:
        counts = _write(out_dir, _download(Path(downloads), digest))
    print("\n".join(f"{out_dir / part}: {count:,} questions" for part, count in counts.items()))


def _is_complete(out_dir: Path) -> bool:
    try:
        report = json.loads((out_dir / _REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and report.get("made_by") == _MADE_BY


def _write(out_dir: Path, wheel: Path) -> dict[str, int]:
    """Write all of the set aside, then rename it to `out_dir`. Return the questions of each part."""
    with atomic_write(out_dir) as folder, zipfile.ZipFile(wheel) as package:
        folder.mkdir(parents=True)
        answers = _text(package, "easy_vqa/data/answers.txt").split()
        numbers = {answer: number for number, answer in enumerate(answers)}
        counts = {part: write_questions(folder, part, _questions(package, part, numbers)) for part in ("train", "test")}
        write_answers(folder, answers)
        texts = [text for text, _, _ in json.loads(_text(package, "easy_vqa/data/train/questions.json"))]
        train_sentencepiece(texts, folder / "tokenizer", _VOCAB_SIZE, MAX_LENGTH)
        licence = next(name for name in package.namelist() if name.endswith(".dist-info/LICENSE"))
        write_text(folder / "LICENSES.txt", f"easy-VQA, the Python package {PACKAGE}:\n\n{_text(package, licence)}")
        report = {"made_by": _MADE_BY, "package": PACKAGE, "licence": "MIT", "questions": counts}
        write_text(folder / _REPORT, json.dumps(report, indent=2) + "\n")
    return counts


def _questions(package: zipfile.ZipFile, part: str, numbers: dict[str, int]) -> Iterator[Question]:
    """Yield the questions of a part in the package's order."""
    for text, answer, image in json.loads(_text(package, f"easy_vqa/data/{part}/questions.json")):
        yield Question(package.read(f"easy_vqa/data/{part}/images/{image}.png"), "png", text, numbers[answer])


def _text(package: zipfile.ZipFile, name: str) -> str:
    return package.read(name).decode("utf-8")


def _download(directory: Path, digest: str) -> Path:
    """Have pip download the package into `directory`, and return its wheel."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"pip, which downloads {PACKAGE}, is not in this Python; run: python -m ensurepip")
    wanted = directory / "wanted.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{digest}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "--dest", str(directory), "-r", str(wanted)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_MOST_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"pip took more than {_MOST_SECONDS} s for {PACKAGE}; start the same command again") from error
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise OSError(f"pip downloaded another package for {PACKAGE}; check its index (pip config list)")
    wheel = next(directory.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["it said nothing"]
        raise UserError(
            f"pip could not download {PACKAGE} ({lines[-1].removeprefix('ERROR: ')}); check that pip reaches its index"
        )
    return wheel
