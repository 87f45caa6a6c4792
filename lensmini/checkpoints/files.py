"""Checkpoint files that nobody has to trust: checked JSON and checked safetensors headers.

Everything is checked before anything is allocated, and what is wrong gives one :class:`CheckpointError`. Only JSON and
safetensors are ever read: no pickle, no code.
"""

import json
import math
import os
import secrets
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "CheckpointError",
    "StoredFile",
    "StoredValue",
    "list_names",
    "parse_json",
    "read_header",
    "read_json",
    "replace_file",
]

MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_DEPTH = 32
# Everything the format defines, so that other tensors beside a transformer's can be passed over.
_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}
_BITS |= {f"{kind}{bits}": bits for kind in "UI" for bits in (8, 16, 32, 64)}
_BITS |= {"F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
_BITS |= {"F16": 16, "BF16": 16, "F32": 32, "F64": 64}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what was expected and what was found.

    Example:
        >>> try:
        ...     read_json(Path("no_such.json"))
        ... except CheckpointError as error:
        ...     print(error)
        no_such.json: expected a file, found none
    """

    def __init__(self, message: str) -> None:
        # Names and values in a hostile file may be of any length and hold control characters.
        printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[:2000])
        super().__init__(printable + (" ..." if len(message) > 2000 else ""))


class StoredValue(NamedTuple):
    """What a safetensors header says of one tensor."""

    dtype: str
    """The format's name: ``F32``, ``BF16``, ..."""
    shape: tuple[int, ...]
    """Sizes of the axes."""
    num_bytes: int
    """Bytes in the file."""


class StoredFile(NamedTuple):
    """A checked safetensors header."""

    values: dict[str, StoredValue]
    """By the name in the file, in the order of their bytes."""
    metadata: dict[str, str]
    """Free text; ``format`` as a rule."""


def list_names(names: Sequence[str]) -> str:
    """A readable short form of many names: their number and the first eight.

    Example:
        >>> list_names([f"w{i}" for i in range(11)])
        '11 (w0, w1, w2, w3, w4, w5, w6, w7, ...)'
    """
    shown = [name if len(name) <= 120 else name[:117] + "..." for name in names[:8]]
    return f"{len(names)} ({', '.join([*shown, *(['...'] if len(names) > 8 else [])])})"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of at most 16 MiB, with unique keys, finite numbers and little nesting.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        CheckpointError: naming the file and what is wrong with it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "config.json")
        ...     _ = path.write_text('{"num_layers": 2}')
        ...     read_json(path)
        {'num_layers': 2}
    """
    size = _file_size(path)
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: expected JSON of at most {MAX_JSON_BYTES} bytes, found {size}")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found {error.strerror}") from error
    return parse_json(data, str(path))


def parse_json(data: bytes | str, where: str) -> dict[str, Any]:
    """The object that ``data`` holds, under the rules of :func:`read_json`; ``where`` names its source in errors.

    Example:
        >>> parse_json('{"a": [1, 2]}', "here")
        {'a': [1, 2]}
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_parse_finite)
    except RecursionError:
        raise CheckpointError(f"{where}: expected JSON nested at most {MAX_JSON_DEPTH} deep, found deeper") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: expected valid JSON, found {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found a {type(value).__name__}")
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise CheckpointError(f"{where}: expected JSON nested at most {MAX_JSON_DEPTH} deep, found deeper")
        inner = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
        level = [child for child in inner if isinstance(child, dict | list)]
    return value


def read_header(path: Path) -> StoredFile:
    """Read and check the header of a safetensors file without reading its tensors.

    Checked are its size and JSON, every dtype and shape, and that the tensors' bytes cover the file exactly, without
    holes and overlaps. https://github.com/huggingface/safetensors describes the format.

    Args:
        path: the file.

    Returns:
        Its tensors' dtypes, shapes and sizes, and its metadata.

    Raises:
        CheckpointError: naming the file and what is wrong; a pickle, an archive or an unfetched large file is named
            as such.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.safetensors")
        ...     save_file({"x": torch.zeros(2, 3)}, path)
        ...     read_header(path).values
        {'x': StoredValue(dtype='F32', shape=(2, 3), num_bytes=24)}
    """
    size = _file_size(path)
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            fits = len(start) == 8 and 2 <= length <= min(MAX_JSON_BYTES, size - 8)
            data = file.read(length if fits else 64)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found {error.strerror}") from error
    if not fits or not data.startswith(b"{"):
        raise CheckpointError(f"{path}: expected a safetensors file, found {_kind(start + data, size)}")
    if len(data) != length:
        raise CheckpointError(f"{path}: expected a header of {length} bytes, found {len(data)}: the file is truncated")
    return _check_header(parse_json(data, f"{path}: header"), size - 8 - length, str(path))


def _file_size(path: Path) -> int:
    try:
        status = path.stat()
    except (OSError, ValueError):
        raise CheckpointError(f"{path}: expected a file, found none") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: expected a file, found something else of that name")
    return status.st_size


def _check_header(header: Mapping[str, Any], num_bytes: int, where: str) -> StoredFile:
    metadata, ends, values = {}, [], {}
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(text, str) for text in entry.values()):
                raise CheckpointError(f"{where}: expected texts as __metadata__, found something else")
            metadata = entry
            continue
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(
                f"{where}: expected dtype, shape and data_offsets of {name[:120]}, found other fields"
            )
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise CheckpointError(f"{where}: expected a known dtype of {name[:120]}, found {dtype!r}")
        if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
            raise CheckpointError(f"{where}: expected whole numbers as shape and data_offsets of {name[:120]}")
        begin, end = offsets
        if 8 * (end - begin) != math.prod(shape) * _BITS[dtype]:
            raise CheckpointError(
                f"{where}: expected the bytes of {name[:120]}, {dtype} {shape}, found data_offsets {offsets}"
            )
        ends.append((begin, end))
        values[name] = StoredValue(dtype, tuple(shape), end - begin)
    position = 0
    for begin, end in sorted(ends):
        if begin != position:
            raise CheckpointError(f"{where}: expected tensors without holes or overlaps, found one at byte {begin}")
        position = end
    if position != num_bytes:
        raise CheckpointError(f"{where}: expected {position} bytes of tensors, found {num_bytes}: truncated or damaged")
    order = sorted(values, key=lambda name: header[name]["data_offsets"])
    return StoredFile({name: values[name] for name in order}, metadata)


def _sizes(value: Any) -> bool:
    # 2^62 elements of eight bytes is beyond any file, and keeps the products small.
    return (
        isinstance(value, list) and len(value) <= 64 and all(type(item) is int and 0 <= item < 2**62 for item in value)
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:120]!r} twice")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"the number {name}")


def _parse_finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:40]}")
    return value


def _kind(start: bytes, size: int) -> str:
    if start.startswith(b"PK\x03\x04"):
        return "a zip archive, as torch.save writes it: a pickle, which could run code and is not read"
    # A header of 640 bytes starts with 80 02 as well, but then with zeros.
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5") and start[2:8].strip(b"\0"):
        return "a pickle, which could run code and is not read"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; fetch the file itself"
    if start.lstrip()[:1] == b"<":
        return "a web page"
    if start.startswith(b"GGUF"):
        return "a GGUF file"
    return f"{size} bytes that do not start with a header that fits: truncated or damaged"


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside a file, then rename: readers see the old one or the new one, and a crash leaves one of them.

    Args:
        path: the file; its folder must exist. The new file gets the permissions of the process's umask.
        write: is given the path to write to, which exists and is empty.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_file(Path(folder, "a"), lambda part: part.write_text("new"))
        ...     os.listdir(folder)
        ['a']
    """
    part = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.part")
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = stat.S_IMODE(part.stat().st_mode)
    try:
        write(part)
        part.chmod(mode)  # safetensors puts a file of its own in place of it
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
