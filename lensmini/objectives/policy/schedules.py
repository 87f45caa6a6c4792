"""How fast DiffusionNFT's sampling policy follows the trained one.

No axes: numbers.
"""

from typing import Literal

__all__ = ["decay_ramp", "nft_decay"]


def nft_decay(step: int, kind: Literal[0, 1, 2] = 1) -> float:
    """Decay d of the old policy, ``old = d old + (1 - d) new``, by the published code's types.

    Type 0 copies every step (fully on-policy). Type 1 is ``min(0.001 step, 0.5)``, which Lens uses (its paper prints
    ``min(0.001, 0.5)``, and the code it builds on has the step in it). Type 2 copies until step 75 and then grows by
    0.0075 a step up to 0.999. Apply it as ``lerp_parameters_(old, new, weight=1 - d)``.

    Args:
        step: steps done, from 0.
        kind: 0, 1 or 2.

    Returns:
        d in [0, 1].

    Raises:
        ValueError: if ``step`` is negative or ``kind`` unknown.

    Example:
        >>> nft_decay(100), nft_decay(900), nft_decay(100, 2)
        (0.1, 0.5, 0.1875)
    """
    ramps = {0: (0, 0.0, 0.0), 1: (0, 0.001, 0.5), 2: (75, 0.0075, 0.999)}
    if kind not in ramps:
        raise ValueError(f"kind: expected 0, 1 or 2, got {kind!r}")
    start, rate, limit = ramps[kind]
    return decay_ramp(step, start=start, rate=rate, limit=limit)


def decay_ramp(step: int, *, start: int, rate: float, limit: float) -> float:
    """A decay of your own: 0 until ``start``, then ``rate`` more each step, at most ``limit``.

    Args:
        step: steps done, from 0.
        start: the last step with decay 0.
        rate: at least 0.
        limit: in [0, 1]; 1 would freeze the old policy.

    Returns:
        d in [0, ``limit``].

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> [decay_ramp(step, start=2, rate=0.25, limit=0.6) for step in (0, 2, 3, 9)]
        [0.0, 0.0, 0.25, 0.6]
    """
    if step < 0 or start < 0 or not rate >= 0 or not 0 <= limit <= 1:
        raise ValueError(
            f"step, start, rate, limit: expected at least 0 and limit in [0, 1], got {step}, {start}, {rate}, {limit}"
        )
    return min(max(step - start, 0) * rate, limit)
