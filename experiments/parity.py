"""Parity: what each known difference between implementations of Lens does, planted into our own code one at a time.

Writes docs/parity.md (between its two marker lines) and experiments/results/parity.json.

    python -m experiments.parity            # about 10 seconds on one CPU core, no download
    python -m experiments.parity --check    # are the page's numbers still true? writes nothing

Expected: our error against the published answer below 1e-5 in every row; planted differences 0.004 to 1.4, except for
those that are equivalent. The models are the small random ones of tests/golden, for which the published answer is known.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from experiments.parity_cases import errors, fingerprints
from experiments.parity_disagreements import COMFY, DIFFUSERS, DISAGREEMENTS, SDCPP
from experiments.parity_measures import GROUPS, Trap
from experiments.parity_traps import PORT_NOTES
from experiments.runs import config_hash, provenance, write_json

__all__ = ["TRAPS", "ParityConfig", "main", "make_report", "page_numbers", "render"]

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"
OURS_LIMIT, NOTHING, FACTOR = 1e-4, 1e-5, 1.5
TRAPS: tuple[Trap, ...] = (*PORT_NOTES, *DISAGREEMENTS)
IMPLEMENTATIONS = (DIFFUSERS, COMFY, SDCPP, "OneTrainer", "SushiUI")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityConfig:
    """What to write, or to compare."""

    check: bool = False
    """Compare the page with fresh numbers (within a factor of 1.5) and write nothing."""
    page: Path = ROOT / "docs" / "parity.md"
    """The page; what stands between its two marker lines is replaced."""
    results: Path = ROOT / "experiments" / "results" / "parity.json"
    """The numbers."""


def make_report(traps: Sequence[Trap] = TRAPS) -> dict[str, Any]:
    """Measure all rows.

    Args:
        traps: the rows.

    Returns:
        What goes into the json: question, rows with their errors, where they come from, verdict.
    """
    rows = []
    for trap in traps:
        measured = {where: errors(measure()) for where, measure in trap.measures.items()}
        rows.append(
            {
                "name": trap.name,
                "group": trap.group,
                "kind": trap.kind,
                "point": trap.point,
                "published": trap.published,
                "differs": list(trap.differs),
                "planted": trap.planted,
                "errors": measured,
                "note": trap.note,
            }
        )
    worst = max(error["ours"] for row in rows for error in row["errors"].values())
    source = provenance()
    return {
        "question": "How far does each known difference between implementations of Lens lead from the published code?",
        "command": "python -m experiments.parity",
        "config_hash": config_hash({"cases": fingerprints(), "rows": [trap.name for trap in traps]}),
        "commit": source["commit"],
        "dirty": source["dirty"],
        "versions": source["versions"],
        "machine": source["machine"],
        "metric": "max |a - b| / max |b| against the published answer (and the same in rms), float32",
        "cases": fingerprints(),
        "rows": rows,
        "worst_ours": worst,
        "verdict": "reproduced: ours agrees with the published code in every row"
        if worst < OURS_LIMIT
        else f"not reproduced: ours is {worst:.1e} away",
    }


def damage(row: Mapping[str, Any]) -> float:
    """The largest error that a row's difference causes."""
    return max((error["planted"] for error in row["errors"].values()), default=0.0)


def render(report: Mapping[str, Any]) -> str:
    """The generated part of the page: a table for each group, worst row first, and one by implementation."""
    lines = []
    for group, title in GROUPS.items():
        rows = sorted((row for row in report["rows"] if row["group"] == group), key=damage, reverse=True)
        lines += [f"### {title}", ""]
        if group == "unmeasured":
            lines += _table(
                ["point", "published", "who differs", "why there is no number"],
                [[_point(row), row["published"], "<br>".join(row["differs"]), row["note"]] for row in rows],
            )
        else:
            lines += _table(
                ["point", "published", "who differs", "planted here", "ours", "error of the difference", "note"],
                [_cells(row) for row in rows],
            )
        lines.append("")
    return "\n".join([*lines, *_by_implementation(report)])


def page_numbers(text: str) -> dict[str, dict[str, float]]:
    """Read the planted errors back from the page: for each row's name, where they show and how large they are.

    Example:
        >>> page_numbers(
        ...     "| x<br>`qk-eps` | 1e-6 | velocity **0.091** (rms 0.076)<br>final latents **5e-06** (rms 4e-06) |"
        ... )
        {'qk-eps': {'velocity': 0.091, 'final latents': 5e-06}}
    """
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        name = re.match(r"\| [^|]*`([\w-]+)` \|", line)
        if name is not None:
            numbers = re.findall(r"(?:\| |<br>)([^|<*]+) \*\*([\d.e+-]+)\*\*", line)
            found[name[1]] = {where: float(number) for where, number in numbers}
    return found


def differences(page: str, report: Mapping[str, Any]) -> list[str]:
    """What on the page is not as measured now: rows that are missing or extra, and numbers off by more than a factor of 1.5.

    Args:
        page: the page's text.
        report: of :func:`make_report`.

    Returns:
        One sentence for each; none if the page holds.
    """
    stated = page_numbers(page)
    measured = {row["name"]: row["errors"] for row in report["rows"]}
    problems = [f"{name}: on the page only" for name in stated.keys() - measured.keys()]
    for name, places in measured.items():
        if name not in stated or stated[name].keys() != places.keys():
            problems.append(f"{name}: expected {sorted(places)}, the page has {sorted(stated.get(name, {}))}")
            continue
        for where, error in places.items():
            old, new = stated[name][where], error["planted"]
            if max(old, new) > NOTHING and not old / FACTOR <= new <= old * FACTOR:
                problems.append(f"{name}, {where}: {old:.2g} on the page, {new:.2g} now")
            if error["ours"] > OURS_LIMIT:
                problems.append(f"{name}, {where}: ours is {error['ours']:.1e} from the published answer")
    return problems


def main(config: ParityConfig) -> dict[str, Any]:
    """Measure, then write the page and the numbers, or compare.

    Args:
        config: what to do.

    Returns:
        The report.

    Raises:
        ValueError: if the page has no marker lines, or with ``check`` does not hold.
    """
    text = config.page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{config.page}: expected the lines {BEGIN} and {END} once each, in this order")
    report = make_report()
    if config.check:
        problems = differences(text, report)
        if problems:
            raise ValueError(f"{config.page} is not as measured now: " + "; ".join(problems))
    else:
        head, tail = text[: text.index(BEGIN)], text[text.index(END) :]
        write_json(config.results, report)
        config.page.write_text(f"{head}{BEGIN}\n\n{render(report)}\n\n{tail}")
    print(f"{len(report['rows'])} rows; ours at most {report['worst_ours']:.1e} from the published answers")
    return report


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]


def _point(row: Mapping[str, Any]) -> str:
    return f"{row['point']}<br>`{row['name']}`"


def _cells(row: Mapping[str, Any]) -> list[str]:
    ours = max(error["ours"] for error in row["errors"].values())
    places = [f"{where} **{e['planted']:.2g}** (rms {e['planted_rms']:.2g})" for where, e in row["errors"].items()]
    planted = row["planted"] + ("<br>*equivalent*" if row["kind"] == "equivalent" else "")
    differs = "<br>".join(row["differs"])
    return [
        _point(row),
        row["published"],
        differs,
        planted,
        "0" if ours == 0 else f"{ours:.0e}",
        "<br>".join(places),
        row["note"],
    ]


def _by_implementation(report: Mapping[str, Any]) -> list[str]:
    lines = ["### By implementation", ""]
    rows = [["lensmini", "the date, by choice: pinned", f"{report['worst_ours']:.0e}, the worst row"]]
    for implementation in IMPLEMENTATIONS:
        own = [row for row in report["rows"] if any(text.startswith(implementation) for text in row["differs"])]
        own.sort(key=damage, reverse=True)
        points = [
            f"{'together' if row['group'] == 'all' else row['point']}"
            f"{' (equivalent)' if row['kind'] == 'equivalent' else ''}"
            f"{' *(secondary)*' if any(implementation in text and 'secondary' in text for text in row['differs']) else ''}"
            for row in own
        ]
        rows.append([implementation, "<br>".join(points), "<br>".join(f"{damage(row):.2g}" for row in own)])
    return lines + _table(["implementation", "differs in", "largest error here"], rows)


def cli(arguments: Sequence[str]) -> None:
    """Run from the command line; what is wrong is one sentence and a failing exit status."""
    try:
        main(tyro.cli(ParityConfig, args=list(arguments), prog="python -m experiments.parity"))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"parity: {error}") from None


if __name__ == "__main__":
    torch.set_num_threads(1)
    cli(sys.argv[1:])
