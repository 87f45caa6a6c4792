"""A rewriter in front of the pipeline: any callable from a request to something with ``prompt``, ``status`` and ``record``.

No axes: text.
"""

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["rewrite_prompts"]


def rewrite_prompts(
    prompts: Sequence[str], rewriter: Callable[[str], Any] | None
) -> tuple[list[str], list[dict[str, Any] | None]]:
    """What to paint, and what became of every request.

    Args:
        prompts: as a person wrote them.
        rewriter: a :class:`lensmini.prompting.Rewriter` or the like; if it has ``rewrite_all``, all are asked together. None
            leaves the prompts as they are.

    Returns:
        The prompts, and for each the record to be kept beside its pictures, None without a rewriter.

    Raises:
        ValueError: if a request was refused, naming it and the cause. Whoever wants to go on paints the others.

    Example:
        >>> from lensmini.prompting import Rewrite
        >>> prompts, records = rewrite_prompts(
        ...     ["a fox"], lambda text: Rewrite(request=text, prompt=f"{text} in the snow", status="rewritten")
        ... )
        >>> prompts, records[0]["status"]
        (['a fox in the snow'], 'rewritten')
    """
    if rewriter is None:
        return list(prompts), [None] * len(prompts)
    together = getattr(rewriter, "rewrite_all", None)
    rewrites = [rewriter(prompt) for prompt in prompts] if together is None else together(list(prompts))
    for index, rewrite in enumerate(rewrites):
        if rewrite.status == "refused":
            why = ": ".join(filter(None, (rewrite.cause, rewrite.detail)))
            raise ValueError(f"prompt[{index}]: expected a request that is not refused, got {why[:300]}")
    return [rewrite.prompt for rewrite in rewrites], [rewrite.record() for rewrite in rewrites]
