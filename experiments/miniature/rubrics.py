"""Rubrics of the miniature world in the paper's form, 10 + 1 criteria at most, and two judges that read pictures exactly.

Axes: h and w pixels, k templates.

A criterion is an English sentence, so that any judge can be asked it; the two judges here understand these sentences and
no others. The second one reads by matching templates and shares nothing with the first but the palette: it is held out
from training, so that what only the first one sees is noticed.
"""

# pyright: reportArgumentType=false

import hashlib
import re
from collections.abc import Callable
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensmini.data import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    FoundObject,
    Scene,
    SceneObject,
    ScenePrompt,
    SceneReading,
    read_scene,
    render_scene,
)
from lensmini.data.scene_captions import PLURALS, RELATIONS, place_name
from lensmini.data.scene_verifier import (
    AskBackground,
    AskCount,
    AskPlace,
    AskRelation,
    Pattern,
    Question,
    answer_question,
)
from lensmini.rewards import Criterion, Rubric
from lensmini.rewards.judges import JudgeRequest, ProgramJudge

__all__ = [
    "answer_sentence",
    "held_out_judge",
    "naive_rubric",
    "read_by_templates",
    "request_rubric",
    "scene_judge",
    "scene_rubric",
]

WHOLE_SHAPES = "Every patch of colour is one whole circle, square, triangle or cross."
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_JITTERS = (-1.0, -0.5, 0.0, 0.5, 1.0)
_MAX_RESIDUAL = 40.0
"""Root mean square difference from the best template, 0..255, beyond which a cell holds nothing that is known."""

Reader = Callable[[Tensor], SceneReading]


def scene_rubric(prompt: ScenePrompt) -> Rubric:
    """What a picture of a full scene has to meet: 7 to 10 criteria of its own and a global one, all binary, of weight 1.

    Colour and shape of each object at its place, each free cell free, the number of objects, the background; and that all
    shapes are whole. A picture that is painted full fails the free cells, the number and mostly the background.

    Args:
        prompt: whose scene is asked for; its text should be the dense form, which tells all of it.

    Returns:
        The rubric.

    Example:
        >>> from lensmini.data import build_scene_prompts
        >>> rubric = scene_rubric(build_scene_prompts(1, 0, kinds=["single"])[0])
        >>> len(rubric.criteria), rubric.criteria[-1].text
        (7, 'The background is black.')
    """
    scene, criteria = prompt.scene, []
    things = {thing.cell: thing for thing in scene.objects}
    for cell in product(range(scene.grid), repeat=2):
        place = place_name(cell, scene.grid)
        key = place.replace(" ", "_")
        if cell in things:
            thing = things[cell]
            criteria.append(_criterion(f"colour_{key}", "attribute", f"The object at the {place} is {thing.colour}."))
            criteria.append(_criterion(f"shape_{key}", "attribute", f"The object at the {place} is a {thing.shape}."))
        else:
            criteria.append(_criterion(f"free_{key}", "position", f"Nothing stands at the {place}."))
    criteria.append(_criterion("number", "count", _number(len(scene.objects))))
    criteria.append(_criterion("background", "attribute", f"The background is {scene.background}."))
    return _rubric(prompt, criteria, (_criterion("whole_shapes", "structure", WHOLE_SHAPES, needs="image"),))


def request_rubric(prompt: ScenePrompt) -> Rubric:
    """What a picture of a bare request has to meet: the request's own questions, the number of objects among them.

    Args:
        prompt: of the short form, which leaves open what the scene has besides.

    Returns:
        The rubric: 2 to 6 criteria, and that all shapes are whole.

    Example:
        >>> from lensmini.data import build_scene_prompts
        >>> prompt = build_scene_prompts(1, 3, form="short", kinds=["count"])[0]
        >>> prompt.text, [c.text for c in request_rubric(prompt).criteria]
        ('three blue crosses', ['There are exactly three objects.', 'There are exactly three blue crosses.'])
    """
    criteria = [
        _criterion(f"question_{number}", _CATEGORIES[type(question)], _sentence(question, prompt.scene.grid))
        for number, question in enumerate(prompt.questions)
    ]
    return _rubric(prompt, criteria, (_criterion("whole_shapes", "structure", WHOLE_SHAPES, needs="image"),))


_CATEGORIES: dict[type, str] = {
    AskCount: "count",
    AskPlace: "position",
    AskRelation: "relation",
    AskBackground: "attribute",
}


def _sentence(question: Question, grid: int) -> str:
    match question:
        case AskCount(number, Pattern(colour, shape)) if colour and shape:
            things = f"{colour} {shape if number == 1 else PLURALS[shape]}"
            return f"There {'is' if number == 1 else 'are'} exactly {_NUMBERS[number]} {things}."
        case AskCount(number, Pattern(None, None)):
            return _number(number)
        case AskPlace(what, row, col):
            return f"At the {place_name((row, col), grid)} stands a {what}."
        case AskRelation(what, relation, other):
            return f"A {what} is {relation} a {other}."
        case AskBackground(background):
            return f"The background is {background}."
        case _:
            raise ValueError(f"questions: expected colours and shapes together, got {question}")


def naive_rubric(prompt: ScenePrompt, *, placed: bool = True) -> Rubric:
    """A careless reward: 0.6 for objects that are there, 0.4 for colours and shapes that occur, nothing for what is too much.

    Args:
        prompt: what is asked for.
        placed: whether an object has to be where the scene has it; without, where a bare request names a place.

    Returns:
        The rubric.

    Example:
        >>> from lensmini.data import build_scene_prompts
        >>> [c.text for c in naive_rubric(build_scene_prompts(1, 0, kinds=["single"])[0]).criteria]
        ['There is a cyan cross at the bottom right.', 'Something is cyan.', 'There is a cross.']
    """
    criteria, share = [], 1 / len(prompt.scene.objects)
    for number, thing in enumerate(prompt.scene.objects):
        place = place_name(thing.cell, prompt.scene.grid)
        there = f"There is a {thing.colour} {thing.shape}{f' at the {place}' if placed else ''}."
        if not placed and prompt.kind in ("position", "whole"):
            there = f"At the {place} stands a {thing.colour} {thing.shape}."
        for name, text, weight in (
            ("object", there, 0.6),
            ("colour", f"Something is {thing.colour}.", 0.2),
            ("shape", f"There is a {thing.shape}.", 0.2),
        ):
            criteria.append(_criterion(f"{name}_{number}", "attribute", text, weight=weight * share))
    return _rubric(prompt, criteria, ())


def _criterion(
    name: str, category: str, text: str, *, weight: float = 1.0, needs: str = "image_and_prompt"
) -> Criterion:
    return Criterion(id=name, text=text, category=category, weight=weight, kind="program", needs=needs)  # pyright: ignore


def _rubric(prompt: ScenePrompt, criteria: list[Criterion], shared: tuple[Criterion, ...]) -> Rubric:
    scene = repr(prompt.scene)
    name = hashlib.sha256(f"{prompt.text}\n{scene}".encode()).hexdigest()[:16]
    return Rubric(
        prompt_id=name, prompt=prompt.text, criteria=tuple(criteria), global_criteria=shared, generator="scenes"
    )


def _number(number: int) -> str:
    return "There is exactly one object." if number == 1 else f"There are exactly {_NUMBERS[number]} objects."


def answer_sentence(text: str, reading: SceneReading, *, grid: int = 2) -> bool:
    """Whether a sentence of these rubrics holds of what was read.

    Args:
        text: the sentence of a criterion.
        reading: of a picture.
        grid: rows and columns of cells that places refer to.

    Returns:
        The answer.

    Raises:
        ValueError: if the sentence is none of these rubrics'.

    Example:
        >>> answer_sentence("Something is red.", SceneReading("white", ()))
        False
    """
    places = {place_name(cell, grid): cell for cell in product(range(grid), repeat=2)}
    place, colour = f"(?P<place>{'|'.join(places)})", f"(?P<colour>{'|'.join(COLOURS)})"
    shape, number = f"(?P<shape>{'|'.join(SHAPES)})", f"(?P<number>{'|'.join(_NUMBERS)})"
    things = reading.objects
    if text == WHOLE_SHAPES:
        return all(thing.shape is not None for thing in things)
    for pattern in (
        rf"There (?:is|are) exactly {number} objects?\.",
        rf"The background is (?P<background>{'|'.join(BACKGROUNDS)})\.",
        rf"The object at the {place} is (?:{colour}|a {shape})\.",
        rf"There is a {colour} {shape}(?: at the {place})?\.",
        rf"There (?:is|are) exactly {number} {colour} (?P<shapes>{'|'.join([*SHAPES, *PLURALS.values()])})\.",
        rf"A {colour} {shape} is (?P<relation>{'|'.join(RELATIONS)}) a (?P<colour2>{'|'.join(COLOURS)}) "
        rf"(?P<shape2>{'|'.join(SHAPES)})\.",
        rf"At the {place} stands a {colour} {shape}\.",
        rf"(?P<free>Nothing) stands at the {place}\.",
        rf"Something is {colour}\.",
        rf"There is a {shape}\.",
    ):
        match = re.fullmatch(pattern, text)
        if match:
            break
    else:
        raise ValueError(f"text: expected a sentence of a scene's rubric, got {text!r}")
    said = match.groupdict()
    if "relation" in said:
        ends = (Pattern(said["colour"], said["shape"]), Pattern(said["colour2"], said["shape2"]))
        return answer_question(AskRelation(ends[0], said["relation"], ends[1]), reading)
    if "shapes" in said:
        one = {plural: name for name, plural in PLURALS.items()}.get(said["shapes"], said["shapes"])
        asked = AskCount(_NUMBERS.index(said["number"]), Pattern(said["colour"], one))
        return answer_question(asked, reading)
    if "number" in said:
        return len(things) == _NUMBERS.index(said["number"])
    if "background" in said:
        return reading.background == said["background"]
    cell = places.get(said.get("place") or "")
    here = [thing for thing in things if cell in (None, thing.cell)]
    if "free" in said:
        return not here
    return any(
        (said.get("colour") or thing.colour) == thing.colour and (said.get("shape") or thing.shape) == thing.shape
        for thing in here
    )


def scene_judge(*, grid: int = 2) -> ProgramJudge:
    """The verifier as a judge of these rubrics: regions of one colour, each against the four shapes.

    Example:
        >>> from lensmini.data import build_scene_prompts
        >>> from lensmini.rewards.judges import judge_pictures
        >>> prompt = build_scene_prompts(1, 0)[0]
        >>> said = judge_pictures(scene_judge(), [render_scene(prompt.scene, 32, 32)], [scene_rubric(prompt)])
        >>> {verdict.score for verdict in said[0]}
        {1.0}
    """
    return _judge(lambda image: read_scene(image, grid=grid), grid, "scene verifier 1")


def held_out_judge(*, grid: int = 2) -> ProgramJudge:
    """A judge that is not trained on: each cell against a picture of everything that may stand in it.

    Example:
        >>> held_out_judge().judge_id
        'scene templates 1, grid 2'
    """
    return _judge(lambda image: read_by_templates(image, grid=grid), grid, "scene templates 1")


def _judge(read: Reader, grid: int, name: str) -> ProgramJudge:
    # A picture is asked about ten times in a row.
    last: list[tuple[str, SceneReading]] = []

    def answer(request: JudgeRequest) -> float:
        found = next((reading for key, reading in list(last) if key == request.image_hash), None)
        if found is None:
            found = read(request.image)
            last[:] = [*last[-7:], (request.image_hash, found)]
        return float(answer_sentence(request.criterion.text, found, grid=grid))

    return ProgramJudge(answer, judge_id=f"{name}, grid {grid}")


def read_by_templates(image: Tensor, *, grid: int = 2) -> SceneReading:
    """What stands in each cell, by the nearest of all pictures of one object or none on one of the backgrounds.

    Args:
        image: ``[3, h, w]`` uint8, h and w multiples of ``grid``.
        grid: rows and columns of cells.

    Returns:
        The reading. A cell that is like no template holds a patch without a shape; objects across cells are not seen as
        such.

    Raises:
        ValueError: if the picture has no whole cells.

    Example:
        >>> scene = Scene("white", (SceneObject("cross", "red", "large", 0, 1),))
        >>> [(o.colour, o.shape, o.cell) for o in read_by_templates(render_scene(scene, 32, 32)).objects]
        [('red', 'cross', (0, 1))]
    """
    height, width = image.shape[1:]
    if height % grid or width % grid or image.dtype != torch.uint8:
        raise ValueError(f"image: expected uint8 with sides in multiples of {grid}, got {list(image.shape)}")
    down, right = height // grid, width // grid
    cells = [(row, col) for row in range(grid) for col in range(grid)]
    pixels = image.cpu().numpy().astype(np.float32)
    windows = np.stack([pixels[:, r * down : (r + 1) * down, c * right : (c + 1) * right].ravel() for r, c in cells])
    squares = (windows**2).sum(1)[:, None]
    best: tuple[float, str, NDArray[np.int64], NDArray[np.float32]] | None = None
    for background in BACKGROUNDS:
        templates, norms = _templates(background, height, width, grid)
        errors = squares + norms - 2 * windows @ templates.T
        chosen = errors.argmin(1)
        least = np.take_along_axis(errors, chosen[:, None], 1)[:, 0]
        if best is None or least.sum() < best[0]:
            best = float(least.sum()), background, chosen, least
    assert best is not None
    _, background, chosen, least = best
    found = []
    for (row, col), index, error in zip(cells, chosen, least, strict=True):
        residual = float(np.sqrt(max(0.0, error) / windows.shape[1]))
        thing = _kinds()[index]
        if thing is None and residual <= _MAX_RESIDUAL:
            continue
        colour, shape, size = thing or (background, None, None)
        if residual > _MAX_RESIDUAL:
            shape = size = None
        found.append(FoundObject(colour, shape, size, row + 0.5, col + 0.5, max(0.0, 1 - residual / 255)))
    return SceneReading(background, tuple(found))


@lru_cache
def _kinds() -> tuple[tuple[str, str, str] | None, ...]:
    """What each template shows; None is the empty cell."""
    kinds = [kind for kind in product(COLOURS, SHAPES, SIZES) for _ in product(_JITTERS, repeat=2)]
    return (None, *kinds)


@lru_cache(maxsize=64)
def _templates(background: str, height: int, width: int, grid: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """``[k, 3 * h * w of a cell]`` and their squared norms."""
    down, right = height // grid, width // grid
    rows = []
    for colour, shape, size in product(COLOURS, SHAPES, SIZES):
        for jitter in product(_JITTERS, repeat=2):
            scene = Scene(background, (SceneObject(shape, colour, size, 0, 0, jitter),), grid)
            rows.append(render_scene(scene, height, width)[:, :down, :right].numpy().ravel())
    empty = np.broadcast_to(np.array(BACKGROUNDS[background], np.float32)[:, None, None], (3, down, right)).ravel()
    templates = np.stack([empty, *rows]).astype(np.float32)
    return templates, (templates**2).sum(1)
