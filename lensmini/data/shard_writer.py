"""Write samples into tars, each of one bucket: the same samples give the same bytes, however often interrupted.

Axes: none; a sample is a key and named bytes.

The tars are also webdataset's: consecutive members ``KEY.SUFFIX``. What would not survive in such a name (dots,
slashes, ...) is escaped as in addresses of the web: ``a.tar/7`` becomes ``a%2Etar%2F7``.
"""

import hashlib
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import IO
from urllib.parse import quote

from lensmini.data.buckets import Bucket, assign_buckets
from lensmini.data.shard_files import (
    ShardFiles,
    ShardInfo,
    Table,
    checksum,
    file_sha256,
    names,
    read_group,
    sync,
    write_folder,
)

__all__ = ["ShardSample", "merge_manifests", "write_shards"]

_SUFFIX = re.compile(r"[a-z0-9][a-z0-9_]*(\.[a-z0-9][a-z0-9_]*)*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_PARTS = "parts"


@dataclass(frozen=True, slots=True)
class ShardSample:
    """A sample that is to be stored.

    Example:
        >>> ShardSample("cats/1.jpg", 4, 600, 512, 9, {"jpg": b"...", "txt": b"A cat."}).key
        'cats/1.jpg'
    """

    key: str
    """Unique, not empty."""
    bucket: int
    height: int
    """Of the stored picture, pixels."""
    width: int
    text_tokens: int
    members: Mapping[str, bytes]
    """Content by suffix, such as ``jpg`` or ``seg.png``: lower case, digits, and dots between."""
    columns: Mapping[str, int | float | str] = field(default_factory=dict)
    """Further columns of the manifest, such as ``source`` or ``sample_id``; the same for all samples."""


def write_shards(
    samples: Iterable[ShardSample],
    out: str | os.PathLike[str],
    buckets: Sequence[Bucket],
    *,
    bases: Sequence[int] | None = None,
    shard_bytes: int = 2**30,
    name: str = "",
) -> ShardFiles:
    """Write samples into tars ``bucket-BB-NNNNNN.tar``, ``manifest.parquet`` and ``shards.json``.

    Every tar appears complete or not at all, and the manifest last. If it is there and the tars have their sizes,
    nothing is done and no sample is asked for; otherwise, after an interruption, all samples are, and tars that
    already hold what they should are read and not written. One process at a time may write under one ``name``.

    Args:
        samples: in a fixed order, which is the order within each bucket.
        out: folder, which may exist.
        buckets: what ``ShardSample.bucket`` counts.
        bases: as in :func:`assign_buckets`.
        shard_bytes: a tar is closed before it would be longer than this, unless one sample alone is.
        name: of one of many tasks that write into one folder, in front of the names of its tars; ``parts/NAME.json``
            and ``parts/NAME.parquet`` then take the place of the other two files until :func:`merge_manifests`.

    Returns:
        What was written.

    Raises:
        ImportError: without pyarrow.
        ValueError: if a key comes twice, a sample's bucket is not the one that :func:`assign_buckets` gives its size,
            another value is out of its range, or ``out`` holds finished shards of other buckets.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sample = ShardSample("a", 0, 512, 512, 2, {"jpg": b"...", "txt": b"A cat."})
        ...     [shard.name for shard in write_shards([sample], folder, [Bucket(512, 512)]).shards]
        ['bucket-00-000000.tar']
    """
    if name and not _NAME.fullmatch(name):
        raise ValueError(f"name: expected letters, digits, _ and -, got {name!r}")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes: expected at least 1, got {shard_bytes}")
    folder = Path(out).absolute()
    notes = folder / _PARTS if name else folder
    notes.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".rows-{name}"
    # Also of a run that was killed when all was done.
    shutil.rmtree(scratch, ignore_errors=True)
    if (finished := _finished(folder, notes, name, tuple(buckets))) is not None:
        return finished
    nearest = lru_cache(2**16)(lambda h, w: int(assign_buckets([h], [w], buckets, bases=bases, small="upscale")[0]))
    scratch.mkdir()
    prefix = f"{name}-bucket-" if name else "bucket-"
    opened: dict[int, _OpenShard] = {}
    written: list[tuple[ShardInfo, Table]] = []
    seen: set[bytes] = set()
    numbers = [0] * len(buckets)
    kinds: dict[str, type] | None = None
    try:
        for sample in samples:
            _check(sample, nearest, len(buckets))
            digest = hashlib.blake2b(sample.key.encode(), digest_size=12).digest()
            if digest in seen:
                raise ValueError(f"samples: expected every key once, got {sample.key!r} twice")
            seen.add(digest)
            own = {column: type(value) for column, value in sample.columns.items()}
            if own != (kinds := own if kinds is None else kinds):
                raise ValueError(f"columns: sample {sample.key!r}: expected {_words(kinds)}, got {_words(own)}")
            data = _tar_bytes(sample)
            shard = opened.get(sample.bucket)
            if shard is not None and shard.num_bytes + len(data) + 1024 > shard_bytes:
                written.append(opened.pop(sample.bucket).close(sample.bucket))
                shard = None
            if shard is None:
                tar = folder / f"{prefix}{sample.bucket:02d}-{numbers[sample.bucket]:06d}.tar"
                numbers[sample.bucket] += 1
                shard = opened[sample.bucket] = _OpenShard(tar, Table(scratch / f"{tar.name}.rows", sample.columns))
            shard.append(sample, data)
        written += [opened.pop(bucket).close(bucket) for bucket in list(opened)]
        written.sort(key=lambda pair: pair[0].name)
        _remove_strays(folder, prefix, {info.name for info, _ in written})
        sync(folder)
        files = ShardFiles(tuple(buckets), tuple(info for info, _ in written))
        return write_folder(notes, files, [table.read for _, table in written], stem=name)
    finally:
        for shard in opened.values():
            shard.abandon()
        shutil.rmtree(scratch, ignore_errors=True)


def merge_manifests(out: str | os.PathLike[str], *, parts: Sequence[str] | None = None) -> ShardFiles:
    """Make one ``manifest.parquet`` and ``shards.json`` of what many tasks wrote into a folder.

    Shards are numbered by name, so the result does not depend on which task ended first. Doing it again changes
    nothing; with further parts it starts over.

    Args:
        out: the folder.
        parts: names of the tasks that must have finished; by default those that have.

    Returns:
        All shards.

    Raises:
        ValueError: if there is no part or one is missing or damaged, buckets or columns differ, or a key is in two
            parts.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for task in ("part-0", "part-1"):
        ...         sample = ShardSample(task, 0, 512, 512, 0, {"jpg": b"..."})
        ...         _ = write_shards([sample], folder, [Bucket(512, 512)], name=task)
        ...     merge_manifests(folder).num_samples
        2
    """
    folder = Path(out).absolute()
    notes = folder / _PARTS
    found = sorted(path.stem for path in notes.glob("*.parquet") if not path.name.startswith("."))
    chosen = found if parts is None else sorted(parts)
    if not chosen or not set(chosen) <= set(found):
        raise ValueError(f"parts: expected finished ones, missing {sorted(set(chosen) - set(found)) or 'all'}")
    headers = {part: ShardFiles.load(notes / f"{part}.json") for part in chosen}
    for part, header in headers.items():
        if header.buckets != headers[chosen[0]].buckets:
            raise ValueError(f"parts: expected equal buckets, {chosen[0]} and {part} differ")
        if file_sha256(notes / f"{part}.parquet") != header.manifest_sha256:
            raise ValueError(f"parts: {notes / part}.parquet has changed since it was written")
    places = [
        (shard, partial(read_group, notes / f"{part}.parquet", group))
        for part, header in headers.items()
        for group, shard in enumerate(header.shards)
    ]
    places.sort(key=lambda place: place[0].name)
    files = ShardFiles(headers[chosen[0]].buckets, tuple(shard for shard, _ in places))
    done = _finished(folder, folder, "", files.buckets)
    if done is not None and done.shards == files.shards:
        return done
    seen: dict[bytes, str] = {}
    for part in chosen:
        for group in range(len(headers[part].shards)):
            for key in read_group(notes / f"{part}.parquet", group)["key"].to_pylist():
                other = seen.setdefault(hashlib.blake2b(key.encode(), digest_size=12).digest(), part)
                if other != part:
                    raise ValueError(f"parts: expected every key once, got {key!r} in {other} and in {part}")
    return write_folder(folder, files, [read for _, read in places])


class _OpenShard:
    """A tar that is being written, or found to hold already what would be written."""

    def __init__(self, path: Path, table: Table) -> None:
        self.path, self.table, self.num_bytes = path, table, 0
        self._hash = hashlib.sha256()
        self._unfinished = path.with_name(f".{path.name}.unfinished")
        self._old: IO[bytes] | None = open(path, "rb") if path.is_file() and not path.is_symlink() else None  # noqa: SIM115
        self._new: IO[bytes] | None = None if self._old else open(self._unfinished, "wb")  # noqa: SIM115

    def append(self, sample: ShardSample, data: bytes) -> None:
        self.table.append(
            sample.columns,
            key=sample.key,
            height=sample.height,
            width=sample.width,
            text_tokens=sample.text_tokens,
            offset=self.num_bytes,
            num_bytes=len(data),
            checksum=checksum(data),
        )
        self._write(data)

    def close(self, bucket: int) -> tuple[ShardInfo, Table]:
        self._write(bytes(1024))
        if self._old is not None and self._old.read(1):
            self._copy(self.num_bytes)
        if self._old is not None:
            self._old.close()
        elif self._new is not None:
            self._new.flush()
            os.fsync(self._new.fileno())
            self._new.close()
            self._unfinished.rename(self.path)
        self.table.close()
        info = ShardInfo(self.path.name, bucket, self.table.num_rows, self.num_bytes, self._hash.hexdigest())
        return info, self.table

    def abandon(self) -> None:
        for file in (self._old, self._new):
            if file is not None:
                file.close()
        self._unfinished.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self._hash.update(data)
        if self._old is not None and self._old.read(len(data)) != data:
            self._copy(self.num_bytes)
        if self._new is not None:
            self._new.write(data)
        self.num_bytes += len(data)

    def _copy(self, length: int) -> None:
        """From here on the old tar differs: start a new one with what agreed."""
        assert self._old is not None
        self._new = open(self._unfinished, "wb")  # noqa: SIM115
        self._old.seek(0)
        while length:
            piece = self._old.read(min(length, 2**20))
            if not piece:
                raise OSError(f"{self.path} was changed while it was read")
            self._new.write(piece)
            length -= len(piece)
        self._old.close()
        self._old = None


def _check(sample: ShardSample, nearest: Callable[[int, int], int], num_buckets: int) -> None:
    where = f"samples: {sample.key!r}"
    try:
        valid = bool(sample.key) and sample.key.encode() is not None
    except UnicodeEncodeError:
        valid = False
    if not valid:
        raise ValueError(f"{where}: expected a key of valid characters")
    if not (0 < sample.height < 2**16 and 0 < sample.width < 2**16 and 0 <= sample.text_tokens < 2**16):
        size = f"{sample.height} x {sample.width} pixels and {sample.text_tokens} tokens"
        raise ValueError(f"{where}: expected sides from 1 and text from 0 to 65535, got {size}")
    if not 0 <= sample.bucket < num_buckets or nearest(sample.height, sample.width) != sample.bucket:
        right = nearest(sample.height, sample.width)
        raise ValueError(
            f"{where}: expected bucket {right} for {sample.height} x {sample.width} pixels, got {sample.bucket}"
        )
    if not sample.members:
        raise ValueError(f"{where}: expected at least one member, got none")
    for suffix in sample.members:
        if not _SUFFIX.fullmatch(suffix):
            raise ValueError(f"{where}: expected suffixes such as jpg or seg.png, got {suffix!r}")


def _tar_bytes(sample: ShardSample) -> bytes:
    """The sample's part of a tar: nothing in it depends on when, where or by whom it was written."""
    stem = quote(sample.key, safe="").replace(".", "%2E")
    # webdataset takes __name__ for its own.
    stem = f"%5F{stem[1:]}" if stem.startswith("_") else stem
    pieces = []
    for suffix in sorted(sample.members):
        data = bytes(sample.members[suffix])
        member = tarfile.TarInfo(f"{stem}.{suffix}")
        member.size, member.mode = len(data), 0o644
        pieces += [member.tobuf(tarfile.PAX_FORMAT), data, bytes(-len(data) % 512)]
    return b"".join(pieces)


def _finished(folder: Path, notes: Path, stem: str, buckets: tuple[Bucket, ...]) -> ShardFiles | None:
    """What is there, if it is complete."""
    header, manifest = (notes / file for file in names(stem))
    if not header.is_file() or not manifest.is_file():
        return None
    files = ShardFiles.load(header)
    if files.buckets != buckets:
        raise ValueError(f"out: {folder} holds finished shards of other buckets")
    for shard in files.shards:
        tar = folder / shard.name
        if not tar.is_file() or tar.is_symlink() or tar.stat().st_size != shard.num_bytes:
            return None
    return files


def _remove_strays(folder: Path, prefix: str, kept: set[str]) -> None:
    """Tars of an interrupted run with other samples, and what it had not finished."""
    ours = re.compile(re.escape(prefix) + r"\d{2,}-\d{6,}\.tar")
    for path in folder.iterdir():
        name = path.name.removeprefix(".").removesuffix(".unfinished") if path.name.startswith(".") else path.name
        if ours.fullmatch(name) and path.name not in kept:
            path.unlink()


def _words(kinds: Mapping[str, type]) -> dict[str, str]:
    return {name: kind.__name__ for name, kind in kinds.items()}
