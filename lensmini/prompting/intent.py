"""What a request states, and what of it a rewrite still says: cheap rules, no model.

A rule sees words, not meaning: "crimson" for "red" counts as a loss, and a changed sentence with the same words as none. So
the report is a metric and an alarm, not a proof.

No axes: text.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lensmini.prompting.language import guess_language
from lensmini.words import split_words

__all__ = ["INTENT_KINDS", "IntentReport", "check_intent", "find_numbers", "find_quoted"]

INTENT_KINDS = ("quoted", "numbers", "colours", "names", "objects", "language")
"""What is looked for: strings in quotes, numbers, colour words, capitalised names, other content words, the language."""

# A mark after a digit is an inch or a second, '90s is a decade. No text reaches over the next opening mark: whoever opens a
# thousand quotes and closes none costs one look at each.
_QUOTED = re.compile(
    r'(?<!\d)"([^"]+)"|\u201c([^\u201c\u201d]+)\u201d|\u201e([^\u201e\u201c\u201d]+)[\u201c\u201d]'
    r"|\u201d([^\u201c\u201d]+)\u201d|\u00ab([^\u00ab\u00bb]+)\u00bb|\u00bb([^\u00ab\u00bb]+)\u00ab"
    r"|\u300c([^\u300c\u300d]+)\u300d|\u300e([^\u300e\u300f]+)\u300f"
    r"|(?<!\w)'(?!\d0s\b)([^']++(?:(?<=\w)'(?=\w)[^']++)*+)'(?!\w)|(?<!\w)\u2018([^\u2018]+?)\u2019(?!\w)"
)
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
_UNITS += " eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBERS = {word: value for value, word in enumerate(_UNITS.split())}
_NUMBERS |= {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}
_SCALES = {"thousand": 1000, "million": 1_000_000}
_LOOSE = {"single": 1, "pair": 2, "couple": 2, "both": 2, "twin": 2, "twins": 2, "duo": 2, "trio": 3, "triplets": 3}
_COUNTING = {*_NUMBERS, *_SCALES, *_LOOSE, "dozen", "hundred"}
_ONE = {"a", "an", "lone", "sole"}
_NUMERAL = re.compile(r"\d+(?:[.,:/]\d+)*|[a-z]+")
_COLOUR_WORDS = (
    "red orange yellow green blue purple violet pink brown black white gray cyan magenta teal turquoise maroon navy beige "
    "gold golden silver crimson scarlet indigo lavender olive ivory cream tan khaki coral salmon amber bronze copper "
    "burgundy mauve lilac peach mint emerald ruby sapphire charcoal"
)
_COLOURS = frozenset(_COLOUR_WORDS.split())
_STOP_WORDS = (
    "a about above across after against all along also am among an and any are around as at be been behind being below "
    "beneath beside between both but by can could do does down during each every few for from front had has have he her "
    "him his how i if in inside into is it its just like left lot made make many may me more most much must my near next no "
    "not of off on one only onto or other our out over own please right she should show shows showing small so some such "
    "than that the their them then there these they this those through to top toward under up upon us very was we were "
    "what when where which while who whose will with within without would you your picture image photo photograph "
    "draw paint render create generate want need"
)
_STOP = frozenset(_STOP_WORDS.split())
_IRREGULAR = {
    "people": "person",
    "children": "child",
    "men": "man",
    "women": "woman",
    "mice": "mouse",
    "geese": "goose",
}
_IRREGULAR |= {
    "feet": "foot",
    "teeth": "tooth",
    "leaves": "leaf",
    "wolves": "wolf",
    "knives": "knife",
    "shelves": "shelf",
}


@dataclass(frozen=True, slots=True)
class IntentReport:
    """What a request states, kind by kind, and what is lost; one yes-or-no question, one bit, for each item.

    Example:
        >>> report = check_intent('two red cats and a sign "OPEN"', 'Three red cats sit below a sign that says "OPEN".')
        >>> report.lost, report.bits_lost, report.bits
        ({'numbers': ('2',)}, 1, 6)
    """

    stated: Mapping[str, tuple[str, ...]]
    """By kind of ``INTENT_KINDS``, without empty ones."""
    lost: Mapping[str, tuple[str, ...]]
    """Likewise, what the rewrite does not say any more."""
    invented: tuple[str, ...] = ()
    """Strings in quotes that the request did not have."""

    @property
    def bits(self) -> int:
        """Number of items that the request states."""
        return sum(map(len, self.stated.values()))

    @property
    def bits_lost(self) -> int:
        """Number of items that are lost."""
        return sum(map(len, self.lost.values()))


def check_intent(request: str, rewrite: str) -> IntentReport:
    """Compare a rewrite with its request.

    Quoted strings must be there letter for letter, up to white space, by themselves; numbers in digits or words, in any form
    of the same value; colours, names and other content words as words, up to plural; the language by script and frequent
    words, where it can be told.

    Args:
        request: what was asked.
        rewrite: what it became.

    Returns:
        The report.

    Example:
        >>> check_intent("a man in Zurich", "Ein Mann mit Hut steht in der Altstadt von Zurich.").lost["language"]
        ('en',)
    """
    # Letters and their accents may be written as one character or as two.
    request, rewrite = unicodedata.normalize("NFC", request), unicodedata.normalize("NFC", rewrite)
    quoted, written = find_quoted(request), find_quoted(rewrite)
    listed, asked = {*written}, {*quoted}
    plain, spoken = _outside_quotes(request), " ".join(rewrite.split())
    outside = _outside_quotes(rewrite)
    words = _words(plain)
    before, after = guess_language(plain), guess_language(outside)
    names = [] if before == "de" else _names(plain)  # every German noun has a capital letter
    numbers = find_numbers(plain)
    colours = [word for word in words if _colour(word) in _COLOURS]
    taken = {*names, *colours, *_COUNTING}
    others = [word for word in words if not taken.issuperset(word.split("-"))]
    objects = [word for word in others if word not in taken and word not in _STOP and not _is_small(word)]
    said = {*_words(spoken)}
    beginnings: dict[int, set[str]] = {}
    stems, said_colours = {_stem(word) for word in said}, {_colour(word) for word in said}
    said_numbers = {*find_numbers(rewrite, loose=True)}
    kept = {
        "quoted": [text for text in quoted if text in listed or _is_written(text, spoken, outside)],
        "numbers": [number for number in numbers if number in said_numbers],
        "colours": [colour for colour in colours if _colour(colour) in said_colours],
        "names": [name for name in names if all(part in said for part in _words(name))],
        "objects": [word for word in objects if _is_said(word, said, stems, beginnings)],
        "language": [before] if before in ("", after) or _same_script(before, after) else [],
    }
    stated = {
        "quoted": quoted,
        "numbers": numbers,
        "colours": colours,
        "names": names,
        "objects": objects,
        "language": [before] if before else [],
    }
    gone = {kind: {*items}.difference(kept[kind]) for kind, items in stated.items()}
    lost = {kind: [item for item in items if item in gone[kind]] for kind, items in stated.items()}
    invented = [text for text in written if text not in asked]
    return IntentReport(_frozen(stated), _frozen(lost), tuple(invented))


def find_quoted(text: str) -> list[str]:
    """Strings in quotes of any usual kind, each once, white space as single spaces.

    Of quotes of one kind inside each other the inner ones count.

    Example:
        >>> find_quoted("a sign 'OPEN' and the cat's bowl, 'don't'"), find_quoted('a 24" screen that says "a  b"')
        (['OPEN', "don't"], ['a b'])
    """
    found = (" ".join(next(filter(None, match.groups())).split()) for match in _QUOTED.finditer(text))
    return list(dict.fromkeys(filter(None, found)))


def find_numbers(text: str, *, loose: bool = False) -> list[str]:
    """Numbers in digits of any script or in English words, as plain digits, each once.

    Args:
        text: where to look.
        loose: also take "a", "pair", "both" and the like as numbers, for the text that is to keep one.

    Example:
        >>> find_numbers("two hundred and three cats at 7:30, a pair of dogs"), find_numbers("a pair", loose=True)
        (['203', '7:30'], ['1', '2'])
    """
    digits = "".join(str(unicodedata.digit(c)) if c.isdecimal() else c for c in text).casefold()
    digits = re.sub(r"\bhalf (?:a )?dozen\b", "six", digits)
    tokens, end = [], 0
    for match in _NUMERAL.finditer(digits):
        if digits[end : match.start()].strip("- \n\t"):
            tokens.append("")  # whatever else stands between two words parts their numbers: "two, hundred"
        tokens.append(re.sub(r",(?=\d{3}\b)", "", match[0]))
        end = match.end()
    found, at = [], 0
    while at < len(tokens):
        word = tokens[at]
        value, after = _number_at(tokens, at)
        if value is not None:
            found.append(str(value))
        elif word[:1].isdigit():
            found.append(word)
        elif loose and (word in _LOOSE or word in _ONE):
            found.append(str(_LOOSE.get(word, 1)))
        at = max(after, at + 1)
    return list(dict.fromkeys(found))


def _number_at(tokens: Sequence[str], at: int) -> tuple[int | None, int]:
    """The number that the words from here on say, and where it ends: groups below 1000, each with its scale."""
    total, smallest, end = 0, 10**12, at
    while smallest > 1:
        start = _behind_and(tokens, end) if end > at else at
        value, after = _group_at(tokens, start, digits=start == at)
        scale = 1
        while after < len(tokens) and tokens[after] in _SCALES:
            scale *= _SCALES[tokens[after]]
            after += 1
        if after == start or scale >= smallest:
            break
        total += (1 if value is None else value) * scale
        smallest, end = scale, after
    return (total, end) if end > at else (None, at)


def _group_at(tokens: Sequence[str], at: int, *, digits: bool) -> tuple[int | None, int]:
    """Likewise below 1000, or dozens; digits only where a word multiplies them ("5 million")."""
    value, end = _below_hundred(tokens, at)
    following = {*tokens[at + 1 : at + 2]}
    if digits and tokens[at].isdigit() and len(tokens[at]) < 9 and following & {"dozen", "hundred", *_SCALES}:
        value, end = int(tokens[at]), at + 1
    after = tokens[end] if end < len(tokens) else ""
    if after == "dozen":
        return 12 * (1 if value is None else value), end + 1
    if after == "hundred":
        value, end = 100 * (1 if value is None else value), end + 1
        rest, further = _below_hundred(tokens, _behind_and(tokens, end))
        if rest:
            return value + rest, further
    return value, end


def _below_hundred(tokens: Sequence[str], at: int) -> tuple[int | None, int]:
    first, second = [*tokens[at : at + 2], "", ""][:2]
    value = _NUMBERS.get(first)
    if value in range(20, 100) and 0 < _NUMBERS.get(second, 0) < 10:
        return (value or 0) + _NUMBERS[second], at + 2
    return value, at + (value is not None)


def _behind_and(tokens: Sequence[str], at: int) -> int:
    return at + (tokens[at : at + 1] == ["and"])


def _outside_quotes(text: str) -> str:
    return _QUOTED.sub(" ", text)


def _words(text: str) -> list[str]:
    parts = (part for word in split_words(text) for part in (word, *(word.split("-") if "-" in word else ())))
    return list(dict.fromkeys(re.sub(r"['\u2019]s$", "", part) for part in parts))


def _names(text: str) -> list[str]:
    """Capitalised words that do not begin a sentence, in lower case."""
    found = re.finditer(r"(?<![.!?:]\s)(?<!^)\b([A-Z][\w-]*\w)", text.strip())
    return list(dict.fromkeys(re.sub(r"['\u2019]s$", "", match[1]).casefold() for match in found))


def _colour(word: str) -> str:
    return "gray" if word == "grey" else word


def _is_small(word: str) -> bool:
    """Numbers, and Latin words of one or two letters; a Chinese character is a word."""
    return any(c.isdecimal() for c in word) or (len(word) < 3 and word.isascii())


def _stem(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for ending, instead in (("ies", "y"), ("xes", "x"), ("ches", "ch"), ("shes", "sh"), ("sses", "ss")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word[: -len(ending)] + instead
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _is_written(text: str, rewrite: str, outside: str) -> bool:
    """Whether a string stands there by itself and not inside a longer word; where words have no spaces, anywhere."""
    at = rewrite.find(text)
    while at >= 0:
        end = at + len(text)
        if not rewrite[max(0, at - 1) : at].isalnum() and not rewrite[end : end + 1].isalnum():
            return True
        at = rewrite.find(text, at + 1)
    return max(text[0], text[-1]) > "\u2e80" and text in " ".join(outside.split())


def _is_said(word: str, said: set[str], stems: set[str], beginnings: dict[int, set[str]]) -> bool:
    # Beyond the plural: the same beginning, at least five letters and all but three, for endings of other languages.
    stem = _stem(word)
    start = max(5, len(stem) - 3)
    if stem in stems or len(stem) < 5:
        return stem in stems
    if start not in beginnings:
        beginnings[start] = {other[:start] for other in said}
    return stem[:start] in beginnings[start]


def _same_script(before: str, after: str) -> bool:
    """Whether two guesses may be the same language: one of them names a script only, and it is the other's."""
    latin = {"en", "de", "fr", "es", "it", "pt", "nl", "latin"}
    return "latin" in (before, after) and {before, after} <= latin


def _frozen(found: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    return {kind: tuple(items) for kind, items in found.items() if items}
