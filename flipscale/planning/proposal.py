"""Which model, batch, mask and length suit some data and a machine: the rules of `flipscale init`, all on this page.

They are rules of thumb, from three places:

- The demo, on a CPU: emoji of 32 pixels, two cores, minutes (README). A tiny ViT of few tokens, a mean over word
  embeddings as text tower, Muon, 256 pairs a batch; larger batches, deeper towers and a text transformer were worse in
  ten minutes, because the number of updates binds. 75 % masked leads in the first minutes, 50 % later.
- The paper (arXiv 2212.00794, Tables 9 and 10) and GLIP's runs on CC3M and CC12M, on GPUs: sizes, 50 % masked, a peak
  rate of 1e-3 whatever the batch, a batch of about a 3,000th of the pairs, 30 epochs, then unmasked tuning.
- A. Malladi et al. (arXiv 2205.10287): with Adam, a rate goes with the square root of a batch below the one it was
  found for.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from flipscale.io.errors import UserError
from flipscale.planning.survey import Survey

# What a GPU of a name has, in GiB; of a name with several, the least.
GPU_GIB = {
    **{"H100": 80, "H100 PCIe": 80, "H100 NVL": 94, "H200": 141, "H200 NVL": 141, "GH200": 96, "B200": 180},
    **{"A100": 40, "A10": 24, "A10G": 24, "L40S": 48, "L40": 48, "L4": 24, "MI300X": 192},
}
LEAST_PAIRS = 16
# Beyond so many passes a small set is learned by heart; a large one gains little (30: GLIP's runs, 32: the paper's).
_EPOCHS_OF_SMALL, _EPOCHS_OF_LARGE, _LARGE = 100, 30, 1_000_000
# A tiny set needs more passes for the weights to get anywhere.
_LEAST_STEPS = 2_000
# Of a batch: above, many pairs are told to be unlike their own caption. A tenth did no harm to the demo.
MOST_REPEATED = 0.1


@dataclass(frozen=True)
class Proposal:
    """A recipe but for its lengths, as nested fields, and why they are so.

    Args:
        fields: of the recipe, in their order.
        reasons: by field, such as `data.global_batch_size`.
        mask_ratio: of the first stage.
        base_lr: of the first stage, for 256 pairs.
        tuning: what part of the pairs is seen unmasked at the end.
        tuning_lr: where the tuning has a schedule of its own; None goes on with the first stage's.
        warnings: what the user should know of the data.
    """

    fields: dict[str, Any]
    reasons: dict[str, str]
    mask_ratio: float
    base_lr: float
    tuning: float
    tuning_lr: float | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def batch_size(self) -> int:
        """Pairs of a step."""
        return int(self.fields["data"]["global_batch_size"])

    def stages(self, samples: int) -> list[dict[str, Any]]:
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
        whole: dict[str, Any] = {"name": "unmasked", "samples": tuning * self.batch_size, "mask_ratio": 0.0}
        if self.tuning_lr is not None:
            whole |= {"base_lr": self.tuning_lr, "warmup_samples": tuning // 10 * self.batch_size}
        return [masked, whole]


def samples_in(seconds: float, rates: list[float], proposal: Proposal) -> int:
    """Return how many pairs the stages see in `seconds` at their `rates`, in pairs a second."""
    masked, whole = rates
    return int(seconds / ((1.0 - proposal.tuning) / masked + proposal.tuning / whole))


def most_samples(data: Survey, proposal: Proposal) -> int:
    """Return the number of pairs beyond which more passes over the data are of little use."""
    epochs = _EPOCHS_OF_LARGE if data.pairs >= _LARGE else _EPOCHS_OF_SMALL
    return max(epochs * data.pairs, _LEAST_STEPS * proposal.batch_size)


def gpu_named(name: str) -> str:
    """Return a GPU's name as its maker writes it, of one such as `h100` or `h100_pcie`.

    Raises:
        ValueError: it is not known.
    """
    known = {one.lower().replace(" ", "_"): one for one in GPU_GIB}
    if name.lower() not in known:
        raise UserError(f"gpu is {name[:40]!r}; use one of {', '.join(known)}")
    return known[name.lower()]


def propose(data: Survey, tokens: dict[str, int], minutes: float, cores: int, num_gpus: int) -> Proposal:
    """Return what to train on `data` in `minutes`.

    Args:
        tokens: the fields of the text tower that follow from the tokenizer.
        cores: for the loader's workers.
        num_gpus: 0 for a CPU.
    """
    if not num_gpus:
        found = _on_cpu(data, tokens, minutes, cores)
    elif data.pairs < _LARGE:
        found = _small_on_gpus(data, tokens, num_gpus)
    else:
        found = _on_gpus(data, tokens, num_gpus)
    repeated = data.repeated(found.batch_size)
    if repeated > MOST_REPEATED * found.batch_size:
        found.warnings.append(
            f"of the {found.batch_size} captions of a batch, about {repeated:.0f} are another pair's of the batch too, "
            "which the loss takes for unlike; captions that tell pictures apart would teach more"
        )
    return found


def _on_cpu(data: Survey, tokens: dict[str, int], minutes: float, cores: int) -> Proposal:
    large = min(data.width, data.height) >= 96
    image, patch = (64, 8) if large else (32, 4)
    batch = min(256, max(8, _power_below(data.pairs // 8)))
    short = data.tokens <= 12
    fields = _fields(
        {"image_size": image, "patch_size": patch, **_tower(128, 4, 2), "hidden_act": "relu", "projection_dim": 128},
        {**tokens, **_tower(128, 0 if short else 2, 2), **_text(data), "projection_dim": 128},
        {"global_batch_size": batch, "crop_scale": [0.8, 1.0], "num_workers": min(cores - 1, 4) if large else 0},
        {"name": "muon", "weight_decay": 0.3},
    )
    mask = 0.75 if minutes <= 5 else 0.5
    reasons = {
        "model.vision_config.patch_size": f"64 patches, of which a masked step sees {round(64 * (1 - mask))}",
        "model.text_config.num_hidden_layers": "the mean of the words: quicker to learn than their order"
        if short
        else "captions are long: the order of their words counts",
        "data.global_batch_size": f"at most 256, and an eighth of the {data.pairs:,} pairs",
        "optim.name": "more from few updates than adamw",
    }
    peak = 2e-3 * math.sqrt(batch / 256)
    return Proposal(fields, _reasons(data, reasons), mask, _rounded(peak * 256 / batch), 0.05)


def _small_on_gpus(data: Survey, tokens: dict[str, int], num_gpus: int) -> Proposal:
    batch = _shared(min(4096, max(256, _power_below(data.pairs // 64))), data, num_gpus)
    fields = _fields(
        {"image_size": 128, "patch_size": 16, **_tower(384, 12, 6), "projection_dim": 384},
        {**tokens, **_tower(384, 6, 6), **_text(data), "projection_dim": 384},
        {"global_batch_size": batch, "num_workers": 8},
        {},
    )
    reasons = {
        "model.vision_config.hidden_size": "ViT-S: B/16 has more weights than so few pairs can teach",
        "model.vision_config.patch_size": "64 patches, of which a masked step sees 32",
        "data.global_batch_size": f"a 64th of the {data.pairs:,} pairs, but 256 to 4,096 and at most a quarter of them",
    }
    return Proposal(fields, _reasons(data, reasons), 0.5, _rounded(1e-3 * 256 / batch), 0.05)


def _on_gpus(data: Survey, tokens: dict[str, int], num_gpus: int) -> Proposal:
    size = "b16" if data.pairs < 100_000_000 else "l16" if data.pairs < 1_000_000_000 else "h14"
    batch = _shared(min(65536, max(1024, _power_below(data.pairs // 3000))), data, num_gpus)
    fields: dict[str, Any] = {
        "model": {"size": size, "text_config": tokens},
        "data": {"global_batch_size": batch, "num_workers": 8},
    }
    reasons = {
        "model.size": f"the paper's towers for {data.pairs:,} pairs: b16, l16 from 100 M, h14 from a billion",
        "data.global_batch_size": "a 3,000th of the pairs, 1,024 to the paper's 65,536",
    }
    base_lr = _rounded(1e-3 * 256 / batch)
    return Proposal(fields, _reasons(data, reasons), 0.5, base_lr, 1 / 31, _rounded(base_lr / 100))


def _fields(
    vision: dict[str, Any], text: dict[str, Any], data: dict[str, Any], optim: dict[str, Any]
) -> dict[str, Any]:
    model = {"size": "b16", "vision_config": vision, "text_config": text}
    return {"model": model, "data": data, **({"optim": optim} if optim else {})}


def _reasons(data: Survey, reasons: dict[str, str]) -> dict[str, str]:
    return {
        "model.size": "the fields below replace its own",
        "model.text_config.vocab_size": "of the tokenizer",
        "model.text_config.max_position_embeddings": f"tokens: 95 % of the captions have at most {data.tokens}",
        "model.text_config.attend_to_padding": "captions of a few words are not outnumbered by padding",
        "data.num_workers": "processes that decode pictures; at 0 the one that trains does",
        **reasons,
    }


def _tower(width: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }


def _text(data: Survey) -> dict[str, Any]:
    tokens = min(max(8 * math.ceil(data.tokens / 8), 8), 64)
    return {"max_position_embeddings": tokens, "pooling": "mean", "attend_to_padding": False}


def _shared(batch: int, data: Survey, num_gpus: int) -> int:
    """Return a batch that the GPUs divide, and that is not more than the pairs where it can be."""
    while batch > data.pairs // 4 and batch > num_gpus:
        batch //= 2
    return math.ceil(batch / num_gpus) * num_gpus


def _power_below(count: int) -> int:
    """Return the largest power of two that is not above `count`, which is 1 at least."""
    return 1 << (max(count, 1).bit_length() - 1)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
