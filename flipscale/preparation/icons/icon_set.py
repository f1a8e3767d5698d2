"""`flipscale prepare icons`: training shards, a validation and a test set, names that nobody has, and a tokenizer.

Everything in the folder is a function of the pinned package and of the fraction: two machines get the same bytes. It
is made beside its place, as `.NAME.partial`. A run that was killed goes on there with what is not drawn or written yet,
and ends with the same bytes.
"""

import json
import os
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from flipscale.data.tokenizers import train_sentencepiece
from flipscale.io.atomic import partial_path, remove, write_text
from flipscale.io.errors import UserError
from flipscale.io.files import check_disk_space, read_text
from flipscale.preparation import demo_emoji
from flipscale.preparation.icons import splits
from flipscale.preparation.icons.collection import INTEGRITY, PACKAGE, caption, read_sets
from flipscale.preparation.icons.drawing import blocks, draw_all
from flipscale.preparation.icons.parts import Drawings, Part, choose_parts
from flipscale.preparation.icons.report import REPORT, summary, write_licences, write_report
from flipscale.preparation.icons.shards import Sample, write_shard
from flipscale.preparation.icons.splits import SetFacts
from flipscale.preparation.labelled_set import write_class_texts
from flipscale.preparation.worker_pool import worker_pool

MADE_BY = "flipscale prepare icons"  # by this a later run recognises the folder
VOCAB_SIZE = 8000
PAIRS_PER_SHARD = 8192
TEMPLATE = "{c}"  # captions are bare names, so class prompts are too
MAX_LENGTH = 16  # tokens, after which a caption is cut
# What only the preparation needs.
_DOWNLOAD, _DRAWN, _BEGUN = ".download", ".drawn", ".begun.json"
# For the package, the pictures and the shards: of the test sets, and of all drawings for training.
_LEAST_BYTES, _TRAIN_BYTES = 200_000_000, 1_150_000_000


def prepare_icons(out_dir: Path, fraction: float = 1.0, processes: int = 2) -> None:
    """Download and draw Iconify's collection into `out_dir`: train/, validation/, test/, unseen/ and tokenizer/.

    A folder that is already complete is left as it is.

    Args:
        out_dir: the folder to write; its parents are created.
        fraction: of the training drawings; those of a smaller fraction are among those of a larger one. The other parts
            are the same.
        processes: how many draw and write.

    Raises:
        ValueError: the folder has other files, another fraction or no room, another process writes it, or the package
            cannot be downloaded.
        OSError: the package is not the pinned one, or a process died.
    """
    out_dir = out_dir.absolute()
    if _is_complete(out_dir, fraction):
        _remove_leftovers(out_dir)  # of a run that was killed at its very end
        print(f"{out_dir} is complete: nothing to do")
        return
    demo_emoji.check_renderer()
    work = partial_path(out_dir)
    if not work.is_dir():
        remove(work)
    work.mkdir(parents=True, exist_ok=True)
    lock = work.with_name(f".{out_dir.name}.lock")
    try:
        with FileLock(lock, timeout=0):
            with worker_pool(processes, remedy="the same command goes on where it stopped") as pool:
                report = _prepare(out_dir, work, fraction, pool, 3 * processes)
            lock.unlink(missing_ok=True)
    except Timeout:
        raise UserError(f"another process writes {out_dir}; wait for it to end, or name another folder") from None
    print("\n".join(summary(report, out_dir)))


def _is_complete(out_dir: Path, fraction: float) -> bool:
    """Return whether an earlier run wrote the folder.

    Raises:
        ValueError: it wrote another fraction, or the folder is somebody else's.
    """
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return False
    try:
        report = json.loads(read_text(out_dir / REPORT))
    except (OSError, ValueError, RecursionError):
        report = None
    if not isinstance(report, dict) or report.get("made_by") != MADE_BY:
        raise UserError(f"{out_dir} holds something that is not the icons; name a new folder, or an empty one")
    made = {name: report.get(name) for name in ("package", "fraction")}
    if made != {"package": PACKAGE, "fraction": fraction}:
        raise UserError(
            f"{out_dir} holds the fraction {made['fraction']} of {made['package']}, and you ask for {fraction:g} of "
            f"{PACKAGE}; name another folder"
        )
    return True


def _prepare(out_dir: Path, work: Path, fraction: float, pool: Executor, at_once: int) -> dict[str, Any]:
    """Write everything into `work`, `at_once` blocks at a time, rename that to `out_dir`, and return the report."""
    made = {"made_by": MADE_BY, "package": PACKAGE, "fraction": fraction}
    _go_on(work, made)
    check_disk_space(out_dir, _bytes_needed(work, fraction), "prepare a smaller --fraction")
    tarball = demo_emoji.download([PACKAGE], work / _DOWNLOAD, INTEGRITY)[PACKAGE]

    sets = [SetFacts.of(icon_set) for icon_set in read_sets(tarball)]
    relatives = splits.find_relatives(sets)
    causes = {facts.prefix: splits.why_left_out(facts, relatives) for facts in sets}
    used = [facts for facts in sets if causes[facts.prefix] is None]
    chosen = [splits.narrowed(facts, fraction) for facts in used]
    if not any(facts.names for facts in chosen if facts.prefix not in splits.HELD_OUT):
        raise UserError(f"fraction {fraction:g} leaves no drawing to train on; name a larger one")
    (work / _DRAWN).mkdir(exist_ok=True)
    blocks_of = {facts.prefix: blocks(work / _DRAWN, facts.prefix, facts.names) for facts in chosen}
    draw_all(read_sets(tarball), blocks_of, pool, at_once)

    every = [block for found in blocks_of.values() for block in found]
    drawings = Drawings.read(every, np.concatenate([facts.paths for facts in chosen]))
    parts, left_out = choose_parts(drawings, splits.sets_of_names(used))
    left_out["beyond_the_fraction"] = sum(len(facts.names) for facts in used) - len(drawings.names)
    for facts in sets:
        left_out["withdrawn"] += facts.num_withdrawn
        if cause := causes[facts.prefix]:
            left_out[cause] += len(facts.names)
    for part in parts:
        write_part(work, part, drawings, pool)
    captions = sorted(caption(drawings.names[number]) for number in parts[0].numbers)
    train_sentencepiece(captions, work / "tokenizer", VOCAB_SIZE, MAX_LENGTH)
    write_licences(work, used, parts, drawings)
    report = write_report(work, made, parts, drawings, left_out, relatives)
    if out_dir.exists():
        out_dir.rmdir()
    os.replace(work, out_dir)
    _remove_leftovers(out_dir)
    return report


def _go_on(work: Path, made: dict[str, Any]) -> None:
    """Leave in `work` what an earlier run of the same command left; of another's only the download."""
    for partial in work.rglob(".*.partial*"):
        remove(partial)
    begun, text = work / _BEGUN, json.dumps(made)
    if not begun.is_file() or begun.read_bytes() != text.encode():
        for path in work.iterdir():
            if path.name != _DOWNLOAD:
                remove(path)
        write_text(begun, text)


def _bytes_needed(work: Path, fraction: float) -> int:
    """Return what is still to be written."""
    held = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    return round(_LEAST_BYTES + fraction * _TRAIN_BYTES) - held


def _remove_leftovers(folder: Path) -> None:
    """Remove what only the preparation needed."""
    for name in (_DRAWN, _DOWNLOAD, _BEGUN):
        remove(folder / name)


def write_part(out_dir: Path, part: Part, drawings: Drawings, pool: Executor) -> None:
    """Write `out_dir/NAME/shard-*.tar`, webdataset naming: KEY.png, KEY.txt and in a test set KEY.cls; beside a test
    set's, its names and its prompt, as CLIP_benchmark lays them out. Shards that are there already are left.

    The set and the name of each drawing are the lines of `out_dir/NAME.tsv`, from 0; KEY is the number of the line.

    Raises:
        OSError: a worker died, or the disk is full.
    """
    folder = out_dir / part.name
    folder.mkdir(exist_ok=True)
    numbers = part.numbers.tolist()
    class_names = sorted({caption(drawings.names[number]) for number in numbers}) if part.is_test else []
    if part.is_test:
        write_class_texts(folder, class_names, TEMPLATE)
    label_of: dict[str, int] = {name: label for label, name in enumerate(class_names)}
    lines = (f"{drawings.prefixes[number]}\t{drawings.names[number]}\n" for number in numbers)
    write_text(out_dir / f"{part.name}.tsv", "".join(lines))

    def samples(first: int) -> list[Sample]:
        some = numbers[first : first + PAIRS_PER_SHARD]
        return [drawings.sample(number, label_of.get(caption(drawings.names[number]))) for number in some]

    firsts = {folder / f"shard-{at // PAIRS_PER_SHARD:05d}.tar": at for at in range(0, len(numbers), PAIRS_PER_SHARD)}
    missing = {path: first for path, first in firsts.items() if not path.exists()}
    written = pool.map(write_shard, missing, missing.values(), map(samples, missing.values()))
    for _ in tqdm(written, f"writing {part.name}", len(missing), unit=" shards", disable=None):
        pass
