"""`python -m fuzz`: attack flipscale's readers of files with inputs that nobody wrote, for a while; `make fuzz`."""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fuzz import fuzzing


def fuzz(target: str, seconds: int, seed: int, findings: Path) -> tuple[str, int, str]:
    """Run one target in its own process. Return its name, exit code and what libFuzzer printed."""
    options = [f"-max_total_time={seconds}", f"-seed={seed}"]
    command = [sys.executable, "-m", "fuzz", target, "--one", *options, "--findings", str(findings)]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # libFuzzer ends the process, which cannot clear up after itself.
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**quiet, **os.environ, "TMPDIR": scratch}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    return target, done.returncode, done.stdout + done.stderr


def main() -> None:
    """Run the targets, as many at once as there are cores, and print a line for each."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(fuzzing.TARGETS)}; all by default")
    parser.add_argument("--seconds", type=int, default=300, help="for all targets together")
    parser.add_argument("--seed", type=int, default=1, help="of libFuzzer: equal seeds try equal inputs")
    parser.add_argument("--findings", type=Path, default=Path("fuzz_findings"), help="gets the inputs that were found")
    parser.add_argument("--input", type=Path, help="give this file to the one target that is named, and end")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parsed, options = parser.parse_known_args()
    if parsed.one:
        fuzzing.run(parsed.targets[0], options, parsed.findings)
    if parsed.input:
        fuzzing.again(parsed.targets[0], parsed.input)
        return
    targets = parsed.targets or fuzzing.TARGETS
    cores = len(os.sched_getaffinity(0))
    share = max(parsed.seconds * min(cores, len(targets)) // len(targets), 1)
    found = 0
    with ThreadPoolExecutor(cores) as pool:
        for target, code, printed in pool.map(lambda one: fuzz(one, share, parsed.seed, parsed.findings), targets):
            runs = re.search(r"number_of_executed_units: (\d+)", printed)
            inputs = f"{target}: {runs[1] if runs else 'no'} inputs in {share} s"
            print(f"{inputs}, {f'a finding (exit code {code})' if code else 'no finding'}", flush=True)
            if code:
                found += 1
                print("\n".join(line for line in printed.splitlines() if not line.startswith("#"))[-6000:])
                print(f"With its traceback: python -m fuzz {target} --input {parsed.findings}/{target}-...")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
