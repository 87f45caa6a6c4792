"""The prompt suite of the miniature world: requests of six kinds, their questions, and the score of pictures.

A request ("a red circle") leaves most of a scene open. Its prompt carries one full scene that fulfils it, whose dense
caption is the prompt's dense form: what a rewriter that knows the training captions would make of the request. Both
forms are judged by the same questions: what was asked, and that nothing else was painted.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lensmini.data.scene_captions import PLURALS, Wording, describe_scene, place_name, relations_between
from lensmini.data.scene_verifier import (
    AskCount,
    AskPlace,
    AskRelation,
    Pattern,
    Question,
    VerdictReport,
    questions_about,
    verify_scene,
)
from lensmini.data.scenes import (
    Pairs,
    Scene,
    SceneObject,
    arrange_scene,
    as_random,
    pair_pool,
    pick,
    render_scene,
    shuffled,
)

__all__ = ["KINDS", "KindScore", "ScenePrompt", "SuiteScore", "build_scene_prompts", "chance_score", "score_images"]

KINDS = ("single", "two", "count", "position", "relation", "whole")
"""One object; two; two to four equal ones; one at a place; two in a relation; everything including the background."""

_NUMBERS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True, slots=True)
class ScenePrompt:
    """A request, its questions, and one scene that fulfils it.

    Example:
        >>> [prompt.kind for prompt in build_scene_prompts(1, 0)]
        ['single', 'two', 'count', 'position', 'relation', 'whole']
    """

    kind: str
    text: str
    """What the model is given."""
    questions: tuple[Question, ...]
    """What decides whether a picture is right."""
    scene: Scene
    """A full scene for which every question holds; the dense form describes it."""


@dataclass(frozen=True, slots=True)
class KindScore:
    """Means over the prompts of one kind.

    Example:
        >>> KindScore(strict=0.25, atom=0.5, loose=0.75, num=4).strict
        0.25
    """

    strict: float
    """Share of prompts of which every question is right."""
    atom: float
    """Mean share of right questions."""
    loose: float
    """Like strict, by colour only: shapes are ignored."""
    num: int


@dataclass(frozen=True, slots=True)
class SuiteScore:
    """Scores by kind and their plain means over the kinds.

    Example:
        >>> score = SuiteScore({"two": KindScore(0.5, 0.6, 0.7, 8), "whole": KindScore(0.0, 0.2, 0.3, 8)}, ())
        >>> score.strict, round(score.strict_error, 3)
        (0.25, 0.088)
    """

    by_kind: dict[str, KindScore]
    reports: tuple[VerdictReport, ...]
    """One per image, in the order given."""

    @property
    def strict(self) -> float:
        """Mean of the kinds' strict scores."""
        return math.fsum(score.strict for score in self.by_kind.values()) / len(self.by_kind)

    @property
    def atom(self) -> float:
        """Mean of the kinds' atom scores."""
        return math.fsum(score.atom for score in self.by_kind.values()) / len(self.by_kind)

    @property
    def loose(self) -> float:
        """Mean of the kinds' loose scores."""
        return math.fsum(score.loose for score in self.by_kind.values()) / len(self.by_kind)

    @property
    def strict_error(self) -> float:
        """Standard error of ``strict``, ``sqrt(sum_k p_k (1 - p_k) / n_k) / K`` for K kinds of n_k prompts.

        It is 0 where every kind scores 0 or 1, which says nothing about certainty.
        """
        variance = math.fsum(score.strict * (1 - score.strict) / score.num for score in self.by_kind.values())
        return math.sqrt(variance) / len(self.by_kind)


def build_scene_prompts(
    num_per_kind: int,
    seed: int,
    *,
    form: Literal["dense", "short"] = "dense",
    wording: Wording = "varied",
    kinds: Sequence[str] = KINDS,
    pairs: Pairs = "seen",
    grid: int = 2,
    ask_size: bool = False,
) -> list[ScenePrompt]:
    """Build a suite; the same seed gives the same requests and scenes in either form.

    Args:
        num_per_kind: prompts of each kind.
        seed: of the suite; a prompt depends only on it, its kind and its number.
        form: "dense" gives the dense caption of the prompt's scene as text, "short" the bare request.
        wording: of the dense captions, as :func:`~lensmini.data.scene_captions.describe_scene` takes it.
        kinds: a selection of :data:`KINDS`.
        pairs: "seen" asks only for colour-shape pairs of the training scenes; "withheld" makes the first object of
            every request one of :data:`~lensmini.data.scenes.WITHHELD_PAIRS`; "all" takes any.
        grid: rows and columns of cells, 2 or 3.
        ask_size: whether the dense form of the kind "whole" is asked about sizes too; by default no kind is.

    Returns:
        ``num_per_kind * len(kinds)`` prompts, kinds interleaved, so that any front part is balanced.

    Raises:
        ValueError: if an argument is not as above.

    Example:
        >>> prompts = build_scene_prompts(1, 0, form="short", kinds=["single"])
        >>> len(prompts), [str(question) for question in prompts[0].questions][0]
        (1, 'exactly 1 x object')
    """
    if num_per_kind < 1 or form not in ("dense", "short") or not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(
            f'num_per_kind, form, kinds: expected a positive number, "dense" or "short", and some of {list(KINDS)}, '
            f"got {num_per_kind}, {form!r}, {list(kinds)}"
        )
    if grid not in (2, 3):
        raise ValueError(f"grid: expected 2 or 3, got {grid}")
    return [
        _build(kind, f"{seed} {kind} {number}", form, wording, pairs, grid, ask_size)
        for number in range(num_per_kind)
        for kind in kinds
    ]


def _build(kind: str, key: str, form: str, wording: Wording, pairs: Pairs, grid: int, ask_size: bool) -> ScenePrompt:
    stream = as_random(0, f"prompt {key}")
    first = pick(stream, pair_pool(pairs))
    others = [pair for pair in pair_pool("all" if pairs == "all" else "seen") if pair != first]
    second, *rest = shuffled(stream, others)
    number = pick(stream, (2, 3, 4))
    chosen = {
        "single": [first],
        "two": [first, second],
        "count": [first] * number,
        "position": [first],
        "relation": [first, second],
        "whole": [first, second, *rest][:number],
    }[kind]
    scene = arrange_scene(stream, chosen, grid=grid)
    one, other = scene.objects[0], scene.objects[-1]
    relation = None
    total = AskCount(len(chosen))
    if kind == "count":
        colour, shape = first
        request = f"{_NUMBERS[number]} {colour} {PLURALS[shape]}"
        questions: tuple[Question, ...] = (total, AskCount(number, Pattern(*first)))
    elif kind == "position":
        request = f"{_name(one)} at the {place_name(one.cell, grid)}"
        questions = (total, AskPlace(Pattern(*first), *one.cell))
    elif kind == "relation":
        relation = pick(stream, relations_between(one, other))
        request = f"{_name(one)} {relation} {_name(other)}"
        questions = (total, *_each(chosen), AskRelation(Pattern(*first), relation, Pattern(*second)))
    elif kind == "whole":
        things = " , ".join(f"{_name(thing)} at the {place_name(thing.cell, grid)}" for thing in scene.objects)
        request = f"{things} , on a {scene.background} background"
        questions = questions_about(scene, ask_size=ask_size and form == "dense")
    else:
        request = " and ".join(_name(thing) for thing in scene.objects)
        questions = (total, *_each(chosen))
    seed = int(stream.random() * 2**53)
    text = request if form == "short" else describe_scene(scene, wording=wording, relation=relation, generator=seed)
    return ScenePrompt(kind, text, questions, scene)


def _each(pairs: Iterable[tuple[str, str]]) -> tuple[AskCount, ...]:
    return tuple(AskCount(1, Pattern(*pair)) for pair in pairs)


def _name(thing: SceneObject) -> str:
    return f"a {thing.colour} {thing.shape}"


def score_images(images: Iterable[Tensor], prompts: Sequence[ScenePrompt]) -> SuiteScore:
    """Judge one picture per prompt.

    Args:
        images: as many as prompts: a tensor ``[b, 3, h, w]``, or any tensors ``[3, h_i, w_i]``, as
            :func:`~lensmini.data.scene_verifier.verify_scene` takes them.
        prompts: what each was to show.

    Returns:
        The scores.

    Raises:
        ValueError: if there is no prompt or the numbers differ.

    Example:
        >>> prompts = build_scene_prompts(2, 0)
        >>> score_images([render_scene(prompt.scene, 32, 32) for prompt in prompts], prompts).strict
        1.0
    """
    pictures = list(images)
    if not prompts or len(pictures) != len(prompts):
        raise ValueError(f"images: expected one for each of {len(prompts)} prompts (at least one), got {len(pictures)}")
    reports = tuple(
        verify_scene(image, prompt.questions, grid=prompt.scene.grid)
        for image, prompt in zip(pictures, prompts, strict=True)
    )
    by_kind = {}
    for kind in dict.fromkeys(prompt.kind for prompt in prompts):
        judged = [report for report, prompt in zip(reports, prompts, strict=True) if prompt.kind == kind]
        rows = [(report.strict, report.atom, report.loose) for report in judged]
        means = [math.fsum(values) / len(judged) for values in zip(*rows, strict=True)]
        by_kind[kind] = KindScore(*means, num=len(judged))
    return SuiteScore(by_kind, reports)


def chance_score(
    prompts: Sequence[ScenePrompt], *, height: int = 32, width: int = 32, images: Sequence[Tensor] | None = None
) -> SuiteScore:
    """The score of perfect pictures of the wrong prompts: what a model gets that ignores its prompt but not its kind.

    Each prompt is judged by the picture of the next prompt of its kind, so every picture is used once. Two requests
    may coincide, which is part of chance: often so with ``pairs="withheld"``, where there are few pairs to ask for.

    Args:
        prompts: the suite, at least two prompts of each kind.
        height: pixels of the rendered pictures.
        width: the same.
        images: a model's pictures for these prompts, to be shifted instead of the rendered scenes.

    Returns:
        The scores.

    Raises:
        ValueError: if a kind has one prompt only, or there are not as many images as prompts.

    Example:
        >>> chance_score(build_scene_prompts(20, 0)).strict < 0.1
        True
    """
    if images is not None and len(images) != len(prompts):
        raise ValueError(f"images: expected one for each of {len(prompts)} prompts, got {len(images)}")
    source = list(range(len(prompts)))
    for kind in dict.fromkeys(prompt.kind for prompt in prompts):
        members = [index for index, prompt in enumerate(prompts) if prompt.kind == kind]
        if len(members) < 2:
            raise ValueError(f"prompts: expected at least two of each kind, got one of kind {kind!r}")
        for index, following in zip(members, [*members[1:], members[0]], strict=True):
            source[index] = following
    pictures = [render_scene(prompt.scene, height, width) for prompt in prompts] if images is None else images
    return score_images([pictures[index] for index in source], prompts)
