"""The command that started a run, as its user typed it."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from flipscale.training.preemption import STOP_FILE

# The words by which a launcher's own command line is known.
_LAUNCHERS = ("torchrun", "accelerate", "torch.distributed.run", "accelerate.commands.launch")


def typed_command() -> str | None:
    """Return the command line that started this process, or the launcher's that did; None where it cannot be known, or
    where a batch script started it, which is not typed again."""
    if STOP_FILE in os.environ:
        return None
    words = list(sys.orig_argv)
    if "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:
        words = _words_of(os.getppid())
        if not any(Path(word).name in _LAUNCHERS for word in words[:4]):
            # The user may have set the variables, where there is one process.
            words = list(sys.orig_argv) if "WORLD_SIZE" not in os.environ else []
    if len(words) < 2 or words[1] == "-c":
        return None
    is_script = os.access(words[1], os.X_OK)  # which the kernel has put its interpreter in front of
    return shlex.join([_short(words[1]), *words[2:]] if is_script else words)


def how_to_go_on() -> str:
    """Return what continues this run, for the end of a sentence."""
    command = typed_command()
    return f"to go on: {command}" if command else "the same command goes on"


def _short(program: str) -> str:
    """Return the name of a program if the shell finds the same one by it, else its path."""
    name = Path(program).name
    found = shutil.which(name)
    return name if found and os.path.abspath(found) == os.path.abspath(program) else program


def _words_of(pid: int) -> list[str]:
    """Return the command line of a process; nothing where it cannot be read."""
    try:
        content = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [word.decode(errors="replace") for word in content.split(b"\0")[:-1]]
