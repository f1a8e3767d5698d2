"""Open the source that a recipe names."""

from pathlib import Path

from flipscale.data.recipe import DataRecipe, SourceRecipe
from flipscale.data.samples import Source
from flipscale.data.sources.dataset_source import DatasetSource, load_rows
from flipscale.data.sources.mixture import Mixture
from flipscale.data.sources.remote_source import RemoteTarSource
from flipscale.data.sources.shard_cache import ShardCache
from flipscale.data.sources.subset import Subset
from flipscale.data.sources.tar_source import TarSource
from flipscale.io.errors import UserError


def open_source(recipe: DataRecipe) -> Source:
    """Return the source of a recipe's samples.

    Raises:
        ValueError: the recipe names none or names it twice, it does not exist, more than `max_bad_fraction` of its
            shards cannot be read, or `fraction` leaves nothing of it.
    """
    if recipe.shards and recipe.sources:
        raise UserError(f"data.shards is {recipe.shards!r} and data.sources names {len(recipe.sources)}; give one")
    named = recipe.sources or [SourceRecipe(shards=recipe.shards)]
    sources: list[Source] = [_open(one, recipe, f"data.sources[{number}]") for number, one in enumerate(named)]
    for source in sources:
        refuse_many_bad_shards(source, recipe.max_bad_fraction)
    if recipe.fraction < 1.0:
        names = [f"data.sources[{number}]" for number in range(len(sources))] if recipe.sources else ["data.shards"]
        sources = [Subset(source, recipe.fraction, name) for source, name in zip(sources, names, strict=True)]
    if len(sources) == 1:
        return sources[0]
    weights = [one.weight for one in named if one.weight is not None]
    if weights and len(weights) < len(named):
        raise UserError(f"{len(weights)} of {len(named)} data.sources have a weight; give all of them one, or none")
    return Mixture(sources, weights or [len(source) for source in sources])


def open_shards(shards: str, recipe: DataRecipe, anew: bool = False) -> TarSource:
    """Open tar shards, on this machine or at a URL through the recipe's cache.

    Args:
        anew: write their manifest even if there is one.

    Raises:
        ValueError: a shard is missing.
    """
    if "://" not in shards:
        return TarSource(shards, anew)
    cache = ShardCache(Path(recipe.cache_dir).expanduser(), recipe.cache_bytes)
    return RemoteTarSource(shards, cache, recipe, anew)


def _open(recipe: SourceRecipe, data: DataRecipe, name: str) -> Source:
    if (recipe.shards is None) == (recipe.dataset is None):
        given = "neither shards nor dataset" if recipe.shards is None else "shards and dataset"
        raise UserError(f"{name} has {given}; give one of them")
    if recipe.dataset is None:
        return open_shards(recipe.shards or "", data)
    rows = load_rows(recipe.dataset, recipe.config, recipe.split)
    return DatasetSource(rows, recipe.dataset, recipe.image_column, recipe.caption_columns)


def refuse_many_bad_shards(source: Source, max_bad_fraction: float) -> None:
    """Raise if too many shards are unreadable.

    Raises:
        ValueError: more than `max_bad_fraction` of them are.
    """
    bad = [fault for fault in source.faults if fault.cause == "unreadable_shard"]
    if len(bad) > max_bad_fraction * len(source.shard_sizes):
        raise UserError(
            f"{len(bad)} of {len(source.shard_sizes)} shards cannot be read, more than data.max_bad_fraction "
            f"{max_bad_fraction} ({bad[0].shard}: {bad[0].detail}); fetch them again or remove them"
        )
