"""Opening the source of a recipe."""

from pathlib import Path

from flipscale.data.samples import Source, contents_digest
from flipscale.data.sources.dataset import DatasetSource, load_rows
from flipscale.data.sources.mixture import Mixture, Subset
from flipscale.data.sources.remote import RemoteTarSource, ShardCache
from flipscale.data.sources.tar import TarSource
from flipscale.data.weights import ABOUT, SampleWeights
from flipscale.io.errors import UserError
from flipscale.io.files import quoted
from flipscale.io.model_folder import read_object
from flipscale.io.options import refuse_set
from flipscale.recipe.data import DataRecipe, SourceRecipe


def open_source(recipe: DataRecipe) -> Source:
    """Return the source of a recipe's samples. Raise UserError if the recipe has no source or names it twice, it does
    not exist, more than `max_bad_fraction` of its shards cannot be read, or `fraction` leaves no sample."""
    if recipe.shards and recipe.sources:
        both = f"data.shards is {recipe.shards!r} and data.sources names {len(recipe.sources)}"
        raise UserError(f"{both}; give one, and --data.shards null or --data.sources []")
    if recipe.weights and recipe.sources:
        both = f"data.weights is {recipe.weights!r} and data.sources names {len(recipe.sources)}"
        raise UserError(f"{both}; give each source its own `weights`")
    recipes = recipe.sources or [SourceRecipe(shards=recipe.shards or "", weights=recipe.weights)]
    names = [f"data.sources[{number}]" for number in range(len(recipes))] if recipe.sources else ["data.shards"]
    sources = [_open(one, recipe, name) for one, name in zip(recipes, names, strict=True)]
    if len(sources) == 1:
        return sources[0]
    weights = [one.weight for one in recipes if one.weight is not None]
    if weights and len(weights) < len(recipes):
        raise UserError(f"{len(weights)} of {len(recipes)} data.sources have a weight; give all of them one, or none")
    return Mixture(sources, weights or [source.num_drawn for source in sources])


def open_shards(shards: str, recipe: DataRecipe, anew: bool = False) -> TarSource:
    """Open tar shards, on this machine or at a URL through the recipe's cache."""
    if "://" not in shards:
        return TarSource(shards, anew)
    cache = ShardCache(Path(recipe.cache_dir).expanduser(), recipe.cache_bytes)
    return RemoteTarSource(shards, cache, recipe, anew)


def _open(recipe: SourceRecipe, data: DataRecipe, name: str) -> Source:
    source: Source
    if (recipe.shards is None) == (recipe.dataset is None):
        given = "neither shards nor dataset" if recipe.shards is None else "shards and dataset"
        raise UserError(f"{name} has {given}; give one of them")
    if recipe.dataset is None:
        source = open_shards(recipe.shards or "", data)
    else:
        rows = load_rows(recipe.dataset, recipe.config, recipe.split)
        columns = list(data.captions or recipe.caption_columns)
        source = DatasetSource(rows, recipe.dataset, recipe.image_column, columns)
    source.kinds = tuple(data.captions or ())
    bad = [fault for fault in source.faults if fault.cause == "unreadable_shard"]
    if len(bad) > data.max_bad_fraction * len(source.shard_sizes):
        raise UserError(
            f"{len(bad)} of {len(source.shard_sizes)} shards cannot be read, more than data.max_bad_fraction "
            f"{data.max_bad_fraction} ({bad[0].shard}: {bad[0].detail}); fetch them again or remove them"
        )
    if recipe.weights is not None:
        field = f"{name.removesuffix('.shards')}.weights"
        refuse_set({"data.fraction": data.fraction < 1.0 and data.fraction}, f"{field} is {recipe.weights!r}")
        source.weights = open_weights(field, recipe.weights, source, recipe.shards or recipe.dataset or "")
    return Subset(source, data.fraction, name) if data.fraction < 1.0 else source


def open_weights(name: str, path: str, source: Source, shards: str) -> SampleWeights:
    """Return the weights of a source, called `shards`, in the folder `path` that the recipe's field `name` has. Raise
    UserError if it has no weights, or those of other shards."""
    folder = Path(path).expanduser()
    remedy = f"make it with `flipscale prepare weights {quoted(shards)} FOLDER`"
    if not (folder / ABOUT).is_file():
        plain = f", which `--scores {path}` reads" if folder.suffix == ".npy" else ""
        raise UserError(f"{name} is {path!r}; expected a folder of sampling weights{plain}; {remedy}")
    about = read_object(folder / ABOUT)
    if about.get("contents_digest") != contents_digest(source):
        raise UserError(
            f"{name} {path!r} has weights of {about.get('shards')}; the data has {in_words(source, shards)}, or "
            f"shards of other names, sizes or contents; {remedy}"
        )
    try:
        return SampleWeights(name, folder, source.shard_sizes, about)
    except Exception as error:  # numpy raises many kinds for a damaged header
        raise UserError(f"{name} {path!r} is damaged ({type(error).__name__}: {error}); {remedy}") from error


def in_words(source: Source, shards: str) -> str:
    """Return the counts and the name of a source's shards."""
    return f"{len(source):,} samples in {len(source.shard_sizes):,} shards of {shards!r}"
