"""How the plan's report is shown: its tables, and balance, memory, days and tokens per slot in four panels."""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

__all__ = ["plot_rows", "print_report"]

_INK, _MUTED, _LINE = "#1d2733", "#66727f", "#dde3e8"
_COLOURS = {"bucket": "#2166ac", "packed": "#1b7f4b", "same_bucket": "#d9731a"}
_NAMES = {"bucket": "a bucket per slot (paper)", "packed": "packed slots", "same_bucket": "a bucket per step"}
_MARKS = (
    ("none", "o", "nothing recomputed"),
    ("selective", "D", "all but matrix products"),
    ("full", "s", "whole blocks"),
)


def _gigabytes(row: dict[str, Any]) -> str:
    sign = ">" if row["memory_is"] == "measured" else ""
    return sign + "/".join(f"{gigabytes:.0f}" for gigabytes in row["memory_gb"].values())


_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("\nranks", lambda row: f"{row['ranks']:,}"),
    ("micro-\nsteps", lambda row: f"{row['micro_steps']}"),
    ("images\n/ step", lambda row: f"{row['images_per_step']:,.0f}"),
    ("image\ntokens", lambda row: f"{row['image_tokens_per_step'] / 1e6:.2f}M"),
    ("text\ntokens", lambda row: f"{row['text_tokens_per_step'] / 1e6:.2f}M"),
    ("bal-\nance", lambda row: f"{row['balance']:.3f}"),
    ("worst\nstep", lambda row: f"{row['worst_balance']:.3f}"),
    ("pad-\nding", lambda row: f"{100 * row['padding']:.1f}%"),
    ("fullest\nslot", lambda row: f"{row['most_slot_tokens']:,}"),
    ("GB: none /\nsome / full", _gigabytes),
    ("recom-\npute", lambda row: row["recompute"] or "no fit"),
    ("seconds\n/ step", lambda row: f"{row['seconds_per_step']:.2f}"),
    ("MFU\n", lambda row: f"{100 * row['mfu']:.1f}%"),
    ("\ndays", lambda row: f"{row['days']:,.1f}"),
    ("GPU\nhours", lambda row: f"{row['gpu_hours'] / 1e3:,.0f}K"),
)


def print_report(report: dict[str, Any]) -> None:
    """The tables, one for each mix and mode, and what their columns mean; plain text where there is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    # Numbers that are cut short would be worse than lines that wrap.
    console.width = max(console.width, 124)
    for (mix, mode), rows in groupby(report["rows"], key=lambda row: (row["mix"], row["mode"])):
        table = Table(title=f"{mix}, {mode}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for title, _ in _COLUMNS:
            table.add_column(title, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*(text(row) for _, text in _COLUMNS))
        console.print(table)
    for note in report["notes"]:
        console.print(f"- {note}", markup=False)


def plot_rows(rows: Sequence[dict[str, Any]], path: Path, *, memory_gb: float) -> None:
    """Write the four panels as a PNG.

    Args:
        rows: as ``report_rows`` makes them.
        path: the file.
        memory_gb: memory of a GPU.
    """
    from matplotlib.figure import Figure

    # Where several mixes are compared, or there is one rank count, lines over ranks would say nothing.
    shown = _at_one_rank_count(rows)
    by_ranks = len({row["mix"] for row in rows}) == 1 and len({row["ranks"] for row in rows}) > 1
    height = max(7.6, 1.4 + 0.62 * len(shown))
    figure = Figure(figsize=(13, height), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_MUTED)
        axis.tick_params(colors=_INK, length=3)
        axis.grid(color=_LINE)
        axis.set_axisbelow(True)
    (_balance_lines if by_ranks else _balance_rows)(axes[0, 0], rows if by_ranks else shown)
    _memory(axes[0, 1], shown, memory_gb)
    (_days_lines if by_ranks else _days_rows)(axes[1, 0], rows if by_ranks else shown)
    _slot_tokens(axes[1, 1], shown)
    figure.suptitle(f"{rows[0]['mix']}" if by_ranks else f"{shown[0]['ranks']:,} ranks", color=_INK)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=130)
    temporary.replace(path)


def _at_one_rank_count(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every mix and mode at the most ranks that the plan's own slots serve."""
    counts = sorted({row["ranks"] for row in rows})
    slots = min(row["num_slots"] for row in rows)
    ranks = max([count for count in counts if count <= slots] or counts[:1])
    return [row for row in rows if row["ranks"] == ranks]


def _by_mode(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    modes = dict.fromkeys(row["mode"] for row in rows)
    return [
        (mode, sorted((row for row in rows if row["mode"] == mode), key=lambda row: row["ranks"])) for mode in modes
    ]


def _rank_axis(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    counts = sorted({row["ranks"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [f"{count:,}" for count in counts])
    axis.minorticks_off()
    axis.set_xlabel("GPUs (ranks)")


def _balance_lines(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    for mode, mine in _by_mode(rows):
        ranks = [row["ranks"] for row in mine]
        axis.plot(ranks, [row["balance"] for row in mine], color=_COLOURS[mode], marker="o", ms=4, label=_NAMES[mode])
        axis.plot(ranks, [row["worst_balance"] for row in mine], color=_COLOURS[mode], linestyle=":", linewidth=1.3)
    axis.plot([], [], color=_MUTED, linestyle=":", label="worst step")
    _rank_axis(axis, rows)
    lowest = min(row["worst_balance"] for row in rows)
    axis.set_ylim(max(0.0, lowest - 0.06), 1.01)
    axis.set_ylabel("useful / (ranks x slowest rank)")
    axis.set_title("Balance of FLOPs, ranks waiting after every micro-step", fontsize=11)
    axis.legend(fontsize=9, loc="lower left")


def _days_lines(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    shown = _at_one_rank_count(rows)
    for mode, mine in _by_mode(rows):
        ranks = [row["ranks"] for row in mine]
        # Lines a few per cent apart are one line on a log axis: the words say how far.
        (at,) = [row for row in shown if row["mode"] == mode]
        name = f"{_NAMES[mode]}: {at['days']:.1f} on {at['ranks']:,}"
        axis.plot(ranks, [row["days"] for row in mine], color=_COLOURS[mode], marker="o", ms=4, label=name)
        unfit = [row for row in mine if row["recompute"] is None]
        axis.plot([row["ranks"] for row in unfit], [row["days"] for row in unfit], "x", color=_COLOURS[mode], ms=11)
    if any(row["recompute"] is None for row in rows):
        axis.plot([], [], "x", color=_MUTED, ms=9, label="does not fit the memory")
    _rank_axis(axis, rows)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axis.set_ylabel("days (a model)")
    axis.set_title(f"Days for {rows[0]['images_of_run'] / 1e6:,.0f} million images", fontsize=11)
    axis.legend(fontsize=9, loc="upper right")


def _name_rows(axis: Any, rows: Sequence[dict[str, Any]], words: Sequence[str] = ()) -> list[int]:
    """Label the y axis with the series, top to bottom, each with a word more where there are any."""
    several = len({row["mix"] for row in rows}) > 1
    names = [(f"{row['mix']}\n" if several else "") + _NAMES[row["mode"]] for row in rows]
    names = [", ".join(pair) for pair in zip(names, words, strict=True)] if words else names
    places = list(range(len(rows)))[::-1]
    axis.set_yticks(places, names, fontsize=8 if several else 9)
    axis.set_ylim(-0.7, len(rows) - 0.3)
    axis.grid(visible=False, axis="y")
    return places


def _balance_rows(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    for place, row in zip(_name_rows(axis, rows), rows, strict=True):
        colour = _COLOURS[row["mode"]]
        axis.plot([row["worst_balance"], row["balance"]], [place, place], color=colour, linewidth=1.5)
        axis.plot(row["balance"], place, "o", color=colour)
    axis.set_xlim(None, 1.005)
    axis.set_xlabel("useful / (ranks x slowest rank); the line reaches to the worst step")
    axis.set_title("Balance of FLOPs", fontsize=11)


def _days_rows(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    for place, row in zip(_name_rows(axis, rows), rows, strict=True):
        fits = row["recompute"] is not None
        axis.barh(place, row["days"], 0.6, color=_COLOURS[row["mode"]], alpha=1 if fits else 0.35)
        axis.text(row["days"], place, f" {row['days']:,.1f}{'' if fits else ', does not fit'}", va="center", fontsize=8)
    axis.margins(x=0.22)
    axis.set_xlabel("days (a model)")
    axis.set_title(f"Days for {rows[0]['images_of_run'] / 1e6:,.0f} million images", fontsize=11)


def _memory(axis: Any, rows: Sequence[dict[str, Any]], memory_gb: float) -> None:
    places = _name_rows(axis, rows, [row["memory_is"] for row in rows])
    for place, row in zip(places, rows, strict=True):
        axis.barh(place, row["fixed_gb"], 0.5, color=_LINE)
        for name, mark, _ in _MARKS:
            chosen = row["recompute"] == name
            axis.plot(
                row["memory_gb"][name], place, mark, color=_COLOURS[row["mode"]], ms=8, mfc=None if chosen else "w"
            )
    axis.axvline(memory_gb, color="#b8322a", linewidth=1.5)
    handles = [axis.plot([], [], mark, color=_INK, mfc="w", label=label)[0] for _, mark, label in _MARKS]
    handles.append(axis.barh(places[0], 0, color=_LINE, label="weights, moments, reserve"))
    axis.set_xlim(0, 1.08 * max(memory_gb, *(max(row["memory_gb"].values()) for row in rows)))
    axis.set_xlabel(f"GB per rank; red: the GPU's {memory_gb:g}; filled: what fits with least recomputation")
    fullest = {"bound": "fullest slot that can be", "measured": "fullest in the steps measured"}
    kinds = " or ".join(fullest[kind] for kind in sorted({row["memory_is"] for row in rows}))
    axis.set_title(f"Memory on {rows[0]['ranks']:,} ranks: {kinds}", fontsize=11)
    axis.legend(handles=handles, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)


def _slot_tokens(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    for place, row in zip(_name_rows(axis, rows), rows, strict=True):
        least, low, middle, high, most = (value / 1000 for value in row["slot_tokens"])
        colour = _COLOURS[row["mode"]]
        axis.plot([least, most], [place, place], color=colour, linewidth=1)
        axis.plot([low, high], [place, place], color=colour, linewidth=7, alpha=0.5, solid_capstyle="butt")
        axis.plot(middle, place, "o", color=colour, ms=6)
    axis.set_xlabel("thousand image and text tokens; dot: median, bar: 5 to 95 %, line: all")
    axis.set_title("Tokens of a slot", fontsize=11)
