"""Programs as judges: readers of text, and whatever else reads a picture once and then answers questions about it.

Axes: h and w pixels.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from lensmini.rewards.judges.combined import ProgramJudge
from lensmini.rewards.judges.lettering import find_lettering, quoted_strings
from lensmini.rewards.judges.protocol import JudgeRequest
from lensmini.rewards.rubric import Criterion

__all__ = ["FoundText", "ReadText", "ocr_judge", "once_per_picture", "question_judge", "rapid_reader", "read_strings"]

Reading = TypeVar("Reading")
Question = TypeVar("Question")


class FoundText(NamedTuple):
    """Text in a picture, and where."""

    text: str
    quad: tuple[tuple[float, float], ...]
    """Four corners (x, y) in pixels, clockwise as it reads from its top left."""


ReadText = Callable[[Tensor], Iterable[Any]]
"""From a picture ``[3, h, w]`` uint8 to texts in reading order: strings, or anything with a ``text``."""


def once_per_picture(read: Callable[[Tensor], Reading], *, memory: int = 1024) -> Callable[[JudgeRequest], Reading]:
    """A reader that looks at each picture once, however many questions there are about it.

    Args:
        read: from a picture ``[3, h, w]`` uint8 to what was read.
        memory: pictures of which the reading is kept, those used last.

    Returns:
        From a request to the reading of its picture. What ``read`` raises is raised, and not kept.

    Raises:
        ValueError: if ``memory`` is not positive.

    Example:
        >>> import torch
        >>> seen = []
        >>> read = once_per_picture(lambda image: seen.append(image) or len(seen))
        >>> request = JudgeRequest(
        ...     image=torch.zeros(3, 2, 2, dtype=torch.uint8), prompt="p", criterion=Criterion(id="a", text="b")
        ... )
        >>> read(request), read(request)
        (1, 1)
    """
    if memory < 1:
        raise ValueError(f"memory: expected a positive integer, got {memory}")
    known: OrderedDict[str, Reading] = OrderedDict()

    def look(request: JudgeRequest) -> Reading:
        if request.image_hash not in known:
            known[request.image_hash] = read(request.image)
            if len(known) > memory:
                known.popitem(last=False)
        known.move_to_end(request.image_hash)
        return known[request.image_hash]

    return look


def question_judge(
    read: Callable[[Tensor], Reading],
    answer: Callable[[Reading, Question], float | bool | None],
    question: Callable[[Criterion], Question | None],
    *,
    judge_id: str,
    memory: int = 1024,
) -> ProgramJudge:
    """A judge out of what answers questions exactly: the verifier of rendered scenes, a detector, a colour histogram.

    Extract once, then verify (arXiv 2605.30244).

    Args:
        read: from a picture ``[3, h, w]`` uint8 to all that is asked about it.
        answer: from a reading and a question to an answer on the criterion's scale; None where it does not apply.
        question: what a criterion asks; None where nothing is asked, and the criterion does not apply. Raises for one that
            is not understood, and the verdict is missing.
        judge_id: names reader, answers and their version.
        memory: readings that are kept.

    Returns:
        The judge.

    Example:
        >>> import torch
        >>> bright = question_judge(
        ...     lambda image: image.float().mean().item(),
        ...     float.__gt__,
        ...     lambda c: float(c.text.split()[-1]),
        ...     judge_id="bright",
        ... )
        >>> picture = torch.full((3, 2, 2), 9, dtype=torch.uint8)
        >>> asked = [Criterion(id=f"c{n}", text=f"Brighter than {n}") for n in (5, 15)]
        >>> [v.score for v in bright.score([JudgeRequest(image=picture, prompt="p", criterion=c) for c in asked])]
        [1.0, 0.0]
    """
    look = once_per_picture(read, memory=memory)

    def function(request: JudgeRequest) -> float | None:
        asked = question(request.criterion)
        return None if asked is None else answer(look(request), asked)

    return ProgramJudge(function, judge_id=judge_id)


def ocr_judge(
    read_text: ReadText,
    *,
    judge_id: str,
    wanted: Callable[[JudgeRequest], Sequence[str]] | None = None,
    case: bool = False,
    memory: int = 1024,
) -> ProgramJudge:
    """A judge of text in pictures: what should be written there against what a reader finds.

    On a binary scale the answer is 1 if every wanted text stands there exactly; on a real scale it is their mean
    similarity (1 - edit distance / longer length), from ``low`` to ``high``; on levels the same, rounded down, so that the
    highest level is for exact texts alone. A criterion that names no text, and whose prompt names none, does not apply.

    Args:
        read_text: any reader, such as :func:`rapid_reader`.
        judge_id: names the reader and its version.
        wanted: texts that a request wants; by default those in quotation marks in the criterion, or else in the prompt.
        case: whether case counts.
        memory: readings that are kept.

    Returns:
        The judge.

    Example:
        >>> import torch
        >>> judge = ocr_judge(lambda image: ["GRAND", "OPENING"], judge_id="parrot")
        >>> sign = Criterion(id="text", text='The sign reads "Grand Opening".')
        >>> picture = torch.zeros(3, 2, 2, dtype=torch.uint8)
        >>> judge.score([JudgeRequest(image=picture, prompt="A sign.", criterion=sign)])[0].score
        1.0
    """
    look = once_per_picture(lambda image: read_strings(read_text, image), memory=memory)

    def function(request: JudgeRequest) -> float | None:
        texts = _wanted(request) if wanted is None else wanted(request)
        if not texts:
            return None
        found = [find_lettering(text, look(request), case=case) for text in texts]
        return _on_scale(request.criterion, sum(found) / len(found))

    return ProgramJudge(function, judge_id=judge_id if not case else f"{judge_id}, case")


def rapid_reader(**options: Any) -> ReadText:
    """PaddleOCR's models for Chinese and English in ONNX, as they come inside the package rapidocr-onnxruntime.

    Nothing is downloaded; other languages need other models, whose paths go in as options. It reads letters well and spaces
    less so: now and then it joins the words of a line.

    Args:
        options: of ``rapidocr_onnxruntime.RapidOCR``.

    Returns:
        A reader that gives :class:`FoundText` from top to bottom.

    Raises:
        ImportError: without the package.

    Example:
        >>> read_text = rapid_reader()  # doctest: +SKIP
        >>> ocr_judge(read_text, judge_id="rapidocr 1.4.4")  # doctest: +SKIP
    """
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
        raise ImportError(
            "reading text needs a reader: pip install rapidocr-onnxruntime (extra ocr), or give your own"
        ) from error
    engine = RapidOCR(**options)

    def read(image: Tensor) -> list[FoundText]:
        blue_first = image.cpu().flip(0).permute(1, 2, 0).contiguous().numpy()
        found, _ = engine(blue_first)
        return [FoundText(text, tuple((float(x), float(y)) for x, y in quad)) for quad, text, _ in found or ()]

    return read


def read_strings(read_text: ReadText, image: Tensor) -> tuple[str, ...]:
    """The texts alone of what a reader finds.

    Example:
        >>> import torch
        >>> read_strings(lambda image: ["a", FoundText("b", ())], torch.zeros(3, 2, 2, dtype=torch.uint8))
        ('a', 'b')
    """
    return tuple(found if isinstance(found, str) else found.text for found in read_text(image))


def _wanted(request: JudgeRequest) -> Sequence[str]:
    return quoted_strings(request.criterion.text) or quoted_strings(request.prompt)


def _on_scale(criterion: Criterion, share: float) -> float:
    if criterion.scale == "binary":
        return float(share == 1)
    if criterion.scale == "levels":
        return 1 + math.floor(share * (criterion.levels - 1))
    # Rounding must not lead beyond the scale.
    return min(criterion.high, (1 - share) * criterion.low + share * criterion.high)
