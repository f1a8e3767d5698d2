"""The source that a recipe names."""

from flipscale.data.loader import DataRecipe
from flipscale.data.source import Source
from flipscale.data.tar_source import TarSource


def open_source(recipe: DataRecipe) -> Source:
    """The source of a recipe's samples, its bad shards counted.

    Raises:
        ValueError: nothing is there, or more of it than `max_bad_fraction` cannot be read.
    """
    source = TarSource(recipe.shards)
    refuse_many_bad_shards(source, recipe.max_bad_fraction)
    return source


def refuse_many_bad_shards(source: Source, max_bad_fraction: float) -> None:
    """Nothing, where few enough shards are unreadable.

    Raises:
        ValueError: more than `max_bad_fraction` of them are.
    """
    if not 0.0 <= max_bad_fraction <= 1.0:
        raise ValueError(f"data.max_bad_fraction is {max_bad_fraction}; it must be in [0, 1]")
    bad = [fault for fault in source.faults if fault.cause == "unreadable_shard"]
    if len(bad) > max_bad_fraction * len(source.shard_sizes):
        raise ValueError(
            f"{len(bad)} of {len(source.shard_sizes)} shards cannot be read, more than data.max_bad_fraction "
            f"{max_bad_fraction} ({bad[0].shard}: {bad[0].detail}); fetch them again or remove them"
        )
