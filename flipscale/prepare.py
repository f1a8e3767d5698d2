"""Data on disk: the demo set, and the index of any shards."""

import argparse
from pathlib import Path

from flipscale.data.tar_source import TarSource


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `flipscale prepare` takes."""
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT", required=True)
    demo = kinds.add_parser("demo", help="download and render the emoji sets: shards, a test set, a tokenizer")
    demo.add_argument("directory", type=Path)
    demo.add_argument(
        "--with_validation", action="store_true", help="also a validation artist, and training without it"
    )
    demo.add_argument(
        "--with_unseen", action="store_true", help="also a tenth of the concepts held out of every artist"
    )
    photos = kinds.add_parser("photos", help="JPEGs of two sizes to measure loaders with, from a Debian package")
    photos.add_argument("directory", type=Path)
    photos.add_argument("--num_images", type=int, default=2000, help="of each size")
    index = kinds.add_parser(
        "index", help="write the index of offsets beside each shard (training does it when absent)"
    )
    index.add_argument("shards", help="a folder, a glob, or a range such as 'laion/{00000..41407}.tar'")


def run(args: argparse.Namespace) -> None:
    """Prepares what `args.kind` names."""
    if args.kind == "demo":
        from flipscale.data.demo_set import prepare_demo

        prepare_demo(args.directory, with_validation=args.with_validation, with_unseen=args.with_unseen)
        return
    if args.kind == "photos":
        from flipscale.data.photo_set import prepare_photos

        prepare_photos(args.directory, args.num_images)
        return
    source = TarSource(args.shards)
    for fault in source.faults:
        print(f"{fault.cause}: {fault.shard}: {fault.detail}")
    print(f"{len(source)} samples in {len(source.shard_sizes)} shards")
