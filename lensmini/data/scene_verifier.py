"""Exact answers to questions about a picture of the miniature world.

Axes: h height, w width, in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

from torch import Tensor

from lensmini.data.scene_captions import RELATIONS
from lensmini.data.scene_reader import FoundObject, SceneReading, read_scene
from lensmini.data.scenes import Scene

__all__ = [
    "AskBackground",
    "AskCount",
    "AskPlace",
    "AskRelation",
    "Pattern",
    "Question",
    "VerdictReport",
    "answer_question",
    "questions_about",
    "verify_scene",
]

_APART = 0.5
"""Distance in cells from which one object is left of, or above, another."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which objects are meant; None means any.

    Example:
        >>> str(Pattern("red", "circle")), str(Pattern(size="large"))
        ('red circle', 'large object')
    """

    colour: str | None = None
    shape: str | None = None
    size: str | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, (self.size, self.colour, self.shape or "object")))

    def matches(self, thing: FoundObject) -> bool:
        """Whether the object is meant."""
        return (
            self.colour in (None, thing.colour)
            and self.shape in (None, thing.shape)
            and self.size in (None, thing.size)
        )


@dataclass(frozen=True, slots=True)
class AskCount:
    """Is the number of such objects exactly this? With the empty pattern: of all objects, the precision question.

    Example:
        >>> str(AskCount(2, Pattern("red"))), str(AskCount(3))
        ('exactly 2 x red object', 'exactly 3 x object')
    """

    number: int
    what: Pattern = Pattern()

    def __str__(self) -> str:
        return f"exactly {self.number} x {self.what}"


@dataclass(frozen=True, slots=True)
class AskPlace:
    """Is there such an object in this cell?

    Example:
        >>> str(AskPlace(Pattern("red", "circle"), row=0, col=1))
        'red circle in row 0, column 1'
    """

    what: Pattern
    row: int
    col: int

    def __str__(self) -> str:
        return f"{self.what} in row {self.row}, column {self.col}"


@dataclass(frozen=True, slots=True)
class AskRelation:
    """Does some such object stand in this relation (left of, right of, above, below) to some such other one?

    It does if their centres are at least half a cell apart in that direction.

    Example:
        >>> str(AskRelation(Pattern("red"), "left of", Pattern("blue")))
        'red object left of blue object'
    """

    what: Pattern
    relation: str
    other: Pattern

    def __post_init__(self) -> None:
        if self.relation not in RELATIONS:
            raise ValueError(f"relation: expected one of {list(RELATIONS)}, got {self.relation!r}")

    def __str__(self) -> str:
        return f"{self.what} {self.relation} {self.other}"


@dataclass(frozen=True, slots=True)
class AskBackground:
    """Is the background of this colour?

    Example:
        >>> str(AskBackground("white"))
        'white background'
    """

    background: str

    def __str__(self) -> str:
        return f"{self.background} background"


Question = AskCount | AskPlace | AskRelation | AskBackground


@dataclass(frozen=True, slots=True)
class VerdictReport:
    """The answers to a picture's questions.

    Example:
        >>> report = VerdictReport((AskCount(1), AskCount(2)), (True, False), (True, True), SceneReading("white", ()))
        >>> report.strict, report.atom, report.loose
        (False, 0.5, True)
    """

    questions: tuple[Question, ...]
    answers: tuple[bool, ...]
    """True = right, in the order of the questions."""
    loose_answers: tuple[bool, ...]
    """The same if colours, numbers and places count but shapes and sizes do not."""
    reading: SceneReading

    @property
    def strict(self) -> bool:
        """Everything is right."""
        return all(self.answers)

    @property
    def atom(self) -> float:
        """Share of the questions that are right."""
        return sum(self.answers) / len(self.answers)

    @property
    def loose(self) -> bool:
        """Everything is right by colour."""
        return all(self.loose_answers)


def verify_scene(image: Tensor, expected: Scene | Sequence[Question], *, grid: int = 2) -> VerdictReport:
    """Read a picture and answer questions about it.

    Args:
        image: ``[3, h, w]`` RGB, uint8, or floating in 0..1 (values outside are clamped).
        expected: the questions, or a scene, for those of :func:`questions_about`.
        grid: rows and columns of cells that places refer to; a scene brings its own.

    Returns:
        The answers, and what they rest on.

    Raises:
        ValueError: if there is no question, or the image is not as above or not finite.

    Example:
        >>> from lensmini.data.scenes import render_scene, sample_scene
        >>> scene = sample_scene(generator=0)
        >>> verify_scene(render_scene(scene, 32, 32), scene).strict
        True
    """
    if isinstance(expected, Scene):
        grid, questions = expected.grid, questions_about(expected)
    else:
        questions = tuple(expected)
    if not questions:
        raise ValueError("expected: expected a scene or at least one question, got none")
    reading = read_scene(image, grid=grid)
    loose = tuple(answer_question(_by_colour(question, questions), reading) for question in questions)
    return VerdictReport(questions, tuple(answer_question(question, reading) for question in questions), loose, reading)


def questions_about(scene: Scene, *, ask_size: bool = False) -> tuple[Question, ...]:
    """The questions that only a picture of exactly this scene, up to jitter, answers: number, background, each object.

    Args:
        scene: the scene.
        ask_size: whether an object's size matters too.

    Returns:
        ``2 + len(scene.objects)`` questions.

    Example:
        >>> from lensmini.data.scenes import SceneObject
        >>> [str(q) for q in questions_about(Scene("white", (SceneObject("circle", "red", "large", 0, 1),)))]
        ['exactly 1 x object', 'white background', 'red circle in row 0, column 1']
    """
    places = tuple(
        AskPlace(Pattern(thing.colour, thing.shape, thing.size if ask_size else None), thing.row, thing.col)
        for thing in scene.objects
    )
    return (AskCount(len(scene.objects)), AskBackground(scene.background), *places)


def answer_question(question: Question, reading: SceneReading) -> bool:
    """What a reading says to a question.

    Args:
        question: about objects or the background.
        reading: of a picture, by :func:`read_scene` or another reader.

    Returns:
        The answer.

    Example:
        >>> answer_question(AskCount(0), SceneReading("white", ()))
        True
    """
    match question:
        case AskCount(number, what):
            return sum(map(what.matches, reading.objects)) == number
        case AskPlace(what, row, col):
            return any(what.matches(thing) and thing.cell == (row, col) for thing in reading.objects)
        case AskRelation(what, relation, other):
            pairs = permutations(reading.objects, 2)
            return any(what.matches(a) and other.matches(b) and _stands(a, relation, b) for a, b in pairs)
        case AskBackground(background):
            return reading.background == background


def _stands(one: FoundObject, relation: str, other: FoundObject) -> bool:
    right, down = one.x - other.x, one.y - other.y
    return {"left of": -right, "right of": right, "above": -down, "below": down}[relation] >= _APART


def _by_colour(question: Question, questions: tuple[Question, ...]) -> Question:
    """The same question with shapes and sizes left out; counts of different shapes of one colour add up."""
    match question:
        case AskCount(_, Pattern(colour, shape, size)) if shape is not None:
            alike = {
                other.what.shape: other.number
                for other in questions
                if isinstance(other, AskCount)
                and other.what.shape is not None
                and (other.what.colour, other.what.size) == (colour, size)
            }
            return AskCount(sum(alike.values()), Pattern(colour))
        case AskCount(_, what) | AskPlace(what, _, _):
            return replace(question, what=Pattern(what.colour))
        case AskRelation(what, _, other):
            return replace(question, what=Pattern(what.colour), other=Pattern(other.colour))
        case AskBackground():
            return question
