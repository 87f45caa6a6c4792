"""SampleIndex: which samples each bucket holds, as memory-mapped columns built in one pass over a Parquet manifest.

Axes: n samples, k buckets. A row counts the samples of the manifest over all its files, a position those of the
index, where they are sorted by bucket and, inside a bucket, in the manifest's order: sorted by shard if that is.

Parquet is decoded once, and private memory is that of a chunk, however many samples there are. An index is a folder:
``index.json`` (version, buckets, counts, hashes) and a ``.npy`` for each column.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lensmini.data.buckets import Bucket, assign_buckets
from lensmini.data.manifest import CAUSES, COLUMNS, SMALL, Chunk, Manifest, Paths
from lensmini.data.spill import BucketSort

__all__ = ["SampleIndex"]

_FORMAT, _VERSION = "lensmini.SampleIndex", 1
_HEADER = "index.json"
_LEFT_OUT = ("left_out_row", "left_out_cause")


class SampleIndex:
    """An index on disk: opening it reads the header only, and processes that open it share its pages.

    It pickles as its folder, so data workers map the files themselves.

    Args:
        folder: what :meth:`build` wrote.

    Attributes:
        buckets: the k buckets.
        bucket_starts: ``[k + 1]`` int64; bucket j holds the positions from ``bucket_starts[j]`` up to
            ``bucket_starts[j + 1]``.
        columns: mapped, read-only arrays ``[n]`` in order of position: ``row`` and the manifest's columns in the
            narrow types they are stored in (see :mod:`lensmini.data.manifest`); :meth:`lookup` widens them.
        sources: what the numbers in ``columns["source"]`` stand for, sorted; empty without that column.
        files: name and number of rows of each file of the manifest.
        left_out: number of manifest rows that are not in the index, by cause.
        fingerprint: hash of the samples kept, their order, the rows left out and the buckets. How the manifest was
            cut into files and row groups does not change it.

    Raises:
        ValueError: if the folder holds no complete index of this version, or a file does not fit the header.

    Example:
        >>> import pyarrow as pa, pyarrow.parquet, tempfile
        >>> table = pa.table({"height": [512, 512, 1024], "width": [512, 1024, 512], "text_tokens": [7, 8, 9]})
        >>> buckets = Bucket(512, 512), Bucket(512, 1024)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pa.parquet.write_table(table, f"{folder}/a.parquet")
        ...     index = SampleIndex.build(f"{folder}/a.parquet", f"{folder}/index", buckets)
        ...     (
        ...         index.bucket_starts.tolist(),
        ...         index.lookup([2])["row"].tolist(),
        ...         index.lookup([1])["text_tokens"].tolist(),
        ...     )
        ([0, 2, 3], [1], [9])
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).absolute()
        header = _read_header(self.folder)
        self.buckets = tuple(Bucket(height, width) for height, width in header["buckets"])
        self.bucket_starts: NDArray[np.int64] = np.array(header["bucket_starts"], np.int64)
        self.bucket_starts.flags.writeable = False
        self._entries: dict[str, dict[str, Any]] = header["arrays"]
        mapped = {name: _map(self.folder, name, entry) for name, entry in self._entries.items()}
        self.columns = {name: array for name, array in mapped.items() if name not in _LEFT_OUT}
        self._left_out = {name: mapped[name] for name in _LEFT_OUT}
        self.sources: tuple[str | int, ...] = tuple(header["sources"])
        self.files: tuple[tuple[str, int], ...] = tuple((name, rows) for name, rows in header["files"])
        self.left_out: dict[str, int] = header["left_out"]
        self.fingerprint: str = header["fingerprint"]

    @classmethod
    def build(
        cls,
        manifest: Paths,
        folder: str | os.PathLike[str],
        buckets: Sequence[Bucket],
        *,
        bases: Sequence[int] | None = None,
        small: Literal["error", "drop", "upscale"] = "error",
        invalid: Literal["error", "drop"] = "error",
        columns: Mapping[str, str] | None = None,
        max_side: int = 2**16 - 1,
        chunk_rows: int = 2**17,
    ) -> "SampleIndex":
        """Write the index of a manifest, and open it. The folder appears complete or not at all.

        Args:
            manifest: a Parquet file, a folder (its ``*.parquet`` in order of name) or files in the order wanted; for
                its columns see :mod:`lensmini.data.manifest`.
            folder: where to write; must not exist. Needs twice the index's size for a while.
            buckets: k buckets.
            bases: as in :func:`assign_buckets`.
            small: as in :func:`assign_buckets`; "drop" counts and lists the small in ``left_out``.
            invalid: refuse a row with a null or a value out of range, naming file, row group and row, or leave it
                out, counted and listed in ``left_out`` by its first column that is wrong. This is about rows only:
                missing columns, wrong types and unreadable files are always errors.
            columns: our column name to the manifest's, where they differ.
            max_side: longest side in pixels that is believed, at most 65,535.
            chunk_rows: rows held in memory at a time.

        Raises:
            ImportError: without pyarrow.
            FileExistsError: if ``folder`` exists.
            FileNotFoundError: if a file of the manifest does not.
            ValueError: if an argument, a file, a column or a row is refused, or no sample is left.

        Example:
            >>> SampleIndex.build([], "index", [Bucket(512, 512)])
            Traceback (most recent call last):
            ValueError: manifest: expected at least one Parquet file, got none
        """
        if small not in ("error", "drop", "upscale"):
            raise ValueError(f'small: expected "error", "drop" or "upscale", got {small!r}')
        assign_buckets([], [], buckets, bases=bases)  # a bad table is refused before anything is read
        source = Manifest.inspect(manifest, columns, max_side=max_side)
        target = Path(folder).absolute()
        if os.path.lexists(target):
            raise FileExistsError(f"folder: expected one that does not exist yet, got {target}")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that moving it there is one rename; the header goes in last.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            row = "<u4" if sum(source.rows) <= 2**32 else "<i8"
            kept = {"row": row, **{name: COLUMNS[name][2] for name in source.columns}}
            sort = BucketSort(Path(scratch), kept, len(buckets))
            left = BucketSort(Path(scratch), {"left_out_row": row, "left_out_cause": "|u1"}, len(CAUSES))
            seen = np.zeros(2**16, bool)
            for chunk in source.read(chunk_rows, invalid=invalid):
                bucket = _assign(chunk, source, buckets, bases, small)
                rows = chunk.start + np.arange(len(bucket))
                sort.append({"row": rows, **chunk.columns}, bucket)
                if chunk.causes.any():
                    left.append(
                        {"left_out_row": rows, "left_out_cause": chunk.causes}, chunk.causes.astype(np.int64) - 1
                    )
                if "source" in chunk.columns:
                    seen[chunk.columns["source"][bucket >= 0]] = True
            left_out = {CAUSES[code]: num for code, num in enumerate(left.bucket_counts.tolist(), 1) if num}
            if not sort.bucket_counts.any():
                raise ValueError(f"manifest: expected samples, got {sum(source.rows)} rows, left out: {left_out}")
            names = {number: name for name, number in source.names.items()}
            numbers = sorted(np.flatnonzero(seen).tolist(), key=lambda number: names.get(number, number))
            dense = np.zeros(2**16, np.uint16)
            dense[numbers] = np.arange(len(numbers))
            complete = Path(scratch) / "index"
            complete.mkdir()
            header = {
                "format": _FORMAT,
                "version": _VERSION,
                "buckets": [[bucket.height, bucket.width] for bucket in buckets],
                "bucket_starts": [0, *np.cumsum(sort.bucket_counts).tolist()],
                "arrays": sort.write(complete, {"source": dense}) | left.write(complete),
                "sources": [names.get(number, number) for number in numbers],
                "left_out": left_out,
            }
            header["fingerprint"] = _hash(header)
            header["files"] = [[file.name, rows] for file, rows in zip(source.files, source.rows, strict=True)]
            header["sha256"] = _hash(header)
            (complete / _HEADER).write_text(json.dumps(header, indent=1), encoding="ascii")
            _sync(complete / _HEADER)
            _sync(complete)
            complete.rename(target)
            _sync(target.parent)
        return cls(target)

    def __len__(self) -> int:
        return int(self.bucket_starts[-1])

    def __reduce__(self) -> tuple[type["SampleIndex"], tuple[str]]:
        return SampleIndex, (str(self.folder),)

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the mapped columns."""
        return sum(column.nbytes for column in self.columns.values())

    def bucket_of(self, positions: ArrayLike) -> NDArray[np.int64]:
        """The bucket of each position, both ``[...]``."""
        wanted = _checked("positions", positions, len(self))
        # From the right: an empty bucket starts where the next one does.
        return np.searchsorted(self.bucket_starts, wanted, side="right").astype(np.int64) - 1

    def lookup(self, positions: ArrayLike) -> dict[str, NDArray[np.int64]]:
        """The samples at some positions.

        Args:
            positions: ``[...]`` integers from 0 to n - 1, of any shape and order.

        Returns:
            ``[...]`` int64 for ``bucket``, ``row`` and each column of the manifest.

        Raises:
            ValueError: if a position is no integer or out of range.
        """
        wanted = _checked("positions", positions, len(self))
        found = {name: np.asarray(column)[wanted].astype(np.int64) for name, column in self.columns.items()}
        return {"bucket": self.bucket_of(wanted), **found}

    def locate(self, rows: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where manifest rows ``[...]`` are: number of the file in ``files`` and row in that file, both ``[...]``."""
        starts = np.cumsum([0, *(count for _, count in self.files)])
        wanted = _checked("rows", rows, int(starts[-1]))
        file = np.searchsorted(starts, wanted, side="right").astype(np.int64) - 1
        return file, wanted - starts[file]

    def left_out_rows(self, cause: str) -> NDArray[np.int64]:
        """The manifest rows left out for one cause of ``left_out``, ascending, int64."""
        if cause not in self.left_out:
            raise ValueError(f"cause: expected one of {list(self.left_out)}, got {cause!r}")
        rows, causes = (np.asarray(self._left_out[name]) for name in _LEFT_OUT)
        return rows[causes == CAUSES.index(cause)].astype(np.int64)

    def verify(self) -> None:
        """Read every file and compare it with its hash; opening compares sizes only.

        Raises:
            ValueError: naming the first file that has changed since it was written.
        """
        for name, array in {**self.columns, **self._left_out}.items():
            digest = hashlib.sha256()
            for start in range(0, len(array), 2**20):
                digest.update(np.asarray(array[start : start + 2**20]).data)
            if digest.hexdigest() != self._entries[name]["sha256"]:
                raise ValueError(f"folder: {self.folder / name}.npy has changed since it was written")


def _assign(
    chunk: Chunk,
    source: Manifest,
    buckets: Sequence[Bucket],
    bases: Sequence[int] | None,
    small: Literal["error", "drop", "upscale"],
) -> NDArray[np.int64]:
    """The bucket of each row of a chunk, -1 for those left out; marks the small in its causes."""
    fine = chunk.causes == 0
    heights, widths = chunk.columns["height"], chunk.columns["width"]
    if not fine.all():
        heights, widths = heights[fine], widths[fine]
    bucket = np.full(len(fine), -1, np.int64)
    bucket[fine] = assign_buckets(
        heights, widths, buckets, bases=bases, small="upscale" if small == "upscale" else "drop"
    )
    too_small = np.flatnonzero(fine & (bucket < 0))
    if small == "error" and len(too_small):
        row = int(too_small[0])
        size = f"{chunk.columns['height'][row]} x {chunk.columns['width'][row]} pixels"
        raise ValueError(
            f'manifest: {source.place(chunk.start + row)}: {size} are {SMALL}; pass small="drop" or small="upscale"'
        )
    chunk.causes[too_small] = CAUSES.index(SMALL)
    return bucket


def _sync(path: Path) -> None:
    """Wait until a file or the names in a folder are on disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _hash(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / _HEADER
    try:
        header = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"folder: expected an index, with a readable {_HEADER}, got {folder}: {error}") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ValueError(f"folder: {path}: expected the header of a {_FORMAT}, got another file")
    if header.get("version") != _VERSION:
        raise ValueError(f"folder: {path}: expected version {_VERSION}, got {header.get('version')!r}; build it again")
    if header.pop("sha256", None) != _hash(header):
        raise ValueError(f"folder: {path} has changed since it was written")
    return header


def _map(folder: Path, name: str, entry: Mapping[str, Any]) -> np.memmap:
    path, dtype, num = folder / f"{name}.npy", np.dtype(entry["dtype"]), entry["num"]
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"folder: {path}: expected {num} of {dtype}, and cannot be read: {error}") from error
    if array.dtype != dtype or array.shape != (num,) or array.offset + array.nbytes != path.stat().st_size:
        raise ValueError(
            f"folder: {path}: expected {num} of {dtype} and nothing else, got {array.dtype} of shape "
            f"{list(array.shape)} in {path.stat().st_size} bytes"
        )
    return array


def _checked(name: str, values: ArrayLike, limit: int) -> NDArray[np.int64]:
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer) and array.size:
        raise ValueError(f"{name}: expected integers, got {array.dtype}")
    if array.size and (array.min() < 0 or array.max() >= limit):
        raise ValueError(f"{name}: expected 0 to {limit - 1}, got {array.min()} to {array.max()}")
    return array.astype(np.int64)
