"""`flipscale prepare coco_captions` and `flipscale prepare vqa_v2`: their arguments, and what they print."""

import argparse
from pathlib import Path

from flipscale.io.options import Count, add_num_workers, number, output_folder


def add_captions_arguments(captions: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale prepare coco_captions`."""
    _add_arguments(captions, "dataset_coco.json, the split")


def add_questions_arguments(questions: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale prepare vqa_v2`."""
    _add_arguments(questions, "the four JSON files of VQA v2.0's training and validation questions")
    questions.add_argument(
        "--with_val",
        action="store_true",
        help="Learn the validation questions too, but for those of the last 1,000 images, which are the test set then; "
        "by default all of them are the test set.",
    )


def _add_arguments(kind: argparse.ArgumentParser, files: str) -> None:
    kind.add_argument(
        "source", type=Path, help=f"The folder with {files}, and COCO's images of 2014 in train2014/ and val2014/."
    )
    kind.add_argument(
        "directory",
        type=output_folder,
        help="The folder to write; the same command continues there after an interruption.",
    )
    kind.add_argument(
        "--short_side",
        type=number(Count),
        default=512,
        help="Shrink images to this short side in pixels if theirs is longer; 512, the default, leaves most alone.",
    )
    add_num_workers(kind)


def prepare_captions(args: argparse.Namespace) -> None:
    """Write COCO's captions and print what was written.

    Raises:
        ValueError, OSError: as `prepare_coco_captions`.
    """
    from flipscale.preparation.coco.captions import prepare_coco_captions
    from flipscale.preparation.shard_report import report_table

    for folder, report in prepare_coco_captions(args.source, args.directory, args.short_side, args.num_workers).items():
        print(f"{folder}\n{report_table(report, folder)}\n")


def prepare_questions(args: argparse.Namespace) -> None:
    """Write VQAv2 and print what was written.

    Raises:
        ValueError, OSError: as `prepare_vqa_v2`.
    """
    from flipscale.preparation.coco.questions import prepare_vqa_v2
    from flipscale.preparation.shard_report import report_table

    reports, answers, unlearned = prepare_vqa_v2(
        args.source, args.directory, args.with_val, args.short_side, args.num_workers
    )
    for folder, report in reports.items():
        print(f"{folder}\n{report_table(report, folder)}\n")
    print(
        f"{args.directory / 'classnames.txt'}: {answers:,} answers, for loss.options.num_answers; {unlearned:,} "
        "training questions have none of them and are left out"
    )
