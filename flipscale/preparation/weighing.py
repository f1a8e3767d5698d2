"""Make sampling weights from scores, ids, or clusters of features, for `data.weights` of a recipe.

Scores, clusters and weights are in memory, a few numbers a sample. Features are read one shard at a time.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from flipscale.data.samples import BadSample, SampleNumbers, Source, contents_digest
from flipscale.data.sampling_weights import ABOUT, SUMS, WEIGHTS, Composition, total
from flipscale.data.sources.opening import in_words
from flipscale.data.sources.tar import TarSource
from flipscale.io.errors import UserError, needed
from flipscale.io.options import Count, Finite, Repeats, Share, ShareAboveZero
from flipscale.io.progress import each
from flipscale.preparation.selection import Matches, capped, digest_keys, scores_by_key
from flipscale.preparation.worker_pool import shared, worker_pool

# Features of each cluster that k-means learns from; faiss takes no more.
_ROWS_PER_CLUSTER = 256


@dataclass(frozen=True, kw_only=True)
class WeightOptions:
    """The options of `flipscale prepare weights`.

    Args:
        scores: An .npy file with a score for each sample, in the order of the manifest.
        field: Field of KEY.json with the score. A sample without a number there is never drawn.
        caption_counts: The score is the number of samples with the same caption.
        table: Parquet file with a row for each chosen sample, or an .npy file of DataComp's uids. A sample without a
            row is never drawn.
        key: Name of the id in --table and in KEY.json, such as uid. sha256 is computed from the image if KEY.json lacks
            it.
        score: Column of --table with the score. Default: the number of an id's rows.
        most_repeats: Draw no sample more often than this in an epoch.
        at_least: Draw samples of at least this score equally often, and no others. Default: each score is a weight.
        top: Draw the samples with the highest scores equally often, this share of all, and no others.
        clusters: An .npy file with each sample's cluster, in the order of the manifest. Samples with negative numbers
            are never drawn.
        features: Folder of features (NNNNN.npy for each shard) to cluster by k-means. Keeps clusters.npy. Needs
            faiss-cpu.
        num_clusters: Number of clusters of --features.
        power: Draw a cluster of n samples in proportion to n ** POWER: 1 keeps the data's shares, 0 makes all equal.
    """

    scores: Path | None = None
    field: str | None = None
    caption_counts: bool | None = None
    table: Path | None = None
    key: str | None = None
    score: str | None = None
    most_repeats: Repeats | None = None
    at_least: Finite | None = None
    top: ShareAboveZero | None = None
    clusters: Path | None = None
    features: Path | None = None
    num_clusters: Count | None = None
    power: Share = 0.2

    def check(self) -> None:
        """Raise UserError for options that exclude each other, or miss one."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        scored_by, clustered_by = ("scores", "field", "caption_counts", "table"), ("clusters", "features")
        for kinds in (scored_by, ("at_least", "top"), clustered_by):
            for one, other in pairwise(name for name in kinds if name in given):
                raise UserError(f"--{one} is {given[one]} and --{other} is {given[other]}; give one of them")
        scores, made_from = given.keys() & set(scored_by), scored_by + clustered_by
        if not given.keys() & set(made_from):
            raise UserError(f"nothing to make weights from; give one of --{', --'.join(made_from)}")
        for name in given.keys() & {"at_least", "top"} if not scores else ():
            raise UserError(f"--{name} is {given[name]} and there are no scores; add --{', --'.join(scored_by)}")
        if ("features" in given) != ("num_clusters" in given):
            raise UserError(f"--features is {self.features} and --num_clusters {self.num_clusters}; give both or none")
        if ("table" in given) != ("key" in given):
            raise UserError(f"--table is {self.table} and --key {self.key}; give both or none")
        if "score" in given and "table" not in given:
            raise UserError(f"--score is {self.score!r}, a column of --table, which is missing; add it")


def make_weights(
    source: Source, shards: str, options: WeightOptions, folder: Path, processes: int
) -> tuple[Composition, Matches | None]:
    """Write the weights of a source, called `shards`, to an empty folder. Return the composition of an epoch, and how
    the samples match the rows of `options.table`. Raise UserError if an option is wrong, a number is not a weight, or
    no sample has a weight above 0."""
    options.check()
    weights, clusters, matches = np.ones(len(source)), None, None
    if options.table is not None:
        scores, matches = scores_by_key(
            options.table, options.key or "", options.score, _keys(source, options, processes)
        )
        weights = _of_scores(scores, options, source)
    elif options.scores is not None or options.field is not None or options.caption_counts:
        weights = _of_scores(_scores(source, options, processes), options, source)
    if options.clusters is not None:
        clusters = _read_numbers("--clusters", options.clusters, source, "iu")
    elif options.features is not None:
        clusters = _cluster(options.features, source, options.num_clusters or 1)
        np.save(folder / "clusters.npy", clusters)
    if clusters is not None:
        weights[clusters < 0] = 0.0
        _, members, sizes = np.unique(clusters[weights > 0.0], return_inverse=True, return_counts=True)
        weights[weights > 0.0] *= (sizes ** (options.power - 1.0))[members]
    if not weights.any():
        raise UserError(f"none of {in_words(source, shards)} would have a weight above 0; lower the threshold")
    if options.most_repeats is not None:
        weights = capped(weights, options.most_repeats)
    return _write(folder, source, shards, weights, options, matches), matches


def _keys(source: Source, options: WeightOptions, processes: int) -> np.ndarray:
    """Return the digest of each sample's id, see `digest_keys`."""
    if not isinstance(source, TarSource):
        raise UserError(f"--key is {options.key!r}, which reads KEY.json of tar shards; give --scores instead")
    keys = _of_shards(digest_keys, source, options.key or "", processes)
    if not keys.any():
        raise UserError(f"--key is {options.key!r}, which no KEY.json of {len(source)} samples has")
    return keys


def _scores(source: Source, options: WeightOptions, processes: int) -> np.ndarray:
    """Return each sample's number in `scores`, its field of KEY.json, or the count of its first caption; else NaN."""
    if options.scores is not None:
        return _read_numbers("--scores", options.scores, source, "fiu")
    if options.field is not None:
        if not isinstance(source, TarSource):
            raise UserError(f"--field is {options.field!r}, which reads KEY.json of tar shards; give --scores instead")
        scores = _of_shards(_read_shard, source, options.field, processes)
        if not np.isfinite(scores).any():
            raise UserError(f"--field is {options.field!r}, which no KEY.json of {len(source)} samples has as a number")
        return scores
    digests = _of_shards(_digest_captions, source, "", processes)
    if not digests.any():
        raise UserError(f"--caption_counts counts captions, and none of {len(source)} samples has one")
    _, members, counts = np.unique(digests, return_inverse=True, return_counts=True)
    return np.where(digests == 0, np.nan, counts[members].astype(np.float64))


def _of_scores(scores: np.ndarray, options: WeightOptions, source: Source) -> np.ndarray:
    """Return the weights by score, float64: 1 above the threshold, or the score itself without a threshold."""
    has_score = np.isfinite(scores)
    is_good = has_score if options.scores is not None else np.ones(len(scores), bool)
    is_weight = options.at_least is None and options.top is None
    is_good = is_good & ~(scores < 0) if is_weight else is_good
    if not is_good.all():
        row = int(np.argmin(is_good))
        shard, number = SampleNumbers(source)[row]
        origin = options.scores or options.field or options.table
        raise UserError(
            f"{origin}: sample {row}, number {number} of {source.shard_name(shard)}, has "
            f"{scores[row]}; expected finite numbers{' of at least 0, or --at_least or --top' if is_weight else ''}"
        )
    if is_weight:
        return np.where(has_score, scores, 0.0).astype(np.float64)
    limit = options.at_least
    if options.top is not None:
        count = max(1, round(options.top * np.count_nonzero(has_score)))
        limit = np.partition(scores[has_score], -count)[-count]
    # In the precision of the scores: 0.7 in float32 is below 0.7.
    limit = scores.dtype.type(limit) if scores.dtype.kind == "f" else limit
    return (has_score & (scores >= limit)).astype(np.float64)


def _read_numbers(option: str, file: Path, source: Source, kinds: str) -> np.ndarray:
    """Return the numbers in an .npy file, one a sample, of numpy's `kinds` of types."""
    numbers = _read_array(option, file)
    if numbers.shape != (len(source),) or numbers.dtype.kind not in kinds:
        whole = "" if "f" in kinds else "whole "
        raise UserError(
            f"{option} {file} has {numbers.dtype} {numbers.shape}; expected {len(source)} {whole}numbers, one a sample "
            "in the order of the manifest"
        )
    return np.asarray(numbers)


def _read_array(option: str, file: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # numpy raises many kinds for a damaged header
        raise UserError(f"{option}: {file} cannot be read as an .npy file ({error}); write it with np.save") from error


def _of_shards(function: Callable[[int], np.ndarray], source: Source, field: str, processes: int) -> np.ndarray:
    """Return what `function` makes of each shard, in worker processes, one after the other."""
    shards = range(len(source.shard_sizes))
    with worker_pool(min(processes, len(shards)), (source, field)) as pool:
        return np.concatenate(list(each(pool.map(function, shards), "reading scores", "shards", len(shards))))


def _read_shard(shard: int) -> np.ndarray:
    source, field = shared()
    scores = np.full(source.shard_sizes[shard], np.nan)
    for number in range(len(scores)):
        try:
            value = source.read_fields(shard, number).get(field)
        except BadSample:
            continue
        if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
            scores[number] = value
    return scores


def _digest_captions(shard: int) -> np.ndarray:
    """Return a digest of each sample's first caption that is not blank, uint64; 0 for none.

    Case and the number of spaces make no difference.
    """
    source, _ = shared()
    digests = np.zeros(source.shard_sizes[shard], np.uint64)
    for number in range(len(digests)):
        try:
            captions = source.read_captions(shard, number)
        except BadSample:
            continue
        words = next(filter(None, map(bytes.split, captions)), None)
        if words:
            text = b" ".join(words).decode("utf-8", "replace").casefold().encode()
            digests[number] = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1
    return digests


def _cluster(folder: Path, source: Source, count: int) -> np.ndarray:
    """Return the cluster of each sample by spherical k-means, int32; -1 for rows that are not finite.

    It learns from at most 256 rows a cluster, evenly spread over the data.
    """
    faiss = needed("faiss", "--features needs the package faiss-cpu", "'flipscale[weights]'")
    step = max(1, len(source) // (_ROWS_PER_CLUSTER * count))
    learned = np.concatenate(list(_features(folder, source, step)))
    learned = learned[np.isfinite(learned).all(1)]
    if len(learned) < count:
        raise UserError(f"--num_clusters is {count} and {len(learned)} samples have features; use fewer clusters")
    means = faiss.Kmeans(learned.shape[1], count, niter=20, spherical=True, seed=0, min_points_per_centroid=1)
    means.train(learned)
    clusters = []
    for rows in each(_features(folder, source), "clustering", "shards", len(source.shard_sizes)):
        nearest = means.index.search(np.nan_to_num(rows), 1)[1][:, 0]
        clusters.append(np.where(np.isfinite(rows).all(1), nearest, -1).astype(np.int32))
    return np.concatenate(clusters)


def _features(folder: Path, source: Source, step: int = 1) -> Iterator[np.ndarray]:
    """Yield the features of every `step`-th sample by shard, float32 `(samples, width)` of length 1."""
    width, row = None, 0
    for shard, size in enumerate(source.shard_sizes):
        rows = _read_array("--features", file := folder / f"{shard:05d}.npy")
        width = width or rows.shape[-1]
        if rows.shape != (size, width) or rows.dtype.kind != "f":
            raise UserError(f"--features: {file} has {rows.dtype} {rows.shape}; expected {size} rows of {width}")
        rows, row = rows[(-row) % step :: step].astype(np.float32), row + size
        yield rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _write(
    folder: Path, source: Source, shards: str, weights: np.ndarray, options: WeightOptions, matches: Matches | None
) -> Composition:
    shares = weights / weights.max()  # so that the sum is finite
    shares /= shares.sum()
    shares[shares * len(shares) < 1e-30] = 0.0  # so that float32 holds the rest
    visits = (shares * np.count_nonzero(shares)).astype("<f4")
    drawn = np.sort(visits[visits > 0])
    heaviest = drawn[len(drawn) - -(-len(drawn) // 100) :]
    composition = Composition(
        samples=len(visits),
        never=len(visits) - len(drawn),
        visits=len(drawn),
        distinct=float(np.minimum(drawn, 1.0).sum(dtype=np.float64)),
        heaviest_share=float(heaviest.sum(dtype=np.float64) / drawn.sum(dtype=np.float64)),
        most_visits=float(drawn[-1]),
    )
    np.save(folder / WEIGHTS, visits)
    ends = np.cumsum([0, *source.shard_sizes]).tolist()
    np.save(folder / SUMS, [total(visits[first:last].astype(np.float64)) for first, last in pairwise(ends)])
    about = {
        "shards": in_words(source, shards),
        "contents_digest": contents_digest(source),
        "digest": hashlib.blake2b(visits.tobytes(), digest_size=16).hexdigest(),
        "composition": asdict(composition),
        "matches": matches and asdict(matches),
        "options": {name: str(value) for name, value in vars(options).items() if value is not None},
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return composition
