"""What `experiments.prepare_data` did, counted and shown: ``summary.json`` and ``report.html``."""

import html
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.prepare_config import PrepareConfig
from experiments.prepare_stages import final_rows
from experiments.prepare_units import read_rows
from experiments.runs import write_json
from lensmini.checkpoints.files import replace_file
from lensmini.data.caption_checks import caption_statistics
from lensmini.data.filters import FILTER_CAUSES
from lensmini.data.shards import ShardReader

__all__ = ["write_report"]

_SHOWN = 24
_SAMPLED = 200_000
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
h1,h2{font-weight:600}table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}
td.n{text-align:right;font-variant-numeric:tabular-nums}.bar{background:#4a7ab5;height:.8em;display:inline-block}
.thumbs{display:flex;flex-wrap:wrap;gap:8px}.thumbs figure{margin:0;width:110px;font-size:11px;overflow-wrap:anywhere}
.thumbs img{max-width:96px;max-height:96px;border:1px solid #ccc}svg{margin-right:1em}
blockquote{margin:.5em 0;padding-left:1em;border-left:3px solid #4a7ab5}"""


def write_report(config: PrepareConfig, num_units: int) -> dict[str, Any]:
    """Count all rows and write the summary and the page.

    Args:
        config: of the run.
        num_units: units of the source.

    Returns:
        The summary.

    Raises:
        RuntimeError: if the shards hold another number of samples than the rows say.
    """
    out = config.run.out
    gone = {row["key"]: row["fate"] for row in read_rows(out / "duplicates.jsonl")}
    fates, notes = Counter[str](), Counter[str]()
    scores: dict[str, list[float]] = {}
    thumbs: dict[str, list[dict[str, Any]]] = {}
    captions: list[str] = []
    draw = random.Random(0)
    num_kept = 0
    for unit in range(num_units):
        for row in final_rows(config, unit, gone):
            fates[row["fate"]] += 1
            notes.update(row.get("notes", ()))
            if len(scores.get("clarity", ())) < _SAMPLED:
                for name, value in row.get("scores", {}).items():
                    scores.setdefault(name, []).append(value)
            if "thumb" in row and len(thumbs.setdefault(row["fate"], [])) < _SHOWN:
                thumbs[row["fate"]].append(row)
            if row["fate"] == "kept":
                num_kept += 1
                # A fair sample of any number of captions.
                if len(captions) < _SAMPLED:
                    captions.append(row["caption"])
                elif (place := draw.randrange(num_kept)) < _SAMPLED:
                    captions[place] = row["caption"]
    kept = fates.pop("kept", 0)
    stored = ShardReader(out / "shards").files
    if stored.num_samples != kept:
        raise RuntimeError(f"shards: expected the {kept} kept samples, found {stored.num_samples}")
    words = caption_statistics(captions)
    summary = {
        "read": kept + sum(fates.values()),
        "kept": kept,
        "dropped": dict(fates.most_common()),
        "notes": dict(notes.most_common()),
        "words": {"mean": words.mean, "std": words.std, "quantiles": words.quantiles},
        "shards": len(stored.shards),
        "bytes": stored.num_bytes,
    }
    write_json(out / "summary.json", summary)
    page = _page(config, summary, scores, thumbs, draw.sample(captions, min(8, len(captions))))
    replace_file(out / "report.html", lambda part: part.write_text(page, encoding="utf-8"))
    return summary


def _page(
    config: PrepareConfig,
    summary: dict[str, Any],
    scores: dict[str, list[float]],
    thumbs: dict[str, list[dict[str, Any]]],
    captions: Sequence[str],
) -> str:
    read = max(1, summary["read"])
    rows = [("read", summary["read"]), *_funnel(summary["dropped"]), ("kept", summary["kept"])]
    funnel = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="n">{number:,}</td><td class="n">{number / read:.2%}</td>'
        f'<td><span class="bar" style="width:{300 * number / read:.0f}px"></span></td></tr>'
        for name, number in rows
    )
    plots = "".join(_histogram(name, values, _bounds(config, name)) for name, values in sorted(scores.items()))
    galleries = "".join(
        _gallery(fate, thumbs[fate]) for fate in sorted(thumbs, key=lambda fate: (fate != "kept", fate))
    )
    quotes = "".join(f"<blockquote>{html.escape(caption)}</blockquote>" for caption in captions)
    words, notes = summary["words"], summary["notes"]
    noted = ", ".join(f"{html.escape(name)} {number:,}" for name, number in notes.items()) or "none"
    quantiles = ", ".join(f"{float(level):.0%}: {value:.0f}" for level, value in words["quantiles"].items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Prepared data</title><style>{_STYLE}</style>'
        f"<h1>{html.escape(config.path.name)}: {summary['kept']:,} of {summary['read']:,} samples kept</h1>"
        f"<p>{summary['shards']:,} tars, {summary['bytes'] / 1e6:,.1f} MB.</p>"
        f"<h2>What became of them</h2><table>{funnel}</table><p>Read with care: {noted}.</p>"
        f"<h2>Scores of all that could be read</h2><p>Red lines are the bounds.</p>{plots}"
        f"<h2>Pictures</h2>{galleries}"
        f"<h2>Captions</h2><p>{words['mean']:.1f} words on average (the paper's: about 109), standard deviation "
        f"{words['std']:.1f}; quantiles {quantiles}.</p>{quotes}</html>\n"
    )


def _funnel(dropped: dict[str, int]) -> list[tuple[str, int]]:
    """In the order in which things are dropped: source, picture, filters, duplicates, captions."""

    def stage(name: str) -> int:
        if name.startswith("picture: "):
            return 1
        if name in FILTER_CAUSES:
            return 2 + FILTER_CAUSES.index(name)
        if name in ("duplicate", "near-duplicate"):
            return 50
        return 60 if name.startswith("caption: ") else 0

    return sorted(dropped.items(), key=lambda item: (stage(item[0]), -item[1], item[0]))


def _bounds(config: PrepareConfig, name: str) -> list[float]:
    found = (getattr(config.thresholds, f"{side}_{name}", None) for side in ("min", "max"))
    return [bound for bound in found if bound is not None]


def _histogram(name: str, values: list[float], bounds: list[float]) -> str:
    finite = np.array([value for value in values if np.isfinite(value)])
    if not len(finite):
        return ""
    # Areas and clarity span decades.
    wide = name in ("area", "clarity")
    shown = np.log10(np.maximum(finite, 1e-2)) if wide else finite
    marks = np.log10(np.maximum(bounds, 1e-2)) if wide else np.array(bounds)
    low, high = float(min([shown.min(), *marks])), float(max([shown.max(), *marks]))
    high = high if high > low else low + 1.0
    counts, _ = np.histogram(shown, bins=40, range=(low, high))
    top = max(1, counts.max())
    bars = "".join(
        f'<rect x="{8 * index}" y="{100 - 100 * count / top:.1f}" width="7" height="{100 * count / top:.1f}" fill="#4a7ab5"/>'
        for index, count in enumerate(counts)
    )
    lines = "".join(
        f'<line x1="{320 * (mark - low) / (high - low):.1f}" x2="{320 * (mark - low) / (high - low):.1f}" y1="0" y2="100" '
        'stroke="#c33" stroke-width="2"/>'
        for mark in marks
    )
    ends = [10**end if wide else end for end in (low, high)]
    label = f"{html.escape(name)}: {ends[0]:.3g} to {ends[1]:.3g}{', logarithmic' if wide else ''}"
    return (
        f'<svg width="330" height="125" role="img" aria-label="{label}">{bars}{lines}'
        f'<text x="0" y="118" font-size="13">{label}</text></svg>'
    )


def _gallery(fate: str, rows: list[dict[str, Any]]) -> str:
    figures = "".join(
        f'<figure><img src="data:image/jpeg;base64,{row["thumb"]}" alt=""><figcaption>{html.escape(row["key"][-60:])}'
        f"</figcaption></figure>"
        for row in rows
    )
    return f'<h3>{html.escape(fate)}</h3><div class="thumbs">{figures}</div>'
