"""One readable error for every primitive: check a tensor's shape against a named pattern."""

from torch import Tensor

__all__ = ["check_shape"]


def check_shape(name: str, tensor: Tensor, pattern: str, **sizes: int) -> dict[str, int]:
    """Check that ``tensor`` has the shape ``pattern`` and return the sizes it binds.

    A pattern is axis names and integers separated by spaces, in which ``...`` stands for any number of axes at
    that place. A name that is given in ``sizes``, or that occurs twice, must have one and the same size.

    Args:
        name: argument name for the error message.
        tensor: the tensor to check, any shape.
        pattern: for example ``"b c h w"``, ``"b 2"`` or ``"b ..."``.
        sizes: sizes that are already known, by axis name.

    Returns:
        Every named axis of the pattern and of ``sizes`` with its size.

    Raises:
        ValueError: naming the argument, the pattern, the shape it has and the sizes bound so far.

    Example:
        >>> import torch
        >>> check_shape("latents", torch.zeros(2, 4, 8, 6), "b c h w")
        {'b': 2, 'c': 4, 'h': 8, 'w': 6}
    """
    shape = tensor.shape
    axes = pattern.split()
    if "..." in axes:
        split = axes.index("...")
        behind = len(axes) - split - 1
        if len(shape) < split + behind:
            raise ValueError(_message(name, pattern, shape, sizes))
        pairs = [*zip(axes[:split], shape[:split], strict=True)]
        pairs += zip(axes[split + 1 :], shape[len(shape) - behind :], strict=True)
    elif len(axes) != len(shape):
        raise ValueError(_message(name, pattern, shape, sizes))
    else:
        pairs = [*zip(axes, shape, strict=True)]
    bound = dict(sizes)
    for axis, size in pairs:
        expected = int(axis) if axis.isdigit() else bound.setdefault(axis, size)
        if expected != size:
            raise ValueError(_message(name, pattern, shape, sizes))
    return bound


def _message(name: str, pattern: str, shape: tuple[int, ...], sizes: dict[str, int]) -> str:
    known = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    return f"{name}: expected shape [{pattern}]{f' with {known}' if known else ''}, got {list(shape)}"
