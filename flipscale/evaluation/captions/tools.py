"""METEOR and SPICE of generated captions, which only COCO's own tools compute: Java programs of pycocoevalcap."""

import importlib.util
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flipscale.evaluation.captions.scores import Words
from flipscale.io.errors import UserError

# What SPICE parses captions with, 500 MB that pycocoevalcap leaves to be fetched.
_PARSER = "stanford-corenlp-3.6.0-models.jar"
_MOST_SECONDS = 3600


def missing_tool(metric: str) -> str | None:
    """Return what is missing on this machine for `meteor` or `spice`; None if nothing is."""
    folder = _package()
    if folder is None:
        return "pycocoevalcap, which has it, is not installed; pip install pycocoevalcap"
    if shutil.which("java") is None:
        return "java, which runs it, is not on PATH"
    if metric == "spice" and not (folder / "spice/lib" / _PARSER).is_file():
        return f"{_PARSER} is not in spice/lib of pycocoevalcap, whose spice/get_stanford_models.py fetches it"
    return None


def score_with_tools(metric: str, candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Return the METEOR or SPICE of the whole set, in [0, 1], of captions as `caption_words` has them.

    Raises:
        OSError: the tool fails.
    """
    made = [" ".join(words) for words in candidates]
    given = [[" ".join(words) for words in some] for some in references]
    try:
        return (_meteor if metric == "meteor" else _spice)(made, given)
    except (ValueError, LookupError, OSError, subprocess.SubprocessError) as error:
        raise OSError(f"{metric} of pycocoevalcap failed ({' '.join(str(error).split())[:300]})") from error


def _meteor(made: list[str], given: list[list[str]]) -> float:
    """Return METEOR 1.5 as COCO's tools call it. A first run counts what each caption matches, a second one adds up."""
    lines = [" ||| ".join(["SCORE", *some, caption]) for caption, some in zip(made, given, strict=True)]
    counts = _run("meteor", ["meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"], "\n".join(lines)).splitlines()
    if len(counts) != len(made):
        raise UserError(f"it answered {len(counts)} of {len(made)} captions")
    added = _run("meteor", ["meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"], " ||| ".join(["EVAL", *counts]))
    return float(added.split()[-1])  # after the score of each caption


def _spice(made: list[str], given: list[list[str]]) -> float:
    captions = zip(made, given, strict=True)
    asked = [{"image_id": n, "test": caption, "refs": some} for n, (caption, some) in enumerate(captions)]
    with tempfile.TemporaryDirectory() as folder:
        file, found = Path(folder, "captions.json"), Path(folder, "scores.json")
        file.write_text(json.dumps(asked), encoding="utf-8")
        _run("spice", ["spice-1.0.jar", str(file), "-cache", folder, "-out", str(found), "-subset", "-silent"], "")
        scores = [one["scores"]["All"]["f"] for one in json.loads(found.read_text(encoding="utf-8"))]
    return sum(scores) / len(scores)


def _run(metric: str, words: list[str], text: str) -> str:
    """Return what a program of pycocoevalcap prints.

    Raises:
        subprocess.SubprocessError: it fails, or takes more than an hour.
    """
    folder = _package()
    assert folder is not None
    command = ["java", "-Dfile.encoding=UTF-8", "-Xmx8G", "-jar", *words]
    done = subprocess.run(
        command, cwd=folder / metric, input=f"{text}\n", capture_output=True, encoding="utf-8", timeout=_MOST_SECONDS
    )
    if done.returncode:
        raise UserError(f"exit code {done.returncode}: {done.stderr.strip() or 'it said nothing'}")
    return done.stdout


def _package() -> Path | None:
    found = importlib.util.find_spec("pycocoevalcap")
    return Path(next(iter(found.submodule_search_locations))) if found and found.submodule_search_locations else None
