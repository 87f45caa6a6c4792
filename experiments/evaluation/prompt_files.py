"""The public prompt files of four benchmarks as a user downloads them, every row checked and bad ones counted by cause.

What a picture is named in the layout of the official scorer is its prompt's ``key``.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.evaluation.boxes import COLOURS, POSITIONS
from experiments.evaluation.texts import Language, quoted_words

__all__ = ["ONEIG_FOLDERS", "Benchmark", "BenchmarkPrompt", "PromptFile", "read_prompts"]

Benchmark = Literal["geneval", "oneig", "longtext", "cvtg"]

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
ONEIG_FOLDERS = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Text_Rendering": "text",
    "Knowledge_Reasoning": "reasoning",
    "Multilingualism": "multilingualism",
}
"""OneIG-Bench's categories and the folder of each (text2image.py of OneIG-Bench/OneIG-Benchmark)."""

_EXAMPLES = 5
_AREAS = (2, 3, 4, 5)


class BenchmarkPrompt(NamedTuple):
    """One prompt and what its scorer wants to know."""

    key: str
    """Names its pictures; unique in the benchmark."""
    prompt: str
    group: str
    """What scores are split by: GenEval's task, OneIG's folder, LongText's category, CVTG's number of regions."""
    facts: dict[str, Any]
    """The rest of the row."""


@dataclass(slots=True)
class PromptFile:
    """Good rows in order, and how many bad ones there were of each cause."""

    prompts: list[BenchmarkPrompt] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def refuse(self, cause: str, place: str) -> None:
        """Count a bad row."""
        self.bad[cause] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{place}: {cause}")

    def describe(self) -> str:
        """How many rows there are, good and bad."""
        groups = Counter(prompt.group for prompt in self.prompts)
        lines = [f"{len(self.prompts)} prompts: {', '.join(f'{n} {name}' for name, n in groups.items())}"]
        lines += [f"{number} bad: {cause}" for cause, number in self.bad.most_common()]
        return "\n".join([*lines, *self.examples])


def read_prompts(benchmark: Benchmark, path: Path, language: Language = "en") -> PromptFile:
    r"""Read and check the prompts of a benchmark.

    Args:
        benchmark: which one.
        path: GenEval: ``prompts/evaluation_metadata.jsonl`` of djghosh13/geneval. OneIG: ``OneIG-Bench.csv`` or
            ``OneIG-Bench-ZH.csv``, or the same rows in .json or .jsonl. LongText: ``text_prompts.jsonl`` or
            ``text_prompts_zh.jsonl``. CVTG: the folder ``CVTG-2K`` with ``CVTG/2.json`` and so on.
        language: of OneIG's and LongText's file.

    Returns:
        Good rows and counts of bad ones. GenEval's keys are line numbers of the file, bad lines counted.

    Raises:
        ValueError: if the file cannot be read or has no row at all.

    Example:
        >>> path = getfixture("tmp_path") / "evaluation_metadata.jsonl"
        >>> row = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
        >>> _ = path.write_text(json.dumps(row) + "\n{}\n")
        >>> print(read_prompts("geneval", path).describe())
        1 prompts: 1 single_object
        1 bad: prompt is missing or empty
        line 2: prompt is missing or empty
    """
    found = PromptFile()
    if benchmark == "cvtg":
        rows: Iterable[tuple[str, Any]] = _cvtg_rows(path)
        check: Callable[[Any, int], BenchmarkPrompt | str] = _cvtg
    elif benchmark == "oneig":
        name = "prompt_en" if language == "en" else "prompt_cn"
        rows = _table_rows(path)
        check = lambda row, number: _oneig(row, name)  # noqa: E731
    else:
        rows = _json_lines(path)
        check = _geneval if benchmark == "geneval" else _longtext
    keys: set[str] = set()
    number = -1
    for number, (place, row) in enumerate(rows):
        if not isinstance(row, dict):
            found.refuse("no JSON object", place)
            continue
        checked = check(row, number)
        if isinstance(checked, str):
            found.refuse(checked, place)
        elif checked.key in keys:
            found.refuse("number or id is there already", place)
        else:
            keys.add(checked.key)
            found.prompts.append(checked)
    if number < 0:
        raise ValueError(f"prompts: expected rows of {benchmark}, got none in {path}")
    return found


def _geneval(row: dict[str, Any], number: int) -> BenchmarkPrompt | str:
    if not _is_text(row.get("prompt")):
        return "prompt is missing or empty"
    if row.get("tag") not in TAGS:
        return f"tag is none of {', '.join(TAGS)}"
    include, exclude = row.get("include"), row.get("exclude", [])
    if not isinstance(include, list) or not include or not isinstance(exclude, list):
        return "include is no list of objects"
    for place, entry in enumerate([*include, *exclude]):
        if not isinstance(entry, dict) or not _is_text(entry.get("class")) or not _is_count(entry.get("count")):
            return "an object has no class or no count"
        if entry.get("color", COLOURS[0]) not in COLOURS:
            return "an object has a colour that GenEval does not know"
        if "position" in entry and not _is_position(entry["position"], place):
            return "a position is no relation to an earlier object"
    return BenchmarkPrompt(f"{number:05d}", row["prompt"], row["tag"], row)


def _oneig(row: dict[str, Any], name: str) -> BenchmarkPrompt | str:
    if row.get("category") not in ONEIG_FOLDERS:
        return f"category is none of {', '.join(ONEIG_FOLDERS)}"
    # Scorers take the first three characters of a file's name for the id.
    if not isinstance(row.get("id"), str) or not re.fullmatch(r"[0-9]{3}", row["id"]):
        return "id is not three digits"
    if not _is_text(row.get(name)):
        return f"{name} is missing or empty"
    folder = ONEIG_FOLDERS[row["category"]]
    return BenchmarkPrompt(f"{folder}/{row['id']}", row[name], folder, row)


def _longtext(row: dict[str, Any], number: int) -> BenchmarkPrompt | str:
    del number
    if not _is_count(row.get("prompt_id"), least=0):
        return "prompt_id is no whole number"
    if not _is_text(row.get("prompt")):
        return "prompt is missing or empty"
    texts = row.get("text")
    if not isinstance(texts, list) or not any(map(_is_text, texts)) or not all(isinstance(one, str) for one in texts):
        return "text is no list of texts"
    return BenchmarkPrompt(f"{row['prompt_id']:04d}", row["prompt"], str(row.get("category", "")), row)


def _cvtg(row: dict[str, Any], number: int) -> BenchmarkPrompt | str:
    del number
    if not isinstance(row.get("index"), int | str) or not re.fullmatch(r"\w+", str(row["index"])):
        return "index is no number or word"
    if not _is_text(row.get("prompt")):
        return "prompt is missing or empty"
    if not quoted_words(row["prompt"]):
        return "prompt has no text in single quotation marks"
    return BenchmarkPrompt(f"{row['folder']}/{row['area']}/{row['index']}", row["prompt"], str(row["area"]), row)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield f"line {number}", _parse(line)


def _table_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".jsonl":
        yield from _json_lines(path)
    elif path.suffix == ".json":
        rows = _parse(_text(path))
        yield from ((f"row {number}", row) for number, row in enumerate(rows if isinstance(rows, list) else [], 1))
    else:
        table = csv.DictReader(_text(path).splitlines(keepends=True))
        yield from ((f"row {number}", row) for number, row in enumerate(table, 1))


def _cvtg_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # The archive says CVTG-style, the official scorer looks for CVTG-Style.
    folders = {"CVTG": "CVTG", "CVTG-style": "CVTG-Style", "CVTG-Style": "CVTG-Style"}
    # Names as they are written, where a file system takes both for one.
    there = sorted(entry.name for entry in path.glob("*") if entry.is_dir() and entry.name in folders)
    if {folders[name] for name in there} != {"CVTG", "CVTG-Style"}:
        raise ValueError(
            f"prompts: expected the folders CVTG and CVTG-style in {path}, found {', '.join(there) or 'none'}"
        )
    for name in there:
        for area in _AREAS:
            file = path / name / f"{area}.json"
            content = _parse(_text(file))
            rows = content.get("data_list") if isinstance(content, dict) else None
            if not isinstance(rows, list):
                raise ValueError(f"prompts: expected an object with a list data_list in {file}")
            for number, row in enumerate(rows, 1):
                own = {"folder": folders[name], "area": area}
                yield f"{name}/{area}.json, row {number}", {**row, **own} if isinstance(row, dict) else row


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts: expected a text file, got {path} ({type(error).__name__})") from error


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_position(value: object, place: int) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not _is_count(value[1], least=0):
        return False
    return value[0] in POSITIONS and value[1] < place


def _is_count(value: object, *, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
