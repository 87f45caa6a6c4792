"""Dense captions of the miniature read back into scenes, so that what a caption says can be checked exactly.

A rewriter's caption becomes the scene that it describes, that scene a picture, and the picture is judged by the questions of
the request: what is wrong then was lost by the rewriter, not by the painter.
"""

import re
from collections.abc import Sequence

from lensmini.data import Scene, ScenePrompt, render_scene, verify_scene
from lensmini.data.scene_captions import PLURALS, SYNONYMS
from lensmini.data.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, SceneObject

__all__ = ["intent_lost", "read_caption"]

_NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
_PLAIN = {way: word for word, ways in SYNONYMS.items() for way in ways if " " not in way}
_SINGULAR = {plural: noun for noun, plural in PLURALS.items()}
_KIND = re.compile(r"(\w+) (\w+) (\w+) (\w+) at (the .+)")


def read_caption(text: str) -> Scene | None:
    """The scene of a dense caption on a grid of 2 with the first form of every sentence, or None if it is none.

    Relations are not read: they say nothing that the places do not say. A number of objects that is not the number of
    those described makes the caption none.

    Example:
        >>> scene = read_caption("one thing on a white canvas . a big red disk at the upper right .")
        >>> scene.background, scene.objects[0]
        ('white', SceneObject(shape='circle', colour='red', size='large', row=0, col=1, jitter=(0.0, 0.0)))
        >>> read_caption("a red circle") is None
        True
    """
    opening, *sentences = [sentence.strip() for sentence in text.split(" .")]
    words = opening.split()
    if len(words) != 6 or words[2:4] != ["on", "a"] or words[4] not in BACKGROUNDS or words[0] not in _NUMBERS:
        return None
    objects: list[SceneObject] = []
    for sentence in sentences:
        found = _KIND.fullmatch(sentence)
        if found is None:
            continue
        number, size, colour, noun, places = found.groups()
        size, noun = _PLAIN.get(size, size), _PLAIN.get(_SINGULAR.get(noun, noun), noun)
        cells = [_cell(place) for place in re.split(r" , | and ", places)]
        counted = 1 if number == "a" else _NUMBERS.get(number)
        if noun not in SHAPES or colour not in COLOURS or size not in SIZES or None in cells or counted != len(cells):
            return None
        objects += [SceneObject(noun, colour, size, *cell) for cell in cells if cell is not None]
    try:
        scene = Scene(words[4], tuple(objects))
    except ValueError:
        return None
    return scene if len(objects) == _NUMBERS[words[0]] else None


def intent_lost(captions: Sequence[str], prompts: Sequence[ScenePrompt]) -> list[tuple[int, int] | None]:
    """How many of each request's questions the scene of its caption answers wrongly, and how many there are.

    Args:
        captions: what was made of the requests.
        prompts: the requests.

    Returns:
        For each bits lost and bits, None where the caption describes no scene.

    Example:
        >>> from lensmini.data import build_scene_prompts
        >>> prompts = build_scene_prompts(1, 0, wording="synonyms")
        >>> [pair[0] for pair in intent_lost([prompt.text for prompt in prompts], prompts)]
        [0, 0, 0, 0, 0, 0]
    """
    found: list[tuple[int, int] | None] = []
    for caption, prompt in zip(captions, prompts, strict=True):
        scene = read_caption(caption)
        if scene is None:
            found.append(None)
            continue
        answers = verify_scene(render_scene(scene, 32, 32), prompt.questions).answers
        found.append((len(answers) - sum(answers), len(answers)))
    return found


def _cell(place: str) -> tuple[int, int] | None:
    words = [_PLAIN.get(word, word) for word in place.split()]
    if len(words) != 3 or words[0] != "the" or words[1] not in ("top", "bottom") or words[2] not in ("left", "right"):
        return None
    return int(words[1] == "bottom"), int(words[2] == "right")
