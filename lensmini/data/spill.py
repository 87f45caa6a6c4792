"""BucketSort: columns longer than memory, sorted by bucket, in one pass over chunks.

Axes: r rows of a chunk, k buckets, c chunks, n rows in all.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BucketSort"]


class BucketSort:
    """A stable counting sort through files.

    Each chunk is sorted in memory and appended to one file per column; :meth:`write` copies the runs of each bucket
    together. Private memory is that of a chunk and of ``8 c k`` bytes of counts; the disk holds one column twice.

    Args:
        folder: where the unsorted columns go; exists, and holds no file of a column's name.
        dtypes: name of each column, and the dtype it is stored in, as numpy writes it (``"<u2"``).
        num_buckets: k.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sort = BucketSort(Path(folder), {"size": "<u2"}, num_buckets=2)
        ...     for size, bucket in (([5, 6, 7], [1, 0, -1]), ([8, 9], [0, 1])):
        ...         sort.append({"size": np.array(size)}, np.array(bucket))
        ...     entries = sort.write(Path(folder))
        ...     sort.bucket_counts.tolist(), np.load(f"{folder}/size.npy").tolist()
        ([2, 2], [6, 8, 5, 9])
    """

    def __init__(self, folder: Path, dtypes: Mapping[str, str], num_buckets: int) -> None:
        self.folder, self.dtypes, self.num_buckets = folder, dict(dtypes), num_buckets
        self._counts: list[NDArray[np.int64]] = []

    @property
    def bucket_counts(self) -> NDArray[np.int64]:
        """``[k]`` rows of each bucket so far."""
        return np.array(self._counts, np.int64).reshape(-1, self.num_buckets).sum(0)

    def append(self, columns: Mapping[str, NDArray[np.integer]], bucket: NDArray[np.int64]) -> None:
        """Add a chunk.

        Args:
            columns: ``[r]`` each, at least those of ``dtypes``; values must fit.
            bucket: ``[r]``, 0 to k - 1, or -1 for a row to leave out.
        """
        counts = np.bincount(bucket + 1, minlength=self.num_buckets + 1)
        # Stable, so that rows keep their order; 16 bits get numpy's radix sort.
        keys = bucket.astype(np.int16 if self.num_buckets < 2**15 else np.int64)
        order = np.argsort(keys, kind="stable")[counts[0] :]
        for name, dtype in self.dtypes.items():
            with open(self.folder / name, "ab") as file:
                columns[name][order].astype(dtype, copy=False).tofile(file)
        self._counts.append(counts[1:])

    def write(
        self, folder: Path, renumber: Mapping[str, NDArray[np.integer]] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Write ``folder/NAME.npy`` ``[n]`` for each column, on disk when this returns, and delete the unsorted ones.

        Args:
            folder: where to.
            renumber: for columns that need it, the new value of each value from 0.

        Returns:
            For each column its ``dtype``, ``num`` (n), and ``sha256`` of the data.
        """
        counts = np.array(self._counts, np.int64).reshape(-1, self.num_buckets)
        entries: dict[str, dict[str, Any]] = {}
        for name, dtype in self.dtypes.items():
            pieces = _runs(self.folder / name, dtype, counts)
            if name in (renumber or {}):
                table = (renumber or {})[name].astype(dtype)
                pieces = (table[piece] for piece in pieces)
            num = int(counts.sum())
            digest = _write_array(folder / f"{name}.npy", dtype, num, pieces)
            entries[name] = {"dtype": dtype, "num": num, "sha256": digest}
            (self.folder / name).unlink(missing_ok=True)
        return entries


def _runs(path: Path, dtype: str, counts: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    """The pieces of an unsorted column, bucket by bucket; ``counts`` ``[c, k]``."""
    if not counts.any():
        return
    unsorted = np.asarray(np.memmap(path, dtype, "r"))
    stops = np.cumsum(counts).reshape(counts.shape)
    for bucket in range(counts.shape[1]):
        for stop, count in zip(stops[:, bucket].tolist(), counts[:, bucket].tolist(), strict=True):
            if count:
                yield unsorted[stop - count : stop]


def _write_array(path: Path, dtype: str, num: int, pieces: Iterable[NDArray[Any]]) -> str:
    """Write a one-dimensional ``.npy`` of ``num`` from its pieces, and hash its data."""
    digest = hashlib.sha256()
    with open(path, "wb", buffering=2**20) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": (num,)})
        for piece in pieces:
            digest.update(piece.data)
            file.write(piece.data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
