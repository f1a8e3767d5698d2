"""Training pairs, and a check of the kinds of captions."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from flipscale.data.batch_inputs import BatchInputs, InputShape, check_masks
from flipscale.data.batches import BatchDataset
from flipscale.data.columns.pixels import image_columns
from flipscale.data.columns.tokens import Tokens
from flipscale.data.samples import BadSample, SampleNumbers, Source
from flipscale.io.errors import UserError

__all__ = ["InputShape", "PairDataset", "check_kinds", "check_masks"]

_log = logging.getLogger(__name__)

# Number of samples that are read at the start for the names of kinds of captions.
_SAMPLES_WITH_KINDS = 256


class PairDataset(BatchDataset):
    """Training pairs by global position, given the fields of `BatchInputs`: images and captions."""

    def __init__(self, *arguments: Any, **options: Any):
        given = BatchInputs(*arguments, **options)
        super().__init__(given, [Tokens(given), *image_columns(given)])


def check_kinds(source: Source, names: Sequence[str]) -> None:
    """Log how many of the first samples of a source, or of each source of a mixture, have each of some kinds of
    captions. Raise UserError if none of them has a kind."""
    counts, total = dict.fromkeys(names, 0), 0
    for part in source.parts or [source]:
        for place in islice(SampleNumbers(part), _SAMPLES_WITH_KINDS if names else 0):
            with suppress(BadSample):
                kinds, total = part.read(*place).kinds, total + 1
                for kind in counts:
                    counts[kind] += any(text.strip() for text in kinds.get(kind, ()))
    shares = ", ".join(f"{kind} in {count}" for kind, count in counts.items())
    for kind, count in counts.items():
        if total and not count:
            raise UserError(
                f"data.captions or a stage's has the kind {kind!r}, which none of the first {total} samples has "
                f"({shares}); name a field of KEY.json, txt, or a column"
            )
    if names:
        _log.info("captions: of the first %d samples, %s", total, shares)
