"""What is asked of a chat server and what comes back.

Axes: h and w pixels.
"""

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["FAILURE_CAUSES", "ChatRequest", "Failure", "Reply", "image_message"]

FAILURE_CAUSES = (
    "rate limit",
    "server error",
    "timeout",
    "connection",
    "bad request",
    "invalid reply",
    "budget",
    "deadline",
)
"""Why a request ends without a reply."""

_MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One question, whole: equal requests to equal models have equal answers in the cache.

    Args:
        messages: as the protocol has them, ``{"role": ..., "content": ...}``; pictures as data URLs.
        temperature: 0 to 2; None leaves it to the server.
        max_tokens: of the answer; None leaves it to the server, which a budget does not allow.
        seed: for servers that can repeat themselves, and to ask the same again on purpose.
        response_format: as the protocol has it.
        extra: more fields of the request's body, as a server wants them.

    Raises:
        ValueError: if a field is not what the protocol allows or JSON cannot hold it.

    Example:
        >>> request = ChatRequest([{"role": "user", "content": "Why?"}], temperature=0.0)
        >>> request.key("a")[:8] == request.key("a")[:8], request.key("a") == request.key("b")
        (True, False)
    """

    messages: Sequence[Mapping[str, Any]]
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    response_format: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.messages or not all(
            isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in self.messages
        ):
            raise ValueError(f"messages: expected at least one with role and content, got {str(self.messages)[:200]}")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature: expected a number from 0 to 2, got {self.temperature}")
        if self.max_tokens is not None and (type(self.max_tokens) is not int or self.max_tokens < 1):
            raise ValueError(f"max_tokens: expected a positive integer, got {self.max_tokens!r}")
        taken = {"model", "messages", "stream", "n"} & set(self.extra)
        if taken:
            raise ValueError(f"extra: expected other fields than {sorted(taken)}, got {sorted(self.extra)}")
        try:
            json.dumps(self._fields(), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"messages: expected what JSON can hold, but {error}") from error

    def _fields(self) -> dict[str, Any]:
        return {
            "messages": [dict(message) for message in self.messages],
            "temperature": None if self.temperature is None else float(self.temperature),
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "response_format": None if self.response_format is None else dict(self.response_format),
            "extra": dict(self.extra),
        }

    def parameters(self) -> dict[str, Any]:
        """The fields of the request's body that are set, without model and ``extra``.

        Example:
            >>> ChatRequest([{"role": "user", "content": "Why?"}], seed=1).parameters()
            {'messages': [{'role': 'user', 'content': 'Why?'}], 'seed': 1}
        """
        fields = self._fields()
        del fields["extra"]
        return {name: value for name, value in fields.items() if value is not None}

    def key(self, model: str) -> str:
        """SHA-256 of everything that decides the answer, pictures included; not the server's address.

        Example:
            >>> len(ChatRequest([{"role": "user", "content": "Why?"}]).key("m"))
            64
        """
        text = json.dumps({"model": model, **self._fields()}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def prompt_bound(self, image_tokens: int) -> int:
        """Tokens that the question cannot exceed: a token is at least a byte of text; pictures as given.

        Example:
            >>> ChatRequest([{"role": "user", "content": "Why?"}]).prompt_bound(1000)
            36
        """
        count = 0
        for message in self.messages:
            content = message["content"]
            parts = content if isinstance(content, list | tuple) else [{"type": "text", "text": str(content)}]
            for part in parts:
                is_text = isinstance(part, Mapping) and part.get("type") == "text"
                count += len(str(part.get("text", "")).encode("utf-8", "replace")) if is_text else image_tokens
            count += 32  # role, separators and what a template puts around them
        return count


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that was paid for, once.

    Args:
        text: of the answer, perhaps empty.
        finish_reason: "stop", "length", "content_filter" or what the server says.
        prompt_tokens: of the question, as billed.
        completion_tokens: of the answer, as billed.
        cached: whether it cost nothing this time.
        refusal: the server's own words where it refuses in the protocol's field, else empty.

    Example:
        >>> Reply("Because.", "stop", 9, 2).cached
        False
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached: bool = False
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that ended without an answer; ``cause`` is one of ``FAILURE_CAUSES``.

    Example:
        >>> Failure("because")
        Traceback (most recent call last):
        ValueError: cause: expected one of (..., got 'because'
    """

    cause: str
    detail: str = ""

    def __post_init__(self) -> None:
        if self.cause not in FAILURE_CAUSES:
            raise ValueError(f"cause: expected one of {FAILURE_CAUSES}, got {self.cause!r}")


def image_message(text: str, images: Sequence[bytes | Tensor], *, role: str = "user") -> dict[str, Any]:
    """A message with pictures in front of its text, as vision models of the protocol take it.

    Args:
        text: the question.
        images: content of PNG, JPEG, WebP or GIF files, or uint8 ``[3, h, w]``, which become PNG.
        role: who says it.

    Returns:
        The message, pictures as data URLs.

    Raises:
        ValueError: if an image is none of these.

    Example:
        >>> message = image_message("What is this?", [torch.zeros(3, 2, 2, dtype=torch.uint8)])
        >>> message["content"][0]["image_url"]["url"][:22], message["content"][1]["text"]
        ('data:image/png;base64,', 'What is this?')
    """
    parts: list[dict[str, Any]] = []
    for index, image in enumerate(images):
        data = image if isinstance(image, bytes) else _to_png(image, index)
        kind = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            kind = "webp"
        if kind is None:
            raise ValueError(f"images[{index}]: expected PNG, JPEG, WebP or GIF, got {data[:12]!r}")
        url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def _to_png(image: Tensor, index: int) -> bytes:
    from PIL import Image

    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"images[{index}]: expected bytes or uint8 [3, h, w], got {found}")
    file = io.BytesIO()
    Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy()).save(file, format="PNG")
    return file.getvalue()
