"""When must a primitive be written in plain differentiable operations?

In eager mode the block uses hand-written backward passes that keep less and read memory fewer times. The compiler fuses
plain operations by itself, and forward-mode or nested differentiation needs them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.autograd import forward_ad

__all__ = ["needs_plain_ops", "plain_ops"]

_plain: ContextVar[bool] = ContextVar("plain_ops", default=False)


@contextmanager
def plain_ops() -> Iterator[None]:
    """Use plain operations inside, which can be differentiated any number of times.

    Example:
        >>> with plain_ops():
        ...     needs_plain_ops()
        True
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def needs_plain_ops() -> bool:
    """True while compiling, in ``torch.func`` transforms, in a forward-mode level and under :func:`plain_ops`.

    Example:
        >>> needs_plain_ops()
        False
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()  # noqa: SLF001
        or forward_ad._current_level >= 0  # noqa: SLF001
        or _plain.get()
    )
