"""Words that should be in a picture against words that were read there, in any script.

No axes: text.
"""

import re
import unicodedata
from collections.abc import Iterable

__all__ = ["edit_distance", "find_lettering", "plain_text", "quoted_strings", "similarity"]

# Scripts that put no spaces between words: kana, Han, Thai, Lao, Burmese, Khmer. Each character is a word here.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_SPACELESS}]|(?:(?![{_SPACELESS}])\w)+|[^\w\s]")
_GAP = re.compile(rf"(?<=[{_SPACELESS}]) (?=[{_SPACELESS}])")
_PLAIN = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2010": "-",
        "\u2011": "-",
        "\u2013": "-",
        "\u2014": "-",
    }
)
_QUOTED = re.compile(
    r'"([^"\n]*)"|(?<!\w)\'(.+?)(?<=\S)\'(?!\w)|(?<!\w)\u2018(.+?)\u2019(?!\w)'
    r"|[\u201c\u201e]([^\u201c\u201d\n]+)[\u201c\u201d]|\u00ab([^\u00bb\n]+)\u00bb"
    r"|\u300c([^\u300d\n]+)\u300d|\u300e([^\u300f\n]+)\u300f"
)


def edit_distance(one: str, other: str) -> int:
    """The fewest insertions, deletions and replacements of characters that turn one text into the other (Levenshtein).

    All rows of the table at once as bits of one integer (Hyyro 2003): a step for each character of ``other``.

    Args:
        one: any text.
        other: any text.

    Returns:
        From the difference of their lengths to the longer length.

    Example:
        >>> edit_distance("OPEN", "OPFN!"), edit_distance("", "abc")
        (2, 3)
    """
    if not one:
        return len(other)
    positions: dict[str, int] = {}
    for index, character in enumerate(one):
        positions[character] = positions.get(character, 0) | 1 << index
    full, last = (1 << len(one)) - 1, 1 << (len(one) - 1)
    # Bits say where a column of the table goes up or down by one from row to row.
    up, down, distance = full, 0, len(one)
    for character in other:
        equal = positions.get(character, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        rises, falls = down | (~(diagonal | up) & full), up & diagonal
        distance += bool(rises & last) - bool(falls & last)
        rises, falls = (rises << 1 | 1) & full, falls << 1 & full
        up, down = falls | (~(diagonal | rises) & full), rises & diagonal
    return distance


def similarity(one: str, other: str) -> float:
    """``1 - edit distance / longer length``; 1 for two empty texts.

    Example:
        >>> similarity("OPEN", "OPFN!")
        0.6
    """
    longest = max(len(one), len(other))
    return 1 - edit_distance(one, other) / longest if longest else 1.0


def quoted_strings(text: str) -> list[str]:
    r"""What stands in quotation marks, straight, typographic, French, German or Japanese, in order.

    Apostrophes are none: a single quotation mark opens behind no letter and closes before none.

    Example:
        >>> quoted_strings("It's a sign 'Bob's Diner' and a door \"Pull\".")
        ["Bob's Diner", 'Pull']
    """
    found = (next(filter(None, match.groups()), "").strip() for match in _QUOTED.finditer(text))
    return [words for words in found if words]


def find_lettering(wanted: str, read: Iterable[str], *, case: bool = False) -> float:
    """How well a text can be found among the words that were read: 1 if it stands there, word for word.

    The largest :func:`similarity` to any run of consecutive words. Words may be spread over lines, and more text around
    them costs nothing, but letters more in the same word do. Compatibility forms (full width, ligatures), kinds of quotation
    marks and dashes, runs of spaces and, by default, case make no difference.

    Args:
        wanted: the text.
        read: words or lines in reading order.
        case: whether case counts.

    Returns:
        From 0 to 1; 0 where nothing was read.

    Raises:
        ValueError: if nothing is wanted.

    Example:
        >>> read = ["CAFE", "OPEN 24", "HOURS!"]
        >>> find_lettering("Open 24 hours", read), find_lettering("open", ["reopened"])
        (1.0, 0.5)
    """
    goal, text = plain_text(wanted, case=case), plain_text(" ".join(read), case=case)
    if not goal:
        raise ValueError(f"wanted: expected some text, got {wanted!r}")
    spans = [match.span() for match in _TOKEN.finditer(text)]
    most = 2 * len(_TOKEN.findall(goal)) + 2  # words of a run: a reader may cut a word in two
    best = 0.0
    for first, (start, _) in enumerate(spans):
        for _, end in spans[first : first + most]:
            length = end - start
            if min(length, len(goal)) > best * max(length, len(goal)):  # else it cannot be better
                best = max(best, similarity(goal, text[start:end]))
    return best


def plain_text(text: str, *, case: bool = False) -> str:
    r"""Without differences that a reader may make: compatibility forms, marks, spaces, and by default case.

    Example:
        >>> plain_text("\u201c\uff2f\uff4b\u201d  \u2013 it\u2019s")
        '"ok" - it\'s'
    """
    text = unicodedata.normalize("NFKC", text).translate(_PLAIN)
    text = " ".join((text if case else unicodedata.normalize("NFKC", text.casefold())).split())
    return _GAP.sub("", text)
