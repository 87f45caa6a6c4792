"""Which answers are no captions, and how many words captions have in any script."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["CAPTION_CAUSES", "CaptionStatistics", "caption_statistics", "check_caption", "count_words", "split_words"]

CAPTION_CAUSES = ("refusal", "empty", "truncated", "loop", "too long")
"""Why an answer is not taken as a caption."""

_REFUSAL = re.compile(
    r"^\W*(i(?:'m| am) (?:very |so )?sorry|sorry\b|i (?:can't|cannot|can not|won't|am unable|am not able)"
    r"|i'm (?:unable|not able)|i must decline|as an ai\b|unfortunately, i\b|i apologi[sz]e"
    r"|i (?:do not|don't) have the ability)",
    re.IGNORECASE,
)
# Ends of sentences in Latin, CJK, Devanagari, Arabic, Urdu, Armenian, Ethiopic and Khmer; then what may still follow.
_ENDS = ".!?\u2026\u3002\uff01\uff1f\uff0e\u0964\u0965\u061f\u06d4\u0589\u1362\u17d4"
_CLOSING = "\"'\u2019\u201d\u00bb\u203a)]}\u300d\u300f\uff09\u3011*_`"
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_DENSE = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_MAX_PERIOD = 64
_MIN_LOOP = 12


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
    plain = text.replace("\u2019", "'").strip()
    if refusal or finish_reason == "content_filter" or _REFUSAL.match(plain):
        return "refusal"
    words = split_words(plain)
    if not words:
        return "empty"
    if _loops(words) or _repeats(plain):
        return "loop"
    ended = plain.rstrip(_CLOSING).endswith(tuple(_ENDS))
    if finish_reason == "length" or (density == "detailed" and not ended):
        return "truncated"
    return "too long" if len(words) >= max_words else None


def split_words(text: str) -> list[str]:
    r"""Words in lower case, whatever the script.

    A word is a run of letters and digits, with apostrophes and hyphens inside. Where words have no spaces between them
    there are conventions: a Chinese character or kana is a word of its own, and in Thai, Lao, Burmese and Khmer four
    letters are.

    Example:
        >>> split_words("It's a T-shirt"), len(split_words("\u732b\u72ac 7"))
        (["it's", 'a', 't-shirt'], 3)
        >>> len(split_words("\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35"))
        2
    """
    spaced = _UNSPACED.sub(lambda match: f" {match.group()} ", unicodedata.normalize("NFC", text).casefold())
    words: list[str] = []
    for run in spaced.split():
        if _DENSE.search(run):
            letters = [c for c in run if c.isalnum() or unicodedata.category(c)[0] == "M"]
            words += ["".join(letters[first : first + 4]) for first in range(0, len(letters), 4)]
        else:
            words += _WORD.findall(run)
    return words


def count_words(text: str) -> int:
    """Number of :func:`split_words`.

    Example:
        >>> count_words("Two cats, one dog.")
        4
    """
    return len(split_words(text))


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


def _loops(words: Sequence[str]) -> bool:
    for period in range(1, min(_MAX_PERIOD, len(words) // 3) + 1):
        run = 0
        for index in range(len(words) - period):
            run = run + 1 if words[index] == words[index + period] else 0
            if run + period >= max(3 * period, _MIN_LOOP):
                return True
    return False


def _repeats(text: str) -> bool:
    counts: dict[tuple[str, ...], int] = {}
    for sentence in re.split(f"[{re.escape(_ENDS)}\n]+", text):
        words = tuple(split_words(sentence))
        if len(words) >= 5:
            counts[words] = counts.get(words, 0) + 1
    return any(count >= 3 for count in counts.values())
