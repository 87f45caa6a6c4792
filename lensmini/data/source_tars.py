"""Raw samples from tars in webdataset's form: consecutive members whose names agree up to the first dot."""

import bz2
import gzip
import hashlib
import lzma
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lensmini.data.picture_bytes import BadPicture, picture_format
from lensmini.data.source_samples import Dropped, RawSample, Unit, clean_caption, clean_key, json_caption

__all__ = ["TarSource"]

_PICTURE_SUFFIXES = frozenset(
    {
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "apng",
        "webp",
        "gif",
        "bmp",
        "dib",
        "tif",
        "tiff",
        "avif",
        "ppm",
        "pgm",
        "pbm",
        "pnm",
        "heic",
        "jp2",
        "jxl",
    }
)
_TEXT_SUFFIXES = ("txt", "text", "caption")
_DAMAGE = (tarfile.TarError, EOFError, OSError, lzma.LZMAError, ValueError, OverflowError)


class _Bounded:
    """A file that refuses to read more than ``limit`` bytes at once: a header may claim any length of extra fields."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file, self._limit = file, limit

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > self._limit:
            raise tarfile.ReadError(f"a header of {size} bytes, at most {self._limit}")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


@dataclass(slots=True)
class _Group:
    """What has been seen of the sample that is being read."""

    name: str
    picture: bytes | None = None
    text: tuple[str | None, str] | None = None
    fields: tuple[str | None, dict[str, Any], str] | None = None
    too_large: str = ""
    extra: list[str] = field(default_factory=list)


class TarSource:
    """Tars, also compressed by gzip, bzip2 or xz, one unit of work each, read in one pass without unpacking.

    A sample's name is its member's name up to the first dot behind the last slash, and its key is the tar's name (as
    far as it differs from the others'), a slash and that name. Its picture is the member with a picture's suffix, or
    one whose content is a picture; ``txt``, ``text`` or ``caption`` and ``json`` members are its caption; others are
    left unread. Members that are no files or have unsafe names are dropped one by one. A tar that ends too early or
    in the middle of nonsense gives what came before, and is then named as one more thing dropped.

    Args:
        paths: a tar, or several.
        max_bytes: longest picture that is read.
        max_caption_bytes: longest caption that is believed.

    Raises:
        ValueError: if there is no tar, one is given twice, or a number is below 1.
        FileNotFoundError: if a tar does not exist.

    Example:
        >>> import io, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with tarfile.open(f"{folder}/a.tar", "w") as tar:
        ...         for name, data in (("7.png", b"?"), ("7.txt", b"a cat")):
        ...             member = tarfile.TarInfo(name)
        ...             member.size = len(data)
        ...             tar.addfile(member, io.BytesIO(data))
        ...     source = TarSource(f"{folder}/a.tar")
        ...     [(sample.key, sample.caption) for unit in source.units() for sample in source.read(unit)]
        [('a.tar/7', 'a cat')]
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        max_bytes: int = 2**28,
        max_caption_bytes: int = 2**16,
    ) -> None:
        self.paths = [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
        if not self.paths:
            raise ValueError("paths: expected at least one tar, got none")
        for path in self.paths:
            if not path.is_file():
                raise FileNotFoundError(f"paths: expected a tar, got {path}")
        whole = [os.path.abspath(path) for path in self.paths]
        if len(set(whole)) < len(whole):
            raise ValueError(f"paths: expected each tar once, got {[str(path) for path in self.paths]}")
        if min(max_bytes, max_caption_bytes) < 1:
            raise ValueError(f"max_bytes, max_caption_bytes: expected at least 1, got {max_bytes}, {max_caption_bytes}")
        folder = os.path.commonpath([os.path.dirname(path) for path in whole])
        self._names = [Path(path).relative_to(folder).as_posix() for path in whole]
        self.max_bytes, self.max_caption_bytes = max_bytes, max_caption_bytes

    def units(self) -> list[Unit]:
        """A unit for every tar, in the order given."""
        items = [(str(path), name, *_state(path)) for path, name in zip(self.paths, self._names, strict=True)]
        return [Unit(i, item[1], (item,)) for i, item in enumerate(items)]

    def fingerprint(self) -> str:
        """Changes when a tar is added, removed, renamed or written."""
        rows = [(name, *_state(path)) for path, name in zip(self.paths, self._names, strict=True)]
        return hashlib.sha256(repr(rows).encode("utf-8", "surrogatepass")).hexdigest()

    def read(self, unit: Unit) -> Iterator[RawSample | Dropped]:
        """What becomes of every sample of a unit's tar, in order.

        Args:
            unit: one of ``units()``, of this or an equal source elsewhere.
        """
        for path, name, size, modified in unit.items:
            yield from self._read(str(path), str(name), (int(size), int(modified)))

    def _read(self, path: str, name: str, listed: tuple[int, int]) -> Iterator[RawSample | Dropped]:
        try:
            if _state(Path(path)) != listed:
                yield Dropped(clean_key(name), "changed since listing", path)
                return
            raw = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            yield Dropped(clean_key(name), "unreadable", str(error))
            return
        with raw:
            group: _Group | None = None
            seen: set[bytes] = set()
            damage = None
            try:
                file = _Bounded(_decompressed(raw), max(self.max_bytes, 2**20))
                with tarfile.open(fileobj=file, mode="r:", errorlevel=0) as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
                    while (member := tar.next()) is not None:
                        tar.members = []  # it would keep every header
                        cause = _refusal(member)
                        if cause:
                            yield Dropped(clean_key(f"{name}/{member.name}"), cause)
                            continue
                        stem, suffix = _split(member.name)
                        if not member.isfile() or not stem.rsplit("/", 1)[-1]:
                            continue
                        if group is None or group.name != stem:
                            if group is not None:
                                yield from self._finish(group, name, seen)
                            group = _Group(stem)
                        self._take(group, tar, member, suffix)
                    _check_end(file, tar.offset)
            except _DAMAGE as error:
                damage = error
            if group is not None:
                yield from self._finish(group, name, seen)
            if damage is not None:
                words = str(damage).lower()
                cut = isinstance(damage, EOFError) or "unexpected end" in words or "end-of-stream" in words
                yield Dropped(clean_key(name), "truncated tar" if cut else "damaged tar", str(damage))

    def _take(self, group: _Group, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> None:
        """Read a member into its group as far as it matters."""
        if suffix in _TEXT_SUFFIXES or suffix == "json":
            most = 16 * self.max_caption_bytes
            taken = group.fields if suffix == "json" else group.text
            if taken is not None:
                group.extra.append(member.name)
            elif suffix == "json":
                data = _content(tar, member) if member.size <= most else None
                group.fields = (
                    (None, {}, "too long") if data is None else json_caption(data, max_bytes=self.max_caption_bytes)
                )
            else:
                data = _content(tar, member) if member.size <= most else None
                group.text = (
                    (None, "too long") if data is None else clean_caption(data, max_bytes=self.max_caption_bytes)
                )
            return
        known = suffix.rsplit(".", 1)[-1] in _PICTURE_SUFFIXES
        if not known and not _is_picture(tar, member):
            return
        if group.picture is not None or group.too_large:
            group.extra.append(member.name)
        elif member.size > self.max_bytes:
            group.too_large = f"{member.size} bytes, at most {self.max_bytes}"
        else:
            group.picture = _content(tar, member)

    def _finish(self, group: _Group, tar: str, seen: set[bytes]) -> Iterator[RawSample | Dropped]:
        key = clean_key(f"{tar}/{group.name}")
        for name in group.extra:
            yield Dropped(clean_key(f"{tar}/{name}"), "duplicate key", group.name)
        digest = hashlib.sha256(group.name.encode("utf-8", "surrogatepass")).digest()[:12]
        if digest in seen:
            yield Dropped(key, "duplicate key")
            return
        seen.add(digest)
        if group.too_large:
            yield Dropped(key, "too large", group.too_large)
        elif group.picture is None:
            yield Dropped(key, "no picture for this caption")
        else:
            caption, metadata, problem = group.fields or (None, {}, "")
            if group.text is not None:
                caption, problem = group.text
            yield RawSample(key, group.picture, caption, metadata, problem)


def _state(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _decompressed(raw: IO[bytes]) -> Any:
    start = raw.read(6)
    raw.seek(0)
    if start[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=raw)
    if start[:3] == b"BZh":
        return bz2.BZ2File(raw)
    return lzma.LZMAFile(raw) if start == b"\xfd7zXZ\x00" else raw


def _refusal(member: tarfile.TarInfo) -> str:
    """The cause why a member is not even looked at, or nothing."""
    name = member.name
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or "\0" in name or name[1:2] == ":":
        return "unsafe name"
    if member.issym() or member.islnk():
        return "link in a tar"
    return "" if member.isfile() or member.isdir() else "special member"


def _split(name: str) -> tuple[str, str]:
    """Name up to the first dot behind the last slash, and what follows in lower case."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix.lower()


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    data = b"" if file is None else file.read()
    if len(data) != member.size:
        raise EOFError(f"unexpected end of {member.name}")
    return data


def _is_picture(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
    file = tar.extractfile(member)
    try:
        return file is not None and bool(picture_format(file.read(64)))
    except BadPicture:
        return False


def _check_end(file: _Bounded, offset: int) -> None:
    """A whole tar ends in a block of zeros; ``tarfile`` stops as silently at nonsense."""
    file.seek(offset)
    block = file.read(512)
    if len(block) < 512:
        raise EOFError("unexpected end of the tar")
    if any(block):
        raise tarfile.ReadError(f"no header at byte {offset}")
