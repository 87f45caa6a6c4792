"""Describe tars of others, in webdataset's form, so that they are read at any place where they lie."""

import io
import os
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from lensmini.data.picture_bytes import BadPicture, picture_format
from lensmini.data.shard_files import ShardFiles, ShardInfo, Table, checksum, file_sha256, write_folder
from lensmini.data.shards import split_name, tar_members
from lensmini.data.source_samples import clean_caption, json_caption

__all__ = ["index_tars"]

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


def index_tars(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    text_tokens: Callable[[str], int],
    max_bytes: int = 2**28,
) -> ShardFiles:
    """Write ``manifest.parquet`` and ``shards.json`` of existing tars, which are left as and where they are.

    A sample is consecutive members whose names agree up to the first dot; its key is the tar's name, a slash and that
    name. Left out, and counted by cause, is what has no picture or an unreadable header of one, is longer than
    ``max_bytes``, comes twice, or is next to damage; what lies behind damage is not seen. Read with
    ``ShardReader(out, tars=FOLDER)``, where ``FOLDER`` is the tars' common folder.

    Args:
        paths: tars, not compressed.
        out: folder for the two files.
        text_tokens: length of a caption (``txt``, or ``caption`` or ``text`` in ``json``), 0 without one.
        max_bytes: longest sample.

    Returns:
        What was found.

    Raises:
        ImportError: without pyarrow.
        FileNotFoundError: if a tar does not exist.
        ValueError: if there is no tar, one is compressed or given twice, or a length is out of its range.

    Example:
        >>> index_tars([], "out", text_tokens=len)
        Traceback (most recent call last):
        ValueError: paths: expected at least one tar, got none
    """
    tars = [Path(path).absolute() for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    if not tars:
        raise ValueError("paths: expected at least one tar, got none")
    if len(set(tars)) < len(tars):
        raise ValueError(f"paths: expected each tar once, got {[str(tar) for tar in tars]}")
    root = Path(os.path.commonpath([tar.parent for tar in tars]))
    folder = Path(out).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    shards, reads, left_out = [], [], Counter[str]()
    scratch = Path(tempfile.mkdtemp(prefix=".rows-", dir=folder))
    try:
        for number, (name, tar) in enumerate(sorted((tar.relative_to(root).as_posix(), tar) for tar in tars)):
            table = Table(scratch / str(number), {})
            with open(tar, "rb") as file:
                if file.read(6).startswith(_COMPRESSED):
                    raise ValueError(f"paths: expected tars that are not compressed, got {tar}")
                _index(file, name, table, left_out, text_tokens, max_bytes)
            if table.num_rows:
                table.close()
                shards.append(ShardInfo(name, -1, table.num_rows, tar.stat().st_size, file_sha256(tar)))
                reads.append(table.read)
        files = ShardFiles((), tuple(shards), dict(sorted(left_out.items())), escaped=False)
        return write_folder(folder, files, reads)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _index(
    file: IO[bytes],
    name: str,
    table: Table,
    left_out: Counter[str],
    text_tokens: Callable[[str], int],
    max_bytes: int,
) -> None:
    seen: set[str] = set()
    for stem, start, stop, cause in _groups(file):
        if not cause and stop - start > max_bytes:
            cause = "too large"
        if not cause and stem in seen:
            cause = "duplicate key"
        seen.add(stem)
        if cause:
            left_out[cause] += 1
            continue
        data = os.pread(file.fileno(), stop - start, start)
        try:
            read_stem, members = tar_members(data) if len(data) == stop - start else ("", {})
        except ValueError:
            read_stem, members = "", {}
        if read_stem != stem:
            left_out["damaged tar"] += 1
            continue
        size = _picture_size(members)
        if isinstance(size, str):
            left_out[size] += 1
            continue
        caption = _caption(members)
        length = text_tokens(caption) if caption else 0
        if not 0 <= length < 2**16:
            raise ValueError(f"text_tokens: {name}/{stem}: expected 0 to 65535, got {length}")
        table.append(
            {},
            key=f"{name}/{stem}",
            height=size[0],
            width=size[1],
            text_tokens=length,
            offset=start,
            num_bytes=len(data),
            checksum=checksum(data),
        )


def _groups(file: IO[bytes]) -> Iterator[tuple[str, int, int, str]]:
    """Name, first byte, byte behind the last and what is wrong of every sample in a tar."""
    length = os.fstat(file.fileno()).st_size
    stem, start, stop, cause, suffixes = "", 0, 0, "", set[str]()
    damaged = False
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                if not member.isreg():
                    continue
                here, suffix = split_name(member.name)
                if here != stem:
                    if stem:
                        yield stem, start, stop, cause
                    stem, start, cause, suffixes = here, member.offset, "", set()
                stop = member.offset_data + -(-member.size // 512) * 512
                if stop > length:
                    raise EOFError
                try:
                    here.encode()
                except UnicodeEncodeError:
                    cause = "name not UTF-8"
                cause = "member twice" if suffix in suffixes else cause
                suffixes.add(suffix)
            file.seek(tar.offset)
            block = file.read(512)
            damaged = damaged or len(block) < 512 or any(block)
    except (tarfile.TarError, OSError, ValueError, EOFError):
        damaged = True
    if stem:
        # What is damaged may have been a part of this sample, such as its caption.
        yield stem, start, stop, "cut by damage" if damaged else cause
    if damaged:
        yield "", 0, 0, "damaged tar"


def _picture_size(members: dict[str, bytes]) -> tuple[int, int] | str:
    """Height and width of the only picture when it is upright, or why there is none."""
    pictures = []
    for data in members.values():
        try:
            kind = picture_format(data)
        except BadPicture:
            continue
        if kind:
            pictures.append((kind, data))
    if len(pictures) != 1:
        return "several pictures" if pictures else "no picture"
    from PIL import Image

    try:
        with Image.open(io.BytesIO(pictures[0][1]), formats=[pictures[0][0]]) as image:
            width, height = image.size
            if image.getexif().get(0x0112, 1) in (5, 6, 7, 8):
                width, height = height, width
    # Pillow's decoders raise anything at all for nonsense.
    except Exception:
        return "unreadable picture"
    return (height, width) if 0 < height < 2**16 and 0 < width < 2**16 else "unreadable picture"


def _caption(members: dict[str, bytes]) -> str | None:
    if "txt" in members:
        return clean_caption(members["txt"], max_bytes=2**16)[0]
    return json_caption(members["json"], max_bytes=2**16)[0] if "json" in members else None
