"""Test sets with captions in many languages, from the addresses at which CLIP_benchmark finds them."""

import io
import json
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import fsspec
from fsspec.core import url_to_fs

from flipscale.data.samples import one_line_reason
from flipscale.data.sources.tar import add_member
from flipscale.data.task_page import TaskSource
from flipscale.io.atomic import atomic_write, write_text
from flipscale.io.errors import UserError


def archive_bytes(url: str) -> int:
    """Return the size of a file at a URL; 0 if the server does not say it."""
    system, path = url_to_fs(url)
    try:
        return int(system.size(path) or 0)
    except Exception:  # every protocol raises its own types, and the download raises again
        return 0


def write_languages(place: Path, source: TaskSource) -> None:
    """Write `test/0.tar`, `languages.txt` and `captions/LANGUAGE.json` to the folder `place`.

    As in CLIP_benchmark, an image has its first caption in each language, and images that the archive lacks are left
    out. Folders in the archive do not count.

    Raises:
        UserError: the archive has none of the images, or a file is not as it was.
        OSError: a URL cannot be read.
    """
    try:
        _write(place, source)
    except (UserError, OSError):
        raise
    except Exception as error:  # archives, JSON and every protocol raise their own types
        raise UserError(f"{source.repo} or its captions have changed ({one_line_reason(error)})") from error


def _write(place: Path, source: TaskSource) -> None:
    texts: dict[str, dict[str, str]] = {}
    for url, languages in source.captions.items():
        if url.endswith(".zip"):
            with zipfile.ZipFile(io.BytesIO(_read(url))) as zipped:
                (file,) = (name for name in zipped.namelist() if name.endswith(".jsonl"))
                rows = [json.loads(line) for line in zipped.read(file).splitlines()]
            for language in languages:
                texts[language] = {f"{row['image/key']}.jpg": row[language]["caption"][0] for row in rows}
        else:
            listed = _read(source.names).decode().splitlines()
            for language in languages:
                lines = _read(url.format(language=language)).decode().splitlines()
                texts[language] = dict(zip(listed, lines, strict=False))
    common = dict.fromkeys(name for name in next(iter(texts.values())) if all(name in own for own in texts.values()))
    # A killed run's folder has a name that the next run removes.
    with TemporaryDirectory(dir=place, prefix=".", suffix=".partial") as partial:
        with fsspec.open(source.repo) as stream, tarfile.open(fileobj=stream, mode="r|*") as archive:
            for member in archive:
                name, content = PurePosixPath(member.name).name, archive.extractfile(member)
                if content is not None and name in common:
                    (Path(partial) / name).write_bytes(content.read())
        order = [name for name in common if (Path(partial) / name).exists()]
        if not order:
            raise UserError(f"{source.repo} has none of the {len(common)} images with captions; the source has changed")
        with atomic_write(place / "test") as folder:
            folder.mkdir()
            with tarfile.open(folder / "0.tar", "w") as shard:
                for number, name in enumerate(order):
                    add_member(shard, f"s{number:07d}{Path(name).suffix}", (Path(partial) / name).read_bytes())
    (place / "captions").mkdir(exist_ok=True)
    for language, those in texts.items():
        write_text(place / f"captions/{language}.json", json.dumps([those[name] for name in order]) + "\n")
    write_text(place / "languages.txt", "".join(f"{language}\n" for language in texts))


def _read(url: str) -> bytes:
    with fsspec.open(url) as file:
        content: bytes = file.read()
        return content
