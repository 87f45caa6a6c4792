"""Raw samples from a folder of pictures, with captions beside them or in metadata tables."""

import csv
import hashlib
import json
import os
from collections.abc import Iterator
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any

from lensmini.data.picture_bytes import BadPicture, picture_format
from lensmini.data.source_samples import (
    Dropped,
    RawSample,
    Unit,
    UnreadableFile,
    clean_caption,
    clean_key,
    json_caption,
    read_regular_file,
    row_caption,
)

__all__ = ["FolderSource"]

_TABLES = ("metadata.jsonl", "metadata.csv")
_MAX_TABLE_BYTES = 2**31

Item = tuple[str, str, int, int, str, str]
"""Path below the folder, kind or cause, size, modification time in ns, and the caption files ".txt" and ".json"."""


class FolderSource:
    """Every file below a folder, whatever its name says, as one sample or one thing dropped.

    A file ``x.txt`` or ``x.json`` beside a picture ``x.png`` (or ``x.png.txt``) is its caption; captions for several
    pictures stand in ``metadata.jsonl`` or ``metadata.csv`` (fields ``file_name`` and ``caption`` or ``text``) in the
    picture's folder or one above it, the nearest counts. All other files are offered as pictures, since only their
    content tells; hidden ones (``.name``) are passed over. Suffixes may be in capitals. The key is the path below the
    folder. Links to files inside are followed, links that lead outside are refused.

    Args:
        path: the folder.
        unit_size: files in a unit of work.
        max_bytes: longest file that is read.
        max_caption_bytes: longest caption that is believed.

    Raises:
        ValueError: if ``path`` is no folder or a number is below 1.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as path:
        ...     _ = Path(path, "a.PNG").write_bytes(b"?"), Path(path, "a.txt").write_text("a cat")
        ...     source = FolderSource(path)
        ...     [sample.caption for unit in source.units() for sample in source.read(unit)]
        ['a cat']
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        unit_size: int = 256,
        max_bytes: int = 2**28,
        max_caption_bytes: int = 2**16,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"path: expected a folder, got {self.path}")
        if min(unit_size, max_bytes, max_caption_bytes) < 1:
            raise ValueError(
                f"unit_size, max_bytes, max_caption_bytes: expected at least 1, got {unit_size}, {max_bytes}, "
                f"{max_caption_bytes}"
            )
        self.unit_size, self.max_bytes, self.max_caption_bytes = unit_size, max_bytes, max_caption_bytes
        self._root = os.path.realpath(self.path)
        self._tables: dict[str, dict[str, dict[str, Any]]] = {}

    def units(self) -> list[Unit]:
        """All files in order of their paths, ``unit_size`` at a time."""
        items = sorted(self._items(""))
        starts = range(0, len(items), self.unit_size)
        return [Unit(i, items[at][0], tuple(items[at : at + self.unit_size])) for i, at in enumerate(starts)]

    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed or written: pictures, captions and metadata tables."""
        items = sorted(self._items(""))
        beside = sorted({str(name) for item in items for name in item[4:6] if name})
        return hashlib.sha256(json.dumps([items, [self._state(name) for name in beside]]).encode()).hexdigest()

    def _state(self, name: str) -> tuple[int, int]:
        try:
            state = os.stat(self.path / name)
        except OSError:
            return -1, -1
        return state.st_size, state.st_mtime_ns

    def read(self, unit: Unit) -> Iterator[RawSample | Dropped]:
        """What becomes of every file of a unit, in order.

        Args:
            unit: one of ``units()``, of this or an equal source elsewhere.
        """
        for item in unit.items:
            name, kind = str(item[0]), str(item[1])
            if kind == "table":
                yield from self._orphans(name)
            elif kind in ("picture", "caption"):
                yield self._sample(name, kind, (int(item[2]), int(item[3])), str(item[4]), str(item[5]))
            else:
                yield Dropped(clean_key(name), kind)

    def _items(self, folder: str) -> Iterator[Item]:
        try:
            with os.scandir(self.path / folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            yield folder or ".", "unreadable", 0, 0, "", ""
            return
        files: dict[str, tuple[str, int, int]] = {}
        for entry in found:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                continue
            try:
                kind = self._kind(entry)
                state = entry.stat() if kind == "file" else None
            except OSError:
                kind, state = "unreadable", None
            if kind == "folder":
                if PurePosixPath(entry.name).suffix.lower() in _PICTURE_SUFFIXES:
                    yield name, "not a regular file", 0, 0, "", ""
                yield from self._items(name)
            elif state is None:
                yield name, kind, 0, 0, "", ""
            else:
                files[entry.name] = (name, state.st_size, state.st_mtime_ns)
        yield from _pair(files)

    def _kind(self, entry: os.DirEntry[str]) -> str:
        if entry.is_symlink():
            target = os.path.realpath(entry.path)
            if target != self._root and not target.startswith(os.path.join(self._root, "")):
                return "link out of the folder"
            if not os.path.exists(target):
                return "broken link"
            if os.path.isdir(target):
                return "link to a folder"
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() else "not a regular file"

    def _sample(self, name: str, kind: str, listed: tuple[int, int], text: str, fields: str) -> RawSample | Dropped:
        key = clean_key(name)
        try:
            self._check_inside(name)
            if kind == "caption":
                data = read_regular_file(self.path / name, max_bytes=self.max_bytes, listed=listed)
                try:
                    picture_format(data[:64])  # a picture that is only named like a caption
                except BadPicture:
                    return Dropped(key, "no picture for this caption")
            else:
                data = read_regular_file(self.path / name, max_bytes=self.max_bytes, listed=listed)
        except UnreadableFile as error:
            return Dropped(key, error.cause, error.detail)
        return RawSample(key, data, *self._caption(name, text, fields))

    def _check_inside(self, name: str) -> None:
        """A unit may come from elsewhere, and a link may have been turned since the listing."""
        target = os.path.realpath(self.path / name)
        if not target.startswith(os.path.join(self._root, "")):
            raise UnreadableFile("link out of the folder", name)

    def _caption(self, name: str, text: str, fields: str) -> tuple[str | None, dict[str, Any], str]:
        caption, metadata, problem = None, {}, ""
        row = self._row(name)
        if row is not None:
            caption, metadata, problem = row_caption(row, max_bytes=self.max_caption_bytes)
            metadata.pop("file_name", None)
        for file, is_text in ((fields, False), (text, True)):
            if not file:
                continue
            try:
                self._check_inside(file)
                raw = read_regular_file(self.path / file, max_bytes=16 * self.max_caption_bytes)
            except UnreadableFile as error:
                found, more, wrong = None, {}, "too long" if error.cause == "too large" else "unreadable"
            else:
                if is_text:
                    (found, wrong), more = clean_caption(raw, max_bytes=self.max_caption_bytes), {}
                else:
                    found, more, wrong = json_caption(raw, max_bytes=self.max_caption_bytes)
            metadata |= more
            if found is not None or wrong:
                caption, problem = found, wrong
        return caption, metadata, problem

    def _row(self, name: str) -> dict[str, Any] | None:
        parts = PurePosixPath(name).parts
        for depth in range(len(parts) - 1, -1, -1):
            folder = "/".join(parts[:depth])
            for table in _TABLES:
                path = f"{folder}/{table}" if folder else table
                if os.path.lexists(self.path / path):
                    row = self._rows(path).get("/".join(parts[depth:]))
                    if row is not None:
                        return row
        return None

    def _rows(self, table: str) -> dict[str, dict[str, Any]]:
        """Rows of a table by file name; few tables are held at a time, since units follow the order of folders."""
        if table not in self._tables:
            if len(self._tables) >= 4:
                self._tables.pop(next(iter(self._tables)))
            rows = self._tables[table] = {}
            for row, _ in self._parse(table):
                if row is not None:
                    rows.setdefault(_file_name(row), row)
        return self._tables[table]

    def _parse(self, table: str) -> Iterator[tuple[dict[str, Any] | None, str]]:
        """(row, "") or (None, what is wrong) for every line of a table that is not blank."""
        try:
            self._check_inside(table)
            raw = read_regular_file(self.path / table, max_bytes=_MAX_TABLE_BYTES)
        except UnreadableFile as error:
            yield None, str(error)
            return
        # A line that is no UTF-8 loses itself only: its surrogates make the caption "not UTF-8".
        text = raw.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        if table.endswith(".csv"):
            try:
                for row in csv.DictReader(StringIO(text, newline="")):
                    named = bool(row.get("file_name"))
                    yield (dict(row), "") if named else (None, "no file_name")
            except csv.Error as error:
                yield None, str(error)
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield None, f"line {number}: {error}"
                    continue
                if isinstance(row, dict) and isinstance(row.get("file_name"), str) and row["file_name"]:
                    yield row, ""
                else:
                    yield None, f"line {number}: no file_name"

    def _orphans(self, table: str) -> Iterator[Dropped]:
        """Rows that are no rows, name a file again, or name one that is not there."""
        folder, seen = self.path / PurePosixPath(table).parent, set()
        for number, (row, wrong) in enumerate(self._parse(table), 1):
            key = clean_key(f"{table}#{number}")
            if row is None:
                yield Dropped(key, "bad metadata row", wrong)
                continue
            name = _file_name(row)
            digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8]
            if digest in seen:
                yield Dropped(key, "duplicate key", name)
            elif name.startswith("/") or ".." in name.split("/") or "\0" in name:
                yield Dropped(key, "unsafe name", name)
            elif not os.path.lexists(folder / os.fsdecode(name.encode("utf-8", "surrogateescape"))):
                yield Dropped(key, "no picture for this caption", name)
            seen.add(digest)


_PICTURE_SUFFIXES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".apng",
        ".webp",
        ".gif",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
        ".avif",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
    }
)


def _file_name(row: dict[str, Any]) -> str:
    name = row["file_name"]
    return str(PurePosixPath(name)) if not name.startswith("/") else name


def _pair(files: dict[str, tuple[str, int, int]]) -> Iterator[Item]:
    """Captions to their pictures within one folder; what is left over is an item of its own."""
    captions: dict[tuple[str, str], str] = {}
    pictures = []
    for file in files:
        suffix = PurePosixPath(file).suffix.lower()
        if file in _TABLES:
            yield (*_front(files[file], "table"), "", "")
        elif suffix in (".txt", ".json"):
            captions.setdefault((file[: -len(suffix)], suffix), file)
        else:
            pictures.append(file)
    used = set()
    for file in pictures:
        mine = []
        for suffix in (".txt", ".json"):
            stem = PurePosixPath(file).stem
            caption = captions.get((file, suffix)) or captions.get((stem, suffix)) or ""
            used.add(caption)
            mine.append(files[caption][0] if caption else "")
        yield (*_front(files[file], "picture"), mine[0], mine[1])
    for file in files:
        if PurePosixPath(file).suffix.lower() in (".txt", ".json") and file not in used:
            yield (*_front(files[file], "caption"), "", "")


def _front(file: tuple[str, int, int], kind: str) -> tuple[str, str, int, int]:
    return file[0], kind, file[1], file[2]
