"""Where raw samples come from: folders, tars and lists of files, all read unit by unit."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from lensmini.data.shard_files import HEADER
from lensmini.data.source_folders import FolderSource
from lensmini.data.source_samples import (
    CAPTION_PROBLEMS,
    SOURCE_CAUSES,
    Dropped,
    RawSample,
    Unit,
    UnreadableFile,
    clean_key,
    read_regular_file,
    row_caption,
)
from lensmini.data.source_tars import TarSource

__all__ = [
    "CAPTION_PROBLEMS",
    "SOURCE_CAUSES",
    "Dropped",
    "FolderSource",
    "ListSource",
    "RawSample",
    "Source",
    "TarSource",
    "Unit",
    "open_source",
]

_MAX_LINE_BYTES = 2**21


class Source(Protocol):
    """What a folder, tars and a list have in common."""

    def units(self) -> list[Unit]:
        """All the work, in a fixed order."""
        ...

    def read(self, unit: Unit) -> Iterator[RawSample | Dropped]:
        """What becomes of everything in a unit."""
        ...

    def fingerprint(self) -> str:
        """Changes when the input does."""
        ...


class ListSource:
    r"""Files named by a list: a path a line, or a JSON object a line with "path" and perhaps "caption" or "text".

    Paths are relative to the list; they may lead anywhere, since somebody wrote them down. Blank lines are passed
    over. The key is the path as written, and a path written again is dropped.

    Args:
        file: the list, UTF-8.
        unit_size: lines in a unit of work.
        max_bytes: longest picture that is read.
        max_caption_bytes: longest caption that is believed.

    Raises:
        FileNotFoundError: if the list does not exist.
        ValueError: if a number is below 1.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.png").write_bytes(b"?"), Path(folder, "list.txt").write_text("a.png\nb.png\n")
        ...     source = ListSource(f"{folder}/list.txt")
        ...     [getattr(sample, "cause", "") for unit in source.units() for sample in source.read(unit)]
        ['', 'missing file']
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        *,
        unit_size: int = 256,
        max_bytes: int = 2**28,
        max_caption_bytes: int = 2**16,
    ) -> None:
        self.file = Path(file)
        if not self.file.is_file():
            raise FileNotFoundError(f"file: expected a list of files, got {self.file}")
        if min(unit_size, max_bytes, max_caption_bytes) < 1:
            raise ValueError(
                f"unit_size, max_bytes, max_caption_bytes: expected at least 1, got {unit_size}, {max_bytes}, "
                f"{max_caption_bytes}"
            )
        self.unit_size, self.max_bytes, self.max_caption_bytes = unit_size, max_bytes, max_caption_bytes

    def units(self) -> list[Unit]:
        """Lines in order, ``unit_size`` at a time, and which of them repeat an earlier path."""
        units: list[Unit] = []
        seen: set[bytes] = set()
        repeats: list[tuple[str | int, ...]] = []
        first, start, number = 1, 0, 0

        def close(end: int) -> None:
            item = ("lines", start, end - start, first)
            units.append(Unit(len(units), f"{self.file.name}:{first}", (item, *repeats)))

        offset = 0
        for number, line in enumerate(self._lines(0), 1):
            entry = _entry(line)
            if isinstance(entry, dict):
                digest = hashlib.sha256(entry["path"].encode("utf-8", "surrogatepass")).digest()[:12]
                if digest in seen:
                    repeats.append(("repeat", number))
                seen.add(digest)
            offset += len(line)
            if number % self.unit_size == 0:
                close(offset)
                first, start, repeats = number + 1, offset, []
        if offset > start:
            close(offset)
        return units

    def fingerprint(self) -> str:
        """Changes when the list does; the files that it names are not looked at."""
        digest = hashlib.sha256(str(self.file.resolve()).encode("utf-8", "surrogatepass"))
        with open(self.file, "rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
        return digest.hexdigest()

    def read(self, unit: Unit) -> Iterator[RawSample | Dropped]:
        """What becomes of every line of a unit, in order.

        Args:
            unit: one of ``units()``, of this or an equal source elsewhere.
        """
        (_, start, left, number), *rest = unit.items
        repeats = {item[1] for item in rest}
        start, left, number = int(start), int(left), int(number)
        for line in self._lines(start):
            if left <= 0:
                return
            left -= len(line)
            entry = _entry(line)
            if entry is not None:
                yield self._sample(entry, number, number in repeats)
            number += 1
        if left > 0:
            yield Dropped(clean_key(f"{self.file.name}:{number}"), "changed since listing", str(self.file))

    def _lines(self, start: int) -> Iterator[bytes]:
        """Lines from an offset on, very long ones in pieces, so that memory stays bounded."""
        with open(self.file, "rb") as file:
            file.seek(start)
            while line := file.readline(_MAX_LINE_BYTES):
                yield line

    def _sample(self, entry: dict[str, Any] | str, number: int, repeated: bool) -> RawSample | Dropped:
        if isinstance(entry, str):
            return Dropped(clean_key(f"{self.file.name}:{number}"), "bad list entry", entry)
        if repeated:
            return Dropped(clean_key(f"{self.file.name}:{number}"), "duplicate key", entry["path"])
        key = clean_key(entry["path"])
        try:
            data = read_regular_file(self.file.parent / entry["path"], max_bytes=self.max_bytes)
        except UnreadableFile as error:
            return Dropped(key, error.cause, error.detail)
        caption, metadata, problem = row_caption(entry, max_bytes=self.max_caption_bytes)
        metadata.pop("path")
        return RawSample(key, data, caption, metadata, problem)


def _entry(line: bytes) -> dict[str, Any] | str | None:
    """An object with "path", or what is wrong with the line, or None for a blank one."""
    text = line.decode("utf-8", "surrogateescape").removeprefix("\ufeff").strip("\r\n")
    if not text.strip():
        return None
    if not text.lstrip().startswith("{"):
        return {"path": text} if "\0" not in text else "a NUL character"
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        return str(error)
    path = entry.get("path") if isinstance(entry, dict) else None
    return entry if isinstance(path, str) and path and "\0" not in path else 'no "path"'


def open_source(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], **limits: int
) -> FolderSource | TarSource | ListSource:
    """The source that paths look like.

    Args:
        paths: a folder of pictures; a tar, several tars, a folder that holds nothing but tars, or one with our shards;
            or a list of files.
        limits: ``max_bytes`` and ``max_caption_bytes``, and ``unit_size`` of folders and lists.

    Returns:
        A ``FolderSource``, ``TarSource`` (names ending in .tar, .tar.gz, .tgz, .tar.bz2 or .tar.xz) or ``ListSource``
        (any other file).

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if there are several paths and not all are tars.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     type(open_source(folder)).__name__
        'FolderSource'
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"paths: expected a folder, tars or a list of files, got {file}")
    if len(files) == 1 and files[0].is_dir():
        inside = [path for path in sorted(files[0].iterdir()) if not path.name.startswith(".")]
        if (files[0] / HEADER).is_file():
            # Shards: beside the tars stand their manifest and header.
            inside = [path for path in inside if path.is_file() and _is_tar(path)]
        if not inside or not all(path.is_file() and _is_tar(path) for path in inside):
            return FolderSource(files[0], **limits)
        files = inside
    if files and all(_is_tar(file) for file in files):
        return TarSource(files, **{name: limit for name, limit in limits.items() if name != "unit_size"})
    if len(files) != 1:
        raise ValueError(f"paths: expected one folder, one list of files, or tars, got {[str(file) for file in files]}")
    return ListSource(files[0], **limits)


def _is_tar(path: Path) -> bool:
    return path.name.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"))
