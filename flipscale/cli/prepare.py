"""Prepare data: write, index, inspect and audit shards, train tokenizers, and download pairs and test sets."""

import dataclasses
import json
import time
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Literal

from flipscale.data.samples import Source
from flipscale.data.sources.opening import open_shards, open_source
from flipscale.data.sources.remote import RemoteTarSource
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.task_page import pages_table, read_page, suite_pages
from flipscale.io.atomic import new_folder
from flipscale.io.command_line import Command, OutputFolder
from flipscale.io.cores import decoding_workers, usable_cores
from flipscale.io.errors import UserError
from flipscale.io.options import (
    Count,
    CountOrZero,
    Pairs,
    Pixels,
    Seed,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    Threads,
    Workers,
)
from flipscale.io.paths import quoted
from flipscale.preparation.lists import FOLDER, open_pairs, source_of
from flipscale.preparation.weighing import WeightOptions, make_weights
from flipscale.process.state import set_defaults
from flipscale.recipe.data import DataRecipe

Names = list[str]  # because a field of `Tasks` is called list


@dataclass(frozen=True)
class Shards:
    """Write tar shards from a folder of images, a table or a `datasets` data set.

    Args:
        source: A folder of images (with a .txt or .json file next to each, a metadata table, or a folder per class), a
            CSV, TSV, JSONL or parquet table of paths and captions, a folder of Parquet files, or a data set of the
            `datasets` library (saved, or its name on the Hub).
        directory: Folder to write. After an interruption, the same command continues.
        image_column: Column of images. Default: the first one named image, file_name, filename, path, filepath,
            image_path, img or picture.
        caption_column: Column of captions. Default: the first one named caption, captions, text, title, txt or
            description. Several columns, or a list of texts, hold several captions of one image.
        labels: Also write classes. `folder`: an image's class is its folder. Any other name is a column of the table.
            Default: no classes.
        split: Hold out this share of the images, such as 0.1, as a test set. The folder then has train/ and test/. An
            image's content decides its part, so duplicates stay together.
        dataset_split: Split of a `datasets` data set.
        short_side: Shrink larger images to this short side, in pixels.
        jpeg_quality: JPEG quality of shrunk images.
        pairs_per_shard: Pairs in a shard.
        drop_duplicates: Keep only the first of several images with the same bytes.
        allow_outside: Also read files outside the source's folder, named or linked.
        max_bad_fraction: Exit with code 2 if a larger share is unusable, after the usable pairs are written.
        num_workers: Number of worker processes. Default: one for each core.
    """

    source: str
    directory: OutputFolder
    _: KW_ONLY
    image_column: str | None = None
    caption_column: Names = field(default_factory=list)
    labels: str | None = None
    split: ShareBelowOne = 0.0
    dataset_split: str = "train"
    short_side: int = 256
    jpeg_quality: int = 90
    pairs_per_shard: int = 10_000
    drop_duplicates: bool = False
    allow_outside: bool = False
    max_bad_fraction: Share = 0.95
    num_workers: Threads = field(default_factory=usable_cores)

    def run(self) -> None:
        from flipscale.preparation.inspection import read_captions
        from flipscale.preparation.shard_writer import ShardOptions, check_reports, report_table, write_set

        options = ShardOptions(
            *(self.short_side, self.jpeg_quality, self.pairs_per_shard, self.drop_duplicates, self.allow_outside),
            *(self.labels, self.split),
        )
        pairs = open_pairs(
            self.source, self.image_column, self.caption_column, self.dataset_split, self.allow_outside, self.labels
        )
        hint = f"; --labels {pairs.usual_labels} --split 0.1 holds out a labelled test set too"
        print(" ".join(pairs.layout.split()) + (hint if pairs.usual_labels and not self.labels else ""))
        reports = write_set(pairs, self.source, self.directory, options, self.num_workers)
        for folder, report in reports.items():
            print(f"\n{folder}\n{report_table(report, folder)}")
        check_reports(reports, self.max_bad_fraction)
        train, *tests = reports
        for test in tests if pairs.usual_labels != FOLDER else ():  # classes' names are on both sides
            known, texts = set(read_captions(_open(str(train)))), read_captions(_open(str(test)))
            if share := 100 * sum(text in known for text in texts) / len(texts):
                print(
                    f"\n{share:.3g} % of the captions of {test} are also in {train}, which makes the test easier; to "
                    "hold out whole products that have several pictures, write a list for each part"
                )
        held_out = f"; {tests[0]} is held out, and {self.directory} is the test set for evaluations" if tests else ""
        print(f"\n{train} is for data.shards of a recipe{held_out}")
        print(f"next: flipscale prepare tokenizer {quoted(train)} {quoted(self.directory / 'tokenizer')}")
        data = f"--shards {quoted(train)}" + (f" --tests {quoted(self.directory)}" if tests else "")
        print(f"or, for a model that you have: flipscale init RECIPE.yaml --start MODEL {data}")


@dataclass(frozen=True)
class Tokenizer:
    """Train a SentencePiece tokenizer on the captions of shards.

    Args:
        shards: Shards: a folder, a glob, or a range such as 'laion/{00000..41407}.tar'. Or a folder of `save_to_disk`
            or Parquet files with images.
        directory: Folder to write, for a recipe's data.tokenizer.
        vocab_size: Largest number of entries.
        begin_and_end: Add the begin and end tokens that a caption decoder needs.
    """

    shards: str
    directory: OutputFolder
    _: KW_ONLY
    vocab_size: Count = 8000
    begin_and_end: bool = False

    def run(self) -> None:
        from flipscale.data.tokenizers import train_sentencepiece
        from flipscale.model.configuration_flip import FlipTextConfig
        from flipscale.preparation.inspection import read_captions

        captions = read_captions(_open(self.shards))
        with new_folder(self.directory) as folder:
            tokenizer = train_sentencepiece(
                *(captions, folder, self.vocab_size, FlipTextConfig.max_position_embeddings, self.begin_and_end)
            )
        lengths = sorted(len(ids) for ids in tokenizer(captions)["input_ids"])
        print(
            f"{self.directory}: {len(tokenizer):,} entries, from {len(captions):,} captions, {len(set(captions)):,} of "
            f"them different; a caption has {lengths[len(lengths) // 2]} tokens in the median, {lengths[-1]} at most"
        )
        set_of_parts = Path(self.shards).parent  # with `prepare shards --split`
        tests = f" --tests {quoted(set_of_parts)}" if (set_of_parts / "test/manifest.jsonl").is_file() else ""
        where = f"--shards {quoted(self.shards)} --tokenizer {quoted(self.directory)}{tests}"
        print(f"next: flipscale init RECIPE.yaml {where}")


@dataclass(frozen=True)
class Inspect:
    """Print counts and sizes of shards, find bad samples, and draw a contact sheet.

    Args:
        shards: Shards: a folder, a glob, or a range such as 'laion/{00000..41407}.tar'. Or a folder of `save_to_disk`
            or Parquet files with images.
        sheet: PNG file to draw.
        tokenizer: Also count the tokens of captions, with a tokenizer named as in a recipe.
        max_samples: Samples to check, evenly spread; 0 for all.
        json: Print one JSON line instead of a table.
    """

    shards: str
    _: KW_ONLY
    sheet: Path = Path("contact_sheet.png")
    tokenizer: str | None = None
    max_samples: CountOrZero = 0
    json: bool = False

    def run(self) -> None:
        from flipscale.data.tokenizers import load_tokenizer
        from flipscale.preparation.inspection import inspect_shards, inspection_table

        source = _open(self.shards)
        tokenizer = load_tokenizer(self.tokenizer, 10**9) if self.tokenizer else None
        figures = inspect_shards(source, self.sheet, tokenizer, self.max_samples)
        print(json.dumps(figures) if self.json else f"{inspection_table(figures)}\n\nsamples drawn in {self.sheet}")


@dataclass(frozen=True)
class Audit:
    """Report a data set's captions and duplicates, and the test images that it contains.

    Args:
        shards: Shards: a folder, a glob, or a range such as 'laion/{00000..41407}.tar'.
        tests: Look for these test images in the training data: a test set's folder, or a folder of several sets.
        output_dir: Folder to write.
        tokenizer: Also count the tokens of captions, with a tokenizer named as in a recipe.
        num_workers: Number of worker processes. Default: one for each core.
    """

    shards: str
    _: KW_ONLY
    tests: Path | None = None
    output_dir: OutputFolder = Path("audit")
    tokenizer: str | None = None
    num_workers: Threads = field(default_factory=usable_cores)

    def run(self) -> None:
        from flipscale.preparation.audit.audit import audit, find_test_sets, summary

        test_sets = find_test_sets(self.tests) if self.tests else {}
        source = open_shards(self.shards)
        figures = audit(self.shards, source, test_sets, self.output_dir, self.tokenizer, self.num_workers)
        print("\n".join(f"{name:<52}{value:>16}" for name, value in summary(figures)))
        print(f"\nthe whole audit is in {self.output_dir / 'audit.md'}")


@dataclass(frozen=True)
class Tasks:
    """Download the test sets of tasks from the Hub.

    Args:
        directory: Folder to write. The recipes expect data/tasks. After an interruption, the same command continues.
        suite: Prepare the tasks of a suite, such as paper, robustness or composition, or all.
        only: Prepare these tasks, such as food101 pets.
        list: Print the tasks, and download nothing.
    """

    directory: OutputFolder | None = None
    _: KW_ONLY
    suite: str | None = None
    only: Names = field(default_factory=list)
    list: bool = False

    def run(self) -> None:
        from flipscale.preparation.task_sets import prepare_tasks

        if self.suite and self.only:
            raise UserError("--suite and --only exclude each other; give one of them")
        pages = [read_page(name) for name in self.only] or suite_pages(self.suite or "all")
        if self.list:
            print(pages_table(pages))
            return
        if self.directory is None or not (self.suite or self.only):
            raise UserError("name a folder, such as data/tasks, and --suite paper or --only TASK; --list prints tasks")
        named = dict.fromkeys(page.data for page in pages)
        prepare_tasks(self.directory, list(map(read_page, named)))


@dataclass(frozen=True)
class NamedPairs:
    """Download a named set of image-text pairs from the Hub, such as cc3m.

    Args:
        set: Name of the set.
        directory: Folder to write: train/ and, if the set has it, validation/. After an interruption, the same command
            continues.
        list: Print the sets, and download nothing.
    """

    set: str | None = None
    directory: OutputFolder | None = None
    _: KW_ONLY
    list: bool = False

    def run(self) -> None:
        from flipscale.data.sources.pair_set import read_set, sets_table

        if self.list:
            print(sets_table())
            return
        if self.set is None or self.directory is None:
            raise UserError("name a set and a folder, such as cc3m data/cc3m; --list prints the sets")
        pairs = read_set(self.set)
        from flipscale.preparation.pair_download import download_pairs

        source = download_pairs(pairs, self.directory)
        train = self.directory / "train"
        print(f"{len(source):,} pairs in {len(source.shard_sizes):,} shards of {train}; {pairs.sample}")
        print(f"licence: {pairs.licence}")
        print(f"next: flipscale pretrain --config RECIPE --data.shards {quoted(train)}")


@dataclass(frozen=True)
class Resize:
    """Shrink the images of shards, so that training decodes fewer pixels.

    Args:
        shards: Shards: a folder, a glob, or a range such as 'laion/{00000..41407}.tar'.
        directory: Folder to write. After an interruption, the same command continues.
        short_side: Short side of shrunk images.
        jpeg_quality: JPEG quality of shrunk images.
        num_workers: Number of worker processes. Default: one for each core.
    """

    shards: str
    directory: OutputFolder
    _: KW_ONLY
    short_side: int = 288
    jpeg_quality: int = 90
    num_workers: Threads = field(default_factory=usable_cores)

    def run(self) -> None:
        from flipscale.preparation.resize import resize_shards
        from flipscale.preparation.shard_writer import REDRAWN, ShardOptions

        options = ShardOptions(short_side=self.short_side, jpeg_quality=self.jpeg_quality)
        total = resize_shards(self.shards, self.directory, options, self.num_workers)
        print(
            f"{self.directory}: {total['images']:,} images, {total['shrunk']:,} of them shrunk to a short side of "
            f"{self.short_side}; {total['before'] / 1e9:.2f} GB became {total['after'] / 1e9:.2f}"
            + (f"; {total['redrawn']:,} redrawn, {REDRAWN}" if total["redrawn"] else "")
            + (f"; {total['left_out']:,} links, devices or sparse files are left out" if total["left_out"] else "")
        )


@dataclass(frozen=True)
class Weights(WeightOptions):
    """Make sampling weights of shards, for a recipe's data.weights.

    Args:
        shards: Shards: a folder, a glob, or a range such as 'laion/{00000..41407}.tar'. Or a folder of `save_to_disk`
            or Parquet files with images.
        directory: Folder to write.
        num_workers: Number of worker processes. Default: one for each core.
    """

    shards: str
    directory: OutputFolder
    _: KW_ONLY
    num_workers: Threads = dataclasses.field(default_factory=usable_cores)

    def run(self) -> None:
        options = WeightOptions(**{name: getattr(self, name) for name in WeightOptions.__dataclass_fields__})
        options.check()
        with new_folder(self.directory) as folder:
            composition, matches = make_weights(_open(self.shards), self.shards, options, folder, self.num_workers)
        print(*filter(None, (f"{self.directory}: {composition}", matches)), sep="\n")
        print(f"next: flipscale pretrain --config RECIPE --data.weights {quoted(self.directory)}")


@dataclass(frozen=True)
class Embed:
    """Embed the images and texts of shards once, and store their features for training.

    Args:
        shards: Shards: a folder, a glob, or a range such as 'laion/{00000..41407}.tar'.
        directory: Folder to write. After an interruption, the same command continues. Several processes may run at
            once; they share the shards.
        model: A run, a model folder, a Hub name, open_clip:NAME,PRETRAINED or hf:NAME, as for `flipscale evaluate`.
            hf:NAME may be a tower alone: an image model, also timm's, a text encoder or a decoder language model.
        features: `embeds` are projected and of unit length. `pooled` are before the projection, which a recipe trains.
        towers: Embed the images, the texts (the first caption of each) or both.
        image_size: Image size, a multiple of the patch size. The recipe's stages need the same. Default: the model's
            own.
        dims: Cut the embeds to their first numbers, for a model whose first numbers were trained.
        crops: Embed this number of random crops of each image, for data.teachers of a recipe. Default: the whole image.
        crop_scale: Least and most area of the crops as a fraction of the image's, as in the recipe's data.crop_scale.
            Default: 0.5 1.0.
        no_mirror: Mirror no crop, as with data.mirror false. By default, half of the crops are mirrored.
        seed: Seed of the crops. Default: 0.
        batch_size: Samples embedded at once.
        num_workers: Processes that decode images; 0 decodes in this process. Default: its share of the cores, less one.
    """

    shards: str
    directory: OutputFolder
    _: KW_ONLY
    model: str
    features: Literal["embeds", "pooled"] = "embeds"
    towers: list[Literal["images", "texts"]] = field(default_factory=lambda: ["images", "texts"])
    image_size: Pixels | None = None
    dims: Count | None = None
    crops: Count | None = None
    crop_scale: tuple[ShareAboveZero, ShareAboveZero] | None = None
    no_mirror: bool = False
    seed: Seed | None = None
    batch_size: Pairs = 256
    num_workers: Workers | None = None

    def run(self) -> None:
        set_defaults(OMP_WAIT_POLICY="passive")  # see `flipscale.cli.evaluate`
        from flipscale.data.features import TeacherCrops
        from flipscale.engines.build_engine import start_accelerator
        from flipscale.hub.loading import open_embedder
        from flipscale.preparation.feature_writer import precompute_features

        least, most = self.crop_scale or (0.5, 1.0)
        if least > most:
            raise UserError(f"--crop_scale is {least:g} {most:g}; expected the smaller share first")
        crops = TeacherCrops(self.crops, (least, most), not self.no_mirror, self.seed or 0) if self.crops else None
        if self.dims and self.features == "pooled":
            raise UserError(f"--dims is {self.dims} with --features pooled; it is for embeds")
        of_crops = [f"--{name}" for name in ("crop_scale", "no_mirror", "seed") if getattr(self, name)]
        if of_crops and crops is None:
            raise UserError(f"{', '.join(of_crops)} without --crops; add --crops N, or leave out the options of crops")
        workers = decoding_workers(self.num_workers)  # before accelerate binds this process to some cores
        source = _open(self.shards, max_bad_fraction=0.0)
        if not isinstance(source, TarSource):
            raise UserError(f"shards is {self.shards!r}; expected tar shards. Fix: `flipscale prepare shards`")
        accelerator = start_accelerator([], ".")
        embedder = open_embedder(self.model, accelerator, self.batch_size, workers).at(self.image_size)
        embedder = replace(embedder, dims=self.dims)
        began = time.monotonic()
        counts = precompute_features(embedder, source, self.directory, self.towers, self.features, crops)
        if accelerator.is_main_process:
            bad = " and ".join(f"{counts[f'bad {tower}']:,} {tower}" for tower in self.towers)
            print(
                f"{self.directory}: embedded {counts['samples']:,} samples of {counts['shards']:,} shards, "
                f"{counts['samples'] / (time.monotonic() - began):,.0f} a second; {bad} cannot be used"
            )


@dataclass(frozen=True)
class Index:
    """Write the manifest of all shards, and an index of offsets next to each shard. Training does this too if the
    manifest is missing.

    Args:
        shards: Shards: a folder, a glob, or a range such as 'laion/{00000..41407}.tar'.
    """

    shards: str

    def run(self) -> None:
        source = open_shards(self.shards, anew=True)
        if isinstance(source, RemoteTarSource):
            source.publish()
        for fault in source.faults:
            print(f"{fault.cause}: {fault.shard}: {fault.detail}")
        print(f"{len(source)} samples in {len(source.shard_sizes)} shards")


COMMANDS: dict[str, type[Command]] = {
    "shards": Shards,
    "tokenizer": Tokenizer,
    "inspect": Inspect,
    "audit": Audit,
    "pairs": NamedPairs,
    "tasks": Tasks,
    "resize": Resize,
    "weights": Weights,
    "embed": Embed,
    "index": Index,
}


def _open(shards: str, max_bad_fraction: float = 1.0) -> Source:
    """Return the source of shards, a saved data set or Parquet files. Shards that cannot be read are left out. Raise
    UserError if there are no shards, or more than `max_bad_fraction` of them cannot be read."""
    data = DataRecipe(sources=[source_of(shards)], lanes=1, shards_per_block=1, max_bad_fraction=max_bad_fraction)
    return open_source(data)
