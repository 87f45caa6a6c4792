"""What a folder of shards consists of beside its tars: ``shards.json`` and ``manifest.parquet``.

Axes: r rows, one for each sample, in order of shard and of offset in it; every shard is one row group.

Shards are numbered from 0 in the order of their names. Columns of the manifest, of which
:class:`lensmini.data.index.SampleIndex` reads those that it knows:

===================  ====================================================================================
key                  what the sample is called, unique
height, width        of the stored picture, pixels
text_tokens          length of its caption, in the unit of whoever wrote the shards
shard, offset        number of its tar, and the byte of the tar that its first header starts at
num_bytes, checksum  length of its part of the tar, headers and padding included, and the CRC-32 of it
shard_name           name of the tar
===================  ====================================================================================
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lensmini.data.buckets import Bucket

__all__ = ["HEADER", "MANIFEST", "RESERVED", "ShardFiles", "ShardInfo", "Table", "checksum", "file_sha256"]

HEADER = "shards.json"
MANIFEST = "manifest.parquet"
_FORMAT, _VERSION = "lensmini.shards", 1
_ROW = {
    "key": "string",
    "height": "uint16",
    "width": "uint16",
    "text_tokens": "uint16",
    "offset": "int64",
    "num_bytes": "int64",
    "checksum": "uint32",
}
RESERVED = frozenset({*_ROW, "shard", "shard_name"})
"""Columns of the manifest that are not the caller's to fill."""
_TYPES = {int: "int64", float: "float64", str: "string"}


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One tar.

    Example:
        >>> ShardInfo("bucket-00-000000.tar", 0, 2, 5120, "ab").num_samples
        2
    """

    name: str
    """Path below the folder of the tars, with slashes."""
    bucket: int
    """Bucket of all its samples, -1 if they are mixed."""
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardFiles:
    """The content of a ``shards.json``: which tars there are, in order of their numbers.

    Example:
        >>> files = ShardFiles((Bucket(512, 512),), (ShardInfo("bucket-00-000000.tar", 0, 2, 5120, "ab"),))
        >>> files.num_samples, files.num_bytes
        (2, 5120)
    """

    buckets: tuple[Bucket, ...]
    """What the shards are grouped by, none if they are not."""
    shards: tuple[ShardInfo, ...]
    left_out: dict[str, int] = field(default_factory=dict)
    """Samples that are in the tars, but not in the manifest, by cause."""
    escaped: bool = True
    """Names in the tars are escaped keys; otherwise a key is the tar's name, a slash and the name in the tar."""
    manifest_sha256: str = ""

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    def dump(self) -> bytes:
        """As JSON that carries its own hash."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "buckets": [[bucket.height, bucket.width] for bucket in self.buckets],
            "shards": [asdict(shard) for shard in self.shards],
            "left_out": self.left_out,
            "escaped": self.escaped,
            "manifest_sha256": self.manifest_sha256,
        }
        return json.dumps({**content, "sha256": _hash(content)}, indent=1).encode("ascii")

    @classmethod
    def load(cls, path: Path) -> "ShardFiles":
        """Read a ``shards.json``.

        Raises:
            ValueError: if it is missing, no header of this version, has changed since it was written, or names a tar
                outside its folder.
        """
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"folder: expected shards, with a readable {path}: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT or content.get("version") != _VERSION:
            raise ValueError(f"folder: {path}: expected the header of {_FORMAT}, version {_VERSION}, got another file")
        if content.pop("sha256", None) != _hash(content):
            raise ValueError(f"folder: {path} has changed since it was written")
        shards = tuple(ShardInfo(**shard) for shard in content["shards"])
        for shard in shards:
            _check_name(path, shard.name)
        buckets = tuple(Bucket(*bucket) for bucket in content["buckets"])
        return cls(buckets, shards, content["left_out"], content["escaped"], content["manifest_sha256"])


class Table:
    """Rows of one shard on their way to the manifest, a few thousand in memory and the others in a file.

    Args:
        path: of the file.
        columns: a row's own columns; they settle which there are, and of which types.

    Raises:
        ImportError: without pyarrow.
        ValueError: if a column's name is reserved, or its value neither an integer, a float nor a string.

    Example:
        >>> Table(Path("rows"), {"height": 512})
        Traceback (most recent call last):
        ValueError: columns: expected other names than those of the manifest, got 'height'
    """

    def __init__(self, path: Path, columns: Mapping[str, int | float | str]) -> None:
        self.path, self.num_rows = path, 0
        types = {name: type(value) for name, value in columns.items()}
        for name, kind in types.items():
            if name in RESERVED:
                raise ValueError(f"columns: expected other names than those of the manifest, got {name!r}")
            if kind not in _TYPES:
                raise ValueError(f"columns: {name}: expected an integer, a float or a string, got {kind.__name__}")
        names = {**_ROW, **{name: _TYPES[kind] for name, kind in types.items()}}
        arrow = _arrow()
        self._schema = arrow.schema([(name, arrow.type_for_alias(kind)) for name, kind in names.items()])
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None

    def append(self, columns: Mapping[str, int | float | str], **row: int | str) -> None:
        """Add a row, with the columns of the first."""
        self._rows.append({**row, **columns})
        self.num_rows += 1
        if len(self._rows) >= 4096:
            self._flush()

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        self._writer.close()

    def read(self) -> Any:
        """All rows, when it is closed."""
        with _arrow().parquet.ParquetFile(self.path) as file:
            return file.read(use_threads=False)

    def _flush(self) -> None:
        arrow = _arrow()
        if self._writer is None:
            self._writer = arrow.parquet.ParquetWriter(self.path, self._schema)
        try:
            self._writer.write_table(arrow.Table.from_pylist(self._rows, schema=self._schema))
        except OverflowError as error:
            raise ValueError(f"columns: expected integers of 64 bits: {error}") from error
        self._rows = []


def write_folder(folder: Path, files: ShardFiles, rows: Iterable[Any], *, stem: str = "") -> ShardFiles:
    """Write manifest and header, the manifest last: with it a folder is complete.

    Args:
        folder: where to.
        files: its shards in order of their names.
        rows: for each shard a function that gives a table of its rows.
        stem: what takes the place of "manifest" and "shards" in the files' names.

    Returns:
        ``files`` with the hash of the manifest.
    """
    arrow = _arrow()
    header, manifest = names(stem)
    unfinished = folder / f".{manifest}.unfinished"
    writer = None
    try:
        for number, (shard, read) in enumerate(zip(files.shards, rows, strict=True)):
            table = read()
            if table.num_rows != shard.num_samples:
                raise ValueError(f"manifest: expected {shard.num_samples} rows of {shard.name}, got {table.num_rows}")
            table = table.append_column("shard", arrow.array([number] * len(table), arrow.uint32()))
            table = table.append_column("shard_name", arrow.array([shard.name] * len(table), arrow.string()))
            writer = writer or arrow.parquet.ParquetWriter(unfinished, table.schema, write_page_checksum=True)
            if table.schema != writer.schema:
                raise ValueError(f"columns: {shard.name} has {table.schema.names}, others have {writer.schema.names}")
            writer.write_table(table, row_group_size=len(table))
        if writer is None:
            kinds = {**_ROW, "shard": "uint32", "shard_name": "string"}
            schema = arrow.schema([(name, arrow.type_for_alias(kind)) for name, kind in kinds.items()])
            writer = arrow.parquet.ParquetWriter(unfinished, schema)
    finally:
        if writer is not None:
            writer.close()
    sync(unfinished)
    complete = ShardFiles(files.buckets, files.shards, files.left_out, files.escaped, file_sha256(unfinished))
    # A manifest of other shards must not be taken for theirs, whenever this is interrupted.
    (folder / manifest).unlink(missing_ok=True)
    sync(folder)
    draft = folder / f".{header}.unfinished"
    draft.write_bytes(complete.dump())
    sync(draft)
    draft.rename(folder / header)
    sync(folder)
    unfinished.rename(folder / manifest)
    sync(folder)
    return complete


def read_group(path: Path, group: int) -> Any:
    """The rows of one shard of a manifest, without its number and name."""
    with _arrow().parquet.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read_row_group(group, use_threads=False).drop_columns(["shard", "shard_name"])


def names(stem: str) -> tuple[str, str]:
    """Names of header and manifest."""
    return (f"{stem}.json", f"{stem}.parquet") if stem else (HEADER, MANIFEST)


def checksum(data: bytes) -> int:
    """The CRC-32 of a sample's part of a tar.

    Example:
        >>> checksum(b"123456789") == 0xCBF43926
        True
    """
    return zlib.crc32(data)


def file_sha256(path: Path) -> str:
    """Hash of a file's content, in hexadecimal digits.

    Example:
        >>> file_sha256(Path(os.devnull))[:8]
        'e3b0c442'
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or the names in a folder are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_name(path: Path, name: object) -> None:
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not isinstance(name, str) or not parts or "\\" in name or "\0" in name or "/".join(parts) != name:
        raise ValueError(f"folder: {path}: expected names of tars, got {name!r}")
    if ".." in parts or name.startswith("/") or name[1:2] == ":":
        raise ValueError(f"folder: {path}: expected tars inside their folder, got {name!r}")


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("the manifest of shards needs pyarrow: pip install lensmini[data]") from error
    return pyarrow
