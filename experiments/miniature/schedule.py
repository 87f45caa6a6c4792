"""The learning-rate schedule of the miniature's stages."""

__all__ = ["warmup_flat_decay"]


def warmup_flat_decay(step: int, steps: int, warmup: int, decay_share: float) -> float:
    """Factor of the learning rate at a step: linear warm-up, flat, linear decay towards zero.

    ``min(1, s / warmup, (steps - s + 1) / (decay_share * steps))`` for s = 1..steps.

    Args:
        step: s, counted from 1.
        steps: of the whole run.
        warmup: steps of the warm-up, 0 for none.
        decay_share: share of the steps in which the rate falls.

    Returns:
        Factor in (0, 1].

    Raises:
        ValueError: if ``step`` is not in 1..``steps``.

    Example:
        >>> [warmup_flat_decay(step, 10, 2, 0.5) for step in (1, 2, 5, 6, 10)]
        [0.5, 1.0, 1.0, 1.0, 0.2]
    """
    if not 1 <= step <= steps:
        raise ValueError(f"step: expected 1..{steps}, got {step}")
    return min(1.0, step / max(1, warmup), (steps - step + 1) / max(1.0, steps * decay_share))
