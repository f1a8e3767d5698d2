"""The nodes that `flipscale bench gpu` checks together: one command on each, started by srun or a launcher."""

import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from flipscale.io.errors import UserError
from flipscale.io.surroundings import known
from flipscale.process.world import whole_number

# Seconds that a node waits for the others: for their own checks, and for all else.
OWN_CHECKS_SECONDS, _MEETING_SECONDS = 6 * 3600.0, 300.0


@dataclass
class Nodes:
    """The nodes by host name, this one's index, and the store through which they talk. By default, this one alone."""

    index: int = 0
    address: str = "127.0.0.1"  # of the first node
    store: dist.Store | None = None
    hosts: list[str] = field(default_factory=lambda: [platform.node()])
    topic: str = "meeting"
    _turn: int = 0

    def begin(self, topic: str) -> None:
        """Start a check. All nodes make the same ones, and one that failed in the check before is in step again."""
        self.topic, self._turn = topic, 0

    def gather(self, value: Any, limit_s: float = _MEETING_SECONDS) -> list[Any]:
        """Collective. Return the values of all nodes, which JSON can hold. Raise UserError if a node sends none."""
        if self.store is None:
            return [value]
        self._turn += 1
        keys = [f"{self.topic}/{self._turn}/{index}" for index in range(len(self.hosts))]
        self.store.set(keys[self.index], json.dumps(value))
        try:
            self.store.wait(keys, timedelta(seconds=limit_s))
        except dist.DistStoreError:
            silent = [host for key, host in zip(keys, self.hosts, strict=True) if not self.store.check([key])]
            raise UserError(f"{', '.join(silent)} did not answer in {limit_s:.0f} s; see the output there") from None
        return [json.loads(self.store.get(key)) for key in keys]

    def first_failure(self, own: str = "") -> str:
        """Return the first failure of all nodes in this check: perhaps this node's own, or empty."""
        if self.store is None or not (own or self.store.check([f"{self.topic}/failed"])):
            return own
        return self.store.compare_set(f"{self.topic}/failed", "", own).decode()


def meet(environment: Mapping[str, str]) -> Nodes:
    """Collective. Return the nodes on which srun, torchrun or `accelerate launch` started this command.

    Raise UserError if the first node cannot be reached."""
    of_launcher = ("GROUP_WORLD_SIZE", "GROUP_RANK", "MASTER_PORT")
    count, index, port = (whole_number(environment, name, 0) for name in of_launcher)
    address = environment.get("MASTER_ADDR", "")
    if not count:
        count, index = (whole_number(environment, f"SLURM_{name}", 0) for name in ("STEP_NUM_NODES", "NODEID"))
        command = ["scontrol", "show", "hostnames", environment.get("SLURM_STEP_NODELIST", "")]
        names = known(lambda: subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        address, port = names[0] if names else "", 20000 + whole_number(environment, "SLURM_JOB_ID", 0) % 10000
    if count <= 1:
        return Nodes()
    is_keeper = index == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(address, port, None, is_keeper, timedelta(seconds=_MEETING_SECONDS), False)
    except (dist.DistError, RuntimeError) as error:
        raise UserError(f"the first node, {address}:{port}, cannot be reached ({error}); open this port") from error
    nodes = Nodes(index, address, dist.PrefixStore("flipscale", store), [""] * count)
    hosts = nodes.gather(platform.node())  # containers may share a name
    nodes.hosts = [f"{one} {number}" if hosts.count(one) > 1 else one for number, one in enumerate(hosts)]
    return nodes
