"""`bad_samples.jsonl`: every sample that could not be used, by name, once; and the limit of how many there may be."""

import dataclasses
import json
from collections import Counter, deque
from pathlib import Path
from typing import Any

import torch.distributed as dist

from flipscale.data.faults import Fault

# The limit holds for the last million samples: long enough that one bad shard in a block does not end a run, short
# enough that a broken store does. Fewer than a thousand samples are judged as if they were a thousand.
_WINDOW_SAMPLES = 1_000_000
_LEAST_SAMPLES = 1_000


class BadSamples:
    """Gathers the faults of all processes and writes them down on the main process.

    Args:
        run_dir: where `bad_samples.jsonl` lies.
        is_main: whether this process writes.
        max_fraction: of the samples of the window that may be bad.
    """

    def __init__(self, run_dir: Path, is_main: bool, max_fraction: float):
        self.path = run_dir / "bad_samples.jsonl"
        self.is_main = is_main
        self.max_fraction = max_fraction
        self._mine: list[Fault] = []
        self._counts: Counter[str] = Counter()
        self._named: set[tuple[str, int | None]] = set()
        self._window: deque[tuple[int, int]] = deque()
        self._samples = self._bad = 0

    def start(self, position: int, shard_faults: list[Fault]) -> None:
        """Begins at global `position`: what the file says of samples from there on is taken back, and whole shards that
        cannot be read are named first."""
        if not self.is_main:
            return
        kept = [record for record in self._read() if record["position"] is not None and record["position"] < position]
        records = [dataclasses.asdict(fault) for fault in shard_faults] + kept
        self._named = {(record["shard"], record["number"]) for record in records}
        if records or self.path.exists():
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(record) + "\n" for record in records))
            partial.replace(self.path)
        for fault in shard_faults:
            print(f"flipscale: {fault.cause}: {fault.shard}: {fault.detail}", flush=True)

    def note(self, faults: list[Fault]) -> int:
        """Keeps this process's faults of one step; their number."""
        self._mine += faults
        return len(faults)

    def count(self, bad: int, samples: int) -> None:
        """Collective when it raises. Counts a step in which `bad` of the global batch's `samples` were replaced.

        Raises:
            OSError: too many were, in the window.
        """
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
        """Collective. How many samples were replaced in all processes since the last call, by cause."""
        self.flush()
        counts, self._counts = self._counts, Counter()
        return counts

    def flush(self) -> None:
        """Collective. Writes down what all processes have noted."""
        everyone: list[list[Fault]] = [self._mine]
        if dist.is_initialized() and dist.get_world_size() > 1:
            everyone = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, self._mine)
        self._mine = []
        faults = sorted((fault for faults in everyone for fault in faults), key=lambda fault: fault.position or 0)
        self._counts.update(fault.cause for fault in faults)
        if self.is_main:
            self._write(faults)

    def _write(self, faults: list[Fault]) -> None:
        new = []
        for fault in faults:
            if (fault.shard, fault.number) not in self._named:
                self._named.add((fault.shard, fault.number))
                new.append(json.dumps(dataclasses.asdict(fault)) + "\n")
        if new:
            with open(self.path, "a") as file:
                file.write("".join(new))

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        # A line that was cut by a kill is of samples that will be seen again.
        return [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
