"""The checks of `flipscale bench gpu` in their order, and their report. A failed check does not end the others."""

import time
from collections.abc import Callable
from typing import Any

from flipscale.checks.kernels import check_attention, check_collectives, check_products, check_triton
from flipscale.checks.machine import check_machine
from flipscale.checks.node import Bench, CheckError, Finding, NotRun
from flipscale.checks.runs import check_kill, check_loader, check_losses, check_resume, check_stall
from flipscale.checks.steps import check_contexts, check_plan, check_steps, planning_figures

_LINES = 60
# Those that measure what others use come before these.
CHECKS: tuple[Callable[[Bench], None], ...] = (
    check_machine,
    check_contexts,
    check_products,
    check_attention,
    check_triton,
    check_collectives,
    check_steps,
    check_plan,
    check_loader,
    check_losses,
    check_resume,
    check_stall,
    check_kill,
)


def run_checks(bench: Bench, announce: Callable[[str], None]) -> None:
    """Run all checks, and call `announce` with the lines of each."""
    for check in CHECKS:
        name, start, before = check.__name__.removeprefix("check_"), time.monotonic(), len(bench.findings)
        try:
            check(bench)
        except NotRun as reason:
            bench.findings.append(Finding(name, "not run", str(reason)))
        except Exception as error:  # a check may fail in any way, and the others still run
            bench.add(name, "", [str(error) if isinstance(error, CheckError) else f"{type(error).__name__}: {error}"])
        bench.figures.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
        for finding in bench.findings[before:]:
            announce(finding.line())


def report(bench: Bench) -> str:
    """Return the block to paste into an issue, at most 60 lines."""
    counts = {status: sum(one.status == status for one in bench.findings) for status in ("ok", "FAILED", "not run")}
    head = ", ".join(f"{count} {status}" for status, count in counts.items())
    seconds = sum(bench.figures.get("seconds", {}).values())
    lines = [f"flipscale bench gpu: {bench.num_gpus} GPUs, {bench.batch_size} pairs each: {head}; {seconds:.0f} s"]
    return "\n".join([*lines, *(one.line() for one in bench.findings)][:_LINES])


def as_json(bench: Bench) -> dict[str, Any]:
    """Return all measurements, ready for JSON."""
    findings = [vars(one) for one in bench.findings]
    return {"kind": "flipscale bench gpu", "num_gpus": bench.num_gpus, "batch_size": bench.batch_size,
            "findings": findings, **bench.figures, "planning": planning_figures(bench)}  # fmt: skip
