"""Answers on disk, so that nothing is paid for twice: one SQLite file for any number of threads and processes."""

import json
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

from lensmini.endpoint.messages import Reply

__all__ = ["ReplyCache"]

_SCHEMA = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID"
_FIELDS = ("text", "finish_reason", "prompt_tokens", "completion_tokens", "refusal")


class ReplyCache:
    """Replies by the key of their request, as JSON in SQLite.

    A reply is on disk before :meth:`put` returns, also if the process is killed a moment later. Two processes that ask
    the same at the same time may both pay; the first answer stays.

    Args:
        path: the file; its folder is made.

    Raises:
        ValueError: if the file is something else or damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, ReplyCache(Path(folder, "replies.sqlite")) as cache:
        ...     cache.put("k", Reply("Because.", "stop", 9, 2))
        ...     cache.get("k").text, cache.get("k").cached, cache.get("other"), len(cache)
        ('Because.', True, None, 1)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._connection = self._open()

    def __len__(self) -> int:
        return int(self._run("SELECT count(*) FROM replies")[0][0])

    def __enter__(self) -> "ReplyCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, key: str) -> Reply | None:
        """The reply, marked as cached, or None."""
        rows = self._run("SELECT reply FROM replies WHERE key = ?", key)
        if not rows:
            return None
        try:
            values = json.loads(rows[0][0])
            return Reply(**{name: values[name] for name in _FIELDS}, cached=True)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: expected replies of lensmini, found another row under {key}") from error

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; the first one of a key stays."""
        text = json.dumps({name: getattr(reply, name) for name in _FIELDS})
        self._run("INSERT OR IGNORE INTO replies VALUES (?, ?)", key, text)

    def remove(self, key: str) -> None:
        """Forget an answer, so that the question is asked again."""
        self._run("DELETE FROM replies WHERE key = ?", key)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._connection.close()

    def _open(self) -> sqlite3.Connection:
        try:
            # Autocommit: every statement is its own transaction. A minute covers many processes that write.
            connection = sqlite3.connect(self.path, timeout=60.0, isolation_level=None, check_same_thread=False)
            with closing(connection.cursor()) as cursor:
                cursor.execute("PRAGMA journal_mode = WAL")
                cursor.execute("PRAGMA synchronous = FULL")
                cursor.execute(_SCHEMA)
            return connection
        except sqlite3.Error as error:
            raise self._damaged(error) from error

    def _run(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._damaged(error) from error

    def _damaged(self, error: sqlite3.Error) -> ValueError:
        return ValueError(
            f"{self.path}: expected a cache of replies, but {error}; move it away to begin a new one, "
            "which pays again for what it held"
        )
