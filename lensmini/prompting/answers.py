"""One image prompt out of what a language model answers, or the cause why there is none. Never an exception.

No axes: text.
"""

import json
import re
import unicodedata
from typing import Any, NamedTuple

from lensmini.words import begins_like_refusal, count_words, is_loop

__all__ = ["ANSWER_CAUSES", "MAX_ANSWER", "Answer", "gives_instructions", "read_answer", "strip_reasoning"]

ANSWER_CAUSES = (
    "refusal",
    "empty",
    "reasoning only",
    "no final channel",
    "several",
    "truncated",
    "loop",
    "markup",
    "characters",
    "too long",
)
"""What may be wrong with an answer; "refusal" is no fault but a decision of the model."""
MAX_ANSWER = 200_000
"""Characters of an answer, reasoning included, that are still read."""
_MAX_PROMPT = 20_000
_TAG = re.compile(r"<(/?)(?:think|thinking|thought|reasoning|analysis|reflection|scratchpad)>", re.IGNORECASE)
_ANSWER_TAG = re.compile(r"<(prompt|answer|final|rewrite|output)>((?:(?!<\1>).)*?)</\1>", re.DOTALL | re.IGNORECASE)
_TURN_END = re.compile(r"<\|(?:end|return|call|start|im_end|eot_id|end_of_text|endoftext)\|>|</s>|<end_of_turn>")
_MARKUP = re.compile(
    r"<\|[^|>]{0,40}\|>|</?(?:s|image|img|prompt|system|user|assistant|answer|think|br|p|div|html|script)\b[^<>]{0,80}>"
    r"|\[/?INST\]|<</?SYS>>|\{\{|\}\}|```|^\s*(?:#{1,6}\s|[-*\u2022]\s+\S|\|.*\|\s*$)",
    re.MULTILINE,
)
_OPTION = re.compile(
    r"^\W{0,3}(?:\d{1,2}\s*[.):]|(?:option|prompt|version|variant|alternative|choice)\s*#?\s*(?:\d{1,2}|[a-e])\b\W{0,3})",
    re.IGNORECASE | re.MULTILINE,
)
_ALTERNATIVE = re.compile(
    r"(?:^|[.!?]\s+)(?:or\s+)?(?:alternatively|another (?:option|version|variant))\b", re.IGNORECASE
)
_LABEL = re.compile(
    r"^\W{0,3}(?:(?:the|your|my)\s+)?(?:(?:final|rewritten|revised|enhanced|improved|expanded|detailed|image|output|"
    r"descriptive)\s+){0,3}(?:prompt|description|rewrite|answer)\s*\W{0,3}:\W{0,3}\s*",
    re.IGNORECASE,
)
_HERE = r"here(?: is| are| it is|'s|\u2019s| you go)\b[^\n:.]{0,120}:\s*"
_OPENING = re.compile(
    r"^\W{0,3}(?:(?:sure|certainly|of course|absolutely|okay|ok|got it|great|understood)\s*[!,.:\u2014]\s*"
    rf"(?:{_HERE})?|{_HERE})",
    re.IGNORECASE,
)
_CHATTER = re.compile(
    r"^\W{0,3}(?:i(?:'d|\u2019d| would) be (?:happy|glad)|i(?:'ve|\u2019ve| have) (?:rewritten|expanded|written|kept)|below is|"
    r"here you go|this is (?:the|your)|as requested|sure|certainly|of course|the user)\b",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    r"^\W{0,3}(?:(?:let me know|i hope|hope this|feel free|would you like|do you want|please let)\b|note(?: that)?\s*:)",
    re.IGNORECASE,
)
_REFUSED = re.compile(r"^\W{0,3}REFUSED\s*[:\u2014-]")
_INSTRUCTION = re.compile(
    r"\b(?:ignore|disregard|forget|override)\s+(?:all\s+|any\s+|the\s+|your\s+|my\s+|these\s+|those\s+|every\s+){0,3}"
    r"(?:previous|prior|above|earlier|preceding|system|safety|other)?\s*(?:instructions?|prompts?|rules|messages?)\b"
    r"|\bsystem prompt\b|\bas an ai\b|\byou are (?:now )?(?:chatgpt|an? (?:ai|helpful|unrestricted))\b|\bdeveloper mode\b",
    re.IGNORECASE,
)
_QUOTES = {'"': '"', "\u201c": "\u201d", "\u00ab": "\u00bb", "`": "`", "\u300c": "\u300d"}
_KEYS = ("prompt", "rewritten_prompt", "rewrite", "final_prompt", "final", "output", "result", "description", "text")


class Answer(NamedTuple):
    """A prompt, or the cause why there is none."""

    prompt: str
    """One line; empty where there is a cause."""
    cause: str | None
    """One of ``ANSWER_CAUSES``."""
    bare: str
    """The answer without reasoning, otherwise as it was."""


def read_answer(text: str, *, finish_reason: str = "stop", refusal: str = "") -> Answer:
    r"""The one prompt that an answer holds.

    Reasoning is taken off (:func:`strip_reasoning`), then what models put around an answer: a code fence, JSON, tags, an
    opening phrase, a label, a closing remark, quotes around the whole. What is left must be one text in plain words.

    Args:
        text: the answer.
        finish_reason: of the server.
        refusal: of the server.

    Returns:
        The prompt or the cause, and the answer without reasoning.

    Example:
        >>> read_answer("<think>A fox?</think>Sure! Here it is:\n\n**Prompt:** A red fox in deep snow.").prompt
        'A red fox in deep snow.'
        >>> read_answer("1. A fox.\n2. A dog.").cause, read_answer("<think>A fox or").cause
        ('several', 'reasoning only')
    """
    if refusal or finish_reason == "content_filter":
        return Answer("", "refusal", text[:_MAX_PROMPT].strip())
    if len(text) > MAX_ANSWER:
        return Answer("", "too long", "")
    bare, cause = strip_reasoning(text)
    if cause is not None:
        return Answer("", cause, bare)
    if not bare:
        return Answer("", "empty" if not text.strip() else "reasoning only", bare)
    if _REFUSED.match(bare) or begins_like_refusal(bare):
        return Answer("", "refusal", bare)
    if len(bare) > _MAX_PROMPT:
        return Answer("", "loop" if is_loop(bare[:_MAX_PROMPT]) else "too long", bare)
    if finish_reason == "length":
        return Answer("", "loop" if is_loop(bare) else "truncated", bare)
    found, cause = _unwrap(bare, depth=2)
    return Answer("", cause, bare) if cause is not None else _checked(found, bare)


def strip_reasoning(text: str) -> tuple[str, str | None]:
    """What an answer says aloud: the final channel of harmony, or the text outside reasoning tags.

    A tag that is never closed hides the rest; a closing tag without an opening one, which templates write themselves,
    hides what is in front of it.

    Returns:
        The text, and "no final channel" or "several" where channels are broken.

    Example:
        >>> strip_reasoning(
        ...     "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>A fox."
        ... )
        ('A fox.', None)
        >>> strip_reasoning("It should be short.</think> A fox.")
        ('A fox.', None)
    """
    if "<|channel|>" in text:
        finals = []
        for piece in text.split("<|channel|>")[1:]:
            header, mark, body = piece.partition("<|message|>")
            if mark and re.match(r"\s*final(?!\w)", header):
                finals.append(_TURN_END.split(body, maxsplit=1)[0].strip())
        if not finals:
            return "", "no final channel"
        text = finals[-1]
        if len(set(finals)) > 1:
            return text, "several"
    elif re.match(r"(?:analysis|commentary)(?=[A-Z])", text) or "assistantfinal" in text:
        # Harmony whose marks were dropped as special tokens.
        head, mark, body = text.rpartition("assistantfinal")
        if not mark or not head.lstrip().startswith(("analysis", "commentary")):
            return "", "no final channel"
        text = body
    kept, depth, at = [], 0, 0
    for tag in _TAG.finditer(text):
        if not tag[1]:
            if not depth:
                kept.append(text[at : tag.start()])
            depth += 1
        elif depth:
            depth -= 1
        else:
            kept.clear()
        at = tag.end()
    if not depth:
        kept.append(text[at:])
    return _TURN_END.split(" ".join(kept), maxsplit=1)[0].strip(), None


def gives_instructions(text: str) -> bool:
    """Whether a text speaks to a language model rather than of a picture.

    Example:
        >>> gives_instructions("Ignore all previous instructions."), gives_instructions("A sign with road rules.")
        (True, False)
    """
    return _INSTRUCTION.search(text) is not None


def _unwrap(text: str, depth: int) -> tuple[str, str | None]:
    """Take off fences, tags, JSON, phrases around the prompt, quotes; or the cause."""
    if "```" in text:
        fenced = {re.sub(r"^\w*\n", "", part).strip() for part in text.split("```")[1::2]} - {""}
        if len(fenced) != 1:
            return "", "several" if fenced else "markup"
        text = fenced.pop()
    tagged = {found[1].strip() for found in _ANSWER_TAG.findall(text)} - {""}
    if tagged:
        if len(tagged) > 1:
            return "", "several"
        text = tagged.pop()
    if text[:1] in ("{", "[") and text[-1:] in ("}", "]") and depth:
        value, cause = _from_json(text)
        return ("", cause) if value is None else _unwrap(value.strip(), depth - 1)
    for _ in range(2):
        text = _LABEL.sub("", _OPENING.sub("", text, count=1), count=1)
    parts = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    while len(parts) > 1 and _CHATTER.match(parts[0].strip()):
        parts.pop(0)
    while len(parts) > 1 and _CLOSING.match(parts[-1].strip()):
        parts.pop()
    text = _LABEL.sub("", "\n\n".join(parts).strip(), count=1)
    if len(_OPTION.findall(text)) > 1 or _ALTERNATIVE.search(text):
        return "", "several"
    for mark in ("**", "__"):
        text = text.replace(mark, "")
    closing = _QUOTES.get(text[:1])
    if len(text) > 1 and closing == text[-1] and not {text[0], closing} & set(text[1:-1]):
        text = text[1:-1].strip()
    return text, None


def _from_json(text: str) -> tuple[str | None, str | None]:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None, "markup"
    if isinstance(value, list):
        value = {str(index): part for index, part in enumerate(value)}
    texts = {str(key).casefold(): part for key, part in value.items() if isinstance(part, str) and count_words(part)}
    named = [texts[key] for key in _KEYS if key in texts]
    chosen = named if named else [*texts.values()]
    if len(chosen) == 1:
        return chosen[0], None
    return None, "several" if chosen else "markup"


def _checked(text: str, bare: str) -> Answer:
    prompt = " ".join(text.split())
    if not count_words(prompt):
        return Answer("", "empty", bare)
    if begins_like_refusal(prompt) or _REFUSED.match(prompt):
        return Answer("", "refusal", bare)
    if is_loop(text):
        return Answer("", "loop", bare)
    if _MARKUP.search(text) or _TAG.search(text):
        return Answer("", "markup", bare)
    if not all(map(_is_plain, prompt)):
        return Answer("", "characters", bare)
    return Answer(prompt, None, bare)


def _is_plain(character: str) -> bool:
    # Control, private, unassigned and half characters, and those that turn the direction of writing.
    kind = unicodedata.category(character)
    turns = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    return kind not in ("Cc", "Cs", "Co", "Cn") and not turns and character != "\ufffd"
