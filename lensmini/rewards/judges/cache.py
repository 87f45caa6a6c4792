"""Verdicts that were paid for, in a file that survives any kill.

No axes: keys and JSON.
"""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from lensmini.rewards.judges.protocol import JudgeRequest
from lensmini.rewards.verdicts import Verdict

__all__ = ["VerdictCache"]


class VerdictCache:
    """Scores by content: pixels, criterion, prompt, judge and repeat. What is missing is never kept.

    One SQLite file with a write-ahead log; every verdict is durable when :meth:`put` returns. Several processes may
    share the file, and several threads an object.

    Args:
        path: of the file; made if it is not there.

    Raises:
        ValueError: if the file is no such cache.

    Example:
        >>> cache = VerdictCache(":memory:")
        >>> len(cache)
        0
    """

    def __init__(self, path: str | Path) -> None:
        self._path, self._lock = str(path), threading.Lock()
        try:
            self._database = sqlite3.connect(self._path, timeout=60.0, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, verdict TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise ValueError(f"{path}: expected a cache of verdicts, but {error}") from error

    def __len__(self) -> int:
        with self._lock:
            return self._database.execute("SELECT COUNT(*) FROM verdicts").fetchone()[0]

    def get(self, judge_id: str, request: JudgeRequest) -> Verdict | None:
        """The verdict on this content, marked as cached, or None."""
        key = _key(judge_id, request)
        with self._lock:
            row = self._database.execute("SELECT verdict FROM verdicts WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        try:
            verdict = Verdict(**json.loads(row[0]))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self._path}: expected a verdict, but {error}") from error
        # Equal criteria may have other ids in other rubrics.
        return replace(verdict, criterion_id=request.criterion.id, cached=True)

    def put(self, judge_id: str, request: JudgeRequest, verdict: Verdict) -> None:
        """Keep a verdict, unless it is missing."""
        self.put_all(judge_id, [(request, verdict)])

    def put_all(self, judge_id: str, pairs: Iterable[tuple[JudgeRequest, Verdict]]) -> None:
        """Keep verdicts, all or none of them, in one write; those that are missing are left out."""
        rows = [
            (_key(judge_id, request), json.dumps(asdict(verdict), allow_nan=False))
            for request, verdict in pairs
            if verdict.state != "missing"
        ]
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                self._database.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", rows)
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._database.close()


def _key(judge_id: str, request: JudgeRequest) -> str:
    parts = [judge_id, request.image_hash, request.prompt, request.criterion.hash, request.repeat]
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogatepass")).hexdigest()
