"""What every experiment script does alike: names of runs, files that survive a kill, stopping, and progress.

Nothing here knows about models. A script calls these functions from its own visible loop.
"""

import ctypes
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm.auto import tqdm

__all__ = [
    "RunConfig",
    "StopRequest",
    "append_jsonl",
    "atomic_directory",
    "cached_stage",
    "config_dict",
    "config_hash",
    "keep_last",
    "latest_checkpoint",
    "progress",
    "provenance",
    "read_jsonl",
    "truncate_jsonl",
    "write_json",
]

_CHECKPOINT = re.compile(r"step-(\d+)")
_BEGUN = re.compile(r"\.(?P<name>.+)\.(?P<kind>new|old)-(?P<process>\d+)-[0-9a-f]+")
_PACKAGES = ("torch", "transformers", "numpy", "einops", "safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where a run writes, how long it is and how often it reports."""

    out: Path = Path("runs/default")
    """Directory of the run; the same directory again resumes it."""
    steps: int = 1000
    """Optimiser steps of the whole run, resumed parts included."""
    seed: int = 0
    """Seed of everything random; with the step and a sample's number it decides data, noise and times."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    sample_every: int = 0
    """Steps between grids of samples; 0 draws only the last one."""
    checkpoint_every: int = 200
    """Steps between checkpoints; 0 saves only the last one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    processes: int = 1
    """Worker processes that share the steps, each with its part of the batch."""
    threads: int = 1
    """Threads of torch in each process."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("log_every", 1), ("keep_checkpoints", 1), ("processes", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("seed", "sample_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")


def config_dict(config: Any) -> Any:
    """Turn a config into what JSON can hold: dataclasses to dicts, tuples and sets to lists, paths to strings.

    Args:
        config: a dataclass, or anything that may stand inside one.

    Returns:
        Dicts with string keys, lists, strings, numbers, booleans and None.

    Raises:
        ValueError: if something else is found, or a number is not finite, which JSON cannot hold.

    Example:
        >>> config_dict(RunConfig(out=Path("runs/a"), steps=5))["out"]
        'runs/a'
    """
    if is_dataclass(config) and not isinstance(config, type):
        return {field.name: config_dict(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, Enum):
        return config_dict(config.value)
    if isinstance(config, Mapping):
        return {str(key): config_dict(value) for key, value in config.items()}
    if isinstance(config, set | frozenset):
        return sorted((config_dict(value) for value in config), key=lambda value: json.dumps(value, sort_keys=True))
    if isinstance(config, list | tuple):
        return [config_dict(value) for value in config]
    if isinstance(config, Path):
        return config.as_posix()
    if config is None or isinstance(config, bool | int | str) or (isinstance(config, float) and abs(config) < 1e400):
        return config
    raise ValueError(f"config: expected dataclasses, containers, paths and finite numbers, got {config!r}")


def config_hash(config: Any) -> str:
    """Twelve hexadecimal digits that name a config: SHA-256 of its JSON with sorted keys.

    Example:
        >>> config_hash({"a": 1, "b": (2,)}) == config_hash({"b": [2], "a": 1}), len(config_hash(None))
        (True, 12)
    """
    text = json.dumps(config_dict(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Fill a directory that appears whole or not at all, whenever the process is killed.

    The body writes into a hidden sibling; when it ends, every file is flushed to disk and the sibling takes the name
    in one system call, an existing directory's too. What a killed process left behind goes with the next call.

    Args:
        path: the directory to make; its parents are made too.

    Yields:
        The directory to write into. If the body raises, it is removed and ``path`` stays as it was.

    Example:
        >>> root = getfixture("tmp_path")
        >>> with atomic_directory(root / "step-5") as new:
        ...     _ = (new / "a.txt").write_text("whole")
        >>> [entry.name for entry in root.iterdir()]
        ['step-5']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    new = path.with_name(f".{path.name}.new-{os.getpid()}-{os.urandom(4).hex()}")
    new.mkdir()
    try:
        yield new
        for entry in [*new.rglob("*"), new]:
            _sync(entry)
        _take_name(new, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is whole or absent, never half."""
    text = json.dumps(config_dict(value), indent=2) + "\n"
    _replace_text(Path(path), text)


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row to a file of JSON lines and flush it.

    Args:
        path: the file; it is made if missing. A torn last line, which a kill left, is cut off first.
        row: what to write; numbers must be finite, as in :func:`config_dict`.
    """
    line = json.dumps(config_dict(row)) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                content = path.read_bytes()
                file.truncate(content.rfind(b"\n") + 1)
        file.write(line.encode())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; a torn last line is left out, a missing file has no rows.

    Raises:
        ValueError: if any other line is broken.

    Example:
        >>> path = getfixture("tmp_path") / "metrics.jsonl"
        >>> append_jsonl(path, {"step": 1, "loss": 0.5})
        >>> read_jsonl(path)
        [{'step': 1, 'loss': 0.5}]
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is no JSON: {line[:80]!r}") from error
    return rows


def truncate_jsonl(path: Path, step: int) -> None:
    """Drop the rows after a step, so that a run that resumes from there does not write them twice.

    Args:
        path: the file; nothing happens if it is missing.
        step: the last step to keep. The rows kept stay byte for byte as they were.
    """
    path = Path(path)
    if not path.exists():
        return
    rows = read_jsonl(path)
    lines = path.read_bytes().split(b"\n")[: len(rows)]
    kept = [line + b"\n" for line, row in zip(lines, rows, strict=True) if row["step"] <= step]
    _replace_text(path, b"".join(kept).decode())


def latest_checkpoint(out: Path) -> tuple[Path, int] | None:
    """The newest complete ``step-N`` directory of a run and its step, or None."""
    found = _checkpoints(Path(out))
    return (found[-1][1], found[-1][0]) if found else None


def keep_last(out: Path, k: int) -> None:
    """Remove all but the k newest ``step-N`` directories of a run."""
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    for _, path in _checkpoints(Path(out))[:-k]:
        # Renamed first: a directory that is half removed must not look like a checkpoint.
        doomed = path.with_name(f".{path.name}.new-{os.getpid()}-{os.urandom(4).hex()}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a flag, so that a loop can finish its step, save and leave.

    A second Ctrl-C interrupts at once. Outside the main thread, where Python allows no handlers, it does nothing.

    Example:
        >>> with StopRequest() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     stop.requested
        True
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.requested

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def provenance() -> dict[str, Any]:
    """Where results come from: git commit, whether the tree was changed, versions, machine and command."""
    root = Path(__file__).parents[1]

    def git(*words: str) -> str | None:
        try:
            answer = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no")
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def progress(
    total: int | None, initial: int = 0, description: str = "", *, rank: int = 0, position: int = 0
) -> "tqdm[Any]":
    """A progress bar with rate and time left, silent on every rank but 0.

    Args:
        total: steps of the whole run; None if nobody knows.
        initial: steps already done before a resume.
        description: what is running.
        rank: of this process.
        position: line of the bar, where several processes draw one each.

    Returns:
        The bar, a context manager; ``update()`` counts a step, ``set_postfix(loss=...)`` shows numbers.
    """
    # Into a log file a line every ten seconds is enough.
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit="step",
        position=position,
        disable=rank != 0,
        mininterval=interval,
        maxinterval=max(interval, 10.0),
        smoothing=0.05,
        dynamic_ncols=True,
    )


def cached_stage(
    root: Path, name: str, config: Any, make: Callable[[Path], object], *, quiet: bool = False
) -> tuple[Path, bool]:
    """Make a directory once for each config, and find it again later.

    Args:
        root: where stages are kept, ``runs/`` in the scripts.
        name: of the stage.
        config: everything that decides the content.
        make: fills the directory it is given. Of two processes that ask at once, one works and the other waits.
        quiet: print nothing.

    Returns:
        ``root / "{name}-{hash of config}"``, and whether it was there already. Which of the two is printed.

    Example:
        >>> make = lambda directory: (directory / "a.txt").write_text("made")
        >>> cached_stage(getfixture("tmp_path"), "letter", {"size": 1}, make)[1]
        letter: making ...
        False
    """
    path = Path(root) / f"{name}-{config_hash(config)}"
    if path.is_dir():  # whole, since it came by a rename; nothing is written beside it then
        if not quiet:
            print(f"{name}: reused from {path}", flush=True)
        return path, True
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        # The lock goes with the process, so that a kill leaves none behind.
        fcntl.flock(lock, fcntl.LOCK_EX)
        reused = path.is_dir()
        if not quiet:
            print(f"{name}: {'reused from' if reused else 'making'} {path}", flush=True)
        if not reused:
            with atomic_directory(path) as directory:
                make(directory)
                write_json(directory / "stage.json", {"name": name, "config": config, "provenance": provenance()})
    return path, reused


def _checkpoints(out: Path) -> list[tuple[int, Path]]:
    if not out.is_dir():
        return []
    entries = ((_CHECKPOINT.fullmatch(entry.name), entry) for entry in out.iterdir() if entry.is_dir())
    return sorted((int(match[1]), entry) for match, entry in entries if match)


def _sweep(path: Path) -> None:
    """Remove what dead processes had begun for ``path``; bring back what one of them had moved away."""
    for entry in path.parent.iterdir():
        match = _BEGUN.fullmatch(entry.name)
        if match is None or match["name"] != path.name or _alive(int(match["process"])):
            continue
        if match["kind"] == "old" and not path.exists():
            entry.rename(path)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _take_name(new: Path, path: Path) -> None:
    """Let ``new`` become ``path``; what was there is afterwards at ``new``, or gone."""
    if not path.exists():
        new.rename(path)
    elif not _exchange(new, path):
        # Two renames where the system has no exchange: a kill between them is undone by the next writer.
        old = path.with_name(new.name.replace(".new-", ".old-"))
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories' names in one system call; false where there is none."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2) and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _replace_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
