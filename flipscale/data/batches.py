"""The batches of a data set: the samples of a list of positions, read by the makers of its columns."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from flipscale.data.batch_inputs import BatchInputs
from flipscale.data.columns.column import Candidate, Column, UnusableRows
from flipscale.data.order import order_of
from flipscale.data.samples import BadSample, Fault, candidates
from flipscale.io.errors import UserError


class BatchDataset(Dataset):
    """Training samples by global position. `__getitems__` returns the batch of a list of positions.

    A batch has the columns of its makers, and `faults`: a list of `Fault`, one for each bad sample. The first usable
    one of its `candidates` replaces it.

    Args:
        makers: makers of the columns, in the order in which they read a sample.
    """

    def __init__(self, given: BatchInputs, makers: Sequence[Column]):
        self.given, self.makers = given, makers
        self.source, self.recipe = given.source, given.recipe
        self.order = order_of(given.source, given.seed, given.recipe)
        # Process number and current shard of each worker, in shared memory, to report the shard of a dead worker.
        self.reading = torch.zeros((max(given.recipe.workers, 1), 2), dtype=torch.int64).share_memory_()

    def __getitems__(self, positions: list[int]) -> dict[str, Any]:
        where, faults = np.asarray(positions, dtype=np.int64), dict[int, Fault]()
        places = self.order.locate(where)
        makers = [maker.begin(where, places) for maker in self.makers]
        rows: Sequence[int] = ()
        if any(maker.reads for maker in makers):
            self.source.fetch_ahead(self.order.shards_ahead(where))
            rows = range(len(where))
        while True:
            for row in rows:
                values, fault = self._read_or_replace(row, makers)
                for maker, value in zip(makers, values, strict=True):
                    maker.put(row, value)
                if fault is not None:
                    faults[row] = fault
            try:
                columns = {name: column for maker in makers for name, column in maker.columns().items()}
                return {**columns, "faults": [faults[row] for row in sorted(faults)]}
            except UnusableRows as unusable:
                rows = unusable.rows

    def _read_or_replace(self, row: int, makers: Sequence[Column]) -> tuple[list[Any], Fault | None]:
        """Read the sample of a row, or its first good replacement. Return each maker's value, and the fault of a
        replaced sample."""
        fault, position = None, int(makers[0].where[row])
        shard, number = (int(part[row]) for part in makers[0].places)
        worker = get_worker_info()
        if worker is not None:
            self.reading.numpy()[worker.id] = os.getpid(), shard
        for place in candidates(self.source, shard, number):
            candidate = Candidate(self.source, place)
            try:
                return [maker.read(row, candidate) for maker in makers], fault
            except BadSample as error:
                if fault is None:
                    name, key = self.source.shard_name(shard), self.source.key(shard, number)
                    fault = Fault(position, name, number, key, error.cause, str(error))
        needed = " and ".join(maker.reads for maker in makers if maker.reads) or "row of stored features"
        raise UserError(
            f"shard {self.source.shard_name(shard)}: neither sample {number} nor any of its replacements has a "
            f"readable {needed} ({fault and fault.detail}); fetch the shards again or remove them"
        )
