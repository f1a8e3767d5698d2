"""Prepare data on disk: write, index and inspect shards, and make the demo set and photos for benchmarks."""

import argparse
import json
import os
from pathlib import Path

from flipscale.data.sources.tar_source import TarSource

_SHARDS_HELP = "a folder, a glob, or a range such as 'laion/{00000..41407}.tar'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `flipscale prepare`."""
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT", required=True)
    add_shards_arguments(kinds.add_parser("shards", help="write shards from a folder, a table or a `datasets` name"))
    inspect = kinds.add_parser("inspect", help="report what is in shards, and draw a sheet of samples")
    inspect.add_argument("shards", help=_SHARDS_HELP)
    inspect.add_argument("--sheet", type=Path, default=Path("contact_sheet.png"), help="the PNG to write")
    inspect.add_argument("--tokenizer", help="as in a recipe; also counts tokens")
    inspect.add_argument("--max_samples", type=int, default=0, help="check this many, evenly spread; 0 checks all")
    inspect.add_argument("--json", action="store_true", help="one JSON line instead of a table")
    demo = kinds.add_parser("demo", help="download and render the emoji sets: shards, a test set, a tokenizer")
    demo.add_argument("directory", type=Path)
    demo.add_argument(
        "--with_validation",
        action="store_true",
        help="also write a validation set by one artist, and training data without it",
    )
    demo.add_argument(
        "--with_unseen",
        action="store_true",
        help="also write training data without a tenth of the concepts, and a test set of these",
    )
    photos = kinds.add_parser(
        "photos", help="write JPEGs of two sizes to benchmark loaders with, from a Debian package"
    )
    photos.add_argument("directory", type=Path)
    photos.add_argument("--num_images", type=int, default=2000, help="of each size")
    index = kinds.add_parser(
        "index", help="write the index of offsets beside each shard (training does it when absent)"
    )
    index.add_argument("shards", help=_SHARDS_HELP)


def add_shards_arguments(shards: argparse.ArgumentParser) -> None:
    """Add the options of `flipscale prepare shards`."""
    shards.add_argument(
        "source",
        help="a folder of images with .txt or .json beside them or a metadata table in it; "
        "a CSV, TSV, JSONL or parquet table of paths and captions; or the name of a data set for `datasets`",
    )
    shards.add_argument("directory", type=Path, help="where the shards are written; an interrupted run continues there")
    shards.add_argument("--image_column", help="of a table or data set; by default the first common name that it has")
    shards.add_argument("--caption_column", help="likewise; a list of texts gives an image several captions")
    shards.add_argument("--split", default="train", help="of a data set")
    shards.add_argument("--short_side", type=int, default=256, help="shrink larger images to it; keep others")
    shards.add_argument("--jpeg_quality", type=int, default=90, help="of the images that are shrunk")
    shards.add_argument("--pairs_per_shard", type=int, default=10_000)
    shards.add_argument("--drop_duplicates", action="store_true", help="keep the first of images with the same bytes")
    shards.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="processes")


def run(args: argparse.Namespace) -> None:
    """Prepare what `args.kind` names.

    Raises:
        ValueError: the input or an option is wrong.
        OSError: a step failed.
    """
    {"shards": _shards, "inspect": _inspect, "demo": _demo, "photos": _photos, "index": _index}[args.kind](args)


def _shards(args: argparse.Namespace) -> None:
    from flipscale.preparation.pair_list import open_pairs
    from flipscale.preparation.shard_writer import ShardOptions, report_table, write_shards

    options = ShardOptions(args.short_side, args.jpeg_quality, args.pairs_per_shard, args.drop_duplicates)
    pairs = open_pairs(args.source, args.image_column, args.caption_column, args.split)
    print(report_table(write_shards(pairs, args.source, args.directory, options, args.num_workers), args.directory))


def _inspect(args: argparse.Namespace) -> None:
    from flipscale.data.tokenizers import load_tokenizer
    from flipscale.preparation.inspection import inspect_shards, inspection_table

    if args.max_samples < 0:
        raise ValueError(f"max_samples is {args.max_samples}; it must be at least 0, which checks all")
    source = TarSource(args.shards)
    tokenizer = load_tokenizer(args.tokenizer, 10**9) if args.tokenizer else None
    figures = inspect_shards(source, args.sheet, tokenizer, args.max_samples)
    print(json.dumps(figures) if args.json else f"{inspection_table(figures)}\n\nsamples drawn in {args.sheet}")


def _demo(args: argparse.Namespace) -> None:
    from flipscale.preparation.demo_set import prepare_demo

    prepare_demo(args.directory, with_validation=args.with_validation, with_unseen=args.with_unseen)


def _photos(args: argparse.Namespace) -> None:
    from flipscale.preparation.photo_set import prepare_photos

    prepare_photos(args.directory, args.num_images)


def _index(args: argparse.Namespace) -> None:
    from flipscale.data.recipe import DataRecipe
    from flipscale.data.sources.opening import open_shards
    from flipscale.data.sources.remote_source import RemoteTarSource

    source = open_shards(args.shards, DataRecipe(shards_per_block=1))
    if isinstance(source, RemoteTarSource):
        source.publish_indices()
    for fault in source.faults:
        print(f"{fault.cause}: {fault.shard}: {fault.detail}")
    print(f"{len(source)} samples in {len(source.shard_sizes)} shards")
