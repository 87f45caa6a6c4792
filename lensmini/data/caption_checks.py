"""Which answers are no captions, and how many words captions have in any script."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from lensmini.words import begins_like_refusal, count_words, ends_like_sentence, is_loop, split_words

__all__ = ["CAPTION_CAUSES", "CaptionStatistics", "caption_statistics", "check_caption", "count_words", "split_words"]

CAPTION_CAUSES = ("refusal", "empty", "truncated", "loop", "too long")
"""Why an answer is not taken as a caption."""


class CaptionStatistics(NamedTuple):
    """Words of captions."""

    num: int
    mean: float
    """The paper's captions: about 109."""
    std: float
    quantiles: dict[float, float]
    """At 0, 0.05, 0.25, 0.5, 0.75, 0.95 and 1."""


def check_caption(
    text: str, *, finish_reason: str = "stop", refusal: str = "", density: str = "detailed", max_words: int = 500
) -> str | None:
    """The first reason of ``CAPTION_CAUSES`` not to take an answer as a caption, None if it is one.

    * refusal: the server says so, or the text begins like one;
    * empty: no word in it;
    * truncated: the server ran out of tokens, or a detailed caption does not end like a sentence;
    * loop: a phrase of at most 64 words stands three times or more in a row over 12 words or more, or a sentence of five
      words or more is there three times;
    * too long: the paper wants fewer than 500 words.

    Args:
        text: the answer.
        finish_reason: of the server.
        refusal: of the server.
        density: "brief" captions need not be sentences.
        max_words: the first number of words that is too many.

    Example:
        >>> (
        ...     check_caption("A red bus stands at a stop."),
        ...     check_caption("A red bus stands at"),
        ...     check_caption("I'm sorry, no."),
        ... )
        (None, 'truncated', 'refusal')
    """
    plain = text.strip()
    if refusal or finish_reason == "content_filter" or begins_like_refusal(plain):
        return "refusal"
    words = split_words(plain)
    if not words:
        return "empty"
    if is_loop(plain):
        return "loop"
    ended = ends_like_sentence(plain)
    if finish_reason == "length" or (density == "detailed" and not ended):
        return "truncated"
    return "too long" if len(words) >= max_words else None


def caption_statistics(captions: Iterable[str]) -> CaptionStatistics:
    """Words of captions in numbers; zeros for none.

    Example:
        >>> statistics = caption_statistics(["A cat.", "Two cats and a dog."])
        >>> statistics.num, statistics.mean, statistics.quantiles[0.5]
        (2, 3.5, 3.5)
    """
    counts = np.array([count_words(caption) for caption in captions], dtype=np.float64)
    levels = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    if not len(counts):
        return CaptionStatistics(0, 0.0, 0.0, dict.fromkeys(levels, 0.0))
    found = np.quantile(counts, levels)
    quantiles = {level: float(value) for level, value in zip(levels, found, strict=True)}
    return CaptionStatistics(len(counts), float(counts.mean()), float(counts.std()), quantiles)
