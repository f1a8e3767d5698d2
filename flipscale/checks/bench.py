"""The checks of `flipscale bench gpu` in their order, and their report. A failed check does not end the others."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flipscale.checks.kernels import check_attention, check_collectives, check_links, check_products, check_triton
from flipscale.checks.machine import check_machine
from flipscale.checks.node import Bench, Finding, NotRun
from flipscale.checks.nodes import OWN_CHECKS_SECONDS, Nodes
from flipscale.checks.open_clip import check_open_clip
from flipscale.checks.runs import check_kill, check_loader, check_losses, check_resume, check_stall, check_trainer
from flipscale.checks.steps import check_contexts, check_plan, check_steps, planning_figures
from flipscale.io.errors import UserError

_LINES = 60
# What `--quick` leaves out: all but the checks.
COMPARED = (check_open_clip, check_trainer)
# Checks of all nodes together.
OF_ALL_NODES = (check_products, check_links, check_collectives, *COMPARED, check_stall, check_kill)
# Checks of a node. Those that measure what others use come before these.
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
    *COMPARED,
    check_losses,
    check_resume,
    check_stall,
    check_kill,
)


def run_checks(bench: Bench, announce: Callable[[str], None], checks: Sequence[Any] = ()) -> None:
    """Run checks, by default all of a node, and call `announce` with the lines of each."""
    for check in checks or CHECKS:
        if check in COMPARED and not bench.compared:
            continue
        name, start, before = check.__name__.removeprefix("check_"), time.monotonic(), len(bench.findings)
        bench.nodes.begin(name)
        try:
            check(bench)
        except NotRun as reason:
            bench.findings.append(Finding(name, "not run", str(reason)))
        except Exception as error:  # a check may fail in any way, and the others still run
            bench.add(name, "", [str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"])
        bench.figures.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
        for finding in bench.findings[before:]:
            announce(finding.line())


def check_nodes(bench: Bench, nodes: Nodes, folder: Path, announce: Callable[[str], None]) -> Bench:
    """Collective. Check all nodes together, in a folder that they share, after the checks `bench` of each."""
    nodes.begin("nodes")
    failed = [vars(one) for one in bench.findings if one.status == "FAILED"]
    own: dict[str, Any] = {"failed": failed, "versions": bench.figures.get("machine", {}).get("versions")}
    own["fastest"] = [*bench.figures.get("fastest", {}).values()]  # recipes of a node are files of its own
    every = dict(zip(nodes.hosts, first := nodes.gather(own, OWN_CHECKS_SECONDS), strict=True))
    faults = [f"{host} failed {len(found['failed'])} checks" for host, found in every.items() if found["failed"]]
    faults += [f"{host} has other versions" for host in every if every[host]["versions"] != first[0]["versions"]]
    figures = {"nodes": every, "fastest": dict(zip(bench.compared, first[0]["fastest"], strict=False))}
    whole = replace(bench, nodes=nodes, folder=folder, figures=figures, findings=[])
    whole.num_gpus *= len(every)
    whole.add("nodes", f"{whole.num_gpus} GPUs on {', '.join(every)}", faults)
    whole.findings += [
        Finding(f"{host}: {one['name']}", "FAILED", one["text"]) for host in every for one in every[host]["failed"]
    ]
    for finding in whole.findings:
        announce(finding.line())
    run_checks(whole, announce, OF_ALL_NODES)
    return whole


def report(bench: Bench) -> str:
    """Return the block to paste into an issue, at most 60 lines."""
    counts = {status: sum(one.status == status for one in bench.findings) for status in ("ok", "FAILED", "not run")}
    head = ", ".join(f"{count} {status}" for status, count in counts.items())
    seconds = sum(bench.figures.get("seconds", {}).values())
    lines = [f"flipscale bench gpu: {bench.num_gpus} GPUs, {bench.batch_size} pairs each: {head}; {seconds:.0f} s"]
    failed_first = sorted(bench.findings, key=lambda one: one.status != "FAILED")
    return "\n".join([*lines, *(one.line() for one in failed_first)][:_LINES])


def as_json(bench: Bench) -> dict[str, Any]:
    """Return all measurements, ready for JSON."""
    findings = [vars(one) for one in bench.findings]
    return {"kind": "flipscale bench gpu", "num_gpus": bench.num_gpus, "batch_size": bench.batch_size,
            "findings": findings, **bench.figures, "planning": planning_figures(bench)}  # fmt: skip
