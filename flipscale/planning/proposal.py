"""The rules of `flipscale init`: a survey of the data, a proposal of model, batch, mask and length, and its text.

The rules of thumb have three sources:

- The demo on a CPU (README): emoji of 32 pixels, two cores, minutes. A tiny ViT of few tokens, a mean over word
  embeddings as text tower, Muon, and 256 pairs a batch. Larger batches, deeper towers and a text transformer were worse
  in ten minutes, because the number of updates limits. A mask of 75 % leads in the first minutes, 50 % later.
- The paper (arXiv 2212.00794, Tables 9 and 10) and GLIP's runs on CC3M and CC12M, on GPUs: sizes, a mask of 50 %, a
  peak rate of 1e-3 for any batch, a batch of about a 3,000th of the pairs, 30 epochs, then unmasked tuning.
- A. Malladi et al. (arXiv 2205.10287): with Adam, the rate follows the square root of the batch, below the batch size
  of the original rate.
"""

import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml
from transformers import PreTrainedTokenizerBase

from flipscale.data.captions import choose_caption
from flipscale.data.decode import open_image
from flipscale.data.samples import BadSample, Source
from flipscale.io.errors import UserError

Fields = dict[str, Any]
LEAST_PAIRS = 16
# Further passes would memorise a small set, and gain little on a large set (30: GLIP's runs, 32: the paper's).
_EPOCHS_OF_SMALL, _EPOCHS_OF_LARGE, _LARGE = 100, 30, 1_000_000
# Fewest steps, because a tiny set needs more passes.
_LEAST_STEPS = 2_000
# Largest share of repeated captions in a batch, because they teach less. A tenth did not harm the demo.
MOST_REPEATED = 0.1
# Share of repeated captions in a batch above which captions are taken for names of a few classes.
FEW_CLASSES = 0.5
_WIDTH = 120
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
        """Return the statistics as text."""
        some = "" if self.sampled == self.pairs else f" of {self.sampled:,} sampled"
        return (
            f"{self.pairs:,} pairs; the median picture has {self.width}x{self.height} pixels; {len(self.captions):,} "
            f"different captions{some}, 95 % of them of at most {self.tokens} tokens"
        )


def survey(source: Source, tokenizer: PreTrainedTokenizerBase) -> Survey:
    """Return the statistics of evenly spaced pairs of `source`. Raise UserError if no sampled pair has a picture and a
    caption."""
    sizes: list[tuple[int, int]] = []
    captions: Counter[str] = Counter()
    places = list(_spread(source))
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
    width, height = np.median(np.array(sizes), axis=0).astype(int).tolist()
    lengths = [len(ids) for ids in tokenizer(list(captions), truncation=False, padding=False)["input_ids"]]
    tokens = int(np.percentile(np.repeat(lengths, list(captions.values())), 95, method="higher"))
    return Survey(len(source), width, height, tokens, captions, len(places))


def _spread(source: Source) -> Iterator[tuple[int, int]]:
    """Yield shards and numbers of evenly spaced samples, of a few shards only if shards are fetched."""
    sizes = np.array(source.shard_sizes)
    if "://" in source.shard_name(0):
        sizes[np.setdiff1d(np.arange(len(sizes)), np.linspace(0, len(sizes) - 1, _FETCHED_SHARDS).astype(int))] = 0
    ends = np.cumsum(sizes)
    numbers = np.unique(np.linspace(0, ends[-1] - 1, min(_MOST_SAMPLES, int(ends[-1]))).round().astype(np.int64))
    shards = np.searchsorted(ends, numbers, side="right")
    yield from zip(shards.tolist(), (numbers - (ends - sizes)[shards]).tolist(), strict=True)


@dataclass(frozen=True)
class Proposal:
    """A recipe without its lengths, and the reasons for its fields.

    Args:
        fields: nested fields of the recipe, in their order.
        reasons: reasons by field, such as `data.global_batch_size`.
        mask_ratio: mask ratio of the first stage.
        base_lr: rate of the first stage per 256 pairs.
        tuning: share of unmasked pairs at the end.
        tuning_lr: rate of a schedule for the tuning; None continues the first stage's schedule.
        warnings: warnings about the data.
    """

    fields: Fields
    reasons: dict[str, str]
    mask_ratio: float
    base_lr: float
    tuning: float
    tuning_lr: float | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def batch_size(self) -> int:
        """Number of pairs in a step."""
        return int(self.fields["data"]["global_batch_size"])

    def stages(self, samples: int) -> list[Fields]:
        """Return the stages of a run of `samples` pairs, in whole steps."""
        steps = max(samples // self.batch_size, 2)
        tuning = min(max(round(steps * self.tuning), 1), steps - 1)
        masked = {
            "name": "masked",
            "samples": (steps - tuning) * self.batch_size,
            "mask_ratio": self.mask_ratio,
            "base_lr": self.base_lr,
            "warmup_samples": (steps - tuning) // 20 * self.batch_size,
        }
        whole: Fields = {"name": "unmasked", "samples": tuning * self.batch_size, "mask_ratio": 0.0}
        if self.tuning_lr is not None:
            whole |= {"base_lr": self.tuning_lr, "warmup_samples": tuning // 10 * self.batch_size}
        return [masked, whole]


def samples_in(seconds: float, rates: list[float], proposal: Proposal) -> int:
    """Return the number of pairs in `seconds`, with the stages' `rates` in pairs per second."""
    masked, whole = rates
    return int(seconds / ((1.0 - proposal.tuning) / masked + proposal.tuning / whole))


def most_samples(data: Survey, proposal: Proposal) -> int:
    """Return the largest useful number of pairs. Further passes over the data gain little."""
    epochs = _EPOCHS_OF_LARGE if data.pairs >= _LARGE else _EPOCHS_OF_SMALL
    return max(epochs * data.pairs, _LEAST_STEPS * proposal.batch_size)


def propose(data: Survey, tokens: dict[str, int], minutes: float, cores: int, num_gpus: int) -> Proposal:
    """Return a proposal for training on `data` for `minutes`.

    Args:
        tokens: fields of the text tower that follow from the tokenizer.
        cores: number of cores, for the loader's workers.
        num_gpus: number of GPUs; 0 for a CPU.
    """
    if not num_gpus:
        proposal = _on_cpu(data, tokens, minutes, cores)
    elif data.pairs < _LARGE:
        proposal = _small_on_gpus(data, tokens, num_gpus)
    else:
        proposal = _on_gpus(data, tokens, num_gpus)
    repeated = data.repeated(proposal.batch_size)
    in_batch = f"{repeated:.0f} of the {proposal.batch_size} in a batch also belong to another pair"
    if repeated > FEW_CLASSES * proposal.batch_size:
        proposal.reasons["data.shards"] = f"captions name a few classes: about {in_batch}"
    elif repeated > MOST_REPEATED * proposal.batch_size:
        proposal.warnings.append(
            f"captions repeat, as about {in_batch}; captions that distinguish pictures would teach more, and loss.kind "
            "sigmoid needs loss.positives equal_captions"
        )
    return proposal


def _on_cpu(data: Survey, tokens: dict[str, int], minutes: float, cores: int) -> Proposal:
    large = min(data.width, data.height) >= 96
    size, patch = (64, 8) if large else (32, 4)
    batch = min(256, max(8, _power_below(data.pairs // 8)))
    short = data.tokens <= 12
    vision = {"image_size": size, "patch_size": patch, **_tower(128, 4, 2), "hidden_act": "relu", "projection_dim": 128}
    text = {**tokens, **_tower(128, 0 if short else 2, 2), **_text(data), "projection_dim": 128}
    workers = min(cores - 1, 4) if large else 0
    fields: Fields = {
        "model": {"size": "b16", "vision_config": vision, "text_config": text},
        "data": {"global_batch_size": batch, "crop_scale": [0.8, 1.0], "num_workers": workers},
        "optim": {"name": "muon", "weight_decay": 0.3},
    }
    mask = 0.75 if minutes <= 5 else 0.5
    reasons = {
        "model.vision_config.patch_size": f"64 patches; a masked step sees {round(64 * (1 - mask))}",
        "model.text_config.num_hidden_layers": "a mean of the words: faster to learn than their order"
        if short
        else "captions are long: the order of their words matters",
        "data.global_batch_size": f"at most 256, and an eighth of the {data.pairs:,} pairs",
        "optim.name": "more from few updates than adamw",
    }
    peak = 2e-3 * math.sqrt(batch / 256)
    return Proposal(fields, _reasons(data, reasons), mask, _rounded(peak * 256 / batch), 0.05)


def _small_on_gpus(data: Survey, tokens: dict[str, int], num_gpus: int) -> Proposal:
    batch = _shared(min(4096, max(256, _power_below(data.pairs // 64))), data, num_gpus)
    vision = {"image_size": 128, "patch_size": 16, **_tower(384, 12, 6), "projection_dim": 384}
    text = {**tokens, **_tower(384, 6, 6), **_text(data), "projection_dim": 384}
    model = {"size": "b16", "vision_config": vision, "text_config": text}
    fields: Fields = {"model": model, "data": {"global_batch_size": batch}}
    reasons = {
        "model.vision_config.hidden_size": "ViT-S: B/16 has more weights than so few pairs can teach",
        "model.vision_config.patch_size": "64 patches; a masked step sees 32",
        "data.global_batch_size": f"a 64th of the {data.pairs:,} pairs, but 256 to 4,096 and at most a quarter of them",
    }
    return Proposal(fields, _reasons(data, reasons), 0.5, _rounded(1e-3 * 256 / batch), 0.05)


def _on_gpus(data: Survey, tokens: dict[str, int], num_gpus: int) -> Proposal:
    size = "b16" if data.pairs < 100_000_000 else "l16" if data.pairs < 1_000_000_000 else "h14"
    batch = _shared(min(65536, max(1024, _power_below(data.pairs // 3000))), data, num_gpus)
    fields: Fields = {"model": {"size": size, "text_config": tokens}, "data": {"global_batch_size": batch}}
    reasons = {
        "model.size": f"the paper's towers for {data.pairs:,} pairs: b16, l16 from 100 M, h14 from a billion",
        "data.global_batch_size": "a 3,000th of the pairs, 1,024 to the paper's 65,536",
    }
    base_lr = _rounded(1e-3 * 256 / batch)
    return Proposal(fields, _reasons(data, reasons), 0.5, base_lr, 1 / 31, _rounded(base_lr / 100))


def _reasons(data: Survey, reasons: dict[str, str]) -> dict[str, str]:
    return {
        "model.size": "the fields below replace those of the size",
        "model.text_config.vocab_size": "size of the tokenizer",
        "model.text_config.max_position_embeddings": f"tokens: 95 % of the captions have at most {data.tokens}",
        "model.text_config.attend_to_padding": "because short captions have more padding than words",
        "data.num_workers": "processes that decode pictures; 0 decodes in the training process",
        **reasons,
    }


def _tower(width: int, layers: int, heads: int) -> dict[str, int]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**sizes, "intermediate_size": 4 * width}


def _text(data: Survey) -> Fields:
    tokens = min(max(8 * math.ceil(data.tokens / 8), 8), 64)
    return {"max_position_embeddings": tokens, "pooling": "mean", "attend_to_padding": False}


def _shared(batch: int, data: Survey, num_gpus: int) -> int:
    """Return a batch size that the GPUs divide, at most a quarter of the pairs if possible."""
    while batch > data.pairs // 4 and batch > num_gpus:
        batch //= 2
    return math.ceil(batch / num_gpus) * num_gpus


def _power_below(count: int) -> int:
    """Return the largest power of two up to `count`, at least 1."""
    return 1 << (max(count, 1).bit_length() - 1)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def commented_yaml(head: list[str], fields: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    """Return fields as YAML with comments.

    Args:
        head: sentences above the fields, each on a new line.
        reasons: comments by field path, such as `data.tokenizer`.
    """
    lines = [f"# {line}" for sentence in head for line in textwrap.wrap(sentence, _WIDTH - 2, break_long_words=False)]
    return "\n".join([*lines, *_mapping(fields, reasons, "", "")]) + "\n"


def _mapping(fields: Mapping[str, Any], reasons: Mapping[str, str], path: str, indent: str) -> Iterator[str]:
    for name, value in fields.items():
        place = f"{path}.{name}" if path else name
        reason = f" # {reasons[place]}" if place in reasons else ""
        if isinstance(value, Mapping):
            yield f"{indent}{name}:{reason}"
            yield from _mapping(value, reasons, place, indent + "  ")
        elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            yield f"{indent}{name}:{reason}"
            for number, one in enumerate(value):
                first, *others = _mapping(one, reasons, f"{place}[{number}]", "")
                yield f"{indent}  - {first}"
                yield from (f"{indent}    {line}" for line in others)
        else:
            yield f"{indent}{name}: {_flat(value)}{reason}"


def _flat(value: Any) -> str:
    """Return a value on one line, with separators in large numbers."""
    if type(value) is int and value >= 10_000:
        return f"{value:_}"
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("\n").removesuffix("\n...")
