"""What weights are, in twelve digits, without reading gigabytes: names, headers, sizes and a sample of every tensor."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["digest_weights"]

_SAMPLE = 4096
_WHOLE = 2**22
_PARTS = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")
_PATTERNS = ("*.safetensors", "*.json", "*.jinja")


def digest_weights(source: str, *, without: Sequence[str] = (), revision: str | None = None) -> str:
    """Twelve hexadecimal digits that name what a checkpoint holds, wherever it lies.

    Files of up to 4 MiB are read whole. Of a larger one the digest takes its size, its header and the first 4 KiB of
    every tensor, so weights that were trained on differ, and a copy does not.

    Args:
        source: a file, a folder, or a Hub repository that was downloaded before.
        without: folders of a pipeline that are left out.
        revision: of the repository.

    Returns:
        The digits.

    Raises:
        ValueError: if there is nothing to read.

    Example:
        >>> path = getfixture("tmp_path") / "a.safetensors"
        >>> _ = path.write_bytes(b"weights")
        >>> one = digest_weights(str(path))
        >>> _ = path.rename(path.with_name("b.safetensors"))
        >>> len(one), digest_weights(str(path.with_name("b.safetensors"))) == one
        (12, True)
    """
    path = Path(source)
    if not path.exists():
        path = _downloaded(source, revision)
    files = [("", path)] if path.is_file() else list(_files(path, without))
    if not files:
        raise ValueError(f"checkpoint: expected safetensors files in {source}, found none")
    total = hashlib.sha256()
    for name, file in files:
        total.update(json.dumps([name, file.stat().st_size]).encode())
        total.update(_sample(file))
    return total.hexdigest()[:12]


def _downloaded(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"checkpoint: expected a run, a pipeline folder, a .safetensors file or a Hub repository, got {source}"
        ) from error


def _files(folder: Path, without: Sequence[str]) -> Iterator[tuple[str, Path]]:
    folders = [folder] if not (folder / "model_index.json").exists() else [folder / "model_index.json"]
    folders += [folder / part for part in _PARTS if part not in without]
    found = {
        file
        for place in folders
        for file in ([place] if place.is_file() else [file for pattern in _PATTERNS for file in place.glob(pattern)])
    }
    yield from sorted((file.relative_to(folder).as_posix(), file) for file in found if file.is_file())


def _sample(path: Path) -> bytes:
    size = path.stat().st_size
    found = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _WHOLE:
            return hashlib.sha256(file.read()).digest()
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, size, 2**26))
        found.update(header)
        try:
            starts = sorted(8 + length + int(entry["data_offsets"][0]) for entry in _tensors(header))
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            # Not safetensors: whoever loads it says so.
            starts = range(0, size, max(1, size // 1024))
        for start in starts:
            if 0 <= start < size:
                file.seek(start)
                found.update(file.read(_SAMPLE))
    return found.digest()


def _tensors(header: bytes) -> Iterator[dict]:
    yield from (entry for name, entry in json.loads(header).items() if name != "__metadata__")
