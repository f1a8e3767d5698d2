"""The outcomes of checks, and what all checks share: the node, the settings, and the measurements so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from flipscale.checks.group import Node

# Relative difference that fails a check.
OFF = 0.15
_CHARACTERS = 200


class NotRun(Exception):
    """A check that cannot run here, with the missing part."""


@dataclass(frozen=True)
class Finding:
    """The outcome of a check in a line."""

    name: str
    status: Literal["ok", "FAILED", "not run"]
    text: str

    def line(self) -> str:
        """Return the line of the report."""
        return f"{self.status:<8}{self.name:<34} {self.text}"[:_CHARACTERS]


@dataclass
class Bench:
    """The settings of the checks, their findings and measurements.

    Args:
        recipes: names or files of the recipes whose steps are measured.
        batch_size: pairs of a GPU.
        shards: shards for the loader; None makes up pictures.
        figures: measurements by the name of their check, for `gpu.json`.
    """

    node: Node
    recipes: Sequence[str]
    batch_size: int
    shards: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, name: str, text: str, faults: Sequence[str] = ()) -> None:
        """Add a finding, which has failed if there are faults."""
        self.findings.append(Finding(name, "FAILED" if faults else "ok", "; ".join([*faults, *filter(None, [text])])))

    def need_gpus(self, count: int) -> None:
        """Raise NotRun on a node with fewer GPUs."""
        if self.node.num_gpus < count:
            raise NotRun(f"it needs {count} GPUs")
