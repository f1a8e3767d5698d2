"""The audit's figure: lengths, languages, words of gender with occupations, and countries, on one page."""

from pathlib import Path
from typing import Any

_ROWS = 15
_BLUE, _GREY, _ORANGE = "#2f6db3", "#9a9a9a", "#c8641e"


def draw_audit(figures: dict[str, Any], file: Path) -> None:
    """Draw `figures`, an audit's, as the PNG `file`. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    page = Figure(figsize=(11, 8.5), layout="constrained")
    FigureCanvasAgg(page)
    lengths, languages, occupations, countries = page.subplots(2, 2).reshape(-1)
    _draw_lengths(lengths, figures["captions"])
    _draw_languages(languages, figures["languages"])
    _draw_occupations(occupations, figures["gender"])
    _draw_countries(countries, figures["countries"]["rows"])
    for axes in (lengths, languages, occupations, countries):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(11)
    page.savefig(file, dpi=110)


def _draw_lengths(axes: Any, captions: dict[str, Any]) -> None:
    edges, counts = captions["histogram"]["edges"], captions["histogram"]["counts"]
    axes.bar(edges[:-1], counts, width=edges[1] - edges[0], align="edge", color=_BLUE, edgecolor="white", linewidth=0.3)
    axes.set_title("Length of captions")
    axes.set_xlabel("characters (longest 1 % not shown)")
    axes.set_ylabel("captions")


def _draw_languages(axes: Any, languages: dict[str, Any]) -> None:
    part = languages["long"] if languages["long"]["captions"] else languages["short"]
    which = (
        "captions of 25 letters and more" if languages["long"]["captions"] else "captions, all shorter than 25 letters"
    )
    rows = part["languages"][: _ROWS - 3]
    shares = [100 * row["share"] for row in rows]
    named = [row["language"] not in ("unsure", "no letters") for row in rows]
    axes.barh(range(len(rows)), shares, color=[_BLUE if one else _GREY for one in named])
    for at, row in enumerate(rows):
        if "low" in row:
            axes.plot([100 * row["low"], 100 * row["high"]], [at, at], color="black", linewidth=1)
        axes.text(
            max(shares) * 0.01 + 100 * row.get("high", row["share"]),
            at,
            f"{100 * row['share']:.2f}",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(rows)), [row["language"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_title(f"Language of {which}")
    axes.set_xlabel("% of them")


def _draw_occupations(axes: Any, gender: dict[str, Any]) -> None:
    rows = [row for row in gender["occupations"] if "log_odds" in row][:_ROWS]
    rows.sort(key=lambda row: row["log_odds"])
    axes.set_title("Occupations with words of women or of men")
    if not rows:
        axes.text(0.5, 0.5, "no occupation stands in 5 captions\nthat have words of gender", ha="center", va="center")
        axes.set_axis_off()
        return
    for at, row in enumerate(rows):
        clear = row["low"] > 0 or row["high"] < 0
        axes.plot([row["low"], row["high"]], [at, at], color=_BLUE if clear else _GREY, linewidth=1.5)
        axes.plot(row["log_odds"], at, "o", color=_BLUE if clear else _GREY, markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(
        range(len(rows)), [f"{row['occupation']} ({row['with_women']}:{row['with_men']})" for row in rows], fontsize=8
    )
    axes.set_xlabel("men  ←  log odds ratio, 95 % interval  →  women")


def _draw_countries(axes: Any, countries: list[dict[str, Any]]) -> None:
    rows = countries[:_ROWS]
    axes.set_title("The countries named most, by their inhabitants")
    if not rows:
        axes.text(0.5, 0.5, "no caption names a country", ha="center", va="center")
        axes.set_axis_off()
        return
    axes.barh(range(len(rows)), [row.get("per_million", 0) for row in rows], color=_ORANGE)
    axes.set_yticks(range(len(rows)), [f"{row['name']} ({row['captions']:,})" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_xlabel("captions that name it, per million inhabitants")
