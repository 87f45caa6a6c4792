"""Which arithmetic the small runs use on this machine."""

from typing import Literal

import torch

__all__ = ["fast_dtype"]


def fast_dtype() -> Literal["float32", "bfloat16"]:
    """The faster of two dtypes for matrix products on this CPU.

    Without AVX-512 or its like torch multiplies bfloat16 element by element, which takes ninety times as long as float32.

    Example:
        >>> fast_dtype() in ("float32", "bfloat16")
        True
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return "bfloat16" if supported is not None and supported() else "float32"
