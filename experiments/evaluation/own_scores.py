"""Scores without the official scorers' models: detections for GenEval, any reader of text for LongText, CVTG and OneIG's text.

What is scored is the layout on disk, so pictures of any other program may lie there. Missing pictures are counted, never
scored as wrong or right.

Axes: h and w pixels.
"""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from experiments.evaluation.boxes import CONFIDENCE, COUNTING_CONFIDENCE, NameColours, check_objects, keep_confident
from experiments.evaluation.detectors import Detect
from experiments.evaluation.intervals import stratified_interval
from experiments.evaluation.layouts import load_picture, picture_files, split_grid
from experiments.evaluation.official import geneval_row
from experiments.evaluation.prompt_files import Benchmark, BenchmarkPrompt
from experiments.evaluation.texts import (
    Language,
    Matches,
    match_exact_words,
    match_words,
    oneig_text_score,
    quoted_words,
    word_similarities,
)
from experiments.runs import progress
from lensmini.rewards.judges import ReadText
from lensmini.rewards.judges.programs import read_strings

__all__ = ["read_text_content", "score_objects", "score_texts"]

Scored = tuple[dict[str, float], list[dict[str, Any]]]
"""A row of numbers, and one line for each picture."""


def score_objects(
    prompts: Sequence[BenchmarkPrompt],
    images: Path,
    number: int,
    detect: Detect,
    colours: Callable[[Tensor], NameColours],
    *,
    seed: int = 0,
) -> Scored:
    """GenEval's scores from detections.

    Args:
        prompts: of GenEval.
        images: folder of the layout.
        number: pictures of each prompt.
        detect: finds objects in a picture.
        colours: names colours in a picture.
        seed: of the interval's resamples.

    Returns:
        Numbers by task, ``overall`` with ``low`` and ``high``, ``pictures`` and ``missing``; and for each picture a line as
        the official scorer writes it.

    Raises:
        ValueError: if there is no picture at all.
    """
    lines = []
    by_prompt: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for prompt, file, picture in _pictures("geneval", prompts, images, number, ""):
        threshold = COUNTING_CONFIDENCE if prompt.group == "counting" else CONFIDENCE
        objects = keep_confident(detect(picture), threshold=threshold)
        verdict = check_objects(objects, prompt.facts, colours(picture))
        by_prompt[prompt.group][prompt.key].append(float(verdict.correct))
        lines.append(
            {
                "filename": str(file),
                "tag": prompt.group,
                "prompt": prompt.prompt,
                "correct": verdict.correct,
                "reason": "\n".join(verdict.reasons),
                "metadata": json.dumps(prompt.facts),
                "details": json.dumps(
                    {name: [[*one.box, one.score] for one in kept] for name, kept in objects.items()}
                ),
            }
        )
    row = geneval_row((line["tag"], float(line["correct"])) for line in lines)
    groups = [[math.fsum(right) / len(right) for right in task.values()] for task in by_prompt.values()]
    row["low"], row["high"] = stratified_interval(groups, seed=seed)
    return row | _counts(prompts, number, len(lines)), lines


def score_texts(
    benchmark: Benchmark,
    prompts: Sequence[BenchmarkPrompt],
    images: Path,
    number: int,
    read_text: ReadText,
    *,
    model: str = "lens",
    language: Language = "en",
    text_content: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Scored:
    """LongText's, CVTG's or OneIG's text score with any reader.

    Args:
        benchmark: "longtext", "cvtg" or "oneig".
        prompts: its prompts; of OneIG's only those of the folder ``text`` count.
        images: folder of the layout.
        number: pictures of each prompt.
        read_text: reads a picture.
        model: folder in OneIG's layout.
        language: of the benchmark.
        text_content: of OneIG, the text of each id, as :func:`read_text_content` gives it.
        seed: of the interval's resamples.

    Returns:
        Numbers by the paper's names, ``low`` and ``high`` of LongText's score and CVTG's average (prompts drawn again, means
        of prompts instead of words), ``pictures`` and ``missing``; and for each picture a line with what was read.

    Raises:
        ValueError: if there is no picture, or a text of OneIG is missing.
    """
    chosen = [prompt for prompt in prompts if benchmark != "oneig" or prompt.group == "text"]
    lines = []
    for prompt, file, picture in _pictures(benchmark, chosen, images, number, model):
        read = list(read_strings(read_text, picture))
        line: dict[str, Any] = {"key": prompt.key, "group": prompt.group, "file": str(file), "read": read}
        if benchmark == "cvtg":
            wanted, words = quoted_words(prompt.prompt), [word for text in read for word in text.lower().split()]
            line["matches"], line["similar"] = match_exact_words(wanted, words), word_similarities(wanted, words)
        elif benchmark == "longtext":
            line["matches"] = match_words(" ".join(prompt.facts["text"]), " ".join(read), language)
        else:
            name = prompt.key.split("/")[1]
            if text_content is None or name not in text_content:
                raise ValueError(f"text_content: expected a text for id {name}, got none")
            line["wanted"] = text_content[name]
        lines.append(line)
    if not lines:
        raise ValueError(f"expected pictures of {benchmark} in {images}, found none")
    if benchmark == "oneig":
        row = oneig_text_score([line["wanted"] for line in lines], [" ".join(line["read"]) for line in lines], language)
    else:
        row = _word_row(lines, benchmark)
        row["low"], row["high"] = stratified_interval([_shares(lines)], seed=seed)
    return row | _counts(chosen, number, len(lines)), lines


def read_text_content(path: Path) -> dict[str, str]:
    """OneIG's ``scripts/text/text_content.csv`` or ``text_content_zh.csv``: columns id and text_content.

    Raises:
        ValueError: if it is no such table.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            found = {row["id"]: row["text_content"] for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"text_content: expected a table with id and text_content, got {path}") from error
    if not found or not all(isinstance(text, str) and text.strip() for text in found.values()):
        raise ValueError(f"text_content: expected a text in every row, got {path}")
    return found


def _word_row(lines: Sequence[dict[str, Any]], benchmark: Benchmark) -> dict[str, float]:
    overall = _share([line["matches"] for line in lines])
    if benchmark == "longtext":
        return {"text": overall}
    groups: dict[str, list[Matches]] = defaultdict(list)
    for line in lines:
        groups[line["group"]].append(line["matches"])
    similar = [value for line in lines for value in line["similar"]]
    regions = {group: _share(matches) for group, matches in sorted(groups.items())}
    return {**regions, "average": overall, "ned": math.fsum(similar) / len(similar)}


def _share(matches: Sequence[Matches]) -> float:
    total = sum(match.wanted for match in matches)
    return sum(match.found for match in matches) / total if total else 0.0


def _shares(lines: Sequence[dict[str, Any]]) -> list[float]:
    by_prompt: dict[str, list[Matches]] = defaultdict(list)
    for line in lines:
        by_prompt[line["key"]].append(line["matches"])
    return [_share(matches) for matches in by_prompt.values()]


def _counts(prompts: Sequence[BenchmarkPrompt], number: int, pictures: int) -> dict[str, int]:
    return {"pictures": pictures, "missing": number * len(prompts) - pictures}


def _pictures(
    benchmark: Benchmark, prompts: Sequence[BenchmarkPrompt], images: Path, number: int, model: str
) -> Iterator[tuple[BenchmarkPrompt, Path, Tensor]]:
    with progress(number * len(prompts), 0, "score") as bar:
        for prompt in prompts:
            for name in picture_files(benchmark, prompt, number, model):
                file = images / name
                if not file.is_file():
                    continue
                picture = load_picture(file)
                for part in split_grid(picture, math.isqrt(number)) if benchmark == "oneig" else [picture]:
                    # The official scorer leaves wholly black parts of a grid out.
                    if benchmark != "oneig" or part.any():
                        yield prompt, file, part
                        bar.update()
