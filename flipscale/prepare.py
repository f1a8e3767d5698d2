"""Prepare data: write, index, inspect and audit shards, train tokenizers, and download test sets."""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flipscale.io.cores import decoding_workers
from flipscale.io.errors import UserError
from flipscale.io.files import quoted
from flipscale.io.options import (
    Count,
    CountOrZero,
    Finite,
    Pairs,
    Pixels,
    Seed,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    add_num_workers,
    number,
    output_folder,
)

if TYPE_CHECKING:
    from flipscale.data.samples import Source

_SHARDS_HELP = "Shards: a folder, a glob, or a range such as 'laion/{00000..41407}.tar'."
_TOKENIZER_HELP = "Also count the tokens of captions, with a tokenizer named as in a recipe."
_CONTINUES = "After an interruption, the same command continues."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale prepare`."""
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT", required=True)

    def add(function: Callable[[argparse.Namespace], None], summary: str) -> argparse.ArgumentParser:
        kind = kinds.add_parser(function.__name__.strip("_"), help=summary, description=summary)
        kind.set_defaults(prepare=function)
        return kind

    shards = add(_shards, "Write tar shards from a folder of images, a table or a `datasets` data set.")
    _add_shards_arguments(shards)

    tokenizer = add(_tokenizer, "Train a SentencePiece tokenizer on the captions of shards.")
    tokenizer.add_argument("shards", help=f"{_SHARDS_HELP} Or a folder of `save_to_disk` or Parquet files with images.")
    tokenizer.add_argument("directory", type=output_folder, help="Folder to write, for a recipe's data.tokenizer.")
    tokenizer.add_argument("--vocab_size", type=number(Count), default=8000, help="Most entries. Default: 8000.")
    tokenizer.add_argument(
        "--begin_and_end", action="store_true", help="Add the begin and end tokens that a caption decoder needs."
    )

    inspect = add(_inspect, "Print counts and sizes of shards, find bad samples, and draw a contact sheet.")
    inspect.add_argument("shards", help=_SHARDS_HELP)
    sheet = Path("contact_sheet.png")
    inspect.add_argument("--sheet", type=Path, default=sheet, help=f"PNG file to draw. Default: {sheet}.")
    inspect.add_argument("--tokenizer", help=_TOKENIZER_HELP)
    most_help = "Samples to check, evenly spread; 0 for all. Default: 0."
    inspect.add_argument("--max_samples", type=number(CountOrZero), default=0, help=most_help)
    inspect.add_argument("--json", action="store_true", help="Print one JSON line instead of a table.")

    audit = add(_audit, "Report a data set's captions and duplicates, and the test images that it contains.")
    audit.add_argument("shards", help=_SHARDS_HELP)
    audit.add_argument(
        "--tests", type=Path, metavar="DIR",
        help="Look for test images in the training data. DIR is a test set's folder, or a folder of several sets.",
    )  # fmt: skip
    folder = Path("audit")
    audit.add_argument("--output_dir", type=output_folder, default=folder, help=f"Folder to write. Default: {folder}.")
    audit.add_argument("--tokenizer", help=_TOKENIZER_HELP)
    add_num_workers(audit)

    tasks = add(_tasks, "Download the test sets of tasks from the Hub.")
    tasks.add_argument(
        "directory", type=output_folder, nargs="?", help=f"Folder to write. The recipes expect data/tasks. {_CONTINUES}"
    )
    tasks.add_argument("--suite", help="Prepare the tasks of a suite: paper, robustness, fairness, languages, or all.")
    tasks.add_argument("--only", nargs="+", metavar="TASK", help="Prepare these tasks, such as food101 pets.")
    tasks.add_argument("--list", action="store_true", help="Print the tasks, and download nothing.")

    resize = add(_resize, "Shrink the images of shards, so that training decodes fewer pixels.")
    resize.add_argument("shards", help=_SHARDS_HELP)
    resize.add_argument("directory", type=output_folder, help=f"Folder to write. {_CONTINUES}")
    resize.add_argument("--short_side", type=int, default=288, help="Short side of shrunk images. Default: 288.")
    resize.add_argument("--jpeg_quality", type=int, default=90, help="JPEG quality of shrunk images. Default: 90.")
    add_num_workers(resize)

    _add_weights_arguments(add(_weights, "Make sampling weights of shards, for a recipe's data.weights."))

    embed = add(_embed, "Embed the images and texts of shards once, and store their features for training.")
    embed.add_argument("shards", help=_SHARDS_HELP)
    embed.add_argument(
        "directory", type=output_folder, help=f"Folder to write. {_CONTINUES} Several processes share the shards."
    )
    embed.add_argument(
        "--model", required=True,
        help="A run, a model folder, a Hub name, open_clip:NAME,PRETRAINED or hf:NAME, as of `flipscale evaluate`.",
    )  # fmt: skip
    embed.add_argument(
        "--features", choices=["embeds", "pooled"], default="embeds",
        help="`embeds` are projected and of unit length. `pooled` are before the projection, which a recipe trains. "
        "Default: embeds.",
    )  # fmt: skip
    embed.add_argument(
        "--towers", nargs="+", choices=["images", "texts"], default=["images", "texts"],
        help="Embed the images, the texts (the first caption of each) or both. Default: both.",
    )  # fmt: skip
    size_help = "Image size, a multiple of the patch size. The recipe's stages need the same. Default: the model's own."
    embed.add_argument("--image_size", type=number(Pixels), metavar="PIXELS", help=size_help)
    embed.add_argument(
        "--crops", type=number(Count), metavar="N",
        help="Embed N random crops of each image, for data.teachers of a recipe. Default: the whole image.",
    )  # fmt: skip
    embed.add_argument(
        "--crop_scale", nargs=2, type=number(ShareAboveZero), metavar=("LEAST", "MOST"),
        help="Area of the crops as a fraction of the image's, the recipe's data.crop_scale. Default: 0.5 1.0.",
    )  # fmt: skip
    embed.add_argument("--no_mirror", action="store_true", help="Mirror no crop, for data.mirror false. Default: half.")
    embed.add_argument("--seed", type=number(Seed), help="Seed of the crops. Default: 0.")
    embed.add_argument("--batch_size", type=number(Pairs), default=256, help="Samples embedded at once. Default: 256.")
    add_num_workers(embed, decode=True)

    index = add(
        _index,
        "Write the manifest of all shards, and an index of offsets beside each shard. Training does this too if the "
        "manifest is missing.",
    )
    index.add_argument("shards", help=_SHARDS_HELP)


def _add_shards_arguments(shards: argparse.ArgumentParser) -> None:
    add = shards.add_argument
    add(
        "source",
        help="A folder of images (with a .txt or .json file beside each, a metadata table, or a folder per class), "
        "a CSV, TSV, JSONL or parquet table of paths and captions, a folder of Parquet files, or a data set of the "
        "`datasets` library (saved, or its name on the Hub).",
    )
    add("directory", type=output_folder, help=f"Folder to write. {_CONTINUES}")
    add(
        "--image_column",
        help="Column of images. Default: the first one named image, file_name, filename, path, filepath, image_path, "
        "img or picture.",
    )
    add(
        "--caption_column",
        help="Column of captions. Default: the first one named caption, captions, text, title, txt or description. A "
        "list of texts holds several captions of one image.",
    )
    add(
        "--labels", metavar="folder|COLUMN",
        help="Also write classes: `folder` takes each image's folder as its class, COLUMN a column of the table. "
        "Default: no classes.",
    )  # fmt: skip
    add(
        "--split", type=number(ShareBelowOne), default=0.0, metavar="SHARE",
        help="Hold out this share of the images, such as 0.1, as a test set. The folder then has train/ and test/. An "
        "image's content decides its part, so duplicates stay together. Default: 0.",
    )  # fmt: skip
    add("--dataset_split", default="train", help="Split of a `datasets` data set. Default: train.")
    add("--short_side", type=int, default=256, help="Shrink larger images to this short side, in pixels. Default: 256.")
    add("--jpeg_quality", type=int, default=90, help="JPEG quality of shrunk images. Default: 90.")
    add("--pairs_per_shard", type=int, default=10_000, help="Pairs in a shard. Default: 10,000.")
    add("--drop_duplicates", action="store_true", help="Keep only the first of several images with the same bytes.")
    add("--allow_outside", action="store_true", help="Also read files outside the source's folder, named or linked.")
    add(
        "--max_bad_fraction", type=number(Share), default=0.95,
        help="Usable pairs are always written. Exit with code 2 if a larger share is unusable. Default: 0.95.",
    )  # fmt: skip
    add_num_workers(shards)


def _add_weights_arguments(weights: argparse.ArgumentParser) -> None:
    add, order = weights.add_argument, "in the order of the manifest"
    add("shards", help=f"{_SHARDS_HELP} Or a folder of `save_to_disk` or Parquet files with images.")
    add("directory", type=output_folder, help="Folder to write.")
    add("--scores", type=Path, metavar="FILE", help=f"An .npy file of a score for each sample, {order}.")
    add("--field", help="Field of KEY.json with the score. A sample without a number there is never drawn.")
    counts_help = "The score is the number of samples with the same caption."
    add("--caption_counts", action="store_true", default=None, help=counts_help)
    least_help = "Draw samples of at least this score equally often, and no others. Default: a score is a weight."
    add("--at_least", type=number(Finite), metavar="SCORE", help=least_help)
    add("--top", type=number(ShareAboveZero), metavar="SHARE", help="The same for this share of the highest scores.")
    clusters_help = f"An .npy file of each sample's cluster, {order}. Negative numbers are never drawn."
    add("--clusters", type=Path, metavar="FILE", help=clusters_help)
    features_help = "Cluster features by k-means: NNNNN.npy of each shard. Keeps clusters.npy. Needs faiss-cpu."
    add("--features", type=Path, metavar="DIR", help=features_help)
    add("--num_clusters", type=number(Count), metavar="N", help="Number of clusters of --features.")
    power_help = "Draw a cluster of n samples in proportion to n ** POWER: 1 as the data is, 0 all alike. Default: 0.2."
    add("--power", type=number(Share), default=0.2, help=power_help)
    add_num_workers(weights)


def run(args: argparse.Namespace) -> None:
    """Prepare the data that `args.kind` names.

    Raises:
        UserError: the input or an option is wrong.
        OSError: the disk or the network failed.
    """
    from flipscale.training.console import start_logging

    start_logging()
    args.prepare(args)


def _shards(args: argparse.Namespace) -> None:
    from flipscale.preparation.lists import open_pairs, printable
    from flipscale.preparation.shard_writer import ShardOptions, check_reports, report_table, write_set

    options = ShardOptions(
        *(args.short_side, args.jpeg_quality, args.pairs_per_shard, args.drop_duplicates, args.allow_outside),
        *(args.labels, args.split),
    )
    pairs = open_pairs(
        args.source, args.image_column, args.caption_column, args.dataset_split, args.allow_outside, args.labels
    )
    hint = f"; --labels {pairs.usual_labels} --split 0.1 holds out a labelled test set too"
    print(printable(pairs.layout) + (hint if pairs.usual_labels and not args.labels else ""))
    reports = write_set(pairs, args.source, args.directory, options, args.num_workers)
    for folder, report in reports.items():
        print(f"\n{folder}\n{report_table(report, folder)}")
    check_reports(reports, args.max_bad_fraction)
    train, *tests = reports
    held_out = f"; {tests[0]} is held out, and {args.directory} is the test set for evaluations" if tests else ""
    print(f"\n{train} is for data.shards of a recipe{held_out}")
    print(f"next: flipscale prepare tokenizer {quoted(train)} {quoted(args.directory / 'tokenizer')}")


def _open(shards: str, max_bad_fraction: float = 1.0) -> "Source":
    """Return the source of shards, a saved data set or Parquet files. Shards that cannot be read are left out.

    Raises:
        UserError: there are no shards, or more than `max_bad_fraction` of them cannot be read.
    """
    from flipscale.data.sources.opening import open_source
    from flipscale.preparation.lists import source_of
    from flipscale.recipe.data import DataRecipe

    data = DataRecipe(sources=[source_of(shards)], lanes=1, shards_per_block=1, max_bad_fraction=max_bad_fraction)
    return open_source(data)


def _tokenizer(args: argparse.Namespace) -> None:
    from flipscale.data.tokenizers import train_sentencepiece
    from flipscale.io.atomic import new_folder
    from flipscale.model.configuration_flip import FlipTextConfig
    from flipscale.preparation.inspection import read_captions

    captions = read_captions(_open(args.shards))
    with new_folder(args.directory) as folder:
        tokenizer = train_sentencepiece(
            *(captions, folder, args.vocab_size, FlipTextConfig.max_position_embeddings, args.begin_and_end)
        )
    lengths = sorted(len(ids) for ids in tokenizer(captions)["input_ids"])
    print(
        f"{args.directory}: {len(tokenizer):,} entries, from {len(captions):,} captions, {len(set(captions)):,} of "
        f"them different; a caption has {lengths[len(lengths) // 2]} tokens in the median, {lengths[-1]} at most"
    )
    set_of_parts = Path(args.shards).parent  # with `prepare shards --split`
    tests = f" --tests {quoted(set_of_parts)}" if (set_of_parts / "test/manifest.jsonl").is_file() else ""
    print(
        f"next: flipscale init RECIPE.yaml --shards {quoted(args.shards)} --tokenizer {quoted(args.directory)}{tests}"
    )


def _inspect(args: argparse.Namespace) -> None:
    from flipscale.data.sources.tar import TarSource
    from flipscale.data.tokenizers import load_tokenizer
    from flipscale.preparation.inspection import inspect_shards, inspection_table

    source = TarSource(args.shards)
    tokenizer = load_tokenizer(args.tokenizer, 10**9) if args.tokenizer else None
    figures = inspect_shards(source, args.sheet, tokenizer, args.max_samples)
    print(json.dumps(figures) if args.json else f"{inspection_table(figures)}\n\nsamples drawn in {args.sheet}")


def _audit(args: argparse.Namespace) -> None:
    from flipscale.data.sources.opening import open_shards
    from flipscale.preparation.audit.audit import audit, find_test_sets, summary

    test_sets = find_test_sets(args.tests) if args.tests else {}
    source = open_shards(args.shards)
    figures = audit(args.shards, source, test_sets, args.output_dir, args.tokenizer, args.num_workers)
    print("\n".join(f"{name:<52}{value:>16}" for name, value in summary(figures)))
    print(f"\nthe whole audit is in {args.output_dir / 'audit.md'}")


def _tasks(args: argparse.Namespace) -> None:
    from flipscale.data.task_page import pages_table, read_page, suite_pages
    from flipscale.preparation.task_sets import prepare_tasks

    if args.suite and args.only:
        raise UserError("--suite and --only exclude each other; give one of them")
    pages = [read_page(name) for name in args.only or ()] or suite_pages(args.suite or "all")
    if args.list:
        print(pages_table(pages))
        return
    if args.directory is None or not (args.suite or args.only):
        raise UserError("name a folder, such as data/tasks, and --suite paper or --only TASK; --list prints the tasks")
    named = dict.fromkeys(page.data for page in pages)
    prepare_tasks(args.directory, list(map(read_page, named)))


def _resize(args: argparse.Namespace) -> None:
    from flipscale.preparation.resize import resize_shards
    from flipscale.preparation.shard_writer import ShardOptions

    options = ShardOptions(short_side=args.short_side, jpeg_quality=args.jpeg_quality)
    total = resize_shards(args.shards, args.directory, options, args.num_workers)
    print(
        f"{args.directory}: {total['images']:,} images, {total['shrunk']:,} of them shrunk to a short side of "
        f"{args.short_side}; {total['before'] / 1e9:.2f} GB became {total['after'] / 1e9:.2f}"
        + (f"; {total['left_out']:,} links, devices or sparse files are left out" if total["left_out"] else "")
    )


def _weights(args: argparse.Namespace) -> None:
    from flipscale.io.atomic import new_folder
    from flipscale.preparation.sampling_weights import WeightOptions, make_weights

    options = WeightOptions(**{name: getattr(args, name) for name in WeightOptions.__dataclass_fields__})
    options.check()
    with new_folder(args.directory) as folder:
        composition = make_weights(_open(args.shards), args.shards, options, folder, args.num_workers)
    print(f"{args.directory}: {composition}")
    print(f"next: flipscale pretrain --config RECIPE --data.weights {quoted(args.directory)}")


def _embed(args: argparse.Namespace) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see `flipscale.evaluate`
    from flipscale.data.features import StoredCrops
    from flipscale.data.sources.tar import TarSource
    from flipscale.engines.start import start_accelerator
    from flipscale.evaluation.precomputed import precompute_features
    from flipscale.hub.loading import open_embedder

    scale = tuple(args.crop_scale or (0.5, 1.0))
    if scale[0] > scale[1]:
        raise UserError(f"--crop_scale is {scale[0]:g} {scale[1]:g}; expected the smaller share first")
    crops = StoredCrops(args.crops, scale, not args.no_mirror, args.seed or 0) if args.crops else None
    of_crops = [f"--{name}" for name in ("crop_scale", "no_mirror", "seed") if getattr(args, name)]
    if of_crops and crops is None:
        raise UserError(f"{', '.join(of_crops)} without --crops; add --crops N, or leave out the options of crops")
    workers = decoding_workers(args.num_workers)  # before accelerate binds this process to some cores
    source = _open(args.shards, max_bad_fraction=0.0)
    if not isinstance(source, TarSource):
        raise UserError(f"shards is {args.shards!r}; expected tar shards. Fix: `flipscale prepare shards`")
    accelerator = start_accelerator([], ".")
    embedder = open_embedder(args.model, accelerator, args.batch_size, workers).at(args.image_size)
    began = time.monotonic()
    counts = precompute_features(embedder, source, args.directory, args.towers, args.features, crops)
    if accelerator.is_main_process:
        bad = " and ".join(f"{counts[f'bad {tower}']:,} {tower}" for tower in args.towers)
        print(
            f"{args.directory}: embedded {counts['samples']:,} samples of {counts['shards']:,} shards, "
            f"{counts['samples'] / (time.monotonic() - began):,.0f} a second; {bad} cannot be used"
        )


def _index(args: argparse.Namespace) -> None:
    from flipscale.data.sources.opening import open_shards
    from flipscale.data.sources.remote import RemoteTarSource

    source = open_shards(args.shards, anew=True)
    if isinstance(source, RemoteTarSource):
        source.publish()
    for fault in source.faults:
        print(f"{fault.cause}: {fault.shard}: {fault.detail}")
    print(f"{len(source)} samples in {len(source.shard_sizes)} shards")
