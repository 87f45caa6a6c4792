"""When must a primitive be written in plain differentiable operations?

In eager mode the block uses hand-written backward passes that keep less and read memory fewer times. The compiler fuses
plain operations by itself, and forward-mode or nested differentiation needs them.
"""

import torch
from torch.autograd import forward_ad

__all__ = ["needs_plain_ops"]


def needs_plain_ops() -> bool:
    """True while compiling, inside ``torch.func`` transforms and inside a forward-mode level.

    Example:
        >>> needs_plain_ops()
        False
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()  # noqa: SLF001
        or forward_ad._current_level >= 0  # noqa: SLF001
    )
