"""Checkpoints that every rank writes its part of: atomic, in the background, and read again by any number of ranks.

The files are safetensors, written by ``torch.distributed.checkpoint``; nothing is pickled.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from lensmini.parallel.processes import Group

__all__ = ["Checkpointer", "load_tensors", "read_whole", "stored_shapes"]

_NAME = re.compile(r"step-(\d{6,})")


class Checkpointer:
    """Writes ``folder/step-N`` while training goes on.

    A directory appears whole, under its name, when every rank has written its part, or not at all: until then it is
    ``.step-N.new``. A save waits for the one before. Create it on every rank at the same moment.

    Args:
        folder: on a disk that all ranks share.
        group: the job.
        keep: how many of the newest checkpoints stay.
        background: return as soon as the tensors are copied to the CPU; False writes first.

    Raises:
        ValueError: if ``keep`` is not positive.

    Example:
        >>> saver = Checkpointer(getfixture("tmp_path"), Group(0, 1))
        >>> saver.save(7, {"weight": torch.ones(2)}, {"seed": 1})
        >>> saver.wait(), saver.latest()[1]
        (None, 7)
    """

    def __init__(self, folder: Path, group: Group, *, keep: int = 2, background: bool = True) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, got {keep}")
        self.folder, self.group, self.keep, self.background = Path(folder), group, keep, background
        # Collectives of the background must not meet those of the training.
        self._processes = dist.new_group(backend="gloo") if group.world_size > 1 else None
        self._written: Future[Any] | None = None
        self._published: threading.Thread | None = None
        self._failure: list[BaseException] = []
        if group.rank == 0 and self.folder.is_dir():
            newest = self.latest()
            for left in sorted(self.folder.glob(".step-*.old")):
                step = int(left.name[6:-4])
                # Ended between two names: what had made room for its successor comes back.
                if newest is None or step > newest[1]:
                    left.rename(self.folder / f"step-{step:06d}")
        group.gather(None)

    def latest(self) -> tuple[Path, int] | None:
        """The newest complete checkpoint and its step, or None."""
        found = self._found()
        return (found[-1][1], found[-1][0]) if found else None

    def save(self, step: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any], **files: str) -> None:
        """Write a checkpoint; every rank calls it.

        Args:
            step: of the name.
            tensors: sharded or whole; a whole one must be equal on all ranks.
            notes: JSON values, kept as ``run.json`` beside the tensors, with the step.
            files: further text files, by name without ``.json``.

        Raises:
            OSError: or whatever else went wrong with the save before this one.
        """
        self.wait()
        new = self.folder / f".step-{step:06d}.new"
        if self.group.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".step-*"):
                shutil.rmtree(left, ignore_errors=True)
            new.mkdir()
            (new / "run.json").write_text(json.dumps({"step": step, **notes}, indent=2) + "\n")
            for name, text in files.items():
                (new / f"{name}.json").write_text(text)
        self.group.gather(None)
        writer = HuggingFaceStorageWriter(str(new), save_distributed=True)
        state = {name: tensor.detach() for name, tensor in tensors.items()}
        options: dict[str, Any] = {"storage_writer": writer}
        options |= {"process_group": self._processes} if self._processes is not None else {"no_dist": True}
        if not self.background or self._processes is None:
            save(state, **options)
            if self.group.rank == 0:
                self._publish(new, step)
            self.group.gather(None)
            return
        written = async_save(state, **options)
        assert isinstance(written, Future)
        self._written = written
        if self.group.rank == 0:
            self._published = threading.Thread(target=self._finish, args=(written, new, step), daemon=True)
            self._published.start()

    def wait(self) -> None:
        """Return when the last save is on disk under its name; every rank calls it.

        Raises:
            RuntimeError: if it failed.
        """
        if self._written is None:
            return
        error = self._written.exception()
        if self._published is not None:
            self._published.join()
        self._written = self._published = None
        failures = [told for told in self.group.gather(repr(error or (self._failure or [None])[0])) if told != "None"]
        self._failure.clear()
        if failures:
            raise RuntimeError(f"{self.folder}: the last checkpoint could not be written: {failures[0]}") from error

    def _finish(self, written: "Future[Any]", new: Path, step: int) -> None:
        try:
            # The first rank's write ends after it has heard of all others'.
            written.result()
            self._publish(new, step)
        except BaseException as error:
            self._failure.append(error)

    def _publish(self, new: Path, step: int) -> None:
        for entry in [*new.iterdir(), new]:
            _sync(entry)
        name = self.folder / f"step-{step:06d}"
        if name.exists():
            # The same step again, after going back: the older one leaves first, and counts no more.
            name.rename(self.folder / f".{name.name}.old")
        new.rename(name)
        _sync(self.folder)
        for _, path in self._found()[: -self.keep]:
            doomed = path.with_name(f".{path.name}.old")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        shutil.rmtree(self.folder / f".{name.name}.old", ignore_errors=True)

    def _found(self) -> list[tuple[int, Path]]:
        entries = self.folder.iterdir() if self.folder.is_dir() else []
        matches = [(_NAME.fullmatch(entry.name), entry) for entry in entries]
        return sorted((int(match[1]), entry) for match, entry in matches if match)


def load_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors from a checkpoint, each rank its part, however many ranks wrote it.

    Args:
        path: ``step-N`` directory.
        tensors: by the names they were saved under; changed in place. The checkpoint may hold more.

    Raises:
        ValueError: if a name is missing or a shape differs; then nothing has been read.

    Example:
        >>> saver, weight = Checkpointer(getfixture("tmp_path"), Group(0, 1)), torch.zeros(2)
        >>> saver.save(7, {"weight": torch.ones(2)}, {})
        >>> load_tensors(saver.latest()[0], {"weight": weight})
        >>> weight
        tensor([1., 1.])
    """
    found = stored_shapes(path)
    missing = sorted(tensors.keys() - found.keys())
    if missing:
        raise ValueError(f"{path}: expected {len(tensors)} tensors, lacks {missing[:4]}")
    wrong = [f"{n}: {list(t.shape)}, stored {list(found[n])}" for n, t in tensors.items() if t.shape != found[n]]
    if wrong:
        raise ValueError(f"{path}: expected the shapes of the model, got {'; '.join(wrong[:4])}")
    state = {name: tensor.detach() for name, tensor in tensors.items()}
    load(state, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=not dist.is_initialized())


def stored_shapes(path: Path) -> dict[str, torch.Size]:
    """Names and whole shapes of a checkpoint's tensors, from the files' headers.

    Raises:
        FileNotFoundError: if it holds none.

    Example:
        >>> saver = Checkpointer(getfixture("tmp_path"), Group(0, 1))
        >>> saver.save(7, {"weight": torch.ones(2, 3)}, {})
        >>> stored_shapes(saver.latest()[0])
        {'weight': torch.Size([2, 3])}
    """
    if not any(Path(path).glob("*.safetensors")):
        raise FileNotFoundError(f"{path}: expected safetensors files of a sharded checkpoint, found none")
    entries = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_whole(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The whole tensors of a sharded checkpoint whose names begin with ``prefix``, without it, in one process.

    Args:
        path: ``step-N`` directory.
        prefix: such as ``"model."`` or ``"ema."``.

    Returns:
        Tensors on the CPU, in the dtypes they were saved in: what ``save_transformer`` or ``load_state_dict`` takes.

    Raises:
        FileNotFoundError: if the checkpoint holds no such tensor.

    Example:
        >>> saver = Checkpointer(getfixture("tmp_path"), Group(0, 1))
        >>> saver.save(7, {"ema.weight": torch.ones(2)}, {})
        >>> read_whole(saver.latest()[0], "ema.")
        {'weight': tensor([1., 1.])}
    """
    shapes = {name: size for name, size in stored_shapes(path).items() if name.startswith(prefix)}
    if not shapes:
        raise FileNotFoundError(f"{path}: expected tensors {prefix}*, found none")
    state = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in _with_dtypes(path, shapes).items()}
    load(state, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _with_dtypes(path: Path, shapes: Mapping[str, torch.Size]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    entries = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name: (size, entries[name].properties.dtype) for name, size in shapes.items()}  # pyright: ignore


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
