"""What goes to a chat server and what comes back: requests, replies, failures with a cause.

Axes: h height, w width.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from lensmini.shapes import check_shape

__all__ = ["FAILURE_CAUSES", "ChatRequest", "Failure", "Message", "Reply", "Unauthorised", "image_message"]

Message: TypeAlias = dict[str, Any]
"""One turn as the protocol has it: ``{"role": ..., "content": text or a list of parts}``."""

FAILURE_CAUSES = (
    "rate limit",
    "server error",
    "timeout",
    "connection",
    "bad request",
    "forbidden",
    "refused",
    "invalid reply",
    "budget",
    "deadline",
)
"""Why a request has no reply."""

_RESERVED = ("model", "messages", "temperature", "max_tokens", "seed", "response_format", "stream", "n")
_SIGNATURES = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif"))


class Unauthorised(RuntimeError):
    """The server does not accept the key, or there is none; nothing else that is asked can succeed.

    Example:
        >>> raise Unauthorised("no key in the environment variable OPENAI_API_KEY")
        Traceback (most recent call last):
        lensmini.endpoint.messages.Unauthorised: no key in the environment variable OPENAI_API_KEY
    """


@dataclass(frozen=True)
class ChatRequest:
    """One question to a chat model.

    Args:
        messages: the turns so far.
        temperature: 0 for the likeliest answer; None leaves it to the server.
        max_tokens: most tokens of the answer; None leaves it to the server. Models that want the limit under the name
            ``max_completion_tokens`` take it in ``extra``.
        seed: of the server's draws, where it honours one. Two samples of one question need two seeds, as equal
            requests are asked once.
        response_format: for example ``{"type": "json_object"}``.
        extra: more fields of the request's body, such as ``top_p``.

    Raises:
        ValueError: without messages, or if ``extra`` holds a field that is an argument here, ``stream`` or ``n``.

    Example:
        >>> ChatRequest([{"role": "user", "content": "Two words."}], max_tokens=8).body("tiny")
        {'model': 'tiny', 'messages': [{'role': 'user', 'content': 'Two words.'}], 'max_tokens': 8}
    """

    messages: Sequence[Message]
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    response_format: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.messages, str | bytes | Mapping) or not self.messages:
            raise ValueError(f"messages: expected a list of one or more messages, got {type(self.messages).__name__}")
        for message in self.messages:
            if not isinstance(message, Mapping) or "role" not in message:
                raise ValueError(f"messages: expected a mapping with a role, got {type(message).__name__}")
        for name in _RESERVED:
            if name in self.extra:
                raise ValueError(f"extra: expected fields without an argument of their own, got {name!r}")
        limit = self.limit
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise ValueError(f"max_tokens: expected at least 1, got {limit!r}")

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer, under either name."""
        limit = self.extra.get("max_completion_tokens")
        return self.max_tokens if limit is None else limit

    def body(self, model: str) -> dict[str, Any]:
        """The request as the server gets it, without the fields that are left to it."""
        body = {"model": model, "messages": [dict(message) for message in self.messages]}
        chosen = {
            "temperature": None if self.temperature is None else float(self.temperature),
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "response_format": None if self.response_format is None else dict(self.response_format),
        }
        return body | {name: value for name, value in chosen.items() if value is not None} | dict(self.extra)


@dataclass(frozen=True)
class Reply:
    """What the model answered.

    Args:
        text: the answer.
        finish_reason: "stop", "length" (cut at the limit), or another word of the server's.
        prompt_tokens: of the question, as billed (or estimated, where the server does not say).
        completion_tokens: of the answer, likewise.
        cached: nothing was sent for this one: it was answered before, or together with an equal request.
        refusal: what the model said instead of an answer, if it said both.

    Example:
        >>> Reply("A cat.", "stop", prompt_tokens=9, completion_tokens=3).text
        'A cat.'
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached: bool = False
    refusal: str | None = None


@dataclass(frozen=True)
class Failure:
    """Why there is no reply.

    Args:
        cause: one of ``FAILURE_CAUSES``.
        detail: the server's words or ours; never holds the key.

    Example:
        >>> Failure("timeout", "no answer within 60 s").cause
        'timeout'
    """

    cause: str
    detail: str = ""

    def __post_init__(self) -> None:
        if self.cause not in FAILURE_CAUSES:
            raise ValueError(f"cause: expected one of {FAILURE_CAUSES}, got {self.cause!r}")


def image_message(text: str, images: Sequence[bytes | Tensor], *, role: str = "user") -> Message:
    """A message that shows pictures: the text first, then each picture as a part of its own (a data URL).

    Args:
        text: what is asked; "" for none.
        images: files as they are (PNG, JPEG, WebP, GIF), or ``[3, h, w]`` uint8, sent as PNG.
        role: who says it.

    Returns:
        A message for ``ChatRequest``.

    Raises:
        ValueError: for other formats, shapes and dtypes.

    Example:
        >>> message = image_message("What is this?", [torch.zeros(3, 4, 4, dtype=torch.uint8)])
        >>> message["content"][1]["image_url"]["url"][:22]
        'data:image/png;base64,'
    """
    if isinstance(images, bytes | bytearray | Tensor):
        raise ValueError(f"images: expected a list of pictures, got one {type(images).__name__}")
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    for image in images:
        data = _png(image) if isinstance(image, Tensor) else bytes(image)
        url = f"data:{_mime_type(data)};base64,{base64.b64encode(data).decode('ascii')}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": role, "content": parts}


def _png(image: Tensor) -> bytes:
    from PIL import Image

    check_shape("image", image, "3 h w")
    if str(image.dtype) != "torch.uint8":
        raise ValueError(f"image: expected uint8, got {image.dtype}")
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(file, "PNG")
    return file.getvalue()


def _mime_type(data: bytes) -> str:
    for signature, mime_type in _SIGNATURES:
        if data.startswith(signature):
            return mime_type
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    raise ValueError(f"images: expected PNG, JPEG, WebP or GIF, which servers take, got {data[:8]!r}")
