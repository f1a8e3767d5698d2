"""The report of `flipscale bench gpu` for a page: its tables in Markdown, and a figure."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from flipscale.checks.bench import report
from flipscale.checks.node import Bench, Row
from flipscale.checks.open_clip import CODES
from flipscale.evaluation.presentation.figures import COLOURS, can_draw, drawing_pyplot, save_figure, tidy
from flipscale.io.atomic import write_text
from flipscale.io.text_table import markdown_table

PROFILE = (
    "to see each kernel of five steps: nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi "
    "--capture-range-end=stop accelerate launch --config_file ds_configs/ddp.yaml -m flipscale.pretrain "
    "--config l16_laion400m --log.profile_steps 5"
)
_TABLES = {"open_clip": "Beside open_clip", "trainer": "Trainer and loader, means of five steps", "steps": "Steps"}
_HEAD = ("", "GPUs", "pairs/s", "quartiles", "medians of starts", "ms", "MFU", "MHz", "W a GPU", "pairs/J")


def write_report(benches: Sequence[Bench], path: Path) -> None:
    """Write the report of a node and perhaps of all nodes, and `report.png` beside it if matplotlib is installed."""
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
        lines += ["", "### Checks", "", "```", report(bench), "```", ""]
    if can_draw() and (rows := [row for bench in benches for row in bench.figures.get("open_clip", [])]):
        _draw(rows, path.with_suffix(".png"))
        lines += [f"![Pairs a second of flipscale and open_clip]({path.stem}.png)", ""]
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


def _draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the pairs per second of a GPU, with quartiles, for each recipe, mask and number of GPUs."""
    figure, axes = drawing_pyplot().subplots(figsize=(9, 4.5), constrained_layout=True)
    names = [f"{Path(row['recipe']).stem}\n{row['mask_ratio']:.0%} masked\non {row['gpus']}" for row in rows]
    places = list(dict.fromkeys(names))
    for number, code in enumerate(CODES):
        own = [(places.index(name), row) for name, row in zip(names, rows, strict=True) if row["code"] == code]
        shown = [(place + 0.4 * number, row) for place, row in own if "seconds" in row]
        rates = [row["pairs_per_s"] for _, row in shown]
        ends = [[abs(row["pairs"] / row["quartiles"][end] - row["pairs_per_s"]) for _, row in shown] for end in (1, 0)]
        look = {"color": COLOURS[number], "yerr": ends, "capsize": 2.5, "label": code}
        axes.bar([place for place, _ in shown], rates, 0.38, **look)
    axes.set_xticks([place + 0.2 for place in range(len(places))], places, fontsize=7)
    axes.set_xlabel("recipe, mask, number of GPUs", fontsize=7)
    axes.set_ylabel("pairs/s of a GPU")
    figure.legend(loc="outside upper center", ncols=len(CODES), frameon=False)
    tidy(axes)
    save_figure(figure, path)
