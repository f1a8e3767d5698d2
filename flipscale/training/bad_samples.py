"""The names of bad samples in `bad_samples.jsonl`, and the limit of their number."""

import dataclasses
import logging
from collections import Counter, deque
from pathlib import Path

import torch.distributed as dist

from flipscale.data.samples import Fault
from flipscale.io import json_lines

_log = logging.getLogger(__name__)

# The limit counts the last million samples: one bad shard does not end a run, but a broken store does. Fewer than a
# thousand samples count as a thousand.
_WINDOW_SAMPLES = 1_000_000
_MIN_SAMPLES = 1_000


class BadSamples:
    """Gathers the faults of all processes, and writes each once on the main process.

    Args:
        is_main: whether this process writes.
        max_fraction: largest allowed fraction of bad samples in the window.
    """

    def __init__(self, run_dir: Path, is_main: bool, max_fraction: float):
        self.path = run_dir / "bad_samples.jsonl"
        self.is_main = is_main
        self.max_fraction = max_fraction
        self._mine: list[Fault] = []
        # Faults of all processes since the last write.
        self._unwritten = 0
        self._counts: Counter[str] = Counter()
        self._named: set[tuple[str, int | None]] = set()
        self._window: deque[tuple[int, int]] = deque()
        self._samples = self._bad = 0

    def start(self, position: int, shard_faults: list[Fault]) -> None:
        """Write the names of unreadable shards, and drop samples from `position` on, which are read again."""
        if not self.is_main:
            return
        records = json_lines.read(self.path, "shard")
        kept = [record for record in records if (at := record.get("position")) is not None and at < position]
        records = [dataclasses.asdict(fault) for fault in shard_faults] + kept
        self._named = {(record["shard"], record.get("number")) for record in records}
        if records or self.path.exists():
            json_lines.rewrite(self.path, records)
        for fault in shard_faults:
            _log.warning("%s: %s: %s", fault.cause, fault.shard, fault.detail)

    def count(self, faults: list[Fault], num_bad: int, num_samples: int) -> None:
        """Collective if it raises. Count a step.

        Args:
            faults: faults of this process.
            num_bad: number of replaced samples in the global batch, of `num_samples`.

        Raises:
            OSError: too many samples of the window were replaced.
        """
        self._mine += faults
        self._unwritten += num_bad
        self._window.append((num_bad, num_samples))
        self._bad, self._samples = self._bad + num_bad, self._samples + num_samples
        while len(self._window) > 1 and self._samples - self._window[0][1] >= _WINDOW_SAMPLES:
            old_bad, old_samples = self._window.popleft()
            self._bad, self._samples = self._bad - old_bad, self._samples - old_samples
        if self._bad > self.max_fraction * max(self._samples, _MIN_SAMPLES):
            causes = ", ".join(f"{number} {cause}" for cause, number in self.take_counts().most_common(3))
            raise OSError(
                f"{self._bad} of the last {self._samples} samples could not be used, more than data.max_bad_fraction "
                f"{self.max_fraction} (lately: {causes}); {self.path} names them; mend the data or raise the "
                "fraction, and start the run again"
            )

    def take_counts(self) -> Counter[str]:
        """Collective. Return the number of replaced samples in all processes since the last call, by cause."""
        self.flush()
        counts, self._counts = self._counts, Counter()
        return counts

    def flush(self) -> None:
        """Collective. Write the faults of all processes; without faults, the processes exchange nothing."""
        if self._unwritten == 0:
            return
        all_faults: list[list[Fault]] = [self._mine]
        if dist.is_initialized() and dist.get_world_size() > 1:
            all_faults = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(all_faults, self._mine)
        self._mine, self._unwritten = [], 0
        faults = sorted((fault for part in all_faults for fault in part), key=lambda fault: fault.position or 0)
        self._counts.update(fault.cause for fault in faults)
        if self.is_main:
            new = []
            for fault in faults:
                if (fault.shard, fault.number) not in self._named:
                    self._named.add((fault.shard, fault.number))
                    new.append(dataclasses.asdict(fault))
            json_lines.append(self.path, new)
