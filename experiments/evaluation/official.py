"""Result files of the official scorers as one row of numbers between 0 and 1, under the names of the paper's tables."""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.evaluation.prompt_files import Benchmark
from experiments.evaluation.texts import Language

__all__ = ["GENEVAL_TASKS", "geneval_row", "read_official"]

GENEVAL_TASKS = {
    "single_object": "single",
    "two_object": "two",
    "counting": "count",
    "colors": "colour",
    "position": "position",
    "color_attr": "attribute",
}
_ONEIG = {
    "align": ("alignment_score", "alignment"),
    "text": ("text_score", "text score"),
    "reasoning": ("reasoning_score", "reasoning"),
    "style": ("style_score", "style"),
    "diversity": ("diversity_score", "total average"),
}
_CVTG = {
    "average": "word_accuracy",
    "ned": "ned",
    "clip": "clipscore",
    "vqa": "vqascore",
    "aesthetic": "aesthetic_score",
}


def read_official(
    benchmark: Benchmark, path: Path, *, model: str = "lens", language: Language = "en"
) -> dict[str, float]:
    """Read what an official scorer wrote.

    Args:
        benchmark: whose scorer.
        path: GenEval: the .jsonl of ``evaluate_images.py``. OneIG: its folder ``results`` (the newest file of each
            dimension; those that are missing leave the overall score out). LongText: ``results.jsonl`` after
            ``summary_scores.py``. CVTG: the .json of ``unified_metrics_eval.py``.
        model: the row of OneIG's tables.
        language: OneIG's mode.

    Returns:
        Numbers by name of the paper's column.

    Raises:
        ValueError: if nothing is there, or something else.
    """
    try:
        if benchmark == "geneval":
            rows = _json_lines(path)
            return geneval_row((row["tag"], float(bool(row["correct"]))) for row in rows)
        if benchmark == "longtext":
            rows = _json_lines(path)
            found, total = (sum(row[name] for row in rows) for name in ("match_word_count", "gt_word_count"))
            return _checked({"text": found / total})
        if benchmark == "cvtg":
            return _cvtg_row(json.loads(path.read_text(encoding="utf-8")))
        return _oneig_row(path, model, language)
    except (OSError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"results: expected what the official scorer of {benchmark} writes, got {path} ({type(error).__name__}: {error})"
        ) from error


def geneval_row(answers: Iterable[tuple[str, float]]) -> dict[str, float]:
    """GenEval's scores: the share of right pictures of each task, and the mean of the tasks.

    Args:
        answers: for each picture its task (tag) and whether it is right.

    Returns:
        By the paper's names; ``overall`` last.

    Raises:
        ValueError: if there is no picture, or a task is unknown.

    Example:
        >>> geneval_row([("counting", 1.0), ("counting", 0.0), ("colors", 1.0)])
        {'count': 0.5, 'colour': 1.0, 'overall': 0.75}
    """
    tasks: dict[str, list[float]] = defaultdict(list)
    for tag, right in answers:
        if tag not in GENEVAL_TASKS:
            raise ValueError(f"tag: expected one of {', '.join(GENEVAL_TASKS)}, got {tag!r}")
        tasks[tag].append(right)
    if not tasks:
        raise ValueError("answers: expected at least one picture, got none")
    row = {name: math.fsum(tasks[tag]) / len(tasks[tag]) for tag, name in GENEVAL_TASKS.items() if tag in tasks}
    return _checked({**row, "overall": math.fsum(row.values()) / len(row)})


def _oneig_row(folder: Path, model: str, language: Language) -> dict[str, float]:
    row = {}
    for name, (stem, column) in _ONEIG.items():
        # Names end in the time of the run; style_score_ must not find style_style_score_.
        files = sorted(folder.glob(f"{stem}_{language.upper()}_*.csv"))
        if not files:
            continue
        with files[-1].open(encoding="utf-8", newline="") as file:
            table = {line[""]: line for line in csv.DictReader(file)}
        if model not in table:
            raise ValueError(f"no row {model!r} in {files[-1].name}, but {', '.join(table)}")
        row[name] = float(table[model][column])
    if not row:
        raise ValueError(f"no file such as alignment_score_{language.upper()}_TIME.csv")
    if len(row) == len(_ONEIG):
        row["overall"] = math.fsum(row.values()) / len(row)
    return _checked(row)


def _cvtg_row(content: dict[str, Any]) -> dict[str, float]:
    found: dict[int, int] = defaultdict(int)
    total: dict[int, int] = defaultdict(int)
    for area in content["area_results"]:
        found[area["area"]] += area["correct_words"]
        total[area["area"]] += area["total_words"]
    regions = {str(area): found[area] / total[area] for area in sorted(total)}
    overall = content["overall_results"]
    return _checked({**regions, **{name: overall[key] for name, key in _CVTG.items() if key in overall}})


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not rows:
        raise ValueError("no row")
    return rows


def _checked(row: dict[str, float]) -> dict[str, float]:
    bad = {name: value for name, value in row.items() if not math.isfinite(value)}
    if bad:
        raise ValueError(f"not finite: {bad}")
    return row
