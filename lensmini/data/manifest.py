"""Manifest: a Parquet table of samples, read in chunks of checked rows.

Axes: r rows of a chunk. Rows count over all files of the manifest, from 0.

Columns, without nulls; all integers except ``source``:

==================  ==================================================================================
name                meaning
==================  ==================================================================================
height, width       size of the stored image in pixels, 1 to ``max_side``
text_tokens         length of the caption, 0 to 65,535, in whatever unit the plan reckons with
source              optional: the data set it is from, by name (string) or by number, 0 to 65,535
sample_id           optional: any int64 that the caller knows the sample by; not checked to be unique
shard, offset       optional, both or neither: its place in storage, from 0, below 2**32 and 2**63
==================  ==================================================================================

Other columns are not read. A manifest with none of the last three (say, with string keys) is addressed by its rows.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["CAUSES", "COLUMNS", "SMALL", "Chunk", "Manifest", "Paths"]

Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A Parquet file, a folder of them, or files in the order wanted."""

COLUMNS: dict[str, tuple[int, int, str]] = {
    "height": (1, 2**16 - 1, "<u2"),
    "width": (1, 2**16 - 1, "<u2"),
    "text_tokens": (0, 2**16 - 1, "<u2"),
    "source": (0, 2**16 - 1, "<u2"),
    "sample_id": (-(2**63), 2**63 - 1, "<i8"),
    "shard": (0, 2**32 - 1, "<u4"),
    "offset": (0, 2**63 - 1, "<i8"),
}
"""Lowest and highest value of each column, and the dtype that holds them. 65,535 is also a JPEG's longest side."""

SMALL = "smaller than every bucket"
CAUSES = ("", SMALL, *(f"{name} {what}" for name in COLUMNS for what in ("null", "out of range")))
"""Why a row is left out, by code; 0 is a row that stays."""


@dataclass(frozen=True)
class Chunk:
    """Rows ``start`` to ``start + r``: columns ``[r]`` by name, and the code ``[r]`` uint8 of what is wrong, 0 if nothing.

    The values of a row whose code is not 0 mean nothing.

    Example:
        >>> chunk = Chunk(0, {"height": np.array([512, 0])}, np.array([0, 3], np.uint8))
        >>> [CAUSES[cause] for cause in chunk.causes]
        ['', 'height out of range']
    """

    start: int
    columns: dict[str, NDArray[np.integer]]
    causes: NDArray[np.uint8]


@dataclass(frozen=True)
class Manifest:
    """The files of a manifest whose columns have been found and are of the right types.

    Example:
        >>> import pyarrow as pa, pyarrow.parquet, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pa.parquet.write_table(pa.table({"h": [512, 9], "w": [512, 0]}), f"{folder}/a.parquet")
        ...     Manifest.inspect(folder, {"height": "h", "width": "w", "text_tokens": "h"}).rows
        [2]
    """

    files: list[Path]
    rows: list[int]
    columns: dict[str, str]
    """Our name of each column in use, and the files'."""
    highest: dict[str, int]
    named: bool
    """``source`` holds strings; then its values are replaced by numbers in ``names``."""
    names: dict[str, int] = field(default_factory=dict)

    @classmethod
    def inspect(
        cls, paths: Paths, columns: Mapping[str, str] | None = None, *, max_side: int = 2**16 - 1
    ) -> "Manifest":
        """Read the footer of every file and settle which columns there are.

        Args:
            paths: a Parquet file, a folder (its ``*.parquet`` in order of name) or files in the order wanted.
            columns: our column name to the files', where they differ.
            max_side: longest side in pixels that is believed, at most 65,535.

        Raises:
            ImportError: without pyarrow.
            FileNotFoundError: if a file does not exist.
            ValueError: if there is no file, one is not readable as Parquet, a column is missing, ambiguous or of a
                wrong type, or the files do not agree on the columns.
        """
        if not set(columns or {}) <= set(COLUMNS):
            raise ValueError(f"columns: expected names among {list(COLUMNS)}, got {list(columns or {})}")
        if not 1 <= max_side <= 2**16 - 1:
            raise ValueError(f"max_side: expected 1 to 65535 pixels, got {max_side}")
        files = [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
        if len(files) == 1 and files[0].is_dir():
            files = sorted(files[0].glob("*.parquet"))
        if not files:
            raise ValueError("manifest: expected at least one Parquet file, got none")
        rows, found = [], []
        for file in files:
            with _open(file) as handle:
                rows.append(handle.metadata.num_rows)
                found.append(_usable(file, handle.schema_arrow, {name: name for name in COLUMNS} | dict(columns or {})))
        for file, other in zip(files, found, strict=True):
            if other != found[0]:
                raise ValueError(
                    f"manifest: {file} has the columns {list(other[0])} (source named: {other[1]}), "
                    f"{files[0]} has {list(found[0][0])} (source named: {found[0][1]})"
                )
        highest = {name: COLUMNS[name][1] for name in found[0][0]} | {"height": max_side, "width": max_side}
        return cls(files, rows, found[0][0], highest, found[0][1])

    def read(self, chunk_rows: int, *, invalid: Literal["error", "drop"] = "error") -> Iterator[Chunk]:
        """All rows in order, at most ``chunk_rows`` at a time.

        Args:
            chunk_rows: at least 1.
            invalid: refuse a row with a null or a value out of range, or mark it in ``causes``, by its first column
                that is wrong.

        Raises:
            ValueError: if a row is refused or a file cannot be read, naming file, row group and row in it.
        """
        if chunk_rows < 1 or invalid not in ("error", "drop"):
            raise ValueError(f'chunk_rows, invalid: expected >= 1 and "error" or "drop", got {chunk_rows}, {invalid!r}')
        before = 0
        for file, rows in zip(self.files, self.rows, strict=True):
            start = 0
            with _open(file, read_dictionary=[self.columns["source"]] if self.named else None) as handle:
                for batch in self._batches(handle, chunk_rows, before):
                    yield self._check(batch, before + start, invalid)
                    start += batch.num_rows
            if start != rows:
                raise ValueError(f"manifest: {file} held {rows} rows when it was inspected, and {start} when read")
            before += rows

    def _batches(self, handle: Any, chunk_rows: int, before: int) -> Iterator[Any]:
        """Record batches of a file whose first row is ``before``, read by as many row groups as make a chunk."""
        numbers = [handle.metadata.row_group(group).num_rows for group in range(handle.metadata.num_row_groups)]
        columns, first, start = sorted(set(self.columns.values())), 0, 0
        while first < len(numbers):
            last, rows = first + 1, numbers[first]
            while last < len(numbers) and rows < chunk_rows:
                last, rows = last + 1, rows + numbers[last]
            # A reader over the whole file holds on to more with every row group; threads would hold several columns.
            batches = handle.iter_batches(chunk_rows, range(first, last), columns, use_threads=False)
            while True:
                try:
                    batch = next(batches, None)
                except (OSError, ValueError) as error:
                    place = self.place(before + min(start, sum(numbers) - 1))
                    raise ValueError(f"manifest: cannot read on at {place}: {error}") from error
                if batch is None:
                    break
                yield batch
                start += batch.num_rows
            first = last

    def place(self, row: int) -> str:
        """File, row group and row in the group of a row, in words."""
        file = int(np.searchsorted(np.cumsum(self.rows), row, side="right"))
        rest, group = row - sum(self.rows[:file]), 0
        with _open(self.files[file]) as handle:
            while rest >= handle.metadata.row_group(group).num_rows:
                rest -= handle.metadata.row_group(group).num_rows
                group += 1
        return f"{self.files[file]}, row group {group}, row {rest}"

    def _check(self, batch: Any, start: int, invalid: str) -> Chunk:
        causes = np.zeros(batch.num_rows, np.uint8)
        checked: dict[str, NDArray[np.integer]] = {}
        for name, theirs in self.columns.items():
            array, dtype = batch.column(theirs), COLUMNS[name][2]
            null = array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None
            values = self._number(array) if name == "source" and self.named else _filled(array)
            low, high = COLUMNS[name][0], self.highest[name]
            if null is not None:
                causes[null & (causes == 0)] = CAUSES.index(f"{name} null")
            # Two reductions without temporaries are all that a clean chunk costs.
            if len(values) and (int(values.min()) < low or int(values.max()) > high):
                outside = (values < low) | (values > high)
                causes[outside & (causes == 0)] = CAUSES.index(f"{name} out of range")
            if invalid == "error" and causes.any():
                row = int(np.flatnonzero(causes)[0])
                got = "null" if null is not None and null[row] else values[row]
                raise ValueError(
                    f"manifest: {self.place(start + row)}: {theirs}: expected {low} to {high}, got {got}; "
                    'invalid="drop" leaves such rows out'
                )
            checked[name] = values.astype(dtype, copy=False)
        return Chunk(start, checked, causes)

    def _number(self, array: Any) -> NDArray[np.integer]:
        """Names to numbers, in order of first sight."""
        if not hasattr(array, "dictionary"):
            array = array.dictionary_encode()
        words = array.dictionary.to_pylist()
        numbers = [self.names.setdefault(word, len(self.names)) for word in words]
        if len(self.names) > 2**16:
            raise ValueError(f"{self.columns['source']}: expected at most 65536 names, got more, such as {words[-1]!r}")
        return np.array([*numbers, 0], np.uint16)[_filled(array.indices)]


def _filled(array: Any) -> NDArray[np.integer]:
    return (array.fill_null(0) if array.null_count else array).to_numpy(zero_copy_only=False)


def _open(file: Path, **options: Any) -> Any:
    """A ParquetFile that reads in small pieces, and checks pages that carry checksums."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError("a Parquet manifest needs pyarrow: pip install lensmini[data]") from error
    if not file.is_file():
        raise FileNotFoundError(f"manifest: expected a Parquet file, got {file}")
    try:
        return parquet.ParquetFile(file, buffer_size=2**20, page_checksum_verification=True, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"manifest: {file} is no complete Parquet file: {error}") from error


def _usable(file: Path, schema: Any, names: Mapping[str, str]) -> tuple[dict[str, str], bool]:
    """The columns of a file that are used, and whether ``source`` holds names."""
    import pyarrow.types as types

    present = {name: theirs for name, theirs in names.items() if theirs in schema.names}
    if len({"shard", "offset"} & set(present)) == 1:
        raise ValueError(f"manifest: {file}: expected both columns shard and offset or neither, got {schema.names}")
    named = False
    for name, theirs in names.items():
        if name not in present:
            if name in ("height", "width", "text_tokens"):
                raise ValueError(f"manifest: {file}: expected a column {theirs!r} ({name}), got {schema.names}")
            continue
        if schema.names.count(theirs) > 1:
            raise ValueError(f"manifest: {file}: expected one column {theirs!r}, got {schema.names.count(theirs)}")
        kind = schema.field(theirs).type
        plain = kind.value_type if types.is_dictionary(kind) else kind
        if name == "source" and (types.is_string(plain) or types.is_large_string(plain)):
            named = True
        elif not types.is_integer(kind):
            raise ValueError(f"manifest: {file}: {theirs}: expected integers, got {kind}")
    return present, named
