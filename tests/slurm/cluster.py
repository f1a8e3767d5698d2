"""A real Slurm on this machine: munged, slurmctld and a slurmd for each node, in namespaces of their own.

Each node has its own host name and loopback address, by an /etc/hosts for the cluster's processes only. The machine
stays unchanged. Needs root and Debian's slurmctld, slurmd, slurm-client and munge.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from processes import free_port

# Longest wait, because jobs wait for each other and for the cores of one machine.
_PATIENCE_SECONDS = 1200.0
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
# FirstJobId: a job's port follows from its number, and two clusters may run on this machine.
# cred_expire: wait of a requeued job, at least 5 s. config_overrides: more CPUs than the machine has.
_CONFIGURATION = """\
ClusterName=flipscale
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptParameters=send_user_signal
JobRequeue=1
KillWait=5
MinJobAge=6000
CompleteWait=0
ReturnToService=2
SlurmctldTimeout=60
SlurmdTimeout=60
InactiveLimit=0
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=300 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF State=UP
"""


def wait_until(happened: Callable[[], object], what: str) -> None:
    """Wait until `happened()` is true.

    Raises:
        TimeoutError: `_PATIENCE_SECONDS` have passed.
    """
    end = time.monotonic() + _PATIENCE_SECONDS
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError(f"after {_PATIENCE_SECONDS:.0f} s still waiting for {what}")
        time.sleep(0.1)


class Cluster:
    """Nodes node1, node2, ..., each with 16 CPUs and 16 pretended GPUs."""

    def __init__(self, num_nodes: int):
        # A short path: the name of a Unix socket has at most 108 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm."))
        self.nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Bring every node up, idle."""
        folder, ports = self.folder, [free_port() for _ in range(len(self.nodes) + 1)]
        folder.chmod(0o755)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        configuration = _CONFIGURATION.format(folder=folder, host=socket.gethostname().split(".")[0], ports=ports)
        hosts = Path("/etc/hosts").read_text()
        for number, node in enumerate(self.nodes, start=1):
            address = f"127.0.1.{number}"
            hosts += f"{address} {node}\n"
            configuration += (
                f"NodeName={node} NodeHostname={socket.gethostname().split('.')[0]} NodeAddr={address} "
                f"Port={ports[number]} CPUs=16 RealMemory=8000 Gres=gpu:16 State=UNKNOWN\n"
            )
            (folder / "spool" / node).mkdir(parents=True)
        (folder / "hosts").write_text(hosts)
        (folder / "slurm.conf").write_text(configuration)
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        for number in range(16):
            # A GPU needs a device file.
            os.mknod(folder / f"gpu{number}", 0o020600, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-15]\n")
        munged = ["munged", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
        munged += [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
        self.run(*munged)
        # slurmctld must know the nodes' names too: it calls srun back at them.
        mount = f"mount --bind {folder}/hosts /etc/hosts"
        self.run("unshare", "--mount", "bash", "-c", f"{mount}; exec slurmctld -f $SLURM_CONF -i")
        for node in self.nodes:
            daemon = f"{mount}; hostname {node}; exec slurmd -f $SLURM_CONF -N {node}"
            self.run("unshare", "--mount", "--uts", "bash", "-c", daemon)
        idle = ("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N")
        wait_until(lambda: set(self.run(*idle, check=False).split()) == {*self.nodes}, "all nodes")

    def stop(self) -> None:
        """End all jobs, daemons and processes in the cluster's namespaces, and remove its files."""
        self.run("scancel", "--full", "--state=RUNNING", "--user=root", check=False)
        for name in ("slurmd.*.pid", "slurmctld.pid"):
            for file in self.folder.glob(name):
                _signal(int(file.read_text()), signal.SIGTERM)
        for process in Path("/proc").glob("[0-9]*"):
            try:
                ours = f" {self.folder}/hosts /etc/hosts " in (process / "mountinfo").read_text()
            except OSError:
                continue
            if ours:
                _signal(int(process.name), signal.SIGKILL)
        _signal(int((self.folder / "munged.pid").read_text()), signal.SIGTERM)
        # Ending processes still write to it.
        wait_until(lambda: shutil.rmtree(self.folder, ignore_errors=True) or not self.folder.exists(), "files to go")

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, **variables: str) -> str:
        """Run a command of the cluster, and return its output."""
        environment = {**self.environment, **variables}
        # Into a file: a daemon would keep a pipe open.
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                command, env=environment, cwd=cwd, stdout=output, stderr=subprocess.STDOUT, check=False
            )
            output.seek(0)
            printed = output.read()
        if check and done.returncode:
            raise OSError(f"{' '.join(command)}: exit code {done.returncode}: {printed}")
        return printed

    def job(self, number: str, field: str) -> str:
        """Return a field of a job, such as JobState or Restarts."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        return re.search(rf"\b{field}=(\S*)", shown)[1]

    def wait_for(self, number: str, *states: str) -> None:
        """Wait until the job has one of `states`."""
        wait_until(lambda: self.job(number, "JobState") in states, f"job {number} to be {' or '.join(states)}")


def _signal(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return
