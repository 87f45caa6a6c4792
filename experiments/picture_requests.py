"""Which pictures a person asks for: prompts from arguments, text files and JSON lines, read one after the other.

A file is read as often as it is needed and never held whole, so that a job may have hundreds of thousands of prompts.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from experiments.runs import config_dict

__all__ = ["OWN_FIELDS", "Prompts", "expand", "shard_of"]

OWN_FIELDS = (
    *("file", "checkpoint", "repeat", "weights", "weights_sha256", "num_steps", "guidance_scale", "rescale", "mu"),
    *("dtype", "published_bf16", "lora_sha256", "lora_scale", "parts_sha256"),
)
"""What a row of ``pictures.jsonl`` says beside the request; a line of the prompts file may not say it."""
_NUMBERS = {"height": 1, "width": 1, "seed": 0}


class Prompts:
    """Every prompt of a job, in order: arguments, then the file; to go through as often as needed.

    A text file has one prompt per line; its blank lines are left out and white space counts as one space. A file that
    ends in ``.jsonl`` has an object per line with ``prompt`` and, if wanted, ``negative_prompt``, ``height``,
    ``width``, ``seed`` and anything else, which is kept; there the prompt stays as it is. Both are UTF-8 in any
    script and are not normalised.

    Args:
        texts: prompts; ``-`` reads more from standard input, one per line.
        path: file of prompts, or ``-``.
    """

    def __init__(self, texts: Sequence[str], path: Path | None) -> None:
        self._texts, self._path = tuple(texts), path
        self._typed: list[str] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields ``{"prompt": ..., ...}``.

        Raises:
            ValueError: if a file cannot be read or a line is wrong; the message names it.
        """
        for text in self._texts:
            yield from _plain(self._standard_input() if text == "-" else [text])
        if self._path is not None and str(self._path) == "-":
            yield from _plain(self._standard_input())
        elif self._path is not None:
            yield from self._file(self._path)

    def _standard_input(self) -> list[str]:
        # It can be read once only, and the prompts are gone through several times.
        typed = sys.stdin.read().splitlines() if self._typed is None else self._typed
        self._typed = typed
        return typed

    def _file(self, path: Path) -> Iterator[dict[str, Any]]:
        try:
            with path.open(encoding="utf-8-sig", newline="\n") as file:
                if path.suffix == ".jsonl":
                    lines = enumerate(file, 1)
                    yield from (_parse(line, path, number) for number, line in lines if line.strip())
                else:
                    yield from _plain(file)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"prompts: expected a text file, got {path} ({type(error).__name__})") from error


def expand(
    item: dict[str, Any], canvases: Sequence[tuple[int, int]], *, seed: int, num_images: int, negative_prompt: str = ""
) -> Iterator[dict[str, Any]]:
    """The pictures of one prompt, in the order canvas, seed.

    Args:
        item: what :class:`Prompts` yields.
        canvases: heights and widths; the item's own size replaces them, half a size the half.
        seed: of the first picture, unless the item has its own; the next ones count on.
        num_images: pictures on each canvas.
        negative_prompt: unless the item has its own.

    Yields:
        Rows that begin with prompt, seed, height and width; a blank negative prompt is left out.

    Example:
        >>> rows = expand({"prompt": "a box", "height": 24}, [(32, 40)], seed=7, num_images=2)
        >>> [(row["seed"], row["height"], row["width"]) for row in rows]
        [(7, 24, 40), (8, 24, 40)]
    """
    rest = {name: value for name, value in item.items() if name not in ("prompt", "negative_prompt", *_NUMBERS)}
    negative = item.get("negative_prompt", negative_prompt)
    rest |= {"negative_prompt": negative} if negative.strip() else {}
    sizes = dict.fromkeys((item.get("height", height), item.get("width", width)) for height, width in canvases)
    first = item.get("seed", seed)
    for height, width in sizes:
        for number in range(num_images):
            yield {"prompt": item["prompt"], "seed": first + number, "height": height, "width": width, **rest}


def shard_of(request: dict[str, Any], shards: int) -> int:
    """The process, of so many, that paints a request; equal requests meet in the same one.

    Example:
        >>> shard_of({"prompt": "a box", "seed": 1}, 1), shard_of({"seed": 1}, 4) == shard_of({"seed": 1}, 4)
        (0, True)
    """
    text = json.dumps(request, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % shards


def _plain(lines: Sequence[str] | Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if words := line.split():
            yield {"prompt": " ".join(words)}


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    def refuse(problem: str) -> NoReturn:
        raise ValueError(f"prompts: {path}, line {number}: {problem}")

    try:
        item = json.loads(line)
        # Rows must be JSON too: no NaN, no infinity, no lone half of a character.
        config_dict(item)
        json.dumps(item, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        refuse(f"expected a JSON object with finite numbers and whole characters, got {line.strip()[:60]!r} ({error})")
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
        refuse(f'expected an object with a "prompt" string, got {line.strip()[:60]!r}')
    if not isinstance(item.get("negative_prompt", ""), str):
        refuse(f"negative_prompt: expected a string, got {item['negative_prompt']!r}")
    for name, least in _NUMBERS.items():
        value = item.get(name, least)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
            refuse(f"{name}: expected a whole number of at least {least}, got {value!r}")
    if own := [name for name in item if name in OWN_FIELDS]:
        refuse(f"expected no field that rows of pictures.jsonl have for themselves, got {', '.join(own)}")
    return item
