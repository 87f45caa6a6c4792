"""A page that shows a run while it is going on: one static file, readable at any width, rewritten in one step.

Axes: h and w pixels.
"""

import base64
import html
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lensmini.rewards.diagnostics.alarms import Record, alarms
from lensmini.rewards.diagnostics.figures import draw_panels

__all__ = ["write_page"]

STYLE = """
:root { color-scheme: light; font: 15px/1.45 system-ui, sans-serif; color: #1d2733; background: #f4f5f7; }
body { margin: 0 auto; max-width: 1240px; padding: 12px; }
h1 { font-size: 1.35rem; margin: 4px 0; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 20px 0 8px; }
p { margin: 4px 0; overflow-wrap: anywhere; }
.grid { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
figure { margin: 0; background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; padding: 8px; min-width: 0; }
figure img, svg.plot { width: 100%; height: auto; display: block; } figcaption { font-size: .85rem; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 12px; font-size: .8rem; overflow-wrap: anywhere; }
svg.key { width: 10px; height: 10px; margin-right: 5px; }
.pictures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 150px), 1fr)); } .pictures img { max-width: 640px; }
ul.alarms { list-style: none; padding: 0; margin: 8px 0; } ul.alarms li { background: #fff7e0; border-left: 5px solid #d99a00;
padding: 6px 10px; margin: 6px 0; overflow-wrap: anywhere; } ul.alarms li.severe { background: #fdeaea; border-color: #c22; }
.fine { color: #17683a; } .scroll { overflow-x: auto; background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; } th, td { padding: 4px 10px;
text-align: right; white-space: nowrap; border-bottom: 1px solid #edf0f3; } th:first-child, td:first-child { text-align: left; }
"""
PICTURE_SIDE, MOST_ROWS = 640, 50


def write_page(
    path: str | Path,
    history: Sequence[Record],
    *,
    title: str = "Rubric RL",
    pictures: Sequence[tuple[Tensor, str]] = (),
    refresh_s: int | None = None,
    notes: str = "",
    window: int = 20,
) -> None:
    """Write the state of a run as one HTML file that needs nothing else: curves, alarms, criteria and pictures.

    Made to be called every few steps. The file is replaced in one step, so that a reader never sees half of one. Whatever
    comes from outside (titles, names of criteria, captions) is escaped, and the page forbids itself scripts and connections.

    Args:
        path: the file; its folder must exist.
        history: records of :func:`lensmini.rewards.diagnostics.describe_step`, in the order of steps.
        title: of the page.
        pictures: samples with captions: ``[3, h, w]`` uint8, or floating point in [0, 1].
        refresh_s: seconds after which a browser reads the file again; none for never.
        notes: a line about the run.
        window: of :func:`lensmini.rewards.diagnostics.alarms`.

    Raises:
        ValueError: if a picture has another form, or ``refresh_s`` is not positive.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_page(Path(folder) / "run.html", [{"step": 0, "reward": {"mean": 0.5}}])
        ...     "No alarm" in (Path(folder) / "run.html").read_text()
        True
    """
    if refresh_s is not None and refresh_s < 1:
        raise ValueError(f"refresh_s: expected at least 1, got {refresh_s}")
    refresh = "" if refresh_s is None else f'<meta http-equiv="refresh" content="{int(refresh_s)}">'
    last: Record = history[-1] if history else {}
    summary = f"{len(history)} records, the last of step {_text(last.get('step'))}." if history else "No records yet."
    sections = [
        f"<h1>{html.escape(title)}</h1><p>{summary} {html.escape(notes)}</p>",
        _alarm_list(alarms(history, window=window)),
        f'<h2>Curves</h2><div class="grid">{"".join(draw_panels(history))}</div>' if history else "",
        _numbers(last),
        _criteria(last),
        _pictures(pictures),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'\">{refresh}<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(sections)}</body></html>\n"
    )
    _replace(Path(path), page)


def _alarm_list(found: Sequence[dict[str, Any]]) -> str:
    if not found:
        return '<p class="fine">No alarm.</p>'
    items = [
        f'<li class="{"severe" if alarm["severe"] else "mild"}"><b>{html.escape(alarm["name"])}</b> since step '
        f"{_text(alarm['since_step'])}: {html.escape(alarm['message'])} "
        f"({_text(alarm['value'])}, bound {_text(alarm['bound'])})</li>"
        for alarm in sorted(found, key=lambda alarm: not alarm["severe"])
    ]
    return f'<h2>Alarms</h2><ul class="alarms">{"".join(items)}</ul>'


def _numbers(record: Record) -> str:
    """The last record's numbers, with intervals where there are some."""
    rows = []
    for name, path, ends in (
        ("reward", ("reward", "mean"), None),
        ("held-out reward", ("heldout", "mean"), None),
        ("held-out rank correlation", ("heldout", "rank_correlation"), None),
        ("pictures without reward", ("reward", "missing"), None),
        ("known verdicts", ("coverage", "fraction"), None),
        ("groups without spread", ("groups", "constant_share"), None),
        ("flip rate", ("flips", "q"), ("low", "high")),
        ("reliability inside groups", ("reliability", "within"), None),
        ("velocity norm ratio", ("velocity_norm", "ratio"), ("low", "high")),
        ("diversity", ("diversity", "mean"), ("low", "high")),
        ("reward for twice the pixels", ("resolution", "area", "slope"), ("slope_low", "slope_high")),
        ("reward for twice the width", ("resolution", "aspect", "slope"), ("slope_low", "slope_high")),
        ("rank correlation with prompt length", ("prompt_length", "rank_correlation"), ("rank_low", "rank_high")),
        ("judge, seconds at the 95th percentile", ("judge", "latency_p95"), None),
        ("judge, cost", ("judge", "cost"), None),
    ):
        value: Any = record
        above: Any = {}
        for key in path:
            above, value = value, value.get(key) if isinstance(value, dict) else None
        if value is not None:
            interval = f"{_text(above.get(ends[0]))} to {_text(above.get(ends[1]))}" if ends else ""
            rows.append(f"<tr><td>{name}</td><td>{_text(value)}</td><td>{interval}</td></tr>")
    if not rows:
        return ""
    head = "<tr><th>last record</th><th>value</th><th>95 % interval</th></tr>"
    return f'<h2>Numbers</h2><div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _criteria(record: Record) -> str:
    tables = []
    for part in ("categories", "criteria"):
        found = sorted((record.get(part) or {}).items(), key=lambda item: -int(item[1].get("due") or 0))
        rows = [_criterion_row(str(name), numbers) for name, numbers in found[:MOST_ROWS]]
        more = f"<p>And {len(found) - MOST_ROWS} more that are asked less often.</p>" if len(found) > MOST_ROWS else ""
        head = (
            f"<tr><th>{part}</th><th>pass rate</th><th>spread</th><th>known</th><th>groups without spread</th>"
            "<th>flip rate</th><th>due</th><th>missing</th></tr>"
        )
        if rows:
            table = f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
            tables.append(f"<h2>{part.capitalize()}</h2>{table}{more}")
    return "".join(tables)


def _criterion_row(name: str, numbers: Record) -> str:
    shares = [numbers.get(key) for key in ("pass_rate", "spread", "valid_fraction", "constant_share")]
    flips = (numbers.get("flips") or {}).get("q")
    causes = ", ".join(f"{cause} {count}" for cause, count in (numbers.get("causes") or {}).items())
    cells = [html.escape(name), *map(_text, (*shares, flips, numbers.get("due"))), html.escape(causes)]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _pictures(pictures: Sequence[tuple[Tensor, str]]) -> str:
    if not pictures:
        return ""
    items = [
        f'<figure><img alt="" src="data:image/png;base64,{_png(image)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for image, caption in pictures
    ]
    return f'<h2>Pictures</h2><div class="grid pictures">{"".join(items)}</div>'


def _png(image: Tensor) -> str:
    from PIL import Image

    if image.ndim != 3 or image.shape[0] != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise ValueError(f"pictures: expected [3, h, w] uint8 or floating point, got {image.dtype} {list(image.shape)}")
    pixels = image.detach().cpu()
    if pixels.is_floating_point():
        pixels = (pixels.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".new")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
