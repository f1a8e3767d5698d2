"""Scores of samples by their id, from a table: the public selections of DataComp, DFN, FLYT and DynamiCS.

A table is a Parquet file with a column of ids, or an .npy file of DataComp's uids, pairs of uint64. Ids are compared as
digests of 64 bits: a billion samples and a billion rows have a wrong match with a probability of 5 %.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from flipscale.data.samples import BadSample
from flipscale.io.errors import UserError, first_line
from flipscale.io.progress import each
from flipscale.preparation.worker_pool import shared

SHA256 = "sha256"  # the key that is computed from the image where KEY.json lacks it
_UID_BYTES = 16
_ROWS_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class Matches:
    """How a table and the samples match.

    Args:
        rows: rows of the table.
        other_rows: rows whose id no sample has.
        other_samples: samples whose id no row has.
        without_key: samples without an id.
    """

    rows: int
    other_rows: int
    other_samples: int
    without_key: int

    def __str__(self) -> str:
        return (
            f"{self.other_rows:,} of {self.rows:,} rows have no sample here; {self.other_samples:,} samples have no "
            f"row, {self.without_key:,} no id"
        )


def digest_keys(shard: int) -> np.ndarray:
    """Return the digests of the ids in a shard, uint64; 0 for a sample without one. The pool shares source and key.

    The key is a field of KEY.json. SHA256 is computed from the image's bytes if the field is missing.
    """
    source, key = shared()
    digests = np.zeros(source.shard_sizes[shard], np.uint64)
    for number in range(len(digests)):
        try:
            value = source.read_fields(shard, number).get(key)
        except BadSample:
            value = None
        if value is None and key == SHA256:
            try:
                value = hashlib.sha256(source.read(shard, number).image).hexdigest()
            except BadSample:
                continue
        if isinstance(value, str | int) and not isinstance(value, bool):
            digests[number] = _digest(str(value))
    return digests


def scores_by_key(table: Path, key: str, score: str | None, keys: np.ndarray) -> tuple[np.ndarray, Matches]:
    """Return the score of each sample, NaN for one without a row, and how table and samples match.

    Args:
        key: column of the table's ids.
        score: column of their scores, finite numbers. None counts the rows of an id: a list of visits has as many.
        keys: digests of the samples' ids, 0 for none.
    """
    parts = list(each(_batches(table, key, score), f"reading {table.name}", "batches"))
    ids = np.concatenate([part for part, _ in parts]) if parts else np.zeros(0, np.uint64)
    if not len(ids):
        raise UserError(f"--table {table} has no rows; expected an id and perhaps a score in each")
    if score is None:
        known, values = np.unique(ids, return_counts=True)
    else:
        scores = np.concatenate([part for _, part in parts])
        order = np.lexsort((scores, ids))
        ids, scores = ids[order], scores[order]
        is_first = np.concatenate([[True], ids[1:] != ids[:-1]])
        known, values = ids[is_first], scores[is_first]
        if (apart := scores != values[np.cumsum(is_first) - 1]).any():
            raise UserError(f"--table {table}: {np.count_nonzero(apart):,} rows repeat an id with another {score}")
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    is_known = (known[places] == keys) & (keys != 0)
    if not is_known.any():
        have = f"{np.count_nonzero(keys):,} of {len(keys):,} samples have a {key}, and"
        raise UserError(f"--table {table} and these shards are of other samples: {have} none of them is in its rows")
    found = np.zeros(len(known), bool)
    found[places[is_known]] = True
    matches = Matches(
        rows=len(ids),
        other_rows=int(np.count_nonzero(~found[np.searchsorted(known, ids)])),
        other_samples=int(np.count_nonzero(~is_known & (keys != 0))),
        without_key=int(np.count_nonzero(keys == 0)),
    )
    return np.where(is_known, values[places], np.nan), matches


def capped(weights: np.ndarray, most: float) -> np.ndarray:
    """Return weights whose visits in an epoch are at most `most`: the excess goes to the others, in proportion."""
    drawn = np.sort(weights[weights > 0])[::-1]
    if not len(drawn):
        return weights
    # With the k heaviest at the cap, the others share what is left.
    heaviest = np.arange(len(drawn))
    rest = np.cumsum(drawn[::-1])[::-1]
    scale = (len(drawn) - most * heaviest) / rest
    at_cap = int(np.argmax(drawn * scale <= most * (1 + 1e-12)))
    return np.minimum(weights * scale[at_cap], most)


def _batches(table: Path, key: str, score: str | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the digests of ids, and their scores, of some rows at a time."""
    if table.suffix == ".npy":
        if score is not None:
            raise UserError(f"--score is {score!r} and --table {table} has uids alone; use a Parquet file")
        yield from ((_digests(names), np.zeros(0)) for names in _uids(table))
        return
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(table)
    except (OSError, ValueError) as error:
        raise UserError(f"--table {table} cannot be read as a Parquet file ({first_line(error)})") from error
    names = file.schema_arrow.names
    for option, name in {"--key": key, "--score": score}.items():
        if name is not None and name not in names:
            raise UserError(f"{option} is {name!r}, and {table} has the columns {', '.join(names)}")
    for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[key] if score is None else [key, score]):
        if batch.column(0).null_count:
            raise UserError(f"--table {table} has rows without a {key}; expected an id in each")
        scores = np.zeros(0)
        if score is not None:
            scores = _numbers(batch.column(1), score, table)
        yield _digests(map(str, batch.column(0).to_pylist())), scores


def _numbers(column: Any, score: str, table: Path) -> np.ndarray:
    try:
        scores = np.asarray(column.to_numpy(zero_copy_only=False), np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"--score is {score!r}, which is no column of numbers in {table}") from error
    if not np.isfinite(scores).all():
        raise UserError(f"--table {table} has rows whose {score} is no finite number; leave them out")
    return scores


def _uids(table: Path) -> Iterator[list[str]]:
    """Yield DataComp's uids, hexadecimal, of some rows at a time."""
    try:
        rows = np.lib.format.open_memmap(table, mode="r")
    except Exception as error:  # numpy raises many kinds for a damaged header
        raise UserError(f"--table {table} cannot be read as an .npy file ({error})") from error
    if rows.dtype != np.dtype("u8,u8") or rows.ndim != 1:
        raise UserError(f"--table {table} has {rows.dtype} {rows.shape}; expected DataComp's uids, pairs of uint64")
    width = 2 * _UID_BYTES
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[first : first + _ROWS_AT_ONCE]
        text = np.stack([some["f0"], some["f1"]], axis=1).astype(">u8").tobytes().hex()
        yield [text[start : start + width] for start in range(0, len(text), width)]


def _digests(keys: Iterable[str]) -> np.ndarray:
    return np.fromiter(map(_digest, keys), np.uint64)


def _digest(key: str) -> int:
    return xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogatepass")) or 1
