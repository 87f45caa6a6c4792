"""Which scores keep a picture: the paper's thresholds where it gives them, ours where it does not."""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["FILTER_CAUSES", "Thresholds", "judge"]

FILTER_CAUSES = ("area", "nsfw", "aesthetic", "watermark", "clarity", "entropy", "luminance", "not a number")
"""Why a picture that can be read is left out, in the paper's order; near-duplicates come after, among the kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """Bounds on the scores of one picture (arXiv 2605.21573, section 2.1); None switches a filter off.

    The bounds on clarity, entropy and luminance are ours. Seven of scikit-image's colour photographs have clarity 142 to
    839, entropy 5.0 to 7.7 and luminance 0.09 to 0.71; blurred by 2 / 256 of the shorter side they have clarity 3 to 19,
    and at a fiftieth of their contrast entropy 0.4 to 2.3. Smooth drawings fall below the clarity of photographs.

    Example:
        >>> judge({"area": 512 * 512, "clarity": 2.0}, Thresholds()), judge({"area": 512 * 512}, Thresholds())
        ('clarity', None)
    """

    min_area: float | None = 384 * 384
    """The paper's: pixels."""
    max_nsfw: float | None = 0.5
    """Ours: probability of at least the medium level; more likely than not."""
    min_aesthetic: float | None = 3.0
    """The paper's: score of Aesthetic Predictor V2.5, 1 to 10."""
    max_watermark: float | None = 0.5
    """Ours: probability; more likely than not."""
    min_clarity: float | None = 30.0
    """Ours: variance of the Laplacian in gray levels squared, see :func:`filter_clarity`."""
    min_entropy: float | None = 3.0
    """Ours: bits, see :func:`filter_entropy`; what eight equally frequent gray levels have."""
    min_luminance: float | None = 0.05
    """Ours: mean HSV value."""
    max_luminance: float | None = 0.98
    """Ours: mean HSV value."""
    max_duplicate_cosine: float = 0.985
    """The paper's: cosine of CLIP ViT-L/14 embeddings."""


def judge(scores: Mapping[str, float], thresholds: Thresholds) -> str | None:
    """The first reason of ``FILTER_CAUSES`` to leave a picture out, None to keep it.

    Args:
        scores: by name as in ``FILTER_CAUSES``; a filter without a score is passed over.
        thresholds: the bounds; a score on a bound is kept.

    Returns:
        The cause. A score that is not a number is never passed over: it is a cause of its own.

    Raises:
        ValueError: if a score has an unknown name.

    Example:
        >>> judge({"luminance": 0.01, "nsfw": 0.9}, Thresholds()), judge({"nsfw": float("nan")}, Thresholds())
        ('nsfw', 'not a number')
    """
    unknown = set(scores) - set(FILTER_CAUSES[:-1])
    if unknown:
        raise ValueError(f"scores: expected names among {FILTER_CAUSES[:-1]}, got {sorted(unknown)}")
    if any(score != score for score in scores.values()):
        return FILTER_CAUSES[-1]
    for name in FILTER_CAUSES[:-1]:
        low, high = (getattr(thresholds, f"{side}_{name}", None) for side in ("min", "max"))
        score = scores.get(name)
        if score is not None and ((low is not None and score < low) or (high is not None and score > high)):
            return name
    return None
