"""Ten categories of things to paint, their sub-categories and items (arXiv 2605.21573, section 3.2.1); items are ours.

The file is text: ``# Category``, ``## Sub-category``, then items between commas; commas in double quotes do not count.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from lensmini.data.prompts.parse import parse_items
from lensmini.endpoint import ChatRequest, Failure, Reply

__all__ = ["CATEGORIES", "Ask", "Item", "Taxonomy", "extend_taxonomy", "load_taxonomy", "normalise", "save_taxonomy"]

CATEGORIES = (
    "Human",
    "Object",
    "Animal",
    "Plant",
    "Scene",
    "Food",
    "Event",
    "Fictional World",
    "Text",
    "UI and Graphic Design",
)
"""The paper's."""

Ask = Callable[[Iterable[ChatRequest]], Iterator[tuple[int, Reply | Failure]]]
"""Answers to requests in any order: :meth:`lensmini.endpoint.Endpoint.ask`."""

_COMMA = re.compile(r",\s*(?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)")


class Item(NamedTuple):
    """A thing to paint and where it belongs."""

    category: str
    subcategory: str
    name: str


@dataclass(frozen=True)
class Taxonomy:
    """Items in order of categories and sub-categories, each once.

    Args:
        items: all of them.

    Raises:
        ValueError: if an item comes twice after :func:`normalise`, or a category is unknown.

    Example:
        >>> Taxonomy((Item("Food", "Breads", "bagel"),)).count()
        {'Food': 1}
    """

    items: tuple[Item, ...]

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for item in self.items:
            if item.category not in CATEGORIES:
                raise ValueError(f"items: expected a category of {CATEGORIES}, got {item.category!r}")
            key = normalise(item.name)
            if not key or key in seen:
                raise ValueError(f"items: expected every item once, got {item.name!r} beside {seen.get(key)!r}")
            seen[key] = item.name

    def count(self) -> dict[str, int]:
        """Items by category."""
        counts: dict[str, int] = {}
        for item in self.items:
            counts[item.category] = counts.get(item.category, 0) + 1
        return counts

    def subcategories(self) -> dict[tuple[str, str], list[str]]:
        """Names of items by category and sub-category."""
        found: dict[tuple[str, str], list[str]] = {}
        for item in self.items:
            found.setdefault((item.category, item.subcategory), []).append(item.name)
        return found


def normalise(text: str) -> str:
    """What two spellings of one item share: case, punctuation, articles and a plural's s do not count.

    Example:
        >>> normalise("The Red Apples!"), normalise("red apple") == normalise("a red apple")
        ('red apple', True)
    """
    # Marks are letters' other halves in many scripts: without them different words would look the same.
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in plain).split()
    words = [word for word in words if word not in ("a", "an", "the")] or words
    return " ".join(word[:-1] if len(word) > 3 and word.endswith("s") and word[-2] != "s" else word for word in words)


def load_taxonomy(path: str | Path | None = None) -> Taxonomy:
    """Read a taxonomy.

    Args:
        path: a file; None for the library's own of more than 2,000 items.

    Raises:
        ValueError: naming the line that is no heading and no list of items, or what :class:`Taxonomy` refuses.

    Example:
        >>> taxonomy = load_taxonomy()
        >>> len(taxonomy.items) > 2000, sorted(taxonomy.count()) == sorted(CATEGORIES)
        (True, True)
    """
    where = "taxonomy.txt" if path is None else str(path)
    source = files("lensmini.data.prompts") / "taxonomy.txt" if path is None else Path(path)
    items: list[Item] = []
    category = subcategory = ""
    for number, line in enumerate(source.read_text(encoding="utf-8").split("\n"), start=1):
        line = line.strip()
        if line.startswith("## "):
            subcategory = line[3:].strip()
        elif line.startswith("# "):
            category, subcategory = line[2:].strip(), ""
        elif line:
            names = [name.strip() for name in _COMMA.split(line)]
            if not category or not subcategory or not all(names):
                raise ValueError(
                    f"{where}, line {number}: expected items below a category and a sub-category, got {line[:80]!r}"
                )
            items += [Item(category, subcategory, name) for name in names]
    return Taxonomy(tuple(items))


def save_taxonomy(taxonomy: Taxonomy, path: str | Path) -> None:
    """Write a taxonomy as :func:`load_taxonomy` reads it; the file appears whole or not at all.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_taxonomy(load_taxonomy(), f"{folder}/a.txt")
        ...     load_taxonomy(f"{folder}/a.txt") == load_taxonomy()
        True
    """
    lines: list[str] = []
    last = ""
    for (category, subcategory), names in taxonomy.subcategories().items():
        lines += [f"# {category}", ""] if category != last else []
        lines += [f"## {subcategory}", ", ".join(names), ""]
        last = category
    part = Path(path).with_name(f".{Path(path).name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write("\n".join(lines))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def extend_taxonomy(
    taxonomy: Taxonomy,
    ask: Ask,
    *,
    target: int = 8406,
    per_request: int = 20,
    max_rounds: int = 20,
    save: str | Path | None = None,
) -> tuple[Taxonomy, dict[str, int]]:
    """Let a language model add items, sub-category by sub-category, until there are enough.

    Args:
        taxonomy: to begin with.
        ask: the model.
        target: items to have in the end; the paper has 8,406.
        per_request: items that are asked for at a time.
        max_rounds: rounds over all sub-categories; it also ends when a round brings nothing new.
        save: a file that is written after every round, to go on from.

    Returns:
        The taxonomy, and how many answers were bad by cause, with items that were there already as "known".

    Raises:
        ValueError: if a number is not positive.

    Example:
        >>> ask = lambda requests: ((n, Reply('["rye roll"]', "stop", 1, 1)) for n, _ in enumerate(requests))
        >>> grown, causes = extend_taxonomy(Taxonomy((Item("Food", "Breads", "bagel"),)), ask, target=2)
        >>> [item.name for item in grown.items], causes
        (['bagel', 'rye roll'], {})
    """
    if min(target, per_request, max_rounds) < 1:
        raise ValueError(
            f"target, per_request, max_rounds: expected positive, got {target}, {per_request}, {max_rounds}"
        )
    causes: dict[str, int] = {}
    for number in range(max_rounds):
        groups = list(taxonomy.subcategories().items())
        if len(taxonomy.items) >= target:
            break
        requests = [_item_request(place, names, per_request, number) for place, names in groups]
        answers = dict(ask(requests))
        known = {normalise(item.name) for item in taxonomy.items}
        new: list[Item] = []
        # In the order of the sub-categories, not of the answers: the result does not depend on who was faster.
        for index, (place, _) in enumerate(groups):
            outcome = answers[index]
            if isinstance(outcome, Failure):
                causes[outcome.cause] = causes.get(outcome.cause, 0) + 1
                continue
            names, found = parse_items(outcome.text) if outcome.finish_reason != "length" else ([], ["cut"])
            for cause in found:
                causes[cause] = causes.get(cause, 0) + 1
            for name in names:
                key = normalise(name)
                if key in known:
                    causes["known"] = causes.get("known", 0) + 1
                elif len(taxonomy.items) + len(new) < target:
                    known.add(key)
                    new.append(Item(*place, name))
        if not new:
            break
        order = {place: index for index, (place, _) in enumerate(groups)}
        items = sorted([*taxonomy.items, *new], key=lambda item: order[item.category, item.subcategory])
        taxonomy = Taxonomy(tuple(items))
        if save is not None:
            save_taxonomy(taxonomy, save)
    return taxonomy, causes


def _item_request(place: tuple[str, str], names: list[str], number: int, attempt: int) -> ChatRequest:
    text = (
        f'We collect concrete, picturable things for the category "{place[0]}", sub-category "{place[1]}". '
        f"We have: {', '.join(names)}. Name {number} more that are different from all of these and from each other. No "
        "real living persons, no brands, at most eight words each. Answer with a JSON list of strings and nothing else."
    )
    return ChatRequest([{"role": "user", "content": text}], temperature=1.0, max_tokens=60 * number, seed=attempt)
