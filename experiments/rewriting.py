"""Prompts of a painting job, rewritten once by a language model and kept, so that every pass over them is the same.

``rewrites.jsonl`` in the job's directory holds what became of every request: status, cause, the whole answer. A request that
was refused is left out of the job and named.
"""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch

from experiments.runs import append_jsonl, read_jsonl
from lensmini.endpoint import Endpoint
from lensmini.prompting import COMPOSITIONAL, DESIGN, GENERAL, LONG_TEXT, LocalChat, Rewriter, SystemPrompt

__all__ = ["RewrittenPrompts", "open_rewriter"]

_BATCH = 64
_OWN = {prompt.name: prompt for prompt in (GENERAL, COMPOSITIONAL, DESIGN, LONG_TEXT)}


class Items(Protocol):
    """Prompts to go through as often as needed."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...


def open_rewriter(
    name: str, *, url: str | None, key_env: str, system_prompt: str, device: str, cache: Path
) -> Rewriter:
    """A rewriter on a server, or of a folder with a language model of transformers.

    Args:
        name: model on the server, or folder. The miniature's fine-tuned rewriter gets the bare request.
        url: of the server, up to ``/v1``; None for OpenAI's own.
        key_env: environment variable with its key.
        system_prompt: name of one of the library's, or file with another.
        device: of a local model.
        cache: file with the server's answers.

    Raises:
        ValueError: if there is no such system prompt.
    """
    folder = Path(name)
    if (folder / "rewriter.json").is_file():
        chat = LocalChat.from_pretrained(name, dtype=torch.float32, local_files_only=True)
        plain = SystemPrompt("none", "(no system turn: the rewriter is fine-tuned)", 6, 120)
        return Rewriter(chat, plain, required=(), frame=lambda text, facts: text, max_tokens=100, temperature=0.5)
    if system_prompt in _OWN:
        told = _OWN[system_prompt]
    elif Path(system_prompt).is_file():
        told = SystemPrompt(Path(system_prompt).stem, Path(system_prompt).read_text(encoding="utf-8"))
    else:
        raise ValueError(f"system_prompt: expected a file or one of {', '.join(_OWN)}, got {system_prompt!r}")
    if folder.is_dir():
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return Rewriter(LocalChat.from_pretrained(name, dtype=dtype, device=device, local_files_only=True), told)
    return Rewriter(Endpoint(name, base_url=url, api_key_env=key_env, cache=cache), told)


class RewrittenPrompts:
    """The prompts of a job after rewriting; to go through as often as needed, each request is asked for once.

    Args:
        prompts: items with ``prompt``.
        rewriter: asked for what is not on record.
        path: the record, JSON lines.
    """

    def __init__(self, prompts: Items, rewriter: Rewriter, path: Path) -> None:
        self._prompts, self._rewriter, self._path = prompts, rewriter, path
        # A rewriter with another model or system prompt has a record of its own.
        rows = (row for row in read_jsonl(path) if row["rewriter"] == rewriter.name)
        self._known = {row["request"]: row for row in rows}
        self._told = {request for request, row in self._known.items() if row["status"] == "refused"}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields ``{"prompt": rewrite, "request": ..., "rewrite": {"status", "cause", "rewriter"}, ...}``."""
        items = iter(self._prompts)
        while batch := list(islice(items, _BATCH)):
            self._ask(
                [request for request in dict.fromkeys(item["prompt"] for item in batch) if request not in self._known]
            )
            for item in batch:
                row = self._known[item["prompt"]]
                if row["status"] == "refused":
                    self._tell(row)
                    continue
                brief = {name: row[name] for name in ("status", "cause", "rewriter")}
                yield {**item, "prompt": row["prompt"], "request": row["request"], "rewrite": brief}

    def _ask(self, requests: list[str]) -> None:
        for rewrite in self._rewriter.rewrite_all(requests):
            row = rewrite.record()
            append_jsonl(self._path, row)
            self._known[rewrite.request] = row

    def _tell(self, row: dict[str, Any]) -> None:
        if row["request"] not in self._told:
            self._told.add(row["request"])
            why = ": ".join(filter(None, (row["cause"], row["detail"])))
            print(f"refused, not painted ({why[:200]}): {row['request'][:200]}", file=sys.stderr)
