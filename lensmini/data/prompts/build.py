"""Prompts with rubrics, built by a language model from the items of a taxonomy, and how well they cover it."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from lensmini.data.caption_checks import split_words
from lensmini.data.prompts.meta_prompts import (
    DIMENSIONS,
    GLOBAL_RUBRIC,
    RUBRIC_NAMES,
    draw_dimensions,
    prompt_request,
    rubric_request,
)
from lensmini.data.prompts.parse import parse_prompts, parse_rubrics
from lensmini.data.prompts.taxonomy import CATEGORIES, Ask, Item
from lensmini.endpoint import ChatRequest, Failure, Reply

__all__ = ["BuildReport", "PromptRecord", "build_prompts", "coverage_table", "load_prompts"]


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A prompt and the checks of its pictures.

    Example:
        >>> record = PromptRecord("Food", "Breads", "bagel", ("counting",), "Three bagels.", {"object count": "Three."})
        >>> record.id == PromptRecord(*[getattr(record, name) for name in record.__slots__]).id, len(record.id)
        (True, 16)
    """

    category: str
    subcategory: str
    item: str
    dimensions: tuple[str, ...]
    prompt: str
    rubrics: dict[str, str]
    """Checks by name; :data:`lensmini.data.prompts.GLOBAL_RUBRIC` comes besides."""

    @property
    def id(self) -> str:
        """Sixteen digits of the prompt's hash."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What became of items.

    Example:
        >>> BuildReport(asked=3, records=2, lost={"no prompt": 1}).asked
        3
    """

    asked: int
    """Items."""
    records: int
    """Prompts with rubrics."""
    lost: dict[str, int] = field(default_factory=dict)
    """Items without a record by cause; with ``records`` they add up to ``asked``."""
    answers: dict[str, int] = field(default_factory=dict)
    """What was wrong with answers or parts of them."""


def build_prompts(
    items: Sequence[Item],
    ask: Ask,
    out: str | Path,
    *,
    seed: int = 0,
    number: int = 5,
    max_attempts: int = 3,
    max_similarity: float = 0.6,
) -> BuildReport:
    """Write ``prompts.jsonl``: for each item one of several prompts, drawn by seed, and its rubrics.

    The result is a function of items, seed and answers; with a client that keeps answers an interrupted run goes on
    without asking again. A prompt that is nearly another one (:func:`_similar`: more than ``max_similarity`` of their
    runs of three words are shared) is dropped in favour of the item's next one.

    Args:
        items: of a taxonomy.
        ask: the model, for example ``Endpoint(..., cache=...).ask``.
        out: folder of ``prompts.jsonl``, which appears whole or not at all, and ``report.json``.
        seed: of dimensions and choices.
        number: prompts that are asked for each item.
        max_attempts: answers for each question before an item is given up.
        max_similarity: see above; 1 keeps all but equal ones.

    Returns:
        What became of the items.

    Raises:
        ValueError: if a number is out of range, an item comes twice, or its category is unknown.
        RuntimeError: if questions failed for the server's or the budget's sake, counted by cause; nothing is written.

    Example:
        >>> import tempfile
        >>> def ask(requests):
        ...     for index, request in enumerate(requests):
        ...         words = (
        ...             "round warm brown shiny seeded fresh split soft plain lone still quiet early bright clean small"
        ...         )
        ...         prompts = json.dumps([f"One bagel on a blue plate, {words}, on a table."])
        ...         rubrics = json.dumps(
        ...             {"object count": "One bagel.", "colour accuracy": "Blue.", "object presence": "A plate."}
        ...         )
        ...         text = rubrics if "<prompt>" in request.messages[0]["content"] else prompts
        ...         yield index, Reply(text, "stop", 1, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = build_prompts([Item("Food", "Breads", "bagel")], ask, folder)
        ...     len(load_prompts(Path(folder, "prompts.jsonl")))
        1
    """
    if number < 1 or max_attempts < 1 or not 0 < max_similarity <= 1:
        raise ValueError(
            f"number, max_attempts, max_similarity: expected positive, positive and in (0, 1], "
            f"got {number}, {max_attempts}, {max_similarity}"
        )
    if len(set(items)) != len(items):
        raise ValueError(f"items: expected every item once, got {len(items) - len(set(items))} again")
    unknown = sorted({item.category for item in items} - set(CATEGORIES))
    if unknown:
        raise ValueError(f"items: expected categories of {CATEGORIES}, got {unknown}")
    answers, lost = Counter[str](), Counter[str]()
    drawn = [draw_dimensions(item, seed=seed) for item in items]

    def ask_prompts(index: int, attempt: int) -> ChatRequest:
        return prompt_request(items[index], drawn[index], number=number, attempt=attempt)

    found = _ask_until(range(len(items)), ask_prompts, ask, lambda text: parse_prompts(text), max_attempts, answers)
    chosen: dict[int, str] = {}
    kept = _Shingles(max_similarity)
    for index, item in enumerate(items):
        if index not in found:
            lost["no prompt"] += 1
            continue
        order = list(found[index])
        Random(hashlib.sha256(f"{seed}/{item}".encode()).digest()).shuffle(order)
        fresh = next((prompt for prompt in order if kept.add(prompt)), None)
        if fresh is None:
            lost["near-duplicate"] += 1
        else:
            chosen[index] = fresh

    def ask_rubrics(index: int, attempt: int) -> ChatRequest:
        return rubric_request(chosen[index], drawn[index], attempt=attempt)

    parse = lambda text: parse_rubrics(text, RUBRIC_NAMES)  # noqa: E731
    rubrics = _ask_until(list(chosen), ask_rubrics, ask, parse, max_attempts, answers)
    lost["no rubrics"] += len(chosen) - len(rubrics)
    records = [PromptRecord(*items[index], drawn[index], chosen[index], rubrics[index]) for index in sorted(rubrics)]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    name, check = GLOBAL_RUBRIC
    rows = [{"id": record.id, **asdict(record), "global_rubric": {name: check}} for record in records]
    _replace(folder / "prompts.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    report = BuildReport(
        len(items), len(records), {k: v for k, v in sorted(lost.items()) if v}, dict(sorted(answers.items()))
    )
    coverage = coverage_table(records)
    _replace(folder / "report.json", json.dumps({**asdict(report), "coverage": coverage}, indent=1))
    return report


def load_prompts(path: str | Path) -> list[PromptRecord]:
    """Read ``prompts.jsonl``, checked.

    Raises:
        ValueError: naming the line and what is wrong with it.

    Example:
        >>> load_prompts("no_such.jsonl")
        Traceback (most recent call last):
        ValueError: no_such.jsonl: expected prompts, ...
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected prompts, but {error}") from error
    records: list[PromptRecord] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                records.append(_read(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: expected a prompt with rubrics, but {error}") from error
    return records


def coverage_table(records: Sequence[PromptRecord]) -> dict[str, dict[str, int]]:
    """Prompts by category and dimension; ``prompts`` counts each once, a dimension all that have it.

    Example:
        >>> record = PromptRecord("Food", "Breads", "bagel", ("counting", "text"), "Three.", {})
        >>> table = coverage_table([record])
        >>> table["Food"]["text"], table["Food"]["colour"], table["all"]["prompts"]
        (1, 0, 1)
    """
    table = {name: dict.fromkeys(("prompts", "rubrics", *DIMENSIONS), 0) for name in (*CATEGORIES, "all")}
    for record in records:
        for row in (table[record.category], table["all"]):
            row["prompts"] += 1
            row["rubrics"] += len(record.rubrics)
            for name in record.dimensions:
                row[name] += 1
    return table


class _Shingles:
    """Runs of three words of all prompts so far, and whether a new one is nearly one of them."""

    def __init__(self, limit: float) -> None:
        self._limit, self._sets = limit, []
        self._where: dict[tuple[str, ...], list[int]] = {}

    def add(self, prompt: str) -> bool:
        words = split_words(prompt)
        runs = {tuple(words[at : at + 3]) for at in range(max(1, len(words) - 2))}
        shared = Counter(number for run in runs for number in self._where.get(run, ()))
        for number, count in shared.items():
            union = len(runs) + self._sets[number] - count
            if count == union or count / union > self._limit:
                return False
        for run in runs:
            self._where.setdefault(run, []).append(len(self._sets))
        self._sets.append(len(runs))
        return True


def _ask_until(
    indices: Sequence[int], request: Any, ask: Ask, parse: Any, max_attempts: int, answers: Counter[str]
) -> dict[int, Any]:
    """Good answers by index; what gives none is asked again, a few times."""
    found: dict[int, Any] = {}
    failed = Counter[str]()
    left = list(indices)
    for attempt in range(max_attempts):
        again: list[int] = []
        for position, outcome in ask(request(index, attempt) for index in left):
            if isinstance(outcome, Failure):
                failed[outcome.cause] += 1
                continue
            good, causes = _outcome(outcome, parse)
            answers.update(causes)
            if good:
                found[left[position]] = good
            else:
                again.append(left[position])
        left = sorted(again)
        if failed:
            counted = ", ".join(f"{count} x {cause}" for cause, count in failed.most_common())
            raise RuntimeError(f"ask: expected an answer to every question, got {counted}; the same call goes on")
        if not left:
            break
    return found


def _outcome(outcome: Reply, parse: Any) -> tuple[Any, list[str]]:
    if outcome.finish_reason == "length":
        return None, ["cut"]
    if outcome.refusal or outcome.finish_reason == "content_filter":
        return None, ["refusal"]
    return parse(outcome.text)


def _read(values: dict[str, Any]) -> PromptRecord:
    names = ("category", "subcategory", "item", "prompt")
    if not all(isinstance(values[name], str) and values[name] for name in names):
        raise ValueError(f"{', '.join(names)} must be texts")
    rubrics, dimensions = values["rubrics"], tuple(values["dimensions"])
    if not isinstance(rubrics, dict) or not all(isinstance(check, str) and check for check in rubrics.values()):
        raise ValueError("rubrics must be texts by name")
    if values["category"] not in CATEGORIES or not set(dimensions) <= set(DIMENSIONS):
        raise ValueError("its category or a dimension is unknown")
    category, subcategory, item, prompt = (values[name] for name in names)
    record = PromptRecord(category, subcategory, item, dimensions, prompt, rubrics)
    if values["id"] != record.id:
        raise ValueError("its id is not that of its prompt")
    return record


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
