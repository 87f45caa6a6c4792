"""What can be told from the words of a text in any script: how many, whether they loop, refuse, or break off."""

import re
import unicodedata
from collections.abc import Sequence

__all__ = ["begins_like_refusal", "count_words", "ends_like_sentence", "is_loop", "split_words"]

_REFUSAL = re.compile(
    r"^\W*(i(?:'m| am) (?:very |so |really |truly )?sorry|sorry\b|we(?:'re| are) sorry\b|i'm afraid (?:i|that)\b"
    r"|i (?:can't|cannot|can not|won't|will not|am unable|am not (?:able|comfortable))|i'm (?:unable|not (?:able|comfortable))"
    r"|i must (?:decline|refuse)|as an? (?:ai|(?:large )?language model)\b|unfortunately,? (?:i|we)\b|i apologi[sz]e"
    r"|i (?:do not|don't) have the ability|this (?:request|content|prompt) (?:violates|goes against)"
    # German, French, Spanish, Italian, Portuguese, Dutch
    r"|(?:es )?tut mir leid\b|ich kann (?:das|dabei|diese[nrms]?|dir|ihnen|leider) [^.]{0,60}\bnicht\b|leider kann ich\b"
    r"|(?:je suis )?d\u00e9sol\u00e9e?\b|je ne peux pas\b|lo siento\b|(?:lo lamento|no puedo) (?:ayudar|crear|generar|cumplir)"
    r"|mi dispiace\b|non posso (?:aiutar|crear|generar|soddisfar)|(?:sinto muito|desculpe|lamento)\b"
    r"|n\u00e3o posso (?:ajudar|criar|gerar)|het spijt me\b|helaas kan ik\b"
    # Russian, Chinese, Japanese, Korean
    r"|\u0438\u0437\u0432\u0438\u043d\u0438\u0442\u0435|\u043f\u0440\u043e\u0441\u0442\u0438\u0442\u0435"
    r"|\u043a \u0441\u043e\u0436\u0430\u043b\u0435\u043d\u0438\u044e, \u044f|\u044f \u043d\u0435 \u043c\u043e\u0433\u0443"
    r"|(?:\u975e\u5e38|\u5f88)?\u62b1\u6b49|\u5bf9\u4e0d\u8d77|\u5c0d\u4e0d\u8d77|\u6211(?:\u4e0d\u80fd|\u65e0\u6cd5|\u7121\u6cd5|\u6ca1\u6cd5)"
    r"|\u7533\u3057\u8a33|\u3054\u3081\u3093\u306a\u3055\u3044|\u3059\u307f\u307e\u305b\u3093|\uc8c4\uc1a1|\ubbf8\uc548\ud569)",
    re.IGNORECASE,
)
# What is in quotes and goes on behind them is what a picture says.
_SAID = re.compile(
    r"^\s*(?:\"[^\"]*\"|'[^'\n]*'(?!\w)|\u201c[^\u201c\u201d]*\u201d|\u300c[^\u300c\u300d]*\u300d),?\s*\w"
)
# Ends of sentences in Latin, CJK, Devanagari, Arabic, Urdu, Armenian, Ethiopic and Khmer; then what may still follow.
_ENDS = ".!?\u2026\u3002\uff01\uff1f\uff0e\u0964\u0965\u061f\u06d4\u0589\u1362\u17d4"
_CLOSING = "\"'\u2019\u201d\u00bb\u203a)]}\u300d\u300f\uff09\u3011*_`"
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_DENSE = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_MAX_PERIOD = 64
_MIN_LOOP = 12


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


def is_loop(text: str) -> bool:
    """Whether a language model has lost its thread.

    A phrase of at most 64 words stands three times or more in a row over 12 words or more, or a sentence of five words or
    more is there three times.

    Example:
        >>> is_loop("a red box " * 4), is_loop("a red box and a blue box")
        (True, False)
    """
    return _loops(split_words(text)) or _repeats(text)


def begins_like_refusal(text: str) -> bool:
    """Whether an answer begins as those of assistants do that will not help, in ten languages.

    Example:
        >>> begins_like_refusal("I'm sorry, but I can't."), begins_like_refusal("A sorry sight: an old car.")
        (True, False)
    """
    plain = unicodedata.normalize("NFC", text).replace("\u2019", "'").strip()
    return _REFUSAL.match(plain) is not None and _SAID.match(plain) is None


def ends_like_sentence(text: str) -> bool:
    """Whether a text ends with the end of a sentence, perhaps in closing quotes or brackets.

    Example:
        >>> ends_like_sentence('She says "no."'), ends_like_sentence("She says")
        (True, False)
    """
    return text.rstrip().rstrip(_CLOSING).endswith(tuple(_ENDS))


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
