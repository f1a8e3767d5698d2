"""The test sets of evaluations that have a page, from the Hub into CLIP_benchmark's layout: `FOLDER/NAME/test/*.tar`,
`classnames.txt`, and `prepared.json`, which is written last."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from flipscale.data.prepared import PREPARED, read_prepared
from flipscale.data.sources.tar_source import TarSource
from flipscale.io.atomic import remove, sync, write_text
from flipscale.io.errors import UserError
from flipscale.io.files import check_disk_space, size_text
from flipscale.io.text_table import plain_table
from flipscale.preparation.hub_files import HubFile, Snapshot, WrongFile, bytes_there, digest, download, list_files
from flipscale.preparation.parquet_set import Columns, convert
from flipscale.preparation.real_labels import REAL_LABELS, find_labels, write_real_labels

# What is being prepared, and at which commit, so that a later start goes on with the same one.
BEGUN = ".begun.json"
_PARQUET = ".parquet"
_TEXTS = ("classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt")


@dataclass(frozen=True)
class TaskSet:
    """The data of a task, as its page has it: see `TaskPage`.

    Args:
        name: of the task, and of the folder to write.
        split: the folder of shards in the repository, or the split of its parquet files.
        columns: of parquet files; None for shards.
        shards: a pattern of the shards' names, where they are others than SPLIT/0.tar, SPLIT/1.tar, ...
        real_labels: whether ImageNet-ReaL's labels are written for the images.
        class_names: written where the source has none, or spells the same names otherwise.
        templates: written where the source has none.
        is_classification: whether it needs class names.
    """

    name: str
    repo: str
    revision: str
    split: str
    columns: Columns | None
    shards: str
    real_labels: bool
    licence: str
    images: int
    num_classes: int | None
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    is_classification: bool

    @property
    def source(self) -> dict[str, str]:
        """What decides which data is taken."""
        return {"repo": self.repo, "revision": self.revision, "split": self.split}

    def files(self, snapshot: Snapshot) -> tuple[HubFile, ...]:
        """Return the files of the repository that belong to the set, with the paths that they get."""
        wanted = [file for file in snapshot.files if self._wanted(file.name)]
        if not self.shards:
            return tuple(wanted)
        wanted.sort(key=lambda file: file.name)
        return tuple(replace(file, path=f"test/{number}.tar") for number, file in enumerate(wanted))

    def _wanted(self, file: str) -> bool:
        if self.shards:
            return fnmatch(file, self.shards)
        split = re.escape(self.split)
        if self.columns:
            return re.fullmatch(rf"([\w-]+/)*{split}([-/][\w.-]+)?\.parquet", file) is not None
        return file in _TEXTS or re.fullmatch(rf"{split}/(\d+\.tar|nshards\.txt)", file) is not None


@dataclass(frozen=True)
class Plan:
    """A set that is to be downloaded: its files, and how many of their bytes are there already."""

    task: TaskSet
    snapshot: Snapshot
    files: tuple[HubFile, ...]
    bytes_there: int

    @property
    def num_bytes(self) -> int:
        """The size of the files of the set."""
        return sum(file.size for file in self.files)

    @property
    def bytes_needed(self) -> int:
        """What is still to be written: what is not there, and for tables the shards that are made of them."""
        return self.num_bytes - self.bytes_there + (self.num_bytes if self.task.columns else 0)


def prepare_tasks(folder: Path, sets: Sequence[TaskSet]) -> None:
    """Print what the sets are and how large, then download those that are not whole into `folder`/NAME.

    A kill leaves whole files and no `prepared.json`; the same command goes on with the same commit of the source. A set
    whose source cannot be read is left out, and named at the end.

    Raises:
        ValueError: the disk is too small, or a source is missing, gated, or not as its page says.
        OSError: the Hub cannot be reached or the disk is full.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no folder; name another")
    plans: list[Plan] = []
    rows: list[list[str]] = []
    faults: dict[str, str] = {}
    for task in sets:
        about = [task.name, f"{task.images:,}"]
        try:
            plan = _plan(folder, task)
        except ValueError as error:
            faults[task.name] = str(error)
            rows.append([*about, "not to be had", task.licence, task.repo])
            continue
        state = "is prepared" if plan is None else size_text(plan.num_bytes)
        rows.append([*about, state, task.licence, task.repo])
        plans += [plan] if plan else []
    print(plain_table([["task", "images", "download", "licence of the images", "source"], *rows], numbers=(1, 2)))
    check_disk_space(folder, sum(plan.bytes_needed for plan in plans), "prepare fewer tasks with --only")
    left = sum(plan.num_bytes - plan.bytes_there for plan in plans)
    if plans:
        there = sum(plan.bytes_there for plan in plans)
        print(f"\n{size_text(left)} to download into {folder}" + (f", {size_text(there)} are there" if there else ""))
    with tqdm(total=sum(p.num_bytes for p in plans), unit="B", unit_scale=True, desc="tasks", disable=None) as bar:
        for plan in plans:
            try:
                _prepare(folder / plan.task.name, plan, bar)
            except (ValueError, WrongFile) as error:
                faults[plan.task.name] = str(error)
    _tell(faults, len(sets))
    print(f"{len(sets)} of {len(sets)} tasks are whole in {folder}")


def _tell(faults: dict[str, str], num_sets: int) -> None:
    """Raise if there are faults: with the reason of one, and of several after a line for each.

    Raises:
        ValueError: there are.
    """
    if len(faults) > 1:
        print(*(f"{name}: {reason}" for name, reason in faults.items()), sep="\n")
        raise UserError(f"{len(faults)} of {num_sets} tasks are not prepared, see above: {', '.join(faults)}")
    for name, reason in faults.items():
        raise UserError(f"{name} is not prepared: {reason}")


def _plan(folder: Path, task: TaskSet) -> Plan | None:
    """Return what there is to do for a set, or None if it is whole."""
    place = folder / task.name
    if task.real_labels:
        find_labels()
    said = read_prepared(place)
    if said is not None and said.get("source") == task.source:
        _remove_leftovers(place)
        return None
    begun = _read_begun(place)
    revision = begun["commit"] if begun.get("source") == task.source else task.revision
    snapshot = list_files(task.repo, revision)
    files = task.files(snapshot)
    data = [file.name for file in files if file.name.endswith((".tar", ".parquet"))]
    if not data:
        what = f"parquet files of the split {task.split}" if task.columns else task.shards or f"{task.split}/*.tar"
        raise UserError(f"data set {task.repo} has no {what}; the source has changed")
    named = task.columns or task.class_names or "classnames.txt" in {file.name for file in files}
    if task.is_classification and not named:
        raise UserError(f"data set {task.repo} has no classnames.txt, and the task's page lists no class names")
    there = sum(bytes_there(_downloaded(place, task) / file.path, file) for file in files)
    return Plan(task, snapshot, files, there)


def _prepare(place: Path, plan: Plan, bar: tqdm) -> None:
    """Download a set and write its `prepared.json`."""
    task = plan.task
    place.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place.with_name(f".{place.name}.lock"), timeout=0):
            (place / PREPARED).unlink(missing_ok=True)
            write_text(place / BEGUN, json.dumps({"source": task.source, "commit": plan.snapshot.commit}) + "\n")
            download(plan.snapshot, plan.files, _downloaded(place, task), bar)
            if task.columns:
                _convert(place, plan)
            _complete_texts(place, task)
            shards = _checked_shards(place, plan)
            if task.real_labels:
                write_real_labels(place, shards)
            _write_prepared(place, plan, _num_images(shards))
    except Timeout:
        raise UserError(f"another process prepares {place}; wait for it to end") from None
    place.with_name(f".{place.name}.lock").unlink(missing_ok=True)


def _num_images(shards: str) -> int:
    """Return how many images the shards have.

    Raises:
        ValueError: a shard is damaged, or there is no image.
    """
    source = TarSource(shards)
    for fault in source.faults:
        raise UserError(f"{fault.shard} cannot be read ({fault.detail}); the source has changed")
    if not len(source):
        raise UserError(f"{shards} has no images; the source has changed")
    return len(source)


def _downloaded(place: Path, task: TaskSet) -> Path:
    """Return where the files of the repository go: tables are no part of the set."""
    return place / _PARQUET if task.columns else place


def _convert(place: Path, plan: Plan) -> None:
    """Write shards and class names of the downloaded tables."""
    task = plan.task
    assert task.columns is not None
    tables = [place / _PARQUET / file.path for file in sorted(plan.files, key=lambda file: file.name)]
    names = convert(tables, place / "test", task.columns, task.name) or list(task.class_names)
    write_text(place / _TEXTS[0], "".join(f"{name}\n" for name in names))


def _complete_texts(place: Path, task: TaskSet) -> None:
    """Write class names and prompts where the source has none, and class names as the page spells them.

    Raises:
        ValueError: there are no class names, or not as many as the page says.
    """
    for name, lines in zip(_TEXTS[:2], (task.class_names, task.templates), strict=True):
        if lines and not (place / name).exists():
            write_text(place / name, "".join(f"{line}\n" for line in lines))
    if not task.is_classification:
        return
    file = place / _TEXTS[0]
    names = [line for line in _text(file).splitlines() if line.strip()] if file.exists() else []
    if not names or (task.num_classes and len(names) != task.num_classes):
        raise UserError(f"{file} lists {len(names)} classes, {task.num_classes} are expected; the source has changed")
    spelled = spelled_as(names, task.class_names)
    if spelled != names:
        write_text(file, "".join(f"{name}\n" for name in spelled))


def _text(file: Path) -> str:
    """Return the text of a file of the source.

    Raises:
        ValueError: it is none.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text in UTF-8 ({error}); the source has changed") from error


def spelled_as(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the names in their order, spelled as those of `known` that have the same letters and digits: CLIP's
    `aquarium fish` for `aquarium_fish`. They stay as they are if not each has one that is its own."""
    by_letters = {re.sub(r"[\W_]", "", name.casefold()): name for name in known}
    letters = [re.sub(r"[\W_]", "", name.casefold()) for name in names]
    if len(set(letters)) != len(names) or len(by_letters) != len(known) or set(letters) != by_letters.keys():
        return list(names)
    return [by_letters[name] for name in letters]


def _checked_shards(place: Path, plan: Plan) -> str:
    """Remove shards that are no part of the set, and return the name of all others: `.../test/{0..3}.tar`, as an
    evaluation opens them.

    Raises:
        ValueError: one is missing.
    """
    folder = place / "test"
    if not plan.task.columns:
        for path in set(folder.glob("*.tar")) - {place / file.path for file in plan.files}:
            path.unlink()
    names = {path.name for path in folder.glob("*.tar")}
    said = folder / "nshards.txt"
    if not said.exists():
        write_text(said, f"{len(names)}\n")
    if (number := _text(said).strip()) != str(len(names)):
        raise UserError(f"{folder} has {len(names)} shards, nshards.txt says {number[:20]}; the source has changed")
    if names != {f"{number}.tar" for number in range(len(names))}:
        raise UserError(f"{folder} lacks a shard of 0.tar to {len(names) - 1}.tar; the source has changed")
    return str(folder / f"{{0..{len(names) - 1}}}.tar")


def _write_prepared(place: Path, plan: Plan, num_images: int) -> None:
    """Say that a set is whole."""
    task, files = plan.task, {}
    known = {file.path: file.digest for file in plan.files if file.digest.startswith("sha256:") and not task.columns}
    for path in sorted([*place.glob("test/*.tar"), *place.glob("test/*.txt"), *place.glob("*.txt")]):
        name = path.relative_to(place).as_posix()
        files[name] = {"bytes": path.stat().st_size, "digest": known.get(name) or digest(path)}
        sync(path)
    if task.real_labels:
        labels = place / REAL_LABELS
        files[REAL_LABELS] = {"bytes": labels.stat().st_size, "digest": digest(labels)}
    about = {"task": task.name, "source": task.source, "revision": plan.snapshot.commit, "licence": task.licence}
    write_text(place / PREPARED, json.dumps({**about, "images": num_images, "files": files}, indent=2) + "\n")
    _remove_leftovers(place)
    if num_images != task.images:
        tqdm.write(f"{task.name}: {num_images:,} images, not the {task.images:,} that its page says")


def _remove_leftovers(place: Path) -> None:
    """Remove what only the preparation of a set needed."""
    for path in (place / _PARQUET, place / BEGUN, *place.rglob(".*.partial")):
        remove(path)


def _read_begun(place: Path) -> dict[str, Any]:
    try:
        begun: dict[str, Any] = json.loads((place / BEGUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return begun if isinstance(begun, dict) and isinstance(begun.get("commit"), str) else {}
