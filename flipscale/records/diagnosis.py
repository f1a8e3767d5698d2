"""Why a run does not learn: the likely cause and the field to change, by the records of its intervals."""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flipscale.recipe.recipe import Recipe

# A loss at chance means something only after a warm-up and this many steps, or at the end of the run.
_PATIENCE_STEPS = 500
# Fewer steps move no model far.
_SHORT_STEPS = 100
# A model that has learned anything is at least this far below chance, in nats; one that begins to, falls by this much.
_LEARNED_NATS, _FALLS_NATS = 0.1, 0.02
# Embeddings spread less than this only if nearly all of them are one vector; those of untrained towers have 0.02.
_COLLAPSED_SPREAD = 0.01
# Bounds of `logit_scale`, and the share of one at which it counts as reached.
_BOUNDS, _AT_BOUND = (1.0, 100.0), 1e-3
# Growth of the gradient norm since the loss was lowest, between medians of this many intervals.
_GROWTH, _INTERVALS = 10.0, 5
# A batch's loss hardly depends on the images if more of its captions are one caption.
_SAME_CAPTIONS = 0.5
# Below this peak, AdamW and Muon move nothing in a run of usual length.
_LOW_RATE = 1e-7


class Diagnosis:
    """Names each cause once, while a run goes on. `chance` is the loss of a model that cannot tell the samples of a
    batch apart, see `Objective.chance_loss`."""

    def __init__(self, recipe: Recipe, chance: float | None):
        self._recipe, self._chance = recipe, chance
        self._batch = recipe.data.global_batch_size
        self._said: set[str] = set()
        self._last_rate, self._top_rate = -1.0, 0.0
        self._warm_from: int | None = None
        self._losses: deque[tuple[int, float]] = deque()
        # The last losses and gradient norms, and their medians when the loss was lowest.
        self._last: deque[tuple[float, float]] = deque(maxlen=_INTERVALS)
        self._lowest = (math.inf, math.inf)
        # Share of the most frequent caption in the first batch.
        self._same_captions: float | None = None

    def look(self, micro_batches: Sequence[Mapping[str, Any]]) -> None:
        """Read the captions of this process's first batch."""
        if self._same_captions is None and self._chance is not None:
            self._same_captions = _largest_share(micro_batches[0])

    def add(self, record: Mapping[str, Any], is_last: bool = False) -> list[str]:
        """Return new sentences, each with a cause and the field to change, by the next interval's record. The last
        record judges a shorter run too, by its second half."""
        rate, seen, loss = record["lr"], record["samples_seen"], record["loss"]
        if self._warm_from is None and (rate <= self._last_rate or is_last):
            self._warm_from = seen
        self._last_rate, self._top_rate = rate, max(rate, self._top_rate)
        if self._warm_from is None or loss is None:
            return []
        self._losses.append((seen, loss))
        patience = min(_PATIENCE_STEPS * self._batch, seen // 2 if is_last else math.inf)
        while self._losses[0][0] < seen - patience:
            self._losses.popleft()
        at_chance = []
        if self._chance is not None and (is_last or seen - self._warm_from >= patience):
            losses = [one for _, one in self._losses]
            first, last = losses[: len(losses) // 2], losses[len(losses) // 2 :]
            falls = bool(first) and statistics.mean(last) < statistics.mean(first) - _FALLS_NATS
            at_chance = self._at_chance(record) if min(losses) > self._chance - _LEARNED_NATS and not falls else []
        return [*at_chance, *self._temperature(record), *self._gradients(record)]

    def _at_chance(self, record: Mapping[str, Any]) -> list[str]:
        field, steps = f"stages.base_lr (a rate of {self._top_rate:.2g} here)", record["samples_seen"] // self._batch
        same, flat = self._same_captions or 0.0, [side for side in ("image", "text") if _is_flat(record, side)]
        if same >= _SAME_CAPTIONS:
            cause = f"{same:.0%} of a batch's captions are one caption; choose others by data.captions or data.shards"
        elif self._top_rate < _LOW_RATE:
            cause = f"the learning rate is too low to move the weights; raise {field}"
        elif flat:
            cause = f"nearly all {' and '.join(f'{side}s' for side in flat)} have one embedding; lower {field}"
        elif steps < _SHORT_STEPS:
            cause = f"the run has only {steps} steps; give its stages more samples, or the run more time"
        else:
            cause = "the captions may belong to other images, see `flipscale prepare inspect`; if not, lower " + field
        place = f"after {record['samples_seen']:,} samples, the loss is {record['loss']:.3f}"
        return self._once("chance", f"{place}, and chance is {self._chance:.3f}: {cause}")

    def _temperature(self, record: Mapping[str, Any]) -> list[str]:
        scale = record.get("logit_scale")
        if scale is None or self._chance is None or record["loss"] < self._chance / 2:
            return []  # a model that knows its pairs may reach the bound
        frozen = {name for stage in self._recipe.stages if stage.name == record["stage"] for name in stage.frozen}
        for bound in _BOUNDS:
            if abs(scale / bound - 1) < _AT_BOUND and "logit_scale" not in frozen.union(self._recipe.model.frozen):
                words = f"logit_scale is at its bound {bound:g} at a loss of {record['loss']:.3f}, "
                words += "before the towers learn; lower stages.base_lr, or name it in a first stage's `frozen`"
                return self._once("temperature", words)
        return []

    def _gradients(self, record: Mapping[str, Any]) -> list[str]:
        norm = record["grad_norm"]
        if norm is None:
            return []
        self._last.append((record["loss"], norm))
        loss, last = map(statistics.median, zip(*self._last, strict=True))
        # The gradients of a model grow while it learns and leaves chance.
        learns = self._chance is not None and abs(loss - self._chance) < _LEARNED_NATS
        if len(self._last) < _INTERVALS or learns or loss < self._lowest[0] - _FALLS_NATS:
            self._lowest = (loss, last)
        if last <= _GROWTH * (first := self._lowest[1]):
            return []
        optim = self._recipe.optim
        words = f"the gradient norm grew from {first:.2g} to {last:.2g}; lower stages.base_lr or optim.adam_beta2 "
        words += f"{optim.adam_beta2:g}, or set optim.max_grad_norm (now {optim.max_grad_norm})"
        return self._once("gradients", words)

    def _once(self, cause: str, words: str) -> list[str]:
        is_new = cause not in self._said
        self._said.add(cause)
        return [words] if is_new else []


def _largest_share(batch: Mapping[str, Any]) -> float:
    """Return the share of the most frequent caption; 0 if captions are packed or there are none."""
    if "input_ids" not in batch or "caption_ends" in batch:
        return 0.0
    counts = torch.unique(batch["input_ids"], dim=0, return_counts=True)[1]
    return float(counts.max()) / len(batch["input_ids"])


def _is_flat(record: Mapping[str, Any], side: str) -> bool:
    spread = record.get(f"{side}_spread")
    return spread is not None and spread < _COLLAPSED_SPREAD
