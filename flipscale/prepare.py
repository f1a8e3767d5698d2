"""Data on disk: the demo set, and the index of any shards."""

import argparse
from pathlib import Path


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
    index = kinds.add_parser(
        "index", help="write the index of offsets beside each shard (training does it when absent)"
    )
    index.add_argument("shards", help="a folder, a glob, or a range such as 'laion/{00000..41407}.tar'")


def run(args: argparse.Namespace) -> None:
    """Prepares what `args.kind` names."""
    from flipscale.data.loader import DataRecipe
    from flipscale.data.remote_source import RemoteTarSource
    from flipscale.data.sources import open_shards

    if args.kind == "demo":
        from flipscale.data.demo_set import prepare_demo

        prepare_demo(args.directory, with_validation=args.with_validation, with_unseen=args.with_unseen)
        return
    source = open_shards(args.shards, DataRecipe(shards_per_block=1))
    if isinstance(source, RemoteTarSource):
        source.publish_indices()
    for fault in source.faults:
        print(f"{fault.cause}: {fault.shard}: {fault.detail}")
    print(f"{len(source)} samples in {len(source.shard_sizes)} shards")
