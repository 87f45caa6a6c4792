"""What every raw source hands out: samples, what was dropped and why, and units of work that travel as JSON."""

import hashlib
import json
import os
import stat
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "CAPTION_PROBLEMS",
    "SOURCE_CAUSES",
    "Dropped",
    "RawSample",
    "Unit",
    "UnreadableFile",
    "clean_caption",
    "clean_key",
    "json_caption",
    "read_regular_file",
]

SOURCE_CAUSES = (
    "not a regular file",
    "broken link",
    "link out of the folder",
    "link to a folder",
    "unreadable",
    "missing file",
    "too large",
    "changed since listing",
    "no picture for this caption",
    "bad metadata row",
    "bad list entry",
    "duplicate key",
    "unsafe name",
    "link in a tar",
    "special member",
    "truncated tar",
    "damaged tar",
)
"""Why a source drops something before anybody looks at the picture."""

CAPTION_PROBLEMS = ("not UTF-8", "NUL character", "too long", "empty", "bad JSON", "unreadable")
"""What may be wrong with a caption that was given; the sample then comes without one."""


@dataclass(frozen=True, slots=True)
class RawSample:
    """A picture's bytes, unchecked, and its caption if there is a usable one.

    Args:
        key: unique within the source, valid UTF-8 without control characters.
        picture: content of the file.
        caption: normalised text, or None.
        metadata: other fields of the caption's JSON object or metadata row.
        caption_problem: one of ``CAPTION_PROBLEMS`` if a caption was given and is unusable, otherwise empty.

    Example:
        >>> RawSample("holiday/1", b"...", "A beach at noon.").caption
        'A beach at noon.'
    """

    key: str
    picture: bytes
    caption: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    caption_problem: str = ""


@dataclass(frozen=True, slots=True)
class Dropped:
    """Something a source leaves out: ``cause`` is one of ``SOURCE_CAUSES``.

    Example:
        >>> Dropped("holiday/2", "because")
        Traceback (most recent call last):
        ValueError: cause: expected one of (..., got 'because'
    """

    key: str
    cause: str
    detail: str = ""

    def __post_init__(self) -> None:
        if self.cause not in SOURCE_CAUSES:
            raise ValueError(f"cause: expected one of {SOURCE_CAUSES}, got {self.cause!r}")


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of work that one process reads alone, anywhere the source's files are.

    Args:
        index: position among the source's units, from 0.
        name: for people.
        items: rows of numbers and texts that only the source understands.

    Example:
        >>> unit = Unit(0, "a.tar", (("a.tar", 10240),))
        >>> Unit.from_dict(json.loads(json.dumps(unit.to_dict()))) == unit
        True
    """

    index: int
    name: str
    items: tuple[tuple[str | int, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """The unit as JSON knows it."""
        return {"index": self.index, "name": self.name, "items": [list(item) for item in self.items]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Unit":
        """The inverse of ``to_dict``."""
        return cls(values["index"], values["name"], tuple(tuple(item) for item in values["items"]))


class UnreadableFile(OSError):
    """A file that cannot be had: ``cause`` is one of ``SOURCE_CAUSES``.

    Example:
        >>> str(UnreadableFile("file too large", "9 bytes of 8"))
        'file too large: 9 bytes of 8'
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail = cause, detail


def read_regular_file(path: Path, *, max_bytes: int, listed: tuple[int, int] | None = None) -> bytes:
    """Content of a regular file; pipes and devices are refused without waiting for them.

    Args:
        path: the file; links are followed.
        max_bytes: longest content that is read.
        listed: (size in bytes, modification time in ns) that it must still have.

    Raises:
        UnreadableFile: naming the cause.

    Example:
        >>> read_regular_file(Path(os.devnull), max_bytes=9)
        Traceback (most recent call last):
        lensmini.data.source_samples.UnreadableFile: not a regular file: /dev/null
    """
    try:
        # Opening a pipe without this flag waits for somebody to write.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise UnreadableFile("missing file", str(path)) from error
    except IsADirectoryError as error:
        raise UnreadableFile("not a regular file", str(path)) from error
    except (OSError, ValueError) as error:
        raise UnreadableFile("unreadable", str(error)) from error
    with os.fdopen(handle, "rb", buffering=0, closefd=True) if _regular(handle) else _refuse(handle, path) as file:
        try:
            before = os.fstat(file.fileno())
            if listed is not None and (before.st_size, before.st_mtime_ns) != listed:
                raise UnreadableFile("changed since listing", str(path))
            if before.st_size > max_bytes:
                raise UnreadableFile("too large", f"{before.st_size} bytes, at most {max_bytes}")
            pieces, left = [], before.st_size + 1
            while left > 0 and (piece := file.read(left)):
                pieces.append(piece)
                left -= len(piece)
            if left != 1:
                raise UnreadableFile("changed since listing", f"{path} changed while it was read")
            return b"".join(pieces)
        except UnreadableFile:
            raise
        except OSError as error:
            raise UnreadableFile("unreadable", str(error)) from error


def _regular(handle: int) -> bool:
    return stat.S_ISREG(os.fstat(handle).st_mode)


def _refuse(handle: int, path: Path) -> Any:
    os.close(handle)
    raise UnreadableFile("not a regular file", str(path))


def clean_caption(raw: bytes | str, *, max_bytes: int) -> tuple[str | None, str]:
    r"""Normalise a caption: UTF-8 without byte order mark, NFC, one blank for every run of white space.

    Args:
        raw: as found.
        max_bytes: longest that is believed, in bytes of UTF-8.

    Returns:
        The caption and an empty text, or None and one of ``CAPTION_PROBLEMS``.

    Example:
        >>> clean_caption(b"a  red\ncircle", max_bytes=100), clean_caption(b" ", max_bytes=100)
        (('a red circle', ''), (None, 'empty'))
    """
    try:
        data = raw.encode() if isinstance(raw, str) else raw
        if len(data) > max_bytes:
            return None, "too long"
        text = data.decode("utf-8-sig")
    except UnicodeError:
        return None, "not UTF-8"
    if "\0" in text:
        return None, "NUL character"
    text = " ".join(unicodedata.normalize("NFC", text.removeprefix("\ufeff")).split())
    return (text, "") if text else (None, "empty")


def json_caption(raw: bytes | str, *, max_bytes: int) -> tuple[str | None, dict[str, Any], str]:
    """Caption and other fields of a JSON object with "caption" or "text".

    Args:
        raw: the object as found; 16 times ``max_bytes`` of it is accepted.
        max_bytes: as of ``clean_caption``.

    Returns:
        The caption or None, the other fields, and one of ``CAPTION_PROBLEMS`` or an empty text; an object without
        either field has no caption and no problem.

    Example:
        >>> json_caption('{"text": "a cat", "licence": "CC0"}', max_bytes=100)
        ('a cat', {'licence': 'CC0'}, '')
    """
    if len(raw) > 16 * max_bytes:
        return None, {}, "too long"
    try:
        values = json.loads(raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw.removeprefix("\ufeff"))
    except UnicodeError:
        return None, {}, "not UTF-8"
    except (ValueError, RecursionError):
        return None, {}, "bad JSON"
    if not isinstance(values, dict):
        return None, {}, "bad JSON"
    return row_caption(values, max_bytes=max_bytes)


def row_caption(values: Mapping[str, Any], *, max_bytes: int) -> tuple[str | None, dict[str, Any], str]:
    """As ``json_caption`` for fields that are read already."""
    rest = {str(name): value for name, value in values.items() if name not in ("caption", "text")}
    given = values.get("caption") if values.get("caption") is not None else values.get("text")
    if given is None:
        return None, rest, ""
    if not isinstance(given, str):
        return None, rest, "bad JSON"
    caption, problem = clean_caption(given, max_bytes=max_bytes)
    return caption, rest, problem


def clean_key(name: str) -> str:
    r"""A name as a key: itself if it is plain text, otherwise with escapes and a digest that keeps it unique.

    Example:
        >>> clean_key("a/b.png"), clean_key("a\nb.png")
        ('a/b.png', 'a\\nb.png~87da0443')
    """
    if name.isprintable():
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name.encode('unicode_escape').decode('ascii')}~{digest}"
