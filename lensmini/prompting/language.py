"""The language of a short text, as far as script and frequent words tell."""

import unicodedata
from collections import Counter

from lensmini.words import split_words

__all__ = ["guess_language"]

_FREQUENT = {
    "en": "a an the of and with in on is are at to from by for over under two three his her their its there this that",
    "de": "ein eine einen einem einer der die das den dem und mit in im auf ist sind am vor hinter zwei drei von zur zum",
    "fr": "un une le la les des du et avec dans sur est sont au aux devant deux trois de qui en son sa",
    "es": "un una el la los las del y con en sobre es al dos tres de que su junto unos unas",
    "it": "un una il lo la gli le di e con in su sul nel nella due tre del della che e sono",
    "pt": "um uma o a os as do da dos das e com em no na dois duas de que seu sua sobre",
    "nl": "een de het van en met in op is zijn bij voor achter twee drie aan naar uit",
}
_SCRIPTS = {"CJK": "han", "HIRAGANA": "japanese", "KATAKANA": "japanese", "HANGUL": "korean", "LATIN": "latin"}


def guess_language(text: str) -> str:
    r"""A code of a language ("en"), the name of a script ("han", "cyrillic"; "latin" where words do not tell), or nothing.

    Of the languages in Latin script seven are told apart, by frequent words; kana makes a text Japanese.

    Args:
        text: without what is quoted.

    Returns:
        The guess; empty where there are no letters.

    Example:
        >>> guess_language("a fox in the snow"), guess_language("ein Fuchs im Schnee"), guess_language("fox")
        ('en', 'de', 'latin')
        >>> guess_language("\u96ea\u91cc\u7684\u72d0\u72f8"), guess_language("7 + 2")
        ('han', '')
    """
    scripts = Counter(
        _SCRIPTS.get(name, name.lower())
        for name in (unicodedata.name(c, "?").partition(" ")[0] for c in text if c.isalpha())
    )
    if not scripts:
        return ""
    if scripts["japanese"]:
        scripts["japanese"] += scripts.pop("han", 0)
    script = max(scripts, key=lambda name: scripts[name])
    if script != "latin":
        return script
    words = split_words(text)
    hits = {code: sum(word in frequent.split() for word in words) for code, frequent in _FREQUENT.items()}
    best, second = sorted(hits.values(), reverse=True)[:2]
    if best < 2 or best == second:
        return "latin"
    return max(hits, key=lambda code: hits[code])
