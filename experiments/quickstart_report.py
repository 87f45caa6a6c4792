"""The quickstart's report: one HTML file with everything in it, that asks nothing of any server."""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from experiments.runs import read_jsonl

__all__ = ["readable", "write_report"]

_INK, _MUTED, _LINE = "#1d2733", "#66727f", "#dde3e8"
_BLUE, _ORANGE, _GREEN, _RED, _VIOLET, _TEAL = "#2166ac", "#d9731a", "#1b7f4b", "#b8322a", "#7a4ea3", "#1a8a94"
_TOKEN = 4  # pixels a side of one of the miniature autoencoder's tokens, in which metrics.jsonl counts
_SERIES = (_BLUE, _ORANGE, _GREEN, _VIOLET, _TEAL, _RED)

_STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:#f4f6f8;color:#1d2733;font:16px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:20px 16px 48px}
h1{font-size:1.6rem;line-height:1.2;margin:.4em 0 .2em}
h2{font-size:1.15rem;margin:2em 0 .3em}
p{max-width:75ch;margin:.3em 0 .8em}
.muted,figcaption,small{color:#56626f}
.card{background:#fff;border:1px solid #dde3e8;border-radius:8px;padding:12px 14px}
.numbers{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:16px 0}
.numbers b{display:block;font-size:1.7rem;line-height:1.2;font-variant-numeric:tabular-nums}
.numbers span{display:block;font-size:.9rem}
.numbers small{display:block;font-size:.8rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:14px}
.charts figure,.pictures figure{margin:0}
.charts svg{display:block;width:100%;height:auto}
.charts figcaption{font-size:.85rem;margin-top:6px}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:10px}
.frame{height:132px;display:flex;align-items:center;justify-content:center}
.frame img{image-rendering:pixelated;border:1px solid #dde3e8;display:block}
.tags{display:flex;flex-wrap:wrap;gap:4px 8px;align-items:center;font-size:.78rem;margin:8px 0 4px}
.mark{font-weight:700}
.right{color:#1b7f4b}.wrong{color:#b8322a}
.new{background:#fdebd7;border-radius:4px;padding:0 5px;color:#7d430c}
.pictures figcaption{font-size:.8rem;line-height:1.35}
.pictures details{font-size:.78rem;margin-top:4px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;padding:5px 12px 5px 0;border-bottom:1px solid #e6ebef;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
pre{background:#1d2733;color:#eef2f5;border-radius:6px;padding:10px 12px;margin:.2em 0 1em;overflow-x:auto;
font-size:.85rem}
"""


def write_report(out: Path, summary: Mapping[str, Any], scores: Mapping[str, Any], pictures: Sequence[Tensor]) -> Path:
    """Write ``OUT/report.html``, whole or not at all.

    Args:
        out: directory of the run, with its ``metrics.jsonl``.
        summary: as in ``summary.json``.
        scores: as in ``scores.json``.
        pictures: ``[3, h_i, w_i]`` uint8, the samples of ``scores``.

    Returns:
        The file.
    """
    rows = read_jsonl(out / "metrics.jsonl")
    sections = [
        _headline(summary),
        _samples(scores["samples"], pictures),
        '<h2>Score</h2><div class="charts">',
        _score_by_kind(summary["by_kind"]),
        _score_by_canvas(scores),
        "</div>",
        '<h2>Learning</h2><div class="charts">',
        _learning_curve(rows),
        _validation(rows),
        _loss_by_time(scores["losses_by_time"]),
        "</div>",
        _trained(summary),
        _next(summary),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>lensmini quickstart</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )
    path = out / "report.html"
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def _headline(summary: Mapping[str, Any]) -> str:
    chance = summary["chance_strict"]
    times = f"the model has {summary['verifier_strict'] / chance:.0f} times as many" if chance else "no hit at all"
    interval = f"95 %: {_share(summary['verifier_strict_low'])} to {_share(summary['verifier_strict_high'])}"
    boxes = [
        ("verifier_strict", "painted without a mistake", f"{interval}; {summary['num_prompts']} prompts"),
        ("chance_strict", "by chance", times),
        ("autoencoder_strict", "ceiling", "perfect pictures through the autoencoder"),
        ("verifier_loose", "right but for shapes", f"by chance {_share(summary['chance_loose'])}"),
        ("unseen_strict", "on sizes never trained", f"{summary['num_prompts_of_others']} prompts"),
        ("withheld_strict", "colour-shape pairs never shown", f"by chance {_share(summary['withheld_chance_strict'])}"),
        ("short_strict", "bare requests", "the model was trained on full descriptions"),
    ]
    cards = "".join(
        f'<div class="card"><b>{_share(summary[key])}</b><span>{name}</span><small>{note}</small></div>'
        for key, name, note in boxes
    )
    reused = f"; taken from an earlier run: {_text(', '.join(summary['reused']))}" if summary["reused"] else ""
    return (
        "<h1>A Lens model, trained from nothing on this machine</h1>"
        f"<p>{_time(summary['seconds'])} of wall time, {_time(summary['cpu_seconds'])} of CPU time over all processes, "
        f"{summary['peak_memory_mb'] / 1000:.1f} GB of memory{reused}. An exact verifier reads every picture: all "
        "objects asked for, of the right colour and shape, at the right place, and nothing else.</p>"
        f'<div class="numbers">{cards}</div>'
    )


def _samples(samples: Sequence[Mapping[str, Any]], pictures: Sequence[Tensor]) -> str:
    figures = []
    for sample, picture in zip(samples, pictures, strict=True):
        scale = 128 / max(picture.shape[1:])
        size = f'width="{round(picture.shape[2] * scale)}" height="{round(picture.shape[1] * scale)}"'
        verdict = ("right", "&#10003; right") if sample["right"] else ("wrong", "&#10007; wrong")
        seen = "" if sample["trained"] else '<span class="new">size never trained</span>'
        mistakes = "".join(f"<br>{_text(question)}" for question in sample["wrong"])
        details = f"<details><summary>what is wrong</summary>not so:{mistakes}</details>" if mistakes else ""
        figures.append(
            f'<figure class="card"><div class="frame"><img {size} src="{_png(picture)}" alt="{_text(sample["prompt"])}">'
            f'</div><div class="tags"><span class="mark {verdict[0]}">{verdict[1]}</span>'
            f"<span>{sample['height']} x {sample['width']}</span>{seen}</div>"
            f"<figcaption>{_text(readable(sample['prompt']))}</figcaption>{details}</figure>"
        )
    return (
        "<h2>Pictures</h2><p>The first prompts of a fixed seed, not chosen. Heights and widths in pixels.</p>"
        f'<div class="pictures">{"".join(figures)}</div>'
    )


def _score_by_kind(by_kind: Mapping[str, Mapping[str, float]]) -> str:
    figure, axes = _figure("by-kind")
    places = np.arange(len(by_kind))
    strict = np.array([one["strict"] for one in by_kind.values()])
    ends = np.array([(one["low"], one["high"]) for one in by_kind.values()]).T
    axes.bar(places, strict, 0.6, color=_BLUE, label="model, 95 %")
    axes.errorbar(places, strict, np.abs(ends - strict), fmt="none", ecolor=_INK, elinewidth=1.2, capsize=3)
    for name, colour, label in (("autoencoder_strict", _GREEN, "ceiling"), ("chance_strict", _ORANGE, "chance")):
        values = [one[name] for one in by_kind.values()]
        axes.hlines(values, places - 0.4, places + 0.4, colors=colour, linewidth=2.5, label=label)
    axes.set_xticks(places, list(by_kind))
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("without a mistake")
    _legend(axes, 3)
    return _svg(figure, "By kind of request: one object, two, several equal ones, a place, a relation, a whole scene.")


def _score_by_canvas(scores: Mapping[str, Any]) -> str:
    figure, axes = _figure("by-canvas")
    rows = [(name, one, colour) for suite, colour in (("trained", _BLUE), ("unseen", _ORANGE))
            for name, one in scores[suite]["by_canvas"].items()]  # fmt: skip
    places = np.arange(len(rows))[::-1]
    axes.barh(places, [one["loose"] for _, one, _ in rows], 0.7, color=_LINE, label="right but for shapes")
    for colour, label in ((_BLUE, "trained size"), (_ORANGE, "never trained")):
        chosen = [index for index, row in enumerate(rows) if row[2] == colour]
        axes.barh(places[chosen], [rows[index][1]["strict"] for index in chosen], 0.7, color=colour, label=label)
    axes.set_yticks(places, [f"{name} (n = {one['num']})" for name, one, _ in rows])
    axes.set_xlim(0, 1)
    axes.grid(axis="x", color=_LINE)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("without a mistake")
    _legend(axes, 3)
    return _svg(figure, "By height x width. Few prompts each: differences below 0.15 mean little.")


def _learning_curve(rows: Sequence[Mapping[str, Any]]) -> str:
    figure, axes = _figure("loss")
    steps, losses = (np.array([row[name] for row in rows], dtype=float) for name in ("step", "loss"))
    width = max(1, len(losses) // 40)
    padded = np.concatenate([np.full(width, losses[0]), losses, np.full(width, losses[-1])])
    smooth = np.convolve(padded, np.ones(2 * width + 1) / (2 * width + 1), "valid")
    axes.plot(steps, losses, color=_BLUE, alpha=0.45, linewidth=0.8, label="a step")
    axes.plot(steps, smooth, color=_BLUE, linewidth=2, label="smoothed")
    held_out = [(row["step"], row["validation"]) for row in rows if "validation" in row]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=_ORANGE, marker="o", markersize=4, label="held-out pictures")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_ylim(0)
    _legend(axes, 3)
    return _svg(
        figure,
        "Flow-matching loss. Held-out pictures are measured at four fixed times, so the lines have other levels.",
    )


def _validation(rows: Sequence[Mapping[str, Any]]) -> str:
    figure, axes = _figure("validation")
    names = sorted({name for row in rows for name in row if name.startswith("validation_")})
    for name, colour in zip(names, [*_SERIES, *["#999999"] * len(names)], strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        height, width = (_TOKEN * int(side) for side in name.split("_")[1].split("x"))
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=f"{height}x{width}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if names:
        _legend(axes, 5)
    return _svg(figure, "The same on held-out pictures by height x width.")


def _loss_by_time(rows: Sequence[Mapping[str, float]]) -> str:
    figure, axes = _figure("loss-by-time")
    times = [row["time"] for row in rows]
    axes.plot(times, [row["zero_loss"] for row in rows], color=_MUTED, linestyle="--", label="predicting nothing")
    axes.plot(times, [row["loss"] for row in rows], color=_BLUE, marker="o", markersize=4, label="trained model")
    axes.set_xlim(0, 1)
    axes.set_ylim(0)
    axes.set_xlabel("time: 0 is the picture, 1 is noise")
    axes.set_ylabel("loss")
    _legend(axes, 2)
    return _svg(figure, "By time, on held-out pictures, with the weights that painted the samples.")


def _trained(summary: Mapping[str, Any]) -> str:
    config = summary["config"]
    language_model, autoencoder = config["miniature"]["language_model"], config["miniature"]["autoencoder"]
    model, data = config["model"], config["data"]
    canvases = ", ".join("{} x {}".format(*canvas) for canvas in data["canvases"])
    what = [
        ("Language model", f"GPT-OSS of {language_model['num_layers']} layers, width {language_model['hidden_size']}; "
         f"{language_model['steps']} steps of {language_model['batch_size']} captions, then frozen"),
        ("Autoencoder", f"convolutional, width {autoencoder['width']}, 4 pixels a side per token; "
         f"{autoencoder['steps']} steps of {autoencoder['batch_size']} pictures, then frozen"),
        ("Transformer", f"{model['num_layers']} blocks of width "
         f"{model['num_attention_heads'] * model['attention_head_dim']}; {config['run']['steps']} steps of "
         f"{data['batch_size']} pictures in {config['run']['processes']} processes"),
        ("Data", f"{data['num_captions']} scenes, {data['pictures_per_caption']} pictures each, on {canvases}"),
        ("Score", f"{summary['weights']} weights, {config['score']['num_steps']} steps, guidance "
         f"{config['score']['guidance_scale']:g}, step {summary['last_metrics']['step']}"),
    ]  # fmt: skip
    facts = "".join(f"<tr><th>{name}</th><td>{_text(fact)}</td></tr>" for name, fact in what)
    total = summary["stages_of_all_calls"]
    times = "".join(
        f'<tr><td>{_text(name.replace("_", " "))}</td><td class="n">{_time(seconds)}</td>'
        f'<td class="n">{_time(total[name]["seconds"]) if name in total else "-"}</td>'
        f'<td class="n">{_time(total[name]["cpu_seconds"]) if name in total else "-"}</td></tr>'
        for name, seconds in summary["stage_seconds"].items()
    )
    found = summary["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    commit = f"commit {(found['commit'] or 'unknown')[:12]}{' with changes' if found['dirty'] else ''}"
    return (
        f'<h2>What was trained</h2><div class="card scroll"><table>{facts}</table></div>'
        '<h2>How long it took</h2><div class="card scroll"><table><tr><th>stage</th><th class="n">this call</th>'
        f'<th class="n">all calls</th><th class="n">CPU</th></tr>{times}</table></div>'
        '<p class="muted">A stage that another run had already made took no time here. '
        f"Memory: {_text(summary['peak_memory_kind'])}. {_text(found['machine'])}; {_text(versions)}; {_text(commit)}.</p>"
    )


def _next(summary: Mapping[str, Any]) -> str:
    run = summary["config"]["run"]
    named = "" if run["out"] == "runs/quickstart" else f" --checkpoint {run['out']}"
    steps, seed = 2 * run["steps"], run["seed"] + 1
    prompt = "two things on white . at the top left is a large red circle . at the bottom right a small blue box ."
    commands = [
        ("Paint your own prompt, on ten sizes", f'python -m experiments.generate ratios "{prompt}"{named}'),
        ("Train longer", f"python -m experiments.quickstart --run.out runs/longer --run.steps {steps}"),
        ("See how much a seed changes", f"python -m experiments.quickstart --run.out runs/seed{seed} --run.seed {seed}"),
        ("Train on your own pictures (name.png or name.jpg beside name.txt)",
         "python -m experiments.pretrain folder --data.path pictures"),
        ("See the size and cost of the paper's second stage", "python -m experiments.pretrain stage2 --dry-run"),
    ]  # fmt: skip
    lines = "".join(f"<p>{name}</p><pre>{_text(command)}</pre>" for name, command in commands)
    return f"<h2>What to try next</h2>{lines}"


def _figure(name: str) -> tuple[Any, Any]:
    """A figure narrow enough that its words can be read on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.5), layout="constrained")
    axes = figure.add_subplot()
    figure.set_label(name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_MUTED)
    axes.tick_params(colors=_INK, length=3)
    axes.grid(axis="y", color=_LINE)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(axes: Any, columns: int) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False, columnspacing=1.2,
                handlelength=1.4)  # fmt: skip


def _svg(figure: Any, caption: str) -> str:
    """The figure as SVG for an HTML page, whose parser needs none of the names of name spaces."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": figure.get_label()}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    # Names are one name space for the whole page.
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{figure.get_label()}-", text)
    return (
        f'<figure class="card">{text.replace("<svg", f"<svg role=img aria-label={figure.get_label()}", 1)}'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _png(picture: Tensor) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy())).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def readable(caption: str) -> str:
    """A caption of the miniature world with its punctuation as people write it.

    Example:
        >>> readable("a disk , small . below it : a box .")
        'a disk, small. below it: a box.'
    """
    return re.sub(r" (?=[.,:])", "", caption)


def _text(words: str) -> str:
    return html.escape(words, quote=True)


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
