"""What a language model is asked in order to write prompts and their rubrics, in our own words.

After arXiv 2605.21573, section 3.2.1: prompts of one item in some of eight dimensions, and rubrics that a picture of the prompt
can be checked by, one point at a time.
"""

import hashlib
from collections.abc import Sequence
from random import Random

from lensmini.data.prompts.taxonomy import Item
from lensmini.endpoint import ChatRequest

__all__ = ["DIMENSIONS", "GLOBAL_RUBRIC", "RUBRIC_NAMES", "draw_dimensions", "prompt_request", "rubric_request"]

DIMENSIONS = {
    "global": "the overall look: medium, style, light, mood or viewpoint",
    "counting": "an exact number of clearly separate things",
    "position": "where things are, in the frame or relative to each other",
    "attribute": "material, texture, shape, size, age or condition of a thing",
    "colour": "definite colours that belong to definite things",
    "relation": "how things stand to each other: part of, made of, larger than, matching",
    "text": "a short legible text, given in double quotes, on a definite surface",
    "interaction": "somebody or something acting on another",
}
"""The paper's seven and interaction."""

RUBRIC_NAMES = (
    "object presence",
    "object count",
    "spatial layout",
    "attribute accuracy",
    "colour accuracy",
    "relation accuracy",
    "action accuracy",
    "text rendering",
    "style and medium",
    "lighting and mood",
    "background and setting",
    "expression and pose",
)
"""Names that rubrics may have, with a number behind where one comes again ("object count 2")."""

GLOBAL_RUBRIC = (
    "structural integrity (overall)",
    "Everything in the picture is built as it would be in its world: bodies have the right number of limbs, fingers and "
    "features in their places, objects keep their shape and hold together, lettering is made of real letters, lines and "
    "perspective agree, and nothing melts, repeats or is cut without reason.",
)
"""Name and check of the rubric that every prompt has besides its own."""

_GRAPHIC = ("Text", "UI and Graphic Design")


def draw_dimensions(item: Item, *, seed: int = 0) -> tuple[str, ...]:
    """One to four dimensions for an item, in the order of ``DIMENSIONS``; a function of seed and item alone.

    Items of the category Text always have the dimension "text".

    Example:
        >>> draw_dimensions(Item("Food", "Breads", "bagel")) == draw_dimensions(Item("Food", "Breads", "bagel"))
        True
    """
    text = "/".join((str(seed), *item))
    random = Random(hashlib.sha256(text.encode()).digest())
    drawn = set(random.sample(sorted(DIMENSIONS), random.randint(1, 4)))
    if item.category == "Text" and "text" not in drawn:
        drawn = {*sorted(drawn)[:3], "text"}
    return tuple(name for name in DIMENSIONS if name in drawn)


def prompt_request(
    item: Item, dimensions: Sequence[str], *, number: int = 5, attempt: int = 0, max_tokens: int = 1024
) -> ChatRequest:
    """Ask for varied prompts of one item.

    Args:
        item: what they are about.
        dimensions: names of ``DIMENSIONS`` that every prompt must use.
        number: of prompts; the paper asks for five.
        attempt: another one asks for other answers.
        max_tokens: of the answer.

    Example:
        >>> request = prompt_request(Item("Food", "Breads", "bagel"), ["counting"])
        >>> "bagel" in request.messages[0]["content"], "exact number" in request.messages[0]["content"]
        (True, True)
    """
    unknown = [name for name in dimensions if name not in DIMENSIONS]
    if unknown or not dimensions:
        raise ValueError(f"dimensions: expected names of {tuple(DIMENSIONS)}, got {list(dimensions)}")
    wanted = "\n".join(f"- {name}: {DIMENSIONS[name]}" for name in dimensions)
    if item.category in _GRAPHIC:
        look = "Describe a finished design or a photograph of the real thing, whichever suits it better."
    elif item.category == "Fictional World":
        look = "Describe it so that it could be painted or filmed; it need not exist."
    else:
        look = "Describe a believable photograph."
    text = f"""\
Write {number} prompts for a model that paints pictures from text. All are about the same subject, and each is a different \
picture of it: another place, time, company and composition.

Subject: {item.name} (from "{item.subcategory}", "{item.category}")

Every prompt must state all of these, woven into the description and not listed:
{wanted}

Rules: one paragraph of 30 to 60 words each, in plain English; the subject is the main thing in the picture. {look} \
Say only what an eye could check in the picture. No real living persons, no brands, no words about \
quality such as "masterpiece" or "4k".

Answer with a JSON list of {number} strings and nothing else."""
    return ChatRequest([{"role": "user", "content": text}], temperature=1.0, max_tokens=max_tokens, seed=attempt)


def rubric_request(
    prompt: str, dimensions: Sequence[str], *, number: int = 10, attempt: int = 0, max_tokens: int = 1024
) -> ChatRequest:
    """Ask for the checks that a picture of a prompt has to pass.

    Args:
        prompt: the prompt.
        dimensions: that it was written for; each must be checked.
        number: most rubrics; the paper has up to ten.
        attempt: another one asks for other answers.
        max_tokens: of the answer.

    Example:
        >>> "three bagels" in rubric_request("A photo of three bagels.", ["counting"]).messages[0]["content"]
        True
    """
    names = ", ".join(RUBRIC_NAMES)
    text = f"""\
A model painted a picture from the prompt below. Write the checks by which somebody who sees only prompt and picture \
decides how faithful it is: between 3 and {number} of them, each about one single thing that the prompt demands.

<prompt>
{prompt.replace("<", "(").replace(">", ")")}
</prompt>

Rules: every check is one short sentence that is true of a perfect picture and can be answered by looking; name the thing, its \
number, colour, place or wording as the prompt does; nothing that the prompt does not say; no two checks about the same thing; \
at least one check for each of: {", ".join(dimensions)}. Do not check anatomy, sharpness or general quality: others do.

Answer with one flat JSON object. Keys are names from this list: {names}; where a name is needed again, add a number to it, \
as in "object count 2". Values are the checks. Nothing else."""
    return ChatRequest([{"role": "user", "content": text}], temperature=0.7, max_tokens=max_tokens, seed=attempt)
