"""Download the test sets of tasks from the Hub, in CLIP_benchmark's layout. Captions in many languages come from the
addresses at which CLIP_benchmark finds them.

`FOLDER/NAME` gets `test/*.tar`, `classnames.txt`, and `prepared.json`, which is written last and marks a whole set.
"""

import importlib.util
import io
import json
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from itertools import chain, islice, repeat
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import fsspec
from filelock import FileLock, Timeout
from fsspec.core import url_to_fs
from PIL import Image

from flipscale.data.decode import decode_whole, is_shown_alike
from flipscale.data.samples import SampleNumbers, one_line_reason
from flipscale.data.sources.tar import TarSource, add_member
from flipscale.evaluation.task_page import PREPARED, TaskPage, TaskSource, read_prepared
from flipscale.io import json_lines
from flipscale.io.atomic import atomic_write, remove, sync, write_text
from flipscale.io.errors import UserError
from flipscale.io.paths import check_disk_space, size_text
from flipscale.io.progress import Progress
from flipscale.io.text_table import plain_table
from flipscale.preparation.hub_files import HubFile, WrongFile, download, list_files
from flipscale.preparation.lists import parquet_rows
from flipscale.preparation.shard_writer import KEPT_FORMATS, png_of

REAL_LABELS = "real_labels.json"
_BEGUN = ".begun.json"  # the source and commit of an unfinished set, so that a later start continues with the same one
_DOWNLOAD, _PARQUET = ".download", ".parquet"
_TEXTS = ("classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt")
_PREPARED_FILES = ("test/*.tar", "test/*.txt", "*.txt", "captions/*.json")
_TIMM_LABELS = "data/_info/imagenet_real_labels.json"  # of image ILSVRC2012_val_00000001, of 00000002, ...
IMAGES_PER_SHARD = 1000  # of shards that are made of tables
_Sample = dict[str, bytes]  # files by their extensions


class _Plan(NamedTuple):
    """A set to download, `num_bytes` in all."""

    page: TaskPage
    commit: str
    files: tuple[HubFile, ...]
    num_bytes: int
    bytes_present: int


def prepare_tasks(folder: Path, pages: Sequence[TaskPage]) -> None:
    """Print the sets of pages and their sizes, then download the missing ones into `folder`/NAME.

    A killed run leaves whole files and no `prepared.json`; the same command continues with the same commit. A set whose
    source cannot be read is left out and reported at the end. Raise UserError if the disk is too small, or a source is
    missing, gated, or not as its page says.
    """
    plans: list[_Plan] = []
    rows = [["task", "images", "download", "licence of the images", "source"]]
    faults: dict[str, str] = {}
    for page in pages:
        state = "is prepared"
        try:
            if plan := _plan(folder, page):
                plans.append(plan)
                state = size_text(plan.num_bytes)
        except ValueError as error:
            faults[page.name], state = str(error), "unavailable"
        rows.append([page.name, f"{page.images:,}", state, page.licence, page.source.repo])
    print(plain_table(rows, numbers=(1, 2)))
    total, present = sum(plan.num_bytes for plan in plans), sum(plan.bytes_present for plan in plans)
    of_tables = sum(plan.num_bytes for plan in plans if plan.page.source.image)  # which become shards of the same size
    check_disk_space(folder, total - present + of_tables, "prepare fewer tasks with --only")
    if plans:
        there = f", {size_text(present)} are there" if present else ""
        print(f"\n{size_text(total - present)} to download into {folder}{there}")
    with Progress(total, "tasks", "B") as progress:
        for plan in plans:
            try:
                _prepare(folder / plan.page.name, plan, progress)
            except (ValueError, WrongFile) as error:
                faults[plan.page.name] = str(error)
    if faults:
        words = [f"{name}: {reason}" for name, reason in faults.items()]
        if len(faults) == 1:
            raise UserError(f"1 of {len(pages)} tasks is not prepared: {words[0]}")
        print(*words, sep="\n")
        raise UserError(f"{len(faults)} of {len(pages)} tasks are not prepared, see above: {', '.join(faults)}")
    print(f"{len(pages)} of {len(pages)} tasks are whole in {folder}")


def _plan(folder: Path, page: TaskPage) -> _Plan | None:
    """Return the download of a set; None if the set is whole."""
    place, source = folder / page.name, page.source
    if _has_real_labels(page):
        find_real_labels()
    prepared = read_prepared(place)
    if prepared is not None and prepared.get("source") == _origin(source):
        _remove_leftovers(place)
        return None
    if source.captions:
        return _Plan(page, "", (), archive_bytes(source.repo), 0)
    begun = next(json_lines.iterate(place / _BEGUN, "source", commit=str), {})
    revisions = begun["commit"].split(",") if begun.get("source") == _origin(source) else repeat(source.revision)
    files = list[HubFile]()
    for (subset, repo), revision in zip(source.repos.items(), revisions, strict=False):
        own = _files_of(source, list_files(repo, revision))
        if not any(file.name.endswith((".tar", ".parquet", ".zip")) for file in own):
            shards = source.shards or f"{source.split}/*.tar"
            what = f"parquet files of the split {source.split}" if source.image else shards
            raise UserError(f"data set {repo} has no {what}; the source has changed")
        files += [replace(file, path=f"{subset}/{Path(file.path).name}") for file in own] if subset else own
    has_names = source.image or page.class_names or "classnames.txt" in {file.name for file in files}
    if _needs_names(page) and not has_names:
        raise UserError(f"data set {source.repo} has no classnames.txt, and the task's page lists no class names")
    paths = {file: _downloaded(place, source) / file.path for file in files}
    present = sum(file.size for file, path in paths.items() if file.has_size(path))
    commits = {file.repo: file.commit for file in files}
    return _Plan(page, ",".join(commits.values()), tuple(files), sum(file.size for file in files), present)


def _prepare(place: Path, plan: _Plan, progress: Progress) -> None:
    """Download a set and write its `prepared.json`."""
    page, source, lock = plan.page, plan.page.source, place.with_name(f".{place.name}.lock")
    place.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            (place / PREPARED).unlink(missing_ok=True)
            json_lines.rewrite(place / _BEGUN, [{"source": _origin(source), "commit": plan.commit}])
            for file in plan.files:
                download(file, _downloaded(place, source) / file.path, place / _DOWNLOAD)
                progress.update(file.size)
            if _downloaded(place, source) != place:
                tables = [place / _PARQUET / file.path for file in sorted(plan.files, key=lambda file: file.path)]
                names = convert(tables, place / "test", source, page.name) or list(page.class_names)
                if names:
                    write_text(place / _TEXTS[0], "".join(f"{name}\n" for name in names))
            if source.captions:
                write_languages(place, source)
                progress.update(plan.num_bytes)
            _complete_texts(place, page)
            images = _open_shards(place, plan)
            if _has_real_labels(page):
                write_real_labels(place, images)
            _write_prepared(place, page, plan.commit, len(images))
    except Timeout:
        raise UserError(f"another process prepares {place}; wait for it to end") from None
    lock.unlink(missing_ok=True)


def _origin(source: TaskSource) -> dict[str, str]:
    """Return repository, revision and split, which decide the data."""
    return {"repo": source.repo, "revision": source.revision, "split": source.split}


def _needs_names(page: TaskPage) -> bool:
    return not page.kind.endswith(("retrieval", "selection"))


def _has_real_labels(page: TaskPage) -> bool:
    return page.options.get("labels") == REAL_LABELS


def _files_of(source: TaskSource, files: Iterable[HubFile]) -> tuple[HubFile, ...]:
    """Return the files of a repository that belong to a set, with their paths."""
    if source.shards:
        chosen = sorted((file for file in files if fnmatch(file.name, source.shards)), key=lambda file: file.name)
        return tuple(replace(file, path=f"test/{number}.tar") for number, file in enumerate(chosen))
    split = re.escape(source.split)
    pattern = rf"{split}/(\d+\.tar|nshards\.txt)|{'|'.join(map(re.escape, _TEXTS))}"
    if source.image:
        pattern = rf"([\w-]+/)*{split}([-/][\w.-]+)?\.parquet"
    return tuple(file for file in files if re.fullmatch(pattern, file.name))


def _downloaded(place: Path, source: TaskSource) -> Path:
    """Return the folder of downloaded files; tables and archives do not belong to the prepared set."""
    return place / _PARQUET if source.image or source.shards.endswith(".zip") else place


def _complete_texts(place: Path, page: TaskPage) -> None:
    """Write missing class names and prompts, and spell class names as the page does."""
    for name, lines in zip(_TEXTS[:2], (page.class_names, page.templates), strict=True):
        if lines and not (place / name).exists():
            write_text(place / name, "".join(f"{line}\n" for line in lines))
    if not _needs_names(page):
        return
    file = place / _TEXTS[0]
    names = [line for line in _text(file).splitlines() if line.strip()] if file.exists() else []
    if not names or (page.num_classes and len(names) != page.num_classes):
        raise UserError(f"{file} lists {len(names)} classes, {page.num_classes} are expected; the source has changed")
    spelled = spelled_as(names, page.class_names)
    if spelled != names:
        write_text(file, "".join(f"{name}\n" for name in spelled))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text in UTF-8 ({error}); the source has changed") from error


def spelled_as(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the names in their order, in the spelling of `known`: CLIP's `aquarium fish` for `aquarium_fish`.

    Names are the same if their letters and digits are. They change only if the mapping is one-to-one.
    """
    by_letters = {re.sub(r"[\W_]", "", name.casefold()): name for name in known}
    letters = [re.sub(r"[\W_]", "", name.casefold()) for name in names]
    if len(set(letters)) != len(names) or len(by_letters) != len(known) or set(letters) != by_letters.keys():
        return list(names)
    return [by_letters[name] for name in letters]


def _open_shards(place: Path, plan: _Plan) -> TarSource:
    """Remove shards of other sets, and open the others: `.../test/{0..3}.tar`. Raise UserError if a shard is missing or
    damaged, or there are no images."""
    folder = place / "test"
    if _downloaded(place, plan.page.source) == place and not plan.page.source.captions:
        for path in set(folder.glob("*.tar")) - {place / file.path for file in plan.files}:
            path.unlink()
    names = {path.name for path in folder.glob("*.tar")}
    nshards = folder / "nshards.txt"
    if not nshards.exists():
        write_text(nshards, f"{len(names)}\n")
    if (number := _text(nshards).strip()) != str(len(names)):
        raise UserError(f"{folder} has {len(names)} shards, nshards.txt says {number[:20]}; the source has changed")
    if names != {f"{number}.tar" for number in range(len(names))}:
        raise UserError(f"{folder} lacks a shard of 0.tar to {len(names) - 1}.tar; the source has changed")
    source = TarSource(str(folder / f"{{0..{len(names) - 1}}}.tar"))
    for fault in source.faults:
        raise UserError(f"{fault.shard} cannot be read ({fault.detail}); the source has changed")
    if not len(source):
        raise UserError(f"{folder} has no images; the source has changed")
    return source


def find_real_labels() -> Path:
    """Return the file of ImageNet-ReaL's labels (Beyer et al., 2020) in the package timm. Raise UserError if timm is
    not installed."""
    spec = importlib.util.find_spec("timm")
    path = Path(spec.origin).parent / _TIMM_LABELS if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError("the labels of ImageNet-ReaL come in the package timm; `pip install timm`")
    return path


def write_real_labels(place: Path, source: TarSource) -> None:
    """Write `real_labels.json` to `place`: the classes of each image of `source`, found by its file name. Raise
    UserError if the images are not named as ImageNet's, or most of their own classes are not among their labels."""
    labels: list[list[int]] = json.loads(find_real_labels().read_text(encoding="utf-8"))
    of_images, labelled, agreeing = [], 0, 0
    for shard, number in SampleNumbers(source):
        key = source.key(shard, number)
        name = re.fullmatch(r"(?:.*/)?ILSVRC2012_val_(\d{8})", key)
        if name is None or not 1 <= int(name[1]) <= len(labels):
            raise UserError(f"{source.shard_name(shard)} has an image {key}, not ILSVRC2012_val_...; it has changed")
        of_images.append(labels[int(name[1]) - 1])
        labelled += bool(of_images[-1])
        agreeing += source.read_label(shard, number) in of_images[-1]
    # Nine in ten agree; of labels in another order, one in a thousand would.
    if 2 * agreeing < labelled:
        raise UserError(f"{agreeing} of {labelled} images have their class among their labels; the source has changed")
    write_text(place / REAL_LABELS, json.dumps(of_images) + "\n")


def _write_prepared(place: Path, page: TaskPage, commit: str, num_images: int) -> None:
    """Mark a set as whole."""
    files = {}
    for path in sorted(path for pattern in _PREPARED_FILES for path in place.glob(pattern)):
        sync(path)
        files[path.relative_to(place).as_posix()] = {"bytes": path.stat().st_size}
    if _has_real_labels(page):
        files[REAL_LABELS] = {"bytes": (place / REAL_LABELS).stat().st_size}
    about = {"task": page.name, "source": _origin(page.source), "revision": commit, "licence": page.licence}
    write_text(place / PREPARED, json.dumps({**about, "images": num_images, "files": files}, indent=2) + "\n")
    _remove_leftovers(place)
    if num_images != page.images:
        print(f"{page.name}: {num_images:,} images, not the {page.images:,} that its page says")


def _remove_leftovers(place: Path) -> None:
    for path in (place / _PARQUET, place / _DOWNLOAD, place / _BEGUN, *place.rglob(".*.partial")):
        remove(path)


def convert(files: Sequence[Path], out_dir: Path, columns: TaskSource, name: str) -> list[str]:
    """Write the parquet files of a split, or an archive, as `0.tar`, `1.tar`, ... and `nshards.txt` to `out_dir`.
    Return the names of the classes or subsets, if the files have them. A kill leaves the folder as it was. Raise
    UserError if a column is missing, a row has no image, class or caption, or a file is damaged."""
    from datasets import ClassLabel, Features
    from pyarrow import ArrowException, parquet

    try:
        if not columns.image:
            _write_samples(_zipped(files[0], name), out_dir, None, name)
            return []
        schema = parquet.read_schema(files[0])
        used = [*filter(None, (columns.image, columns.label, *columns.texts, columns.other_image, columns.box))]
        for column in (*used, *columns.clip, *filter(None, [columns.frame])):
            if column not in schema.names:
                raise UserError(f"{name}: its source has no column {column!r}; it has {', '.join(schema.names)}")
        chosen = _middle_frames(files, columns) if columns.clip else None
        total = sum(parquet.read_metadata(file).num_rows for file in files) if chosen is None else len(chosen)
        label = Features.from_arrow_schema(schema).get(columns.label)
        names = list(label.names) if isinstance(label, ClassLabel) else _subsets(files, columns)
        # Without a column of subsets, "", a file's folder is its subset.
        rows = ((file.parent.name, *row) for file in files for row in parquet_rows(file, used))
        samples = (
            sample
            for at, row in enumerate(rows)
            if chosen is None or at in chosen
            for sample in _samples(dict(zip(["", *used], row, strict=True)), columns, names, f"{name}: row {at}")
        )
        _write_samples(samples, out_dir, total, name)
        return names
    except (ArrowException, KeyError, TypeError, OSError, zipfile.BadZipFile) as error:
        # pyarrow's OSErrors have no number; a full disk's have.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"{name}: its files cannot be read ({one_line_reason(error)}); the source has changed"
        ) from error


def _write_samples(samples: Iterator[_Sample], out_dir: Path, total: int | None, name: str) -> None:
    shard = -1
    with atomic_write(out_dir) as partial, Progress(total, name, "images") as progress:
        partial.mkdir(parents=True)
        for shard, first in enumerate(samples):
            with tarfile.open(partial / f"{shard}.tar", "w") as tar:
                for at, sample in enumerate(chain([first], islice(samples, IMAGES_PER_SHARD - 1))):
                    for extension, content in sample.items():
                        add_member(tar, f"s{shard * IMAGES_PER_SHARD + at:07d}.{extension}", content)
                    progress.update()
        (partial / "nshards.txt").write_text(f"{shard + 1}\n", encoding="utf-8")


def _subset(label: Any) -> str:
    return "_".join(map(str, label)) if isinstance(label, list) else str(label)


def _subsets(files: Sequence[Path], columns: TaskSource) -> list[str]:
    """Return the names of the subsets of a table of captions in alphabetical order."""
    if not columns.label or not columns.texts:
        return sorted(columns.subsets)
    counts = Counter(_subset(label) for (label,) in _rows(files, [columns.label]))
    return sorted(name for name, count in counts.items() if count >= columns.least and name not in columns.leave_out)


def _samples(row: dict[str, Any], columns: TaskSource, names: list[str], where: str) -> Iterator[_Sample]:
    """Yield the sample of a row, or the two of a row with two images."""
    files, label = _image(row[columns.image], where, row[columns.box] if columns.box else None), row[columns.label]
    if not columns.texts:
        if not isinstance(label, int) or label < 0:
            raise UserError(f"{where} has no class; the source has changed")
        yield {**files, "cls": str(label).encode()}
        return
    given = [row[column] for column in columns.texts]
    texts = [text for own in given for text in (own if isinstance(own, list) else [own])]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{where} has no caption; the source has changed")
    lines, subset = [" ".join(text.splitlines()) for text in texts], _subset(label)
    number = {"cls": str(names.index(subset)).encode()} if subset in names else {}
    yield {**files, "txt": "\n".join(lines).encode(), **number}
    if columns.other_image:
        yield {**_image(row[columns.other_image], where), "txt": "\n".join(lines[::-1]).encode(), **number}


def _zipped(archive: Path, name: str) -> Iterator[_Sample]:
    """Yield the samples of a zip file of images and texts: each image with the first line of the text of its name."""
    with zipfile.ZipFile(archive) as zipped:
        files = {path: PurePosixPath(path).stem for path in zipped.namelist() if "__MACOSX" not in path}
        texts = {stem: path for path, stem in files.items() if path.endswith(".txt")}
        for path, stem in sorted(files.items(), key=lambda file: (len(file[0]), file[0])):
            if path.endswith((".jpg", ".png")) and stem in texts:
                line = zipped.read(texts[stem]).strip().split(b"\n")[0]
                yield {**_image(zipped.read(path), f"{name}: {path} of its source"), "txt": line.strip()}


def _middle_frames(files: Sequence[Path], columns: TaskSource) -> set[int]:
    """Return the rows with the middle frame of each clip: frame n // 2 of n in order."""
    clips: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for row, (*clip, frame) in enumerate(_rows(files, [*columns.clip, columns.frame])):
        clips.setdefault(tuple(clip), []).append((frame, row))
    return {sorted(frames)[len(frames) // 2][1] for frames in clips.values()}


def _rows(files: Sequence[Path], columns: list[str]) -> Iterator[tuple[Any, ...]]:
    return chain.from_iterable(parquet_rows(file, columns) for file in files)


def _image(image: Any, where: str, box: dict[str, float] | None = None) -> _Sample:
    """Return an image, or its part in a box, by its extension. It becomes a PNG if shards do not hold its format, or if
    other readers would show it otherwise than training, such as a transparent one."""
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes):
        raise UserError(f"{where} has no image; the source has changed")
    try:
        kind = KEPT_FORMATS.get(Image.open(io.BytesIO(content)).format or "")
        if box is None and (kind == "jpg" or (kind and is_shown_alike(content, decode_whole(content)))):
            return {kind: content}
        whole = Image.fromarray(decode_whole(content))
        if box is not None:
            whole = whole.crop((box["x"], box["y"], box["x"] + box["w"], box["y"] + box["h"]))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where} has an image that cannot be read ({error}); the source has changed") from error
    return {"png": png_of(whole)}


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
    out. Folders in the archive do not count. Raise UserError if the archive or a file is not as it was.
    """
    try:
        _write_captions(place, source)
    except (UserError, OSError):
        raise
    except Exception as error:  # archives, JSON and every protocol raise their own types
        raise UserError(f"{source.repo} or its captions have changed ({one_line_reason(error)})") from error


def _write_captions(place: Path, source: TaskSource) -> None:
    texts: dict[str, dict[str, str]] = {}
    for url, languages in source.captions.items():
        if url.endswith(".zip"):
            with zipfile.ZipFile(io.BytesIO(_content_of(url))) as zipped:
                (file,) = (name for name in zipped.namelist() if name.endswith(".jsonl"))
                rows = [json.loads(line) for line in zipped.read(file).splitlines()]
            for language in languages:
                texts[language] = {f"{row['image/key']}.jpg": row[language]["caption"][0] for row in rows}
        else:
            listed = _content_of(source.names).decode().splitlines()
            for language in languages:
                lines = _content_of(url.format(language=language)).decode().splitlines()
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


def _content_of(url: str) -> bytes:
    with fsspec.open(url) as file:
        content: bytes = file.read()
        return content
