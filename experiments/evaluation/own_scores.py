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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from experiments.evaluation.boxes import CONFIDENCE, COUNTING_CONFIDENCE, NameColours, check_objects, keep_confident
from experiments.evaluation.breakdowns import Breakdowns, break_down
from experiments.evaluation.detectors import Detect
from experiments.evaluation.intervals import stratified_interval
from experiments.evaluation.layouts import load_pictures
from experiments.evaluation.official import geneval_row
from experiments.evaluation.prompt_files import Benchmark, BenchmarkPrompt
from experiments.evaluation.texts import (
    Language,
    Matches,
    clean_text,
    match_exact_words,
    match_words,
    oneig_text_score,
    quoted_words,
    split_joined,
    word_similarities,
)
from experiments.runs import progress
from lensmini.rewards.judges import ReadText
from lensmini.rewards.judges.programs import read_strings

__all__ = ["Scored", "read_text_content", "score_objects", "score_texts"]


class Scored(NamedTuple):
    """Own scores of a benchmark."""

    row: dict[str, float]
    """Numbers of the whole."""
    lines: list[dict[str, Any]]
    """What was found in each picture."""
    parts: Breakdowns
    """Numbers of its parts, see :func:`experiments.evaluation.breakdowns.break_down`."""


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
        Numbers by task, ``overall`` with ``low`` and ``high``, ``pictures`` and ``missing``; for each picture a line as the
        official scorer writes it, with key and size; and the numbers by size of the picture.

    Raises:
        ValueError: if there is no picture at all.
    """
    lines = []
    for prompt, file, picture in _pictures("geneval", prompts, images, number, ""):
        threshold = COUNTING_CONFIDENCE if prompt.group == "counting" else CONFIDENCE
        objects = keep_confident(detect(picture), threshold=threshold)
        verdict = check_objects(objects, prompt.facts, colours(picture))
        kept = {name: [[*one.box, one.score] for one in found] for name, found in objects.items()}
        lines.append(
            {
                "filename": str(file),
                "tag": prompt.group,
                "prompt": prompt.prompt,
                "correct": verdict.correct,
                "reason": "\n".join(verdict.reasons),
                "metadata": json.dumps(prompt.facts),
                "details": json.dumps(kept),
                "key": prompt.key,
                "size": _size(picture),
            }
        )
    score = partial(_object_row, seed=seed)
    return Scored(score(lines) | _counts(prompts, number, len(lines)), lines, _parts("geneval", prompts, lines, score))


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
        of prompts instead of words), ``apart`` (the score with joined words taken apart, :func:`split_joined`), ``pictures``
        and ``missing``; for each picture a line with what was read; and the numbers of the benchmark's parts.

    Raises:
        ValueError: if there is no picture, or a text of OneIG is missing.
    """
    chosen = [prompt for prompt in prompts if benchmark != "oneig" or prompt.group == "text"]
    lines = []
    for prompt, file, picture in _pictures(benchmark, chosen, images, number, model):
        read = list(read_strings(read_text, picture))
        line = {"key": prompt.key, "group": prompt.group, "file": str(file), "size": _size(picture), "read": read}
        if benchmark == "oneig":
            name = prompt.key.split("/")[1]
            if text_content is None or name not in text_content:
                raise ValueError(f"text_content: expected a text for id {name}, got none")
            line["wanted"] = text_content[name]
        else:
            line |= _match(benchmark, prompt, read, language)
        lines.append(line)
    if not lines:
        raise ValueError(f"expected pictures of {benchmark} in {images}, found none")
    score = partial(_text_row, benchmark=benchmark, language=language, seed=seed)
    return Scored(score(lines) | _counts(chosen, number, len(lines)), lines, _parts(benchmark, chosen, lines, score))


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


def _match(benchmark: Benchmark, prompt: BenchmarkPrompt, read: Sequence[str], language: Language) -> dict[str, Any]:
    """The words of one picture as the benchmark counts them, and with joined ones taken apart."""
    if benchmark == "cvtg":
        wanted, words = quoted_words(prompt.prompt), [word for text in read for word in text.lower().split()]
        apart = match_exact_words(wanted, split_joined(words, wanted))
        similar = word_similarities(wanted, words)
        return {"matches": match_exact_words(wanted, words), "apart": apart, "similar": similar}
    goal, text = " ".join(prompt.facts["text"]), " ".join(read)
    found: dict[str, Any] = {"matches": match_words(goal, text, language)}
    if language == "en":
        goals, words = (clean_text(one, "en").lower().split() for one in (goal, text))
        found["apart"] = match_words(goal, " ".join(split_joined(words, goals)), "en")
    return found


def _object_row(lines: Sequence[Mapping[str, Any]], *, seed: int) -> dict[str, float]:
    by_prompt: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        by_prompt[line["tag"]][line["key"]].append(float(line["correct"]))
    row = geneval_row((line["tag"], float(line["correct"])) for line in lines)
    groups = [[math.fsum(right) / len(right) for right in task.values()] for task in by_prompt.values()]
    row["low"], row["high"] = stratified_interval(groups, seed=seed)
    return row


def _text_row(
    lines: Sequence[Mapping[str, Any]], *, benchmark: Benchmark, language: Language, seed: int
) -> dict[str, float]:
    if benchmark == "oneig":
        return oneig_text_score(
            [line["wanted"] for line in lines], [" ".join(line["read"]) for line in lines], language
        )
    overall = _share([line["matches"] for line in lines])
    row = {"text" if benchmark == "longtext" else "average": overall}
    if benchmark == "cvtg":
        groups: dict[str, list[Matches]] = defaultdict(list)
        for line in lines:
            groups[line["group"]].append(line["matches"])
        similar = [value for line in lines for value in line["similar"]]
        regions = {group: _share(matches) for group, matches in sorted(groups.items())}
        row = {**regions, **row, "ned": math.fsum(similar) / len(similar)}
    if all("apart" in line for line in lines):
        row["apart"] = _share([line["apart"] for line in lines])
    row["low"], row["high"] = stratified_interval([_shares(lines)], seed=seed)
    return row


def _parts(
    benchmark: Benchmark,
    prompts: Sequence[BenchmarkPrompt],
    lines: Sequence[Mapping[str, Any]],
    score: Callable[[Sequence[Mapping[str, Any]]], dict[str, float]],
) -> Breakdowns:
    return break_down(benchmark, lines, {prompt.key: prompt.facts for prompt in prompts}, score)


def _share(matches: Sequence[Matches]) -> float:
    total = sum(match.wanted for match in matches)
    return sum(match.found for match in matches) / total if total else 0.0


def _shares(lines: Sequence[Mapping[str, Any]]) -> list[float]:
    by_prompt: dict[str, list[Matches]] = defaultdict(list)
    for line in lines:
        by_prompt[line["key"]].append(line["matches"])
    return [_share(matches) for matches in by_prompt.values()]


def _counts(prompts: Sequence[BenchmarkPrompt], number: int, pictures: int) -> dict[str, int]:
    return {"pictures": pictures, "missing": number * len(prompts) - pictures}


def _size(picture: Tensor) -> str:
    return f"{picture.shape[1]}x{picture.shape[2]}"


def _pictures(
    benchmark: Benchmark, prompts: Sequence[BenchmarkPrompt], images: Path, number: int, model: str
) -> Iterator[tuple[BenchmarkPrompt, Path, Tensor]]:
    with progress(number * len(prompts), 0, "score") as bar:
        for prompt in prompts:
            for file, picture in load_pictures(benchmark, prompt, images, number, model):
                yield prompt, file, picture
                bar.update()
