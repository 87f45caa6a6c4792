"""Replies that are paid once: a SQLite file that many threads and processes share."""

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lensmini.endpoint.messages import Reply

__all__ = ["CacheError", "ReplyCache", "request_key"]

BUSY_S = 60.0
"""How long to wait while another process writes."""

_VERSION = 1
_FIELDS = {"text": str, "finish_reason": str, "prompt_tokens": int, "completion_tokens": int}


class CacheError(RuntimeError):
    """The file of replies cannot be used.

    Example:
        >>> raise CacheError("replies.sqlite: damaged")
        Traceback (most recent call last):
        lensmini.endpoint.cache.CacheError: replies.sqlite: damaged
    """


def request_key(body: Mapping[str, Any], cache_name: str = "") -> bytes:
    """SHA-256 of everything that decides the answer: model, messages with their pictures, sampling parameters.

    Args:
        body: the request as the server gets it.
        cache_name: tells servers or revisions apart that go by the same model name.

    Returns:
        32 bytes; the order of fields does not matter.

    Raises:
        ValueError: for what JSON or UTF-8 cannot say.

    Example:
        >>> request_key({"model": "m", "seed": 1}) == request_key({"seed": 1, "model": "m"})
        True
    """
    content = {"version": _VERSION, "name": cache_name, "body": body}
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode("utf-8")).digest()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"request: expected what JSON can say: {error}") from error


class ReplyCache:
    """Replies by key, on disk (write-ahead log) as soon as :meth:`put` returns.

    A killed process loses nothing that was put; a power cut may lose the last ones, never the file. The file has to
    lie on a local disk, as the log's index is shared memory. One table: ``replies(key, reply, created)``, the reply as
    JSON.

    Args:
        path: the file; made if it is not there, with its folder.

    Raises:
        CacheError: if the file is damaged or holds something else.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, ReplyCache(Path(folder) / "replies.sqlite") as cache:
        ...     cache.put(bytes(32), Reply("A cat.", "stop", 9, 3))
        ...     cache.get(bytes(32)).text, cache.get(bytes([1] * 32))
        ('A cat.', None)
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(
                self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise CacheError(f"cache: cannot open {self.path}: {error}") from error
        try:
            self._open()
        except BaseException:
            self._database.close()
            raise

    def get(self, key: bytes) -> Reply | None:
        """The reply put under this key, marked as cached; None if there is none."""
        rows = self._run("SELECT reply FROM replies WHERE key = ?", (key,))
        if not rows:
            return None
        try:
            fields = json.loads(rows[0][0])
            good = all(isinstance(fields[name], kind) for name, kind in _FIELDS.items())
            refusal = fields["refusal"]
        except (ValueError, TypeError, KeyError):
            good, fields, refusal = False, {}, None
        if not good:
            raise CacheError(f"cache: {self.path} is damaged: no reply under {key.hex()}; move it away to start anew")
        return Reply(**{name: fields[name] for name in _FIELDS}, cached=True, refusal=refusal)

    def put(self, key: bytes, reply: Reply) -> None:
        """Keep a reply; the first one under a key stays."""
        fields = asdict(reply)
        del fields["cached"]
        self._run("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", (key, json.dumps(fields), time.time()))

    def close(self) -> None:
        """Close the file; a later call does nothing."""
        with self._lock:
            self._database.close()

    def __enter__(self) -> "ReplyCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        version = self._run("PRAGMA user_version")[0][0]
        tables = {name for (name,) in self._run("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if (version, tables) not in ((0, set()), (_VERSION, {"replies"})):
            raise CacheError(f"cache: {self.path} is a database, but not one of replies of version {_VERSION}")
        self._run("PRAGMA journal_mode = WAL")
        self._run("PRAGMA synchronous = NORMAL")
        if version != _VERSION:
            # In one transaction, so that a process that opens the file at the same time sees all or nothing.
            self._run("BEGIN IMMEDIATE")
            self._run(
                "CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, reply TEXT NOT NULL, created REAL NOT NULL)"
            )
            self._run(f"PRAGMA user_version = {_VERSION}")
            self._run("COMMIT")

    def _run(self, command: str, values: tuple[Any, ...] = ()) -> list[Any]:
        with self._lock:
            try:
                return self._database.execute(command, values).fetchall()
            except sqlite3.OperationalError as error:
                raise CacheError(f"cache: {self.path}: {error}") from error
            except sqlite3.DatabaseError as error:
                raise CacheError(
                    f"cache: {self.path} is damaged or no SQLite file ({error}); move it away to start anew"
                ) from error
