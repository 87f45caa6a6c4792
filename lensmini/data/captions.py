"""Captions of pictures by a vision-language model, on a server or here: each accepted, or left out with a cause.

Axes: h and w pixels.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lensmini.data.caption_checks import CAPTION_CAUSES, check_caption, count_words
from lensmini.data.caption_prompts import Mode, caption_instruction, choose_density
from lensmini.data.pictures import BadPicture, encode_picture, read_picture
from lensmini.endpoint import FAILURE_CAUSES, ChatRequest, Endpoint, Failure, Reply, image_message

__all__ = ["Caption", "CaptionFailure", "CaptionJob", "Captioner", "EndpointCaptioner", "caption_images", "shrink"]


class CaptionJob(NamedTuple):
    """What a captioner is asked."""

    picture: bytes
    """A picture file."""
    instruction: str
    attempt: int
    """0 at first; the same question again must be asked so that another answer can come."""


class Captioner(Protocol):
    """Answers questions about pictures."""

    def answer(self, jobs: Iterable[CaptionJob]) -> Iterator[tuple[int, Reply | Failure]]:
        """For each job its position and its answer, in any order, reading ahead by a bounded number."""
        ...


@dataclass(frozen=True, slots=True)
class Caption:
    """An accepted caption.

    Example:
        >>> Caption("a", "A red bus stands at a stop.", "detailed", 7).words
        7
    """

    key: str
    text: str
    density: str
    """"detailed" or "brief"."""
    words: int
    attempts: int = 1
    """Answers it took."""
    cached: bool = False
    """Whether the accepted one cost nothing."""


@dataclass(frozen=True, slots=True)
class CaptionFailure:
    """A picture that got no caption.

    Args:
        key: of the picture.
        cause: of ``CAPTION_CAUSES`` (the last answer was not a caption), of the server's ``FAILURE_CAUSES``, or
            "picture" if it could not be read.
        detail: the beginning of the last answer, or the server's words.

    Example:
        >>> CaptionFailure("a", "loop", "cat cat cat").cause
        'loop'
    """

    key: str
    cause: str
    detail: str = ""

    def __post_init__(self) -> None:
        known = (*CAPTION_CAUSES, *FAILURE_CAUSES, "picture")
        if self.cause not in known:
            raise ValueError(f"cause: expected one of {known}, got {self.cause!r}")


class EndpointCaptioner:
    """A model behind an OpenAI-compatible server.

    Args:
        endpoint: the server; its cache is what makes interrupted runs go on without paying again.
        max_side: pictures are shrunk to this longer side before they are sent.
        max_tokens: of an answer.
        temperature: of the first attempt; later ones are at least at 0.7.

    Example:
        >>> captioner = EndpointCaptioner(Endpoint("gpt-4.1", base_url="http://localhost:8000/v1"))
        >>> captioner.max_side
        1024
    """

    def __init__(
        self, endpoint: Endpoint, *, max_side: int = 1024, max_tokens: int = 1024, temperature: float = 0.2
    ) -> None:
        if max_side < 16:
            raise ValueError(f"max_side: expected at least 16, got {max_side}")
        self.endpoint, self.max_side, self.max_tokens, self.temperature = endpoint, max_side, max_tokens, temperature

    def answer(self, jobs: Iterable[CaptionJob]) -> Iterator[tuple[int, Reply | Failure]]:
        """As :class:`Captioner`."""
        return self.endpoint.ask(map(self._request, jobs))

    def _request(self, job: CaptionJob) -> ChatRequest:
        picture = encode_picture(shrink(read_picture(job.picture).image, self.max_side), "jpeg", quality=90)
        return ChatRequest(
            [image_message(job.instruction, [picture])],
            temperature=max(self.temperature, 0.7) if job.attempt else self.temperature,
            max_tokens=self.max_tokens,
            seed=job.attempt,
        )


def caption_images(
    pictures: Iterable[tuple[str, bytes]],
    captioner: Captioner,
    *,
    mode: Mode = "detailed",
    seed: int = 0,
    max_attempts: int = 3,
    max_words: int = 500,
    hints: Mapping[str, str] | None = None,
) -> Iterator[Caption | CaptionFailure]:
    """Caption pictures as they come, each exactly once, in the order in which answers come.

    An answer that is no caption (:func:`check_caption`) is asked for again with another seed. Nothing depends on the
    order of the pictures, and only as many are in memory as the captioner reads ahead.

    Args:
        pictures: key and content of a file.
        captioner: who is asked.
        mode: "detailed", "brief", or "mixed" by seed and key.
        seed: of the data set.
        max_attempts: answers for one picture.
        max_words: see :func:`check_caption`.
        hints: texts found beside pictures, by key.

    Yields:
        For each picture its caption, or why it has none.

    Raises:
        ValueError: if ``max_attempts`` or ``mode`` is out of range.

    Example:
        >>> class Parrot:
        ...     def answer(self, jobs):
        ...         for index, job in enumerate(jobs):
        ...             yield index, Reply("A black square.", "stop", 9, 4)
        >>> black = encode_picture(torch.zeros(3, 8, 8, dtype=torch.uint8), "png")
        >>> [caption.text for caption in caption_images([("a", black)], Parrot())]
        ['A black square.']
    """
    if max_attempts < 1:
        raise ValueError(f"max_attempts: expected a positive integer, got {max_attempts}")
    choose_density(mode, "", seed)
    source, again, unreadable = iter(pictures), deque[_Asked](), deque[CaptionFailure]()
    finished = False

    def feed(asked: list["_Asked | None"]) -> Iterator[CaptionJob]:
        nonlocal finished
        while True:
            if again:
                current = again.popleft()
            else:
                try:
                    key, data = next(source)
                except StopIteration:
                    finished = True
                    return
                try:
                    read_picture(data)
                except BadPicture as error:
                    unreadable.append(CaptionFailure(key, "picture", str(error)))
                    continue
                current = _Asked(key, data, 0)
            density = choose_density(mode, current.key, seed)
            hint = (hints or {}).get(current.key, "")
            asked.append(current)
            yield CaptionJob(current.picture, caption_instruction(density, hint), current.attempt)

    while not finished or again:
        asked: list[_Asked | None] = []
        for index, answer in captioner.answer(feed(asked)):
            current = asked[index]
            assert current is not None
            asked[index] = None  # its picture may go
            outcome = _judge(current, answer, choose_density(mode, current.key, seed), max_attempts, max_words)
            if outcome is None:
                again.append(_Asked(current.key, current.picture, current.attempt + 1))
            else:
                yield outcome
            while unreadable:
                yield unreadable.popleft()
    yield from unreadable


class _Asked(NamedTuple):
    key: str
    picture: bytes
    attempt: int


def _judge(
    asked: _Asked, answer: Reply | Failure, density: str, max_attempts: int, max_words: int
) -> Caption | CaptionFailure | None:
    """The outcome, or None to ask again."""
    if isinstance(answer, Failure):
        return CaptionFailure(asked.key, answer.cause, answer.detail)
    text = " ".join(answer.text.split())
    cause = check_caption(
        text, finish_reason=answer.finish_reason, refusal=answer.refusal, density=density, max_words=max_words
    )
    if cause is None:
        return Caption(asked.key, text, density, count_words(text), asked.attempt + 1, answer.cached)
    if asked.attempt + 1 < max_attempts:
        return None
    return CaptionFailure(asked.key, cause, (answer.refusal or text)[:200])


def shrink(image: Tensor, max_side: int) -> Tensor:
    """A picture ``[3, h, w]`` uint8 with its longer side at most ``max_side``, antialiased.

    Example:
        >>> shrink(torch.zeros(3, 100, 50, dtype=torch.uint8), 20).shape
        torch.Size([3, 20, 10])
    """
    height, width = image.shape[1:]
    scale = max_side / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    options: dict[str, Any] = {"size": size, "mode": "bilinear", "antialias": True}
    if min(height, width, *size) > 1:
        return torch.nn.functional.interpolate(image[None], **options)[0]
    # torch 2.15 fails on three uint8 channels of one pixel in a row: it takes them for another memory format.
    return torch.nn.functional.interpolate(image[None].float(), **options)[0].round().to(torch.uint8)
