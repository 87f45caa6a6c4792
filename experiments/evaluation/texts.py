"""Text in pictures as the benchmarks count it: matched words (LongText, OneIG), exact words and NED (CVTG).

Any reader of text may stand in for theirs (Qwen2.5-VL-7B for LongText and OneIG, PaddleOCR for CVTG), and the numbers are
comparable only with the same one. No axes: text.
"""

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from lensmini.rewards.judges.lettering import edit_distance

__all__ = [
    "Language",
    "Matches",
    "clean_text",
    "match_exact_words",
    "match_words",
    "oneig_text_score",
    "quoted_words",
    "split_joined",
    "word_similarities",
]

Language = Literal["en", "zh"]

_ACCENTED = "\xe0\xe2\xe4\xe9\xe8\xea\xeb\xee\xef\xf4\xf6\xf9\xfb\xfc\xe7"
_LETTERS = f"\u4e00-\u9fa5a-zA-Z0-9{_ACCENTED}{_ACCENTED.upper()}"
_OTHER = {"en": re.compile(rf"[^{_LETTERS}\s]"), "zh": re.compile(rf"[^{_LETTERS}]")}
_MARKED = re.compile(r"'([^'\n]*)'")
_HAN = re.compile("[\u4e00-\u9fff]")


class Matches(NamedTuple):
    """Words, in Chinese characters, that were found, of those that should be there."""

    found: int
    wanted: int


def clean_text(text: str, language: Language) -> str:
    """Han, Latin letters of some languages, and digits alone: words in English, one run of characters in Chinese.

    Both benchmarks delete every other character, so that "don't" becomes one word. LongText also ignores the case of
    English; OneIG does not, see :func:`oneig_text_score`.

    Example:
        >>> clean_text(" Don't  PANIC! ", "en"), clean_text("A \u4f60\u597d\uff01", "zh")
        ('Dont PANIC', 'A\u4f60\u597d')
    """
    return " ".join(_OTHER[language].sub("", text).split()) if language == "en" else _OTHER["zh"].sub("", text)


def match_words(wanted: str, read: str, language: Language, *, case: bool = False) -> Matches:
    """How many of the words are among those that were read, each as often as it was read at most.

    LongText-Bench (arXiv 2507.22058, textbench/summary_scores.py) divides the sums over all pictures.

    Args:
        wanted: the text that should be there.
        read: all that was read.
        language: "zh" counts characters.
        case: whether the case of English counts; that of Latin letters in Chinese always does.

    Returns:
        The counts; nothing wanted gives 0 of 0.

    Example:
        >>> match_words("Stay, stay calm.", "CALM stay", "en")
        Matches(found=2, wanted=3)
    """
    goal, text = clean_text(wanted, language), clean_text(read, language)
    if language == "en":
        goals, words = ((one if case else one.lower()).split() for one in (goal, text))
    else:
        goals, words = list(goal), list(text)
    return Matches((Counter(goals) & Counter(words)).total(), len(goals))


def oneig_text_score(wanted: Sequence[str], read: Sequence[str], language: Language) -> dict[str, float]:
    """OneIG-Bench's text score, ``1 - min(cap, ED) (1 - CR) (1 - WAC) / cap`` (arXiv 2506.07977; scripts/text).

    ED is the mean edit distance of a picture, CR the share of pictures without any, WAC the share of all words, and cap
    100 in English, 50 in Chinese. A text is compared by characters once it has a Han one.

    Args:
        wanted: for each picture its text.
        read: for each picture what was read.
        language: of the benchmark.

    Returns:
        ``edit_distance``, ``completion``, ``word_accuracy`` and ``text``.

    Raises:
        ValueError: if there is nothing, or the numbers differ.

    Example:
        >>> oneig_text_score(["Open"], ["Open!"], "en")["text"], oneig_text_score(["Open"], ["Shut"], "en")["text"]
        (1.0, 0.96)
    """
    if not wanted or len(wanted) != len(read):
        raise ValueError(f"wanted, read: expected equally many, at least one, got {len(wanted)} and {len(read)}")
    distances, matches = [], []
    for goal, text in zip(wanted, read, strict=True):
        goal, text = (clean_text(one, "zh" if _HAN.search(clean_text(one, "en")) else "en") for one in (goal, text))
        distances.append(edit_distance(goal, text))
        matches.append(match_words(goal, text, "zh" if _HAN.search(goal) else "en", case=True))
    total = sum(match.wanted for match in matches)
    distance, cap = math.fsum(distances) / len(distances), 100 if language == "en" else 50
    completion = distances.count(0) / len(distances)
    accuracy = sum(match.found for match in matches) / total if total else 0.0
    score = 1 - min(cap, distance) * (1 - completion) * (1 - accuracy) / cap
    return {"edit_distance": distance, "completion": completion, "word_accuracy": accuracy, "text": score}


def quoted_words(prompt: str) -> list[str]:
    """The words of a CVTG prompt: lower case, between one straight single quotation mark and the next.

    Apostrophes count as marks, as they do in the official scorer (arXiv 2503.23461).

    Example:
        >>> quoted_words("A sign 'Grand Opening' over a door 'Pull'")
        ['grand', 'opening', 'pull']
    """
    return [word for part in _MARKED.findall(prompt) for word in part.lower().split()]


def split_joined(words: Sequence[str], vocabulary: Iterable[str]) -> list[str]:
    """Words that were read, those taken apart that are nothing but words of a vocabulary without the spaces between.

    Readers of text lose spaces much more readily than letters. Not a benchmark's rule: it tells one from the other.

    Args:
        words: as they were read.
        vocabulary: the words that should be there; one of them is never taken apart, and of several ways to take a word
            apart the one with the fewest parts is taken.

    Returns:
        The words, in order.

    Example:
        >>> split_joined(["saleopen", "opensales", "river"], ["sale", "open", "river"])
        ['sale', 'open', 'opensales', 'river']
    """
    known = {word for word in vocabulary if word}
    longest = max(map(len, known), default=0)
    found: list[str] = []
    for word in words:
        # The best way to write the first n characters, or none.
        ways: list[list[str] | None] = [[]]
        for end in range(1, len(word) + 1):
            starts = range(max(0, end - longest), end)
            tried = ((ways[start], word[start:end]) for start in starts)
            possible = [[*way, part] for way, part in tried if way is not None and part in known]
            ways.append(min(possible, key=len, default=None))
        found += ways[-1] or [word]
    return found


def match_exact_words(wanted: Sequence[str], read: Sequence[str]) -> Matches:
    """How many words stand exactly so among those that were read; one read once serves as often as it is wanted.

    CVTG-2K's word accuracy divides the sums over all pictures.

    Example:
        >>> match_exact_words(["the", "the", "end"], ["the", "ende"])
        Matches(found=2, wanted=3)
    """
    known = set(read)
    return Matches(sum(word in known for word in wanted), len(wanted))


def word_similarities(wanted: Sequence[str], read: Sequence[str]) -> list[float]:
    """CVTG-2K's NED of each word: ``1 - edit distance / longer length`` to the word that was read and is most like it.

    Most like it means by ``difflib``'s ratio. The benchmark's NED is the mean over the words of all pictures.

    Args:
        wanted: words.
        read: words; none at all is similarity 0.

    Returns:
        For each wanted word from 0 to 1.

    Example:
        >>> word_similarities(["open", "door"], ["opfn!", "door"])
        [0.6, 1.0]
    """
    similar = []
    for word in wanted:
        nearest = difflib.get_close_matches(word, read, n=1, cutoff=0.0)
        longest = max(len(word), len(nearest[0])) if nearest else 0
        similar.append(1 - edit_distance(word, nearest[0]) / longest if longest else 0.0)
    return similar
