"""Read samples from shards at any place, checked, without losing more to damage than what is damaged.

Axes: r rows of the manifest, one for each sample, in order of shard and of offset.
"""

import io
import os
import stat
import tarfile
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from lensmini.data.shard_files import HEADER, MANIFEST, ShardFiles, checksum, file_sha256

__all__ = ["DAMAGE_CAUSES", "Damage", "DamagedSample", "RawMembers", "ShardReader", "tar_members"]

DAMAGE_CAUSES = ("missing shard", "unreadable shard", "truncated shard", "wrong checksum", "changed outside samples")
"""What may be wrong with a part of a shard."""


class RawMembers(NamedTuple):
    """A sample as it is stored.

    Example:
        >>> RawMembers("a", {"txt": b"A cat."}).members["txt"]
        b'A cat.'
    """

    key: str
    members: dict[str, bytes]
    """Content by suffix."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A sample that cannot be read, or a change of a shard that hits none: then the key is empty.

    Example:
        >>> Damage("bucket-00-000000.tar", "a", 1024, "wrong checksum").key
        'a'
    """

    shard: str
    key: str
    offset: int
    cause: str
    """One of ``DAMAGE_CAUSES``."""

    def __post_init__(self) -> None:
        if self.cause not in DAMAGE_CAUSES:
            raise ValueError(f"cause: expected one of {DAMAGE_CAUSES}, got {self.cause!r}")


class DamagedSample(ValueError):
    """A sample that cannot be read.

    Args:
        damage: what is wrong.

    Example:
        >>> print(DamagedSample(Damage("bucket-00-000000.tar", "a", 1024, "wrong checksum")))
        shard bucket-00-000000.tar, sample 'a' at byte 1024: wrong checksum
    """

    def __init__(self, damage: Damage) -> None:
        super().__init__(f"shard {damage.shard}, sample {damage.key!r} at byte {damage.offset}: {damage.cause}")
        self.damage = damage

    def __reduce__(self) -> tuple[type["DamagedSample"], tuple[Damage]]:
        return DamagedSample, (self.damage,)


class ShardReader:
    """Shards that :func:`write_shards`, :func:`merge_manifests` or :func:`index_tars` described.

    Opening it reads ``shards.json``; the first sample reads 16 bytes a sample of the manifest. Threads may share it,
    and so may processes that fork; it pickles as its folders.

    Args:
        folder: with ``shards.json`` and ``manifest.parquet``.
        tars: folder of the tars, if it is another one.
        max_open: tars that are kept open.
        check: compare every sample with its checksum, which takes about half of the time; without, what is damaged
            but has the form of a sample is handed out as it is. :meth:`verify` checks always.

    Raises:
        ValueError: if the folder is not complete, or ``max_open`` below 1.

    Example:
        >>> import tempfile
        >>> from lensmini.data.buckets import Bucket
        >>> from lensmini.data.shard_writer import ShardSample, write_shards
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sample = ShardSample("a", 0, 512, 512, 2, {"jpg": b"...", "txt": b"A cat."})
        ...     _ = write_shards([sample], folder, [Bucket(512, 512)])
        ...     ShardReader(folder)[0].members["txt"]
        b'A cat.'
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        tars: str | os.PathLike[str] | None = None,
        max_open: int = 64,
        check: bool = True,
    ) -> None:
        if max_open < 1:
            raise ValueError(f"max_open: expected at least 1, got {max_open}")
        self.folder = Path(folder).absolute()
        self.tars = self.folder if tars is None else Path(tars).absolute()
        self.max_open, self.check = max_open, check
        self.files = ShardFiles.load(self.folder / HEADER)
        if not (self.folder / MANIFEST).is_file():
            raise ValueError(f"folder: {self.folder / MANIFEST} is missing; finish writing it")
        self.shard_starts = np.cumsum([0, *(shard.num_samples for shard in self.files.shards)], dtype=np.int64)
        self._starts: list[int] = self.shard_starts.tolist()
        self._columns: tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint32]] | None = None
        self._forget()

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.folder), str(self.tars), self.max_open, self.check)

    def __getitem__(self, row: int) -> RawMembers:
        """The sample of a row of the manifest; raises as :meth:`read` does, and IndexError beyond the last."""
        if not 0 <= row < len(self):
            raise IndexError(f"row: expected 0 to {len(self) - 1}, got {row}")
        return self._read(bisect_right(self._starts, row) - 1, int(row))

    def read(self, shard: int, offset: int) -> RawMembers:
        """The sample at a place that the manifest names.

        Args:
            shard: number of the shard.
            offset: byte of it.

        Raises:
            DamagedSample: if its bytes are not those that were written.
            ValueError: if no sample is there.
        """
        start, stop = self._rows_of(shard)
        row = start + int(np.searchsorted(self._table()[0][start:stop], offset))
        if row == stop or self._table()[0][row] != offset:
            raise ValueError(f"offset: expected that of a sample of {self.files.shards[shard].name}, got {offset}")
        return self._read(int(shard), row)

    def iterate(self, shard: int) -> Iterator[RawMembers | Damage]:
        """Every sample of a shard in order, or what is wrong with it."""
        for row in range(*self._rows_of(shard)):
            try:
                yield self._read(shard, row)
            except DamagedSample as error:
                yield error.damage

    def verify(self, shard: int) -> list[Damage]:
        """Read a whole shard and list what has changed; nothing if it is as it was written."""
        checked = self if self.check else ShardReader(self.folder, tars=self.tars)
        damages = [sample for sample in checked.iterate(shard) if isinstance(sample, Damage)]
        info = self.files.shards[shard]
        if not damages and file_sha256(self._path(shard)) != info.sha256:
            damages.append(Damage(info.name, "", 0, "changed outside samples"))
        return damages

    def verify_manifest(self) -> None:
        """Compare the manifest with its hash; opening does not.

        Raises:
            ValueError: if it has changed.
        """
        if file_sha256(self.folder / MANIFEST) != self.files.manifest_sha256:
            raise ValueError(f"folder: {self.folder / MANIFEST} has changed since it was written")

    def _rows_of(self, shard: int) -> tuple[int, int]:
        if not 0 <= shard < len(self.files.shards):
            raise ValueError(f"shard: expected 0 to {len(self.files.shards) - 1}, got {shard}")
        return self._starts[shard], self._starts[shard + 1]

    def _read(self, shard: int, row: int) -> RawMembers:
        offsets, lengths, sums = self._table()
        offset, length = int(offsets[row]), int(lengths[row])
        try:
            # Held by name until it has been read from: another thread may push it out of the open ones.
            tar = self._open(shard)
            data = os.pread(tar.number, length, offset)
        except FileNotFoundError as error:
            raise self._damaged(shard, row, "missing shard") from error
        except OSError as error:
            raise self._damaged(shard, row, "unreadable shard") from error
        if len(data) != length:
            raise self._damaged(shard, row, "truncated shard")
        if self.check and checksum(data) != int(sums[row]):
            raise self._damaged(shard, row, "wrong checksum")
        try:
            stem, members = tar_members(data)
        except (ValueError, tarfile.TarError) as error:
            raise self._damaged(shard, row, "wrong checksum") from error
        key = unquote(stem) if self.files.escaped else f"{self.files.shards[shard].name}/{stem}"
        return RawMembers(key, members)

    def _damaged(self, shard: int, row: int, cause: str) -> DamagedSample:
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(self.folder / MANIFEST) as file:
            key = file.read_row_group(shard, columns=["key"])["key"][row - int(self.shard_starts[shard])].as_py()
        return DamagedSample(Damage(self.files.shards[shard].name, key, int(self._table()[0][row]), cause))

    def _table(self) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint32]]:
        if self._columns is None:
            self._columns = _load(self.folder / MANIFEST, self.shard_starts)
        return self._columns

    def _path(self, shard: int) -> Path:
        return self.tars / self.files.shards[shard].name

    def _open(self, shard: int) -> "_Descriptor":
        # A lock that another thread held when this process forked would stay locked for ever.
        if self._process != os.getpid():
            self._forget()
        with self._lock:
            found = self._opened.pop(shard, None)
            if found is None:
                found = _Descriptor(self._path(shard), self.tars)
            self._opened[shard] = found
            if len(self._opened) > self.max_open:
                self._opened.popitem(last=False)
            return found

    def _forget(self) -> None:
        self._opened: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock, self._process = threading.Lock(), os.getpid()


class _Descriptor:
    """An open tar, closed when nobody reads from it any more."""

    def __init__(self, path: Path, root: Path) -> None:
        self.number = -1
        if os.path.realpath(path) != os.path.join(os.path.realpath(root), path.relative_to(root)):
            raise OSError(f"{path} is a link")
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
        if not stat.S_ISREG(os.fstat(self.number).st_mode):
            raise OSError(f"{path} is no regular file")

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def tar_members(data: bytes) -> tuple[str, dict[str, bytes]]:
    r"""Take a sample's part of a tar apart: its name up to the first dot, and its files by what follows.

    Args:
        data: headers and contents, each padded to 512 bytes; all files of one name.

    Raises:
        ValueError: if it is no part of a tar.

    Example:
        >>> member = tarfile.TarInfo("cats/1.txt")
        >>> member.size = 6
        >>> tar_members(member.tobuf() + b"A cat.".ljust(512, b"\0"))
        ('cats/1', {'txt': b'A cat.'})
    """
    if len(data) % 512:
        raise ValueError(f"data: expected whole blocks of 512 bytes, got {len(data)} bytes")
    stem, members, place = "", {}, 0
    while place < len(data):
        # A plain file with a short name and no large size; tarfile takes twenty times as long and reads the others.
        if data[place + 156] not in (0, 48) or data[place + 345] or data[place + 124] & 0x80:
            return _any_members(data)
        end = data.find(0, place, place + 100)
        stem, suffix = split_name(data[place : end if end >= 0 else place + 100].decode("utf-8", "surrogateescape"))
        size = int(data[place + 124 : place + 136].strip(b" \0") or b"0", 8)
        place += 512
        members[suffix] = data[place : place + size]
        place += size + -size % 512
    return stem, members


def split_name(name: str) -> tuple[str, str]:
    """A member's name up to the first dot behind the last slash, and what follows in lower case.

    Example:
        >>> split_name("./v1.0/cat.seg.PNG")
        ('v1.0/cat', 'seg.png')
    """
    if "/" not in name:
        stem, _, suffix = name.partition(".")
        return stem, suffix.lower()
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix.lower()


def _any_members(data: bytes) -> tuple[str, dict[str, bytes]]:
    stem, members = "", {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isreg() else None
                if file is not None:
                    stem, suffix = split_name(member.name)
                    members[suffix] = file.read()
    except tarfile.TarError as error:
        raise ValueError(f"data: expected a part of a tar: {error}") from error
    return stem, members


def _load(
    manifest: Path, starts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint32]]:
    """Offset, length and checksum of every row."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError("the manifest of shards needs pyarrow: pip install lensmini[data]") from error
    num = int(starts[-1])
    columns = np.empty(num, np.int64), np.empty(num, np.uint32), np.empty(num, np.uint32)
    with parquet.ParquetFile(manifest, page_checksum_verification=True) as file:
        if (
            num
            and [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] != np.diff(starts).tolist()
        ):
            raise ValueError(f"folder: {manifest} does not belong to {HEADER} beside it")
        for group in range(len(starts) - 1):
            table = file.read_row_group(group, columns=["offset", "num_bytes", "checksum"], use_threads=False)
            rows = slice(starts[group], starts[group + 1])
            for column, name in zip(columns, ("offset", "num_bytes", "checksum"), strict=True):
                values = table[name].to_numpy()
                if name == "num_bytes" and len(values) and int(values.max()) >= 2**32:
                    raise ValueError(f"folder: {manifest}: expected samples of less than 4 GiB, got {values.max()}")
                column[rows] = values
    return columns


def _reopen(folder: str, tars: str, max_open: int, check: bool) -> ShardReader:
    return ShardReader(folder, tars=tars, max_open=max_open, check=check)
