"""What a start gives the training loop: the set-up, which each process opens by itself, and the session of all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flipscale.data.samples import Source, shard_sizes_digest
from flipscale.recipe.model import dropout_rates
from flipscale.recipe.recipe import Recipe
from flipscale.recipe.schedule import Schedule, Stage

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from flipscale.data.batches import BatchDataset
    from flipscale.data.features import PrecomputedFeatures, Teacher
    from flipscale.model import FlipConfig
    from flipscale.objectives.objective import Objective
    from flipscale.process.lock import FolderLock


@dataclass(frozen=True)
class TrainingSetup:
    """A checked recipe with its data.

    Args:
        tokenizer: tokenizer of the captions; None for an objective without text.
        datasets: the training pairs at each stage's masks and sizes.
        config: configuration of the model.
        precomputed: the stored features in place of a tower's input, by tower.
        teachers: the teachers of the loss.
    """

    recipe: Recipe
    schedule: Schedule
    source: Source
    tokenizer: PreTrainedTokenizerBase | None
    datasets: Mapping[Stage, BatchDataset]
    objective: Objective
    config: FlipConfig
    precomputed: Mapping[str, PrecomputedFeatures]
    teachers: Sequence[Teacher]
    text_rows: Mapping[int, int] | None = None

    @property
    def fingerprint(self) -> int:
        """63-bit digest of what the order and the samples depend on: sizes of shards, and models of stored features."""
        digests = [int(found.digest, 16) for found in self.precomputed.values()]
        digests += [teacher.digest for teacher in self.teachers]
        return (shard_sizes_digest(self.source) + sum(digests)) % 2**63

    @property
    def lengths_digest(self) -> str:
        """Digest of the shards' bytes, which are equal in copies, and differ in other data of as many samples."""
        return hashlib.blake2b(np.array(self.source.shard_bytes, "<i8").tobytes(), digest_size=8).hexdigest()

    @property
    def batch_size(self) -> int:
        return self.recipe.data.global_batch_size

    @property
    def has_dropout(self) -> bool:
        """Whether a part of the model drops at random, besides `drop_path_rate`, which is keyed by the sample."""
        return any(rate > 0.0 for rate in dropout(self.config).values())


def dropout(config: FlipConfig) -> dict[str, float]:
    """Return the fields of a model's configuration that hold a rate of dropout, such as `text_config.dropout`."""
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name)) is not None}
    return {
        f"{name}.{field}": rate for name, part in parts.items() for field, rate in dropout_rates(part.to_dict()).items()
    }


@dataclass(frozen=True)
class Session:
    """The processes of one start of a run, and the point at which it begins.

    Args:
        accelerator: accelerate's view of the processes.
        checkpoint: path of the checkpoint to resume from; None for a fresh start.
        state: state of that checkpoint.
        quarantined: names of newer checkpoints that were damaged.
        lock: lock of the run directory; None except on the main process.
    """

    accelerator: Accelerator
    checkpoint: Path | None
    state: Mapping[str, Any]
    quarantined: Sequence[str] = ()
    lock: FolderLock | None = None

    @property
    def step(self) -> int:
        return self.state.get("step", 0)

    @property
    def trained_seconds(self) -> float:
        """Training time of all starts so far."""
        return self.state.get("trained_seconds", 0.0)

    def check_lock(self, at_once: bool = False) -> None:
        """Raise OSError if another run has taken the run directory, see `FolderLock.check`."""
        if self.lock is not None:
            self.lock.check(at_once)
