"""What a picture is judged by: criteria and rubrics that are checked when they are made, with a hash of their content.

No axes: a rubric belongs to one prompt.
"""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["STRUCTURAL_INTEGRITY", "Criterion", "Rubric", "lens_rubric", "load_rubrics", "read_rubric", "save_rubrics"]

SCHEMA_VERSION = 1
MAX_CRITERIA, MAX_TEXT, MAX_PROMPT = 32, 600, 8000


@dataclass(frozen=True, kw_only=True, slots=True)
class Criterion:
    """One atomic check.

    Example:
        >>> check = Criterion(id="count", text="There are exactly three boats.", category="count")
        >>> check.normalise(1), len(check.hash)
        (1.0, 16)
    """

    id: str
    """Stable name, unique in its rubric: letters, digits, ``_`` and ``-``."""
    text: str
    """What has to hold, in one sentence about the picture."""
    category: str = "other"
    """Count, position, attribute, action, text, structure and so on; for sub-scores."""
    weight: float = 1.0
    """At least 0."""
    scale: Literal["binary", "levels", "real"] = "binary"
    """Answers: 0 or 1; a whole level from 1 to ``levels``; or a number from ``low`` to ``high``."""
    levels: int = 2
    """Of the scale ``levels``."""
    low: float = 0.0
    """Of the scale ``real``."""
    high: float = 1.0
    """Of the scale ``real``."""
    polarity: Literal["positive", "pitfall"] = "positive"
    """Whether a high answer is good, or says that a fault is there."""
    kind: Literal["judge", "program"] = "judge"
    """Who answers: a model, or a function."""
    required: bool = False
    """A gate: without it the other criteria count for nothing (where the aggregation has gates)."""
    needs: Literal["image", "image_and_prompt"] = "image_and_prompt"
    """What the judge has to see."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_\-]{1,80}", self.id):
            raise ValueError(f"id: expected 1 to 80 letters, digits, '_' or '-', got {self.id!r}")
        _check_text("text", self.text, MAX_TEXT)
        _check_text("category", self.category, 80)
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight of {self.id}: expected a finite number, at least 0, got {self.weight}")
        if self.scale == "levels" and not 2 <= self.levels <= 101:
            raise ValueError(f"levels of {self.id}: expected 2 to 101, got {self.levels}")
        if self.scale == "real" and not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low and high of {self.id}: expected finite, low < high, got {self.low} and {self.high}")

    @property
    def hash(self) -> str:
        """Sixteen digits of the content: the same check has the same hash in every rubric."""
        return _hash(asdict(self))

    def normalise(self, answer: float) -> float:
        """An answer on the criterion's scale as a score in [0, 1], high for a high answer.

        Raises:
            ValueError: if the answer is not on the scale; it is never clamped.
        """
        number = float(answer)
        first, last = {"binary": (0.0, 1.0), "levels": (1.0, float(self.levels)), "real": (self.low, self.high)}[
            self.scale
        ]
        whole = self.scale == "real" or number == round(number) if math.isfinite(number) else False
        if not (whole and first <= number <= last):
            raise ValueError(f"answer to {self.id}: expected {self.scale} from {first:g} to {last:g}, got {answer}")
        return (number - first) / (last - first)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rubric:
    """The criteria of one prompt: its own, and those that every prompt has.

    Example:
        >>> rubric = lens_rubric("Three boats.", {"object count": "There are exactly three boats."})
        >>> [criterion.id for criterion in rubric.all_criteria]
        ['object_count', 'structural_integrity']
        >>> read_rubric(rubric.to_json()) == rubric
        True
    """

    prompt_id: str
    """Names the prompt in files and logs."""
    prompt: str
    """What the picture was asked to show."""
    criteria: tuple[Criterion, ...]
    """Of this prompt."""
    global_criteria: tuple[Criterion, ...] = ()
    """Of every prompt."""
    schema_version: int = SCHEMA_VERSION
    """Of this form."""
    generator: str = "unknown"
    """What wrote the criteria: a model and the hash of its instructions."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version: expected {SCHEMA_VERSION}, got {self.schema_version}")
        _check_text("prompt_id", self.prompt_id, 200)
        _check_text("prompt", self.prompt, MAX_PROMPT)
        everything = self.all_criteria
        if not 1 <= len(everything) <= MAX_CRITERIA:
            raise ValueError(f"criteria of {self.prompt_id}: expected 1 to {MAX_CRITERIA}, got {len(everything)}")
        ids = [criterion.id for criterion in everything]
        repeated = sorted({name for name in ids if ids.count(name) > 1})
        if repeated:
            raise ValueError(f"criteria of {self.prompt_id}: expected unique ids, got {repeated} more than once")
        if not any(criterion.weight > 0 for criterion in everything):
            raise ValueError(f"criteria of {self.prompt_id}: expected at least one weight above 0")
        prompt = _words(self.prompt)
        for criterion in everything:
            text = _words(criterion.text)
            if prompt and (text == prompt or (len(prompt.split()) >= 5 and prompt in text)):
                raise ValueError(
                    f"criterion {criterion.id} of {self.prompt_id} only repeats the prompt: ask for one thing"
                )

    @property
    def all_criteria(self) -> tuple[Criterion, ...]:
        """The prompt's own criteria and then the global ones: the order of columns everywhere."""
        return self.criteria + self.global_criteria

    @property
    def hash(self) -> str:
        """Sixteen digits of the content."""
        return _hash(asdict(self))

    def to_json(self) -> str:
        """One line of JSON, that :func:`read_rubric` reads back."""
        return _canonical(asdict(self))


def lens_rubric(
    prompt: str,
    checks: Mapping[str, str],
    *,
    prompt_id: str | None = None,
    max_criteria: int = 10,
    generator: str = "unknown",
) -> Rubric:
    """The paper's form: a flat mapping from names to checks, up to ten, and one global criterion (arXiv 2605.21573 sec. 6).

    All binary, all of weight 1; a criterion's category is its name without the number behind it.

    Args:
        prompt: what the picture was asked to show.
        checks: checks by name, as :func:`lensmini.data.build_prompts` stores them; a repeated name has a number behind it.
        prompt_id: by default sixteen digits of the prompt's hash.
        max_criteria: 10 in the paper.
        generator: what wrote the checks.

    Returns:
        The rubric.

    Raises:
        ValueError: if there is no check or there are too many, names collide, or a check is empty, long or no text.

    Example:
        >>> rubric = lens_rubric("Two red cups.", {"object count": "Two cups.", "object count 2": "No plate."})
        >>> [(c.id, c.category) for c in rubric.criteria]
        [('object_count', 'object count'), ('object_count_2', 'object count')]
    """
    if not 1 <= len(checks) <= max_criteria:
        raise ValueError(f"checks: expected 1 to {max_criteria}, got {len(checks)}")
    criteria = []
    for name, text in checks.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(f"checks: expected texts by name, got {name!r}: {text!r}")
        slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        category = re.sub(r"\s*\d+$", "", name).strip()
        criteria.append(Criterion(id=slug, text=text, category=category))
    return Rubric(
        prompt_id=prompt_id or hashlib.sha256(prompt.encode()).hexdigest()[:16],
        prompt=prompt,
        criteria=tuple(criteria),
        global_criteria=(STRUCTURAL_INTEGRITY,),
        generator=generator,
    )


def read_rubric(text: str | bytes) -> Rubric:
    """A rubric from JSON, every field checked: unknown fields, wrong types and impossible values are refused.

    Args:
        text: JSON, as :meth:`Rubric.to_json` writes it.

    Returns:
        The rubric.

    Raises:
        ValueError: naming each field that is wrong.
        ImportError: without ``pip install lensmini[endpoints]``.

    Example:
        >>> read_rubric('{"prompt_id": "a"}')
        Traceback (most recent call last):
        ...
        ValueError: rubric: prompt: Field required; criteria: Field required
    """
    try:
        import pydantic
    except ImportError as error:
        raise ImportError("reading rubrics needs pydantic: pip install lensmini[endpoints]") from error
    try:
        return pydantic.TypeAdapter(Rubric).validate_json(text)
    except pydantic.ValidationError as error:
        parts = [f"{'.'.join(map(str, e['loc'])) or 'rubric'}: {e['msg']}" for e in error.errors(include_input=False)]
        raise ValueError(f"rubric: {'; '.join(parts[:10])}") from None


def save_rubrics(path: str | Path, rubrics: Iterable[Rubric]) -> None:
    """Write rubrics as JSON lines, all or nothing.

    Args:
        path: the file, replaced in one step.
        rubrics: with prompt ids of their own.

    Raises:
        ValueError: if a prompt id comes twice.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_rubrics(Path(folder) / "r.jsonl", [lens_rubric("Two cups.", {"object count": "Exactly two."})])
        ...     [rubric.prompt for rubric in load_rubrics(Path(folder) / "r.jsonl")]
        ['Two cups.']
    """
    kept = list(rubrics)
    _check_ids(kept)
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".new")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.writelines(rubric.to_json() + "\n" for rubric in kept)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_rubrics(path: str | Path) -> list[Rubric]:
    """Read JSON lines of rubrics, all of them checked now rather than at step 40.

    Args:
        path: the file.

    Returns:
        The rubrics in order.

    Raises:
        ValueError: naming the line of the first rubric that is wrong, or a prompt id that comes twice.

    Example:
        >>> load_rubrics(os.devnull)
        []
    """
    rubrics = []
    with Path(path).open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    rubrics.append(read_rubric(line))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None
    _check_ids(rubrics)
    return rubrics


def _check_ids(rubrics: list[Rubric]) -> None:
    seen: set[str] = set()
    for rubric in rubrics:
        if rubric.prompt_id in seen:
            raise ValueError(f"prompt_id: expected unique ids, got {rubric.prompt_id!r} twice")
        seen.add(rubric.prompt_id)


def _check_text(name: str, value: str, most: int) -> None:
    if not isinstance(value, str) or not value.strip() or len(value) > most:
        shown = value if not isinstance(value, str) else f"{len(value)} characters, {value[:40]!r}"
        raise ValueError(f"{name}: expected 1 to {most} characters of text, got {shown}")
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", value):
        raise ValueError(f"{name}: expected no control characters, got {value[:40]!r}")


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _hash(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:16]


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


STRUCTURAL_INTEGRITY = Criterion(
    id="structural_integrity",
    category="structure",
    needs="image",
    text=(
        "Everything in the picture is built as it would be in its world: bodies have the right number of limbs, fingers and "
        "features in their places, objects keep their shape and hold together, lettering is made of real letters, lines and "
        "perspective agree, and nothing melts, repeats or is cut without reason."
    ),
)
"""The criterion that every prompt of the Lens recipe has besides its own."""
