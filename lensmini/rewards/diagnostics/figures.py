"""Curves of a run as small inline SVG pictures: a few milliseconds for all of them, and text that stays text.

Coordinates are those of a canvas of 400 by 220, which the page scales.
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from lensmini.rewards.diagnostics.alarms import Record, read_series

__all__ = ["draw_panels"]

Series = dict[str, tuple[list[float], list[float]]]
Range = tuple[float, float]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 220, 46, 390, 10, 184
COLOURS = ("#1668b3", "#d1495b", "#2e8b57", "#8c5fbf", "#d98e04", "#2a9d98", "#7a4a2b", "#d8639c", "#5f6b7a", "#8aa313")
MOST_LINES, MOST_POINTS = len(COLOURS), 300
CURVES: tuple[tuple[str, dict[str, tuple[str, ...]], float | None], ...] = (
    ("Mean reward", {"training judge": ("reward", "mean"), "held-out judge": ("heldout", "mean")}, None),
    ("Spread of the reward (std)", {"inside groups": ("reward", "within_std"), "overall": ("reward", "std")}, None),
    (
        "Reliability of the judge",
        {
            "inside groups": ("reliability", "within"),
            "overall": ("reliability", "overall"),
            "flip rate": ("flips", "q"),
        },
        None,
    ),
    ("Share of groups without spread", {"all rewards equal": ("groups", "constant_share")}, None),
    ("Diversity (distance inside groups)", {"mean over groups": ("diversity", "mean")}, None),
    ("Velocity norm over the reference's", {"geometric mean": ("velocity_norm", "ratio")}, 1.0),
    (
        "Reward by resolution (slope inside groups)",
        {
            "twice the pixels": ("resolution", "area", "slope"),
            "twice the width to height": ("resolution", "aspect", "slope"),
            "twice the longer to shorter side": ("resolution", "elongation", "slope"),
        },
        0.0,
    ),
)
"""Title, lines by name with the path of their number in a record, and a level worth a rule."""
BY_NAME = (
    ("Pass rate by criterion", "criteria", "pass_rate"),
    ("Spread inside groups by criterion (std)", "criteria", "spread"),
    ("Reward of control pictures", "controls", "mean"),
)


def draw_panels(history: Sequence[Record]) -> list[str]:
    """Draw the curves of a run as HTML figures; what the records do not hold has none.

    Args:
        history: records of :func:`lensmini.rewards.diagnostics.describe_step`.

    Returns:
        ``<figure>`` elements, everything in them escaped.

    Example:
        >>> [figure[:8] for figure in draw_panels([{"step": 0, "reward": {"mean": 0.5}}])]
        ['<figure>']
    """
    found = [
        (title, {name: read_series(history, *path) for name, path in paths.items()}, level)
        for title, paths, level in CURVES
    ]
    found[1:1] = [(title, _by_name(history, part, key), None) for title, part, key in BY_NAME]
    figures = []
    for title, series, level in found:
        known = {name: line for name, line in series.items() if line[0]}
        if known:
            figures.append(_figure(title, _lines(known, level), known))
    steps, causes = _missing_by_cause(history)
    if steps:
        figures.insert(
            1, _figure("Missing verdicts by cause (share of all)", _stack(steps, causes), causes or ["none"])
        )
    last: Record = history[-1] if history else {}
    histogram = (last.get("reward") or {}).get("histogram")
    if histogram and sum(histogram["counts"]):
        figures.append(_figure("Rewards of the last record (pictures)", _bars(histogram), ()))
    correlation = last.get("correlation")
    if correlation and len(correlation["ids"]) > 1:
        figures.append(_figure("Correlation of criteria inside groups, last record", _matrix(correlation), ()))
    return figures


def _by_name(history: Sequence[Record], part: str, key: str) -> Series:
    """One line for each criterion or kind, those that are judged most often."""
    weight: dict[str, int] = {}
    for record in history:
        for name, numbers in (record.get(part) or {}).items():
            weight[name] = weight.get(name, 0) + int(numbers.get("valid") or 0)
    most = sorted(weight, key=lambda name: -weight[name])[:MOST_LINES]
    return {name: read_series(history, part, name, key) for name in most}


def _missing_by_cause(history: Sequence[Record]) -> tuple[list[float], Series]:
    rows = [(i, record) for i, record in enumerate(history) if (record.get("coverage") or {}).get("shares") is not None]
    shares = [record["coverage"]["shares"] for _, record in rows]
    steps = [float(i if record.get("step") is None else record["step"]) for i, record in rows]
    total: dict[str, float] = {}
    for share in shares:
        for cause, value in share.items():
            total[cause] = total.get(cause, 0.0) + float(value)
    most = sorted(total, key=lambda cause: -total[cause])[:MOST_LINES]
    return steps, {cause: (steps, [float(share.get(cause, 0.0)) for share in shares]) for cause in most}


def _figure(title: str, drawing: str, names: Iterable[str]) -> str:
    legend = "".join(
        f'<span><svg class="key" viewBox="0 0 10 10"><rect width="10" height="10" rx="2" fill="{colour}"/></svg>'
        f"{html.escape(str(name))}</span>"
        for name, colour in zip(names, COLOURS, strict=False)
    )
    return (
        f"<figure><figcaption><b>{html.escape(title)}</b></figcaption>"
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{drawing}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def _lines(series: Series, level: float | None) -> str:
    x_range = _span(step for steps, _ in series.values() for step in steps)
    values = [value for _, line in series.values() for value in line]
    y_range = _span([*values, *([] if level is None else [level])], margin=0.06)
    parts = [_frame(x_range, y_range)]
    if level is not None:
        y = _place(level, y_range, BOTTOM, TOP)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#888" stroke-dasharray="4 3"/>')
    for (name, (steps, line)), colour in zip(series.items(), COLOURS, strict=False):
        kept = _thin(len(steps))
        points = [(_place(steps[i], x_range, LEFT, RIGHT), _place(line[i], y_range, BOTTOM, TOP)) for i in kept]
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        title = f"<title>{html.escape(str(name))}: {line[-1]:.4g} at step {steps[-1]:g}</title>"
        parts.append(
            f'<polyline points="{text}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-linejoin="round">{title}'
            "</polyline>"
        )
        if len(points) <= 40:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{colour}"/>' for x, y in points]
    return "".join(parts)


def _stack(steps: Sequence[float], causes: Series) -> str:
    kept = _thin(len(steps))
    x_range = _span(steps)
    totals = [sum(line[i] for _, line in causes.values()) for i in range(len(steps))]
    y_range = (0.0, max(0.05, 1.06 * max(totals)))
    parts = [_frame(x_range, y_range)]
    below = [0.0] * len(steps)
    for (name, (_, line)), colour in zip(causes.items(), COLOURS, strict=False):
        above = [low + share for low, share in zip(below, line, strict=True)]
        edge = [(steps[i], above[i]) for i in kept] + [(steps[i], below[i]) for i in reversed(kept)]
        text = " ".join(f"{_place(x, x_range, LEFT, RIGHT):.1f},{_place(y, y_range, BOTTOM, TOP):.1f}" for x, y in edge)
        title = f"<title>{html.escape(str(name))}: {line[-1]:.4g} at step {steps[-1]:g}</title>"
        parts.append(f'<polygon points="{text}" fill="{colour}" fill-opacity="0.85">{title}</polygon>')
        below = above
    return "".join(parts)


def _bars(histogram: dict[str, Any]) -> str:
    edges, counts = histogram["edges"], histogram["counts"]
    x_range, y_range = (float(edges[0]), float(edges[-1])), (0.0, 1.06 * max(counts))
    parts = [_frame(x_range, y_range, "reward")]
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        left, right = (_place(x, x_range, LEFT, RIGHT) for x in (low, high))
        top = _place(count, y_range, BOTTOM, TOP)
        parts.append(
            f'<rect x="{left + 0.7:.1f}" y="{top:.1f}" width="{right - left - 1.4:.1f}" height="{BOTTOM - top:.1f}" '
            f'fill="{COLOURS[0]}"><title>{low:.3g} to {high:.3g}: {count}</title></rect>'
        )
    return "".join(parts)


def _matrix(correlation: dict[str, Any]) -> str:
    ids, matrix = [str(name) for name in correlation["ids"]], correlation["matrix"]
    left, side = 132, 200 / len(ids)
    size = min(11.0, max(4.0, 0.85 * side))
    parts = []
    for i, row in enumerate(matrix):
        y = TOP + i * side
        name = ids[i] if len(ids[i]) <= 20 else ids[i][:18] + ".."
        parts.append(_label(left - 4, y + side / 2 + size / 3, name, "end", size))
        for j, value in enumerate(row):
            shown = "not known" if value is None else f"{value:.2f}"
            title = f"<title>{html.escape(ids[i])}, {html.escape(ids[j])}: {shown}</title>"
            parts.append(
                f'<rect x="{left + j * side:.1f}" y="{y:.1f}" width="{side - 0.6:.1f}" height="{side - 0.6:.1f}" '
                f'fill="{_shade(value)}">{title}</rect>'
            )
            if side >= 24 and value is not None:
                ink = "#fff" if abs(value) > 0.6 else "#1d2733"
                parts.append(_label(left + (j + 0.47) * side, y + side / 2 + 3.5, shown, "middle", 9.5, ink))
    return "".join(parts)


def _shade(value: float | None) -> str:
    """White at 0, blue below and red above; grey where not known."""
    if value is None:
        return "#d5d9de"
    strength, end = min(1.0, abs(value)), (0xC2, 0x2F, 0x3D) if value > 0 else (0x16, 0x68, 0xB3)
    return "#" + "".join(f"{round(255 + (colour - 255) * strength):02x}" for colour in end)


def _frame(x_range: Range, y_range: Range, x_label: str = "step") -> str:
    parts = []
    for tick in _ticks(y_range):
        y = _place(tick, y_range, BOTTOM, TOP)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#e6e9ed"/>')
        parts.append(_label(LEFT - 5, y + 4, f"{tick:.6g}", "end"))
    for tick in _ticks(x_range):
        x = _place(tick, x_range, LEFT, RIGHT)
        parts.append(f'<path d="M{x:.1f} {BOTTOM}v4" stroke="#8a939e"/>')
        parts.append(_label(x, BOTTOM + 16, f"{tick:.6g}", "middle"))
    parts.append(f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#8a939e"/>')
    parts.append(_label((LEFT + RIGHT) / 2, HEIGHT - 5, x_label, "middle"))
    return "".join(parts)


def _label(x: float, y: float, text: str, anchor: str, size: float = 11.5, ink: str = "#46515d") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:.1f}" fill="{ink}">'
        f"{html.escape(text)}</text>"
    )


def _span(values: Iterable[float], margin: float = 0.0) -> Range:
    """Ends of an axis that is never without width."""
    plain = list(values)
    low, high = min(plain), max(plain)
    room = (high - low) * margin or max(abs(high) * 0.05, 0.05) * (high == low)
    return low - room, high + room


def _place(value: float, span: Range, start: float, end: float) -> float:
    return start + (value - span[0]) / (span[1] - span[0]) * (end - start)


def _ticks(span: Range) -> list[float]:
    """At most six round numbers inside."""
    rough = (span[1] - span[0]) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))
    first, last = math.ceil(span[0] / gap - 1e-9), math.floor(span[1] / gap + 1e-9)
    return [i * gap for i in range(first, last + 1)]


def _thin(count: int) -> list[int]:
    """Indices of at most some hundred points, the last always among them."""
    stride = max(1, -(-count // MOST_POINTS))
    return [*range(0, count - 1, stride), count - 1]
