"""A directory of numbered pictures and ``pictures.jsonl``, which several processes may fill and any kill may interrupt."""

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from experiments.runs import append_jsonl, config_dict
from lensmini.pipeline.picture import save_png, to_picture

__all__ = ["PictureStore", "claim", "picture_key"]


class PictureStore:
    """The pictures that a directory has, by everything that decides how they look.

    The rows stay on disk: a picture costs some hundred bytes of memory, whatever its prompt is.

    Args:
        out: the directory; it is not made before the first picture.
        shard: number and count of the processes that fill it together: this one takes every count-th file name.

    Raises:
        ValueError: if a line of ``pictures.jsonl`` is broken, but for a torn last one.
    """

    def __init__(self, out: Path, shard: tuple[int, int] = (0, 1)) -> None:
        self.out = Path(out)
        self.index = self.out / "pictures.jsonl"
        last = dict(self._read())
        present = {entry.name for entry in self.out.iterdir()} if last else set()
        kept = {file: found for file, found in last.items() if file in present}
        self._found = dict(kept.values())
        # A number is used once, whatever was painted first: what a stopped call left out gets the same files later.
        self._free = (name for name in map("{:05d}.png".format, count(*shard)) if name not in kept)

    def __contains__(self, row: Mapping[str, Any]) -> bool:
        return picture_key(row) in self._found

    def find(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The line of ``pictures.jsonl`` of a picture that is there.

        Raises:
            KeyError: if it is not.
        """
        with self.index.open("rb") as file:
            file.seek(self._found[picture_key(row)])
            return json.loads(file.readline())

    def name(self) -> str:
        """The next free file name."""
        return next(self._free)

    def add(self, row: Mapping[str, Any], picture: Tensor) -> None:
        """Write a picture with its row inside it, whole or not at all, and then the row.

        Args:
            row: with ``file``, from :meth:`name`.
            picture: ``[3, h, w]`` uint8.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        save_png(to_picture(picture, config_dict(row)), self.out / row["file"])
        size = len(json.dumps(config_dict(row))) + 1
        with _lock(self.out / ".pictures.lock", wait=True):
            append_jsonl(self.index, row)
            self._found[picture_key(row)] = self.index.stat().st_size - size

    def load(self, row: Mapping[str, Any]) -> Tensor:
        """The picture of a row, ``[3, h, w]`` uint8."""
        from PIL import Image

        with Image.open(self.out / row["file"]) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

    def _read(self) -> Iterator[tuple[str, tuple[bytes, int]]]:
        if not self.index.is_file():
            return
        with self.index.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    row = json.loads(line)
                    yield row["file"], (picture_key(row), offset)
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(f"{self.index}: line {number} is no row of a picture: {line[:80]!r}") from error
                offset += len(line)


@contextmanager
def claim(out: Path, shard: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """Hold a directory while painting into it; the claim goes with the process, however it ends.

    Args:
        out: the directory.
        shard: number and count; processes with the same count and other numbers may hold it too.

    Raises:
        ValueError: if another process holds it.
    """
    number, shards = shard
    out.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as stack:
            stack.enter_context(_lock(out / ".painting.lock", shared=shards > 1))
            if shards > 1:
                mine = out / f".painting-{shards}.lock"
                stack.enter_context(_lock(mine, shared=True))
                for other in out.glob(".painting-*.lock"):
                    if other != mine and "of" not in other.name:
                        with _lock(other):
                            pass
                stack.enter_context(_lock(out / f".painting-{number}of{shards}.lock"))
            yield
    except BlockingIOError:
        raise ValueError(
            f"out: another process is painting into {out}; wait for it, take another --out, or let all of them share"
            " it as --shard 0/2, 1/2 and so on"
        ) from None


def picture_key(row: Mapping[str, Any]) -> bytes:
    """Sixteen bytes that name a picture: everything in its row but where it lies and whose weights they are.

    Example:
        >>> picture_key({"seed": 1, "file": "00000.png"}) == picture_key({"file": "00001.png", "seed": 1})
        True
    """
    kept = {name: value for name, value in row.items() if name not in ("file", "checkpoint")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).digest()[:16]


@contextmanager
def _lock(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[IO[str]]:
    with path.open("a") as file:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        yield file
