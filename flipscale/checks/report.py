"""The checks of `flipscale bench gpu` in their order, and their report: a block of text, tables in Markdown.

A failed check does not end the others.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flipscale.checks.kernels import check_attention, check_collectives, check_links, check_products, check_triton
from flipscale.checks.machine import check_machine
from flipscale.checks.node import Bench, Finding, NotRun, Row
from flipscale.checks.nodes import OWN_CHECKS_SECONDS, Nodes
from flipscale.checks.steps import check_contexts, check_plan, check_steps, planning_figures
from flipscale.checks.trainings import check_kill, check_loader, check_losses, check_resume, check_stall, check_trainer
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.io.text_table import markdown_table

_LINES = 60
# Checks of all nodes together.
OF_ALL_NODES = (check_products, check_links, check_collectives, check_trainer, check_stall, check_kill)
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
    check_trainer,
    check_losses,
    check_resume,
    check_stall,
    check_kill,
)

PROFILE = (
    "to see each kernel of five steps: nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi "
    "--capture-range-end=stop accelerate launch --config_file ds_configs/ddp.yaml -m flipscale.pretrain "
    "--config l16_laion400m --log.profile_steps 5"
)
_TABLES = {"open_clip": "Beside open_clip", "trainer": "Trainer and loader, means of five steps", "steps": "Steps"}
_HEAD = ("", "GPUs", "pairs/s", "quartiles", "medians of starts", "ms", "MFU", "MHz", "W a GPU", "pairs/J")


def run_checks(bench: Bench, announce: Callable[[str], None], checks: Sequence[Any] = ()) -> None:
    """Run checks, by default all of a node, and call `announce` with the lines of each."""
    for check in checks or CHECKS:
        if check is check_trainer and not bench.trained:  # as `--quick` has it
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


def check_nodes(benches: list[Bench], nodes: Nodes, folder: Path, announce: Callable[[str], None]) -> None:
    """Collective. Check all nodes together, in a folder that they share, after the checks `benches[0]` of each, and
    append these checks to `benches`."""
    bench = benches[0]
    nodes.begin("nodes")
    failed = [vars(one) for one in bench.findings if one.status == "FAILED"]
    own: dict[str, Any] = {"failed": failed, "versions": bench.figures.get("machine", {}).get("versions")}
    own["fastest"] = [*bench.figures.get("fastest", {}).values()]  # recipes of a node are files of its own
    every = dict(zip(nodes.hosts, first := nodes.gather(own, OWN_CHECKS_SECONDS), strict=True))
    faults = [f"{host} failed {len(found['failed'])} checks" for host, found in every.items() if found["failed"]]
    faults += [f"{host} has other versions" for host in every if every[host]["versions"] != first[0]["versions"]]
    figures = {"nodes": every, "fastest": dict(zip(bench.trained, first[0]["fastest"], strict=False))}
    benches.append(whole := replace(bench, nodes=nodes, folder=folder, figures=figures, findings=[]))
    whole.num_gpus *= len(every)
    whole.add("nodes", f"{whole.num_gpus} GPUs on {', '.join(every)}", faults)
    whole.findings += [
        Finding(f"{host}: {one['name']}", "FAILED", one["text"]) for host in every for one in every[host]["failed"]
    ]
    for finding in whole.findings:
        announce(finding.line())
    run_checks(whole, announce, OF_ALL_NODES)


def findings_block(bench: Bench) -> str:
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


def write_report(benches: Sequence[Bench], path: Path) -> None:
    """Write the report of a node and perhaps of all nodes."""
    machine, first = benches[0].figures.get("machine", {}), benches[0]
    gpu: Row = (machine.get("gpus") or [{}])[0]
    starts = f"{first.starts} starts of {first.timed_steps} steps"
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **machine.get("versions", {}),
        "GPU": f"{gpu.get('name', '?')}, driver {gpu.get('driver_version', '?')}",
        "at most": f"{gpu.get('clocks.max.sm', '?')} MHz, {gpu.get('power.limit', '?')} W",
        "pairs of a GPU": str(first.batch_size),
        "a row": f"{starts}; pairs/s of all GPUs: median, quartiles of all steps; MHz and watts during the steps",
    }
    lines = ["# flipscale bench gpu", "", *(f"- {name}: {fact}" for name, fact in facts.items())]
    for bench in benches:
        lines += ["", f"## GPUs: {bench.num_gpus}, nodes: {len(bench.nodes.hosts)}"]
        lines += ["", f"Hosts: {', '.join(bench.nodes.hosts)}."]
        for name, title in _TABLES.items():
            if rows := [row for row in bench.figures.get(name, []) if "calls" not in row]:
                lines += ["", f"### {title}", "", markdown_table([_HEAD, *map(_cells, rows)], 1)]
        lines += ["", "### Checks", "", "```", findings_block(bench), "```", ""]
    write_text(path, "\n".join([*lines, PROFILE, ""]))


def _label(row: Row) -> str:
    words = [Path(row["recipe"]).stem, row.get("code") or row["engine"]]
    words += [f"{row['mask_ratio']:.0%}"] if "mask_ratio" in row else []
    return " ".join([*words, *(name for name in ("compiled", "recomputes") if row.get(name))])


def _cells(row: Row) -> list[str]:
    if "out_of_memory" in row:
        return [_label(row), str(row["gpus"]), "out of memory", *[""] * (len(_HEAD) - 3)]
    rate = [row["gpus"] * row["pairs"] / seconds for seconds in (row["seconds"], *row["quartiles"][::-1])]
    medians = ", ".join(f"{row['gpus'] * row['pairs'] / seconds:,.0f}" for seconds in row["medians"])
    digits = {"mfu": ".1%", "mhz": ".0f", "watts": ".0f", "pairs_per_joule": ".2f"}
    known = [format(row[name], form) if row[name] is not None else "-" for name, form in digits.items()]
    ends = f"{rate[1]:,.0f} to {rate[2]:,.0f}"
    return [_label(row), str(row["gpus"]), f"{rate[0]:,.0f}", ends, medians, f"{1e3 * row['seconds']:.1f}", *known]
