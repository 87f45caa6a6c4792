"""Every step of a search on disk, so that a search that was stopped goes on by replaying it.

No axes: JSON.
"""

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["SearchLog"]


class SearchLog:
    """An append-only file of JSON lines that is read back before it is written on.

    A search is a function of what its calls return. Run again with the same log, it asks for the same things in the same
    order, and gets what they returned then; behind the last line it goes on with real calls. Every line is on disk before
    the search uses it, and a line that a kill tore is left out, so that only the call in flight is made again.

    Args:
        path: the file; None keeps nothing.

    Raises:
        ValueError: if another process writes it, or it is no such file.

    Example:
        >>> path = getfixture("tmp_path") / "search.jsonl"
        >>> with SearchLog(path) as log:
        ...     log.call({"ask": 1}, lambda: {"said": 2})
        {'said': 2}
        >>> with SearchLog(path) as log:
        ...     log.call({"ask": 1}, lambda: 1 / 0), log.replayed
        ({'said': 2}, 1)
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.replayed = 0
        self._rows: list[dict[str, Any]] = []
        self._path = None if path is None else Path(path)
        self._file: Any = None

    def __enter__(self) -> "SearchLog":
        if self._path is None:
            return self
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"log: expected a file that no other process writes, got {self._path}") from None
        try:
            self._read()
        except BaseException:
            self._file.close()  # and with it the lock
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def call(self, question: Mapping[str, Any], run: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What a call returned the last time, or what it returns now.

        Args:
            question: everything that decides the answer, as JSON can hold it.
            run: makes the call; returns what JSON can hold.

        Raises:
            ValueError: if the log has another question here.
        """
        known = self._next()
        if known is not None:
            self._check(known, "question", dict(question))
            return known["answer"]
        row = _plain({"question": question, "answer": run()})
        self._append(row)
        return row["answer"]

    def note(self, fact: Mapping[str, Any]) -> None:
        """Write what follows from the calls; in a replay it has to follow again.

        Raises:
            ValueError: if it does not.
        """
        known = self._next()
        if known is None:
            self._append(_plain({"fact": fact}))
        else:
            self._check(known, "fact", dict(fact))

    def _next(self) -> dict[str, Any] | None:
        if self.replayed == len(self._rows):
            return None
        self.replayed += 1
        return self._rows[self.replayed - 1]

    def _check(self, row: Mapping[str, Any], kind: str, wanted: dict[str, Any]) -> None:
        if row.get(kind) != _plain(wanted):
            raise ValueError(
                f"log: expected this search in {self._path}, but line {self.replayed} says {str(row)[:200]} where it has "
                f"{kind} {str(wanted)[:200]}; name another file to begin a new one"
            )

    def _append(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _read(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole, end, torn = data.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if end else [], 1):
            try:
                row = json.loads(line.decode("utf-8", "surrogatepass"))
            except ValueError:
                row = None
            if not isinstance(row, dict) or row.keys() not in ({"question", "answer"}, {"fact"}):
                raise ValueError(f"log: expected steps of a search, got line {number} of {self._path}: {line[:80]!r}")
            self._rows.append(row)
        if not any(torn.startswith(begin[: len(torn)]) for begin in (b'{"question": ', b'{"fact": ')):
            raise ValueError(f"log: expected steps of a search, got {torn[:80]!r} at the end of {self._path}")
        self._file.truncate(len(whole) + len(end))


def _plain(value: Any) -> Any:
    """As it comes back from the file."""
    return json.loads(json.dumps(value))
