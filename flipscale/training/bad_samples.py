"""`bad_samples.jsonl`, which names every sample that could not be used, and the limit of how many there may be."""

import dataclasses
import logging
from collections import Counter, deque
from pathlib import Path

import torch.distributed as dist

from flipscale.data.samples import Fault
from flipscale.io import json_lines

_log = logging.getLogger(__name__)

# The limit holds for the last million samples: long enough that one bad shard in a block does not end a run, short
# enough that a broken store does. Fewer than a thousand samples are judged as if they were a thousand.
_WINDOW_SAMPLES = 1_000_000
_LEAST_SAMPLES = 1_000


class BadSamples:
    """Gathers the faults of all processes and writes each of them once, on the main process.

    Args:
        run_dir: where `bad_samples.jsonl` lies.
        is_main: whether this process writes.
        max_fraction: how much of the window may be bad.
    """

    def __init__(self, run_dir: Path, is_main: bool, max_fraction: float):
        self.path = run_dir / "bad_samples.jsonl"
        self.is_main = is_main
        self.max_fraction = max_fraction
        self._mine: list[Fault] = []
        # In all processes, since their faults were written down.
        self._unwritten = 0
        self._counts: Counter[str] = Counter()
        self._named: set[tuple[str, int | None]] = set()
        self._window: deque[tuple[int, int]] = deque()
        self._samples = self._bad = 0

    def start(self, position: int, shard_faults: list[Fault]) -> None:
        """Name whole shards that cannot be read, and drop what the file says of samples from the global `position` on:
        they will be read again."""
        if not self.is_main:
            return
        found = json_lines.read(self.path, "shard")
        kept = [record for record in found if (at := record.get("position")) is not None and at < position]
        records = [dataclasses.asdict(fault) for fault in shard_faults] + kept
        self._named = {(record["shard"], record.get("number")) for record in records}
        if records or self.path.exists():
            json_lines.rewrite(self.path, records)
        for fault in shard_faults:
            _log.warning("%s: %s: %s", fault.cause, fault.shard, fault.detail)

    def count(self, faults: list[Fault], bad: int, samples: int) -> None:
        """Collective when it raises. Count a step.

        Args:
            faults: of this process.
            bad: how many samples of the global batch were replaced.
            samples: the size of the global batch.

        Raises:
            OSError: too many of the window's samples were replaced.
        """
        self._mine += faults
        self._unwritten += bad
        self._window.append((bad, samples))
        self._bad, self._samples = self._bad + bad, self._samples + samples
        while len(self._window) > 1 and self._samples - self._window[0][1] >= _WINDOW_SAMPLES:
            old_bad, old_samples = self._window.popleft()
            self._bad, self._samples = self._bad - old_bad, self._samples - old_samples
        if self._bad > self.max_fraction * max(self._samples, _LEAST_SAMPLES):
            causes = ", ".join(f"{number} {cause}" for cause, number in self.take_counts().most_common(3))
            raise OSError(
                f"{self._bad} of the last {self._samples} samples could not be used, more than data.max_bad_fraction "
                f"{self.max_fraction} (lately: {causes}); {self.path} names them; mend the data or raise the "
                "fraction, and start the run again"
            )

    def take_counts(self) -> Counter[str]:
        """Collective. Return how many samples were replaced in all processes since the last call, by cause."""
        self.flush()
        counts, self._counts = self._counts, Counter()
        return counts

    def flush(self) -> None:
        """Collective. Write down the faults of all processes, which do not even meet if none of them has any."""
        if self._unwritten == 0:
            return
        everyone: list[list[Fault]] = [self._mine]
        if dist.is_initialized() and dist.get_world_size() > 1:
            everyone = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, self._mine)
        self._mine, self._unwritten = [], 0
        faults = sorted((fault for faults in everyone for fault in faults), key=lambda fault: fault.position or 0)
        self._counts.update(fault.cause for fault in faults)
        if self.is_main:
            self._write(faults)

    def _write(self, faults: list[Fault]) -> None:
        new = []
        for fault in faults:
            if (fault.shard, fault.number) not in self._named:
                self._named.add((fault.shard, fault.number))
                new.append(dataclasses.asdict(fault))
        json_lines.append(self.path, new)
