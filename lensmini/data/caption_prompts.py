"""What a captioner is told, in our own words, after the requirements of arXiv 2605.21573, section 2.2."""

import hashlib
from typing import Literal, get_args

__all__ = ["Density", "Mode", "caption_instruction", "choose_density"]

Mode = Literal["detailed", "brief", "mixed"]
"""How captions are asked for: "mixed" is half and half, drawn for each picture."""
Density = Literal["detailed", "brief"]

_DETAILED = """\
Write the caption of this picture for a data set that teaches a model to paint from text. Somebody who reads only your \
caption should be able to paint the picture again.

- One paragraph of plain English prose, between 60 and 300 words and never 500 or more. No title, no list, no markup.
- Begin with what is shown, not with words about a picture or photo, unless the medium itself matters (a photograph, \
a watercolour, a screenshot, a poster): then name the medium.
- Every salient thing with its colours, material, texture, shape, pose or expression; how many there are, as a number \
where they can be counted.
- Where things are, in the frame and relative to each other, and what they do with or to each other.
- Background, light, weather, viewpoint, framing and style.
- Name well-known places, people, characters, dishes, species, vehicles and works by their names when you are sure.
- Copy every piece of legible text letter for letter, in its own language and script, in double quotes, and say where it \
stands and how it looks. Do not translate it. If there is none, do not mention text at all.
- State only what can be seen. No guesses, no judgement of quality, no remarks about these instructions."""

_BRIEF = """\
Write a short caption of this picture in English: one plain phrase or sentence of at most 15 words that names the main \
subject and what it does or where it is. Keep any prominent text in its own language, in double quotes. No other words."""

_HINT = """

A text that was found beside the picture follows. It may be wrong, incomplete or about something else: use it for names \
that fit what you see, and for nothing else.
<found>
{hint}
</found>"""


def caption_instruction(density: Density, hint: str = "") -> str:
    """The request that goes with a picture.

    Args:
        density: "detailed" or "brief".
        hint: text found beside the picture, for names; at most 2,000 characters of it are used.

    Raises:
        ValueError: for another density.

    Example:
        >>> "15 words" in caption_instruction("brief"), "Zurich" in caption_instruction("brief", "Zurich, 1998")
        (True, True)
    """
    if density not in get_args(Density):
        raise ValueError(f"density: expected one of {get_args(Density)}, got {density!r}")
    text = _DETAILED if density == "detailed" else _BRIEF
    # The hint is data: it must not close its own frame.
    return text + (_HINT.format(hint=hint[:2000].replace("<", "(").replace(">", ")")) if hint.strip() else "")


def choose_density(mode: Mode, key: str, seed: int) -> Density:
    """Which caption a picture gets; a function of seed and key alone.

    Args:
        mode: as asked for.
        key: of the picture.
        seed: of the data set.

    Raises:
        ValueError: for another mode.

    Example:
        >>> (
        ...     choose_density("brief", "a", 0),
        ...     {choose_density("mixed", str(n), 0) for n in range(9)} == {"brief", "detailed"},
        ... )
        ('brief', True)
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode: expected one of {get_args(Mode)}, got {mode!r}")
    if mode != "mixed":
        return mode
    return "detailed" if hashlib.sha256(f"{seed}/{key}".encode()).digest()[0] & 1 else "brief"
