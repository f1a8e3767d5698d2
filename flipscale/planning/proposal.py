"""The rules of `flipscale init`: a survey of the data, the numbers of a recipe's template, and its length.

The templates name the sources of their fields. The learning rate of small batches is by A. Malladi et al. (arXiv
2205.10287): with Adam, it follows the square root of the batch, below the batch size of the original rate.
"""

import math
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import PreTrainedTokenizerBase

from flipscale.data.captions import choose_caption
from flipscale.data.decode import open_image
from flipscale.data.samples import BadSample, Source
from flipscale.engines.launch import Launch
from flipscale.io.errors import UserError
from flipscale.io.templates import render
from flipscale.planning.flops import pair_flops
from flipscale.planning.memory import GPUS_OF_A_NODE, recipe_memory
from flipscale.recipe.data import DataRecipe
from flipscale.recipe.recipe import Recipe
from flipscale.start.complete_recipe import parse_recipe

LEAST_PAIRS = 16
# Further passes would memorise a small set, and gain little on a large set (30: GLIP's runs, 32: the paper's).
_EPOCHS_OF_SMALL, _EPOCHS_OF_LARGE, _LARGE = 100, 30, 1_000_000
# Fewest steps, because a tiny set needs more passes.
_LEAST_STEPS = 2_000
# Largest share of repeated captions in a batch, because they teach less. A tenth did not harm the demo.
MOST_REPEATED = 0.1
# Share of repeated captions in a batch above which captions are taken for names of a few classes.
FEW_CLASSES = 0.5
_TEMPLATES, _WIDTH = Path(__file__).with_name("templates"), 118
# Enough samples for percentiles and for repeated captions; a few seconds in a large set.
_MOST_SAMPLES = 4096
_FETCHED_SHARDS = 4  # of shards at a URL


@dataclass(frozen=True)
class Survey:
    """Statistics of the data from a sample of its pairs.

    Args:
        pairs: number of pairs in the shards, usable or not.
        width, height: median size of the pictures in pixels.
        tokens: 95th percentile of the captions' numbers of tokens.
        captions: number of sampled pairs by caption.
        sampled: number of sampled pairs.
    """

    pairs: int
    width: int
    height: int
    tokens: int
    captions: Mapping[str, int] = field(repr=False)
    sampled: int

    def repeated(self, batch_size: int) -> float:
        """Return the expected number of pairs in a batch that share their caption with another pair of the batch.

        If c of n pairs have a caption, one of them shares it with none of batch_size - 1 others with the probability
        (1 - (c - 1) / (n - 1)) ** (batch_size - 1).
        """
        counts = np.array(list(self.captions.values()), dtype=float)
        total = counts.sum()
        alone = (1.0 - (counts - 1.0) / max(total - 1.0, 1.0)) ** (batch_size - 1)
        return float(batch_size * (counts / total * (1.0 - alone)).sum())

    def __str__(self) -> str:
        some = "" if self.sampled == self.pairs else f" of {self.sampled:,} sampled"
        return (
            f"{self.pairs:,} pairs; the median picture has {self.width}x{self.height} pixels; {len(self.captions):,} "
            f"different captions{some}, 95 % of them of at most {self.tokens} tokens"
        )


def survey(source: Source, tokenizer: PreTrainedTokenizerBase) -> Survey:
    """Return the statistics of evenly spaced pairs of `source`. Raise UserError if more of them lack a picture or
    a caption than training skips."""
    sizes: list[tuple[int, int]] = []
    captions: Counter[str] = Counter()
    places = list(spread(source))
    for shard, number in places:
        try:
            sample = source.read(shard, number)
            caption = choose_caption(sample.captions, 0.0)
            size = open_image(sample.image).size
        except BadSample:
            continue  # Training leaves it out too, and counts it.
        sizes.append(size)
        captions[caption] += 1
    if not sizes:
        raise UserError(
            f"none of {len(places):,} samples has a picture and a caption; `flipscale prepare inspect` lists the "
            "contents of the shards"
        )
    if (bad := (len(places) - len(sizes)) / len(places)) > (most := DataRecipe().max_bad_fraction):
        raise UserError(
            f"{bad:.0%} of {len(places):,} sampled pairs lack a picture or a caption that can be read, more than "
            f"data.max_bad_fraction {most:g}; `flipscale prepare inspect` names the causes"
        )
    width, height = np.median(np.array(sizes), axis=0).astype(int).tolist()
    lengths = [len(ids) for ids in tokenizer(list(captions), truncation=False, padding=False)["input_ids"]]
    tokens = int(np.percentile(np.repeat(lengths, list(captions.values())), 95, method="higher"))
    return Survey(len(source), width, height, tokens, captions, len(places))


def spread(source: Source, most: int = _MOST_SAMPLES) -> Iterator[tuple[int, int]]:
    """Yield shards and numbers of at most `most` evenly spaced samples, of a few shards only if shards are fetched."""
    sizes = np.array(source.shard_sizes)
    if "://" in source.shard_name(0):
        sizes[np.setdiff1d(np.arange(len(sizes)), np.linspace(0, len(sizes) - 1, _FETCHED_SHARDS).astype(int))] = 0
    ends = np.cumsum(sizes)
    numbers = np.unique(np.linspace(0, ends[-1] - 1, min(most, int(ends[-1]))).round().astype(np.int64))
    shards = np.searchsorted(ends, numbers, side="right")
    yield from zip(shards.tolist(), (numbers - (ends - sizes)[shards]).tolist(), strict=True)


@dataclass
class Proposal:
    """A template of a recipe, and the values that it inserts.

    Args:
        kind: name of the template: `cpu`, `small_gpu`, `gpu` or `finetune`.
        tuning: share of unmasked pairs at the end.
        most_samples: largest useful number of pairs; further passes over the data gain little.
        values: values of the template; `text` needs all, and `recipe` all but the time.
        warnings: warnings about the data.
    """

    kind: str
    batch_size: int
    tuning: float
    most_samples: int
    values: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def recipe(self) -> Recipe:
        """Return the recipe, for a minute if the time is not known yet."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "recipe.yaml"
            file.write_text(self._render(**{"head": [], "minutes": 1.0, "share": 0.5, **self.values}), encoding="utf-8")
            return parse_recipe(["--config", str(file)])

    def text(self, head: list[str], minutes: float) -> str:
        """Return the text of a recipe of `minutes`, with sentences above the fields. The stages' shares of the time are
        their shares of all operations."""
        masked, unmasked = pair_flops(self.recipe()).values()
        work = (1.0 - self.tuning) * masked, self.tuning * unmasked
        share = round(1.0 - round(work[1] / sum(work), 4), 4)
        return self.written(head, minutes=minutes, share=share)

    def written(self, head: list[str], **values: Any) -> str:
        """Return the text of a recipe with further values, with sentences above the fields."""
        head = [line for sentence in head for line in textwrap.wrap(sentence, _WIDTH, break_long_words=False)]
        return self._render(**self.values, head=head, **values) + "\n"

    def _render(self, **values: Any) -> str:
        return render(_TEMPLATES / f"{self.kind}.yaml.jinja", {"yaml": _flat}, batch_size=self.batch_size, **values)

    def samples_in(self, seconds: float, rates: list[float]) -> int:
        """Return the number of pairs in `seconds`, with the stages' `rates` in pairs per second."""
        masked, whole = rates
        return int(seconds / ((1.0 - self.tuning) / masked + self.tuning / whole))

    def fit(self, num_gpus: int, gib: int) -> tuple[Recipe, Launch]:
        """Add recomputation and micro-batches until it fits GPUs of `gib`. Return the recipe and the launch. Raise
        UserError if nothing fits."""
        launch = Launch(num_processes=num_gpus, precision="bf16", processes_per_node=min(num_gpus, GPUS_OF_A_NODE))
        pairs = self.batch_size // num_gpus
        # In this order: no change; recomputation, which costs a third more time; micro-batches.
        for parts in (0, 1, *(parts for parts in (2, 4, 8, 16, 32, 64) if pairs % parts == 0)):
            self.values |= {"recomputes": parts > 0, "micro_batch_size": pairs // parts if parts > 1 else None}
            recipe = self.recipe()
            if recipe_memory(recipe, launch).fits(gib):
                return recipe, launch
        raise UserError(
            f"the model and a batch of {self.batch_size} do not fit {num_gpus} GPUs of {gib} GiB under DDP; use more "
            "or larger GPUs, or a recipe of your own under FSDP2"
        )


def propose(data: Survey, minutes: float, cores: int, num_gpus: int, **values: Any) -> Proposal:
    """Return a proposal for training on `data` for `minutes`.

    Args:
        cores: number of cores, for the loader's workers.
        num_gpus: number of GPUs; 0 for a CPU.
        values: values of the template that follow from options: `source`, a `SourceRecipe`, `tokenizer`, `tasks`,
            `output_dir`, whether captions can be packed (`packs`), and `vocab_size` and `pad_token_id` of the
            tokenizer, if the recipe states them.
    """
    is_large, mask_ratio, tuning, workers, image_size = data.pairs >= _LARGE, 0.5, 0.05, None, 0
    if not num_gpus:
        kind, batch = "cpu", min(256, max(8, power_below(data.pairs // 8)))
        peak, mask_ratio = 2e-3 * math.sqrt(batch / 256), 0.75 if minutes <= 5 else 0.5
        image_size, workers = (64, min(cores - 1, 4)) if min(data.width, data.height) >= 96 else (32, 0)
    elif is_large:
        kind, batch = "gpu", _shared(min(65536, max(1024, power_below(data.pairs // 3000))), data, num_gpus)
        peak, tuning = 1e-3, 1 / 31
    else:
        kind, batch = "small_gpu", _shared(min(4096, max(256, power_below(data.pairs // 64))), data, num_gpus)
        peak = 1e-3
    most = max((_EPOCHS_OF_LARGE if is_large else _EPOCHS_OF_SMALL) * data.pairs, _LEAST_STEPS * batch)
    values |= {"image_size": image_size, "num_workers": workers, "recomputes": False, "micro_batch_size": None}
    values |= {"data": data, "mask_ratio": mask_ratio, "base_lr": float(f"{peak * 256 / batch:.3g}")}
    values |= {"tokens": min(max(8 * math.ceil(data.tokens / 8), 8), 64), "few_classes": ""}
    repeated, warnings = data.repeated(batch), []
    in_batch = f"{repeated:.0f} of the {batch} in a batch also belong to another pair"
    if repeated > FEW_CLASSES * batch:
        values["few_classes"] = f"captions name a few classes: about {in_batch}"
    elif repeated > MOST_REPEATED * batch:
        warnings.append(
            f"captions repeat, as about {in_batch}; captions that distinguish pictures would teach more, and loss.kind "
            "sigmoid needs loss.positives equal_captions"
        )
    return Proposal(kind, batch, tuning, most, values, warnings)


def _shared(batch: int, data: Survey, num_gpus: int) -> int:
    """Return a batch size that the GPUs divide, at most a quarter of the pairs if possible."""
    while batch > data.pairs // 4 and batch > num_gpus:
        batch //= 2
    return math.ceil(batch / num_gpus) * num_gpus


def power_below(count: int) -> int:
    return 1 << (max(count, 1).bit_length() - 1)


def _flat(value: Any) -> str:
    """Return a value as YAML on one line, with separators in large numbers."""
    if type(value) is int and value >= 10_000:
        return f"{value:_}"
    line = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False)
    return line.removesuffix("\n").removesuffix("\n...")
