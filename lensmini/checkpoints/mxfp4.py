"""MXFP4 weights as GPT-OSS stores them, unpacked to plain floating point.

Axes: x experts, o output features, g groups of 32 input features, i = 32 * g input features.
"""

import torch
from einops import rearrange
from torch import Tensor

from lensmini.shapes import check_shape

__all__ = ["unpack_mxfp4"]

# E2M1: one sign bit, two exponent bits (bias 1), one mantissa bit.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpack_mxfp4(blocks: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Unpack MXFP4 expert weights, ``weight = e2m1(code) * 2^(scale - 127)`` (OCP Microscaling Formats v1.0, 5.2-5.4).

    A byte holds two codes, the low nibble first; 32 neighbouring inputs share one scale. The result is exact wherever
    ``dtype`` can hold it: in float32 and bfloat16 everything but an overflow at scales 253 and 254, which is infinite.
    Scale 255 stands for NaN, as the standard says. Only one expert at a time is held in another form.

    Args:
        blocks: ``[x, o, g, 16]`` uint8, ``*_blocks`` of the checkpoint.
        scales: ``[x, o, g]`` uint8, ``*_scales`` of the checkpoint: exponents with a bias of 127.
        dtype: floating point, of the result.

    Returns:
        ``[x, i, o]``, transposed from the stored rows to the (in, out) order in which the model multiplies.

    Raises:
        ValueError: if a shape or dtype is wrong.

    Example:
        >>> unpack_mxfp4(torch.full((1, 1, 1, 16), 0xA1).byte(), torch.full((1, 1, 1), 128).byte())[0, :4, 0]
        tensor([ 1., -2.,  1., -2.], dtype=torch.bfloat16)
    """
    sizes = check_shape("blocks", blocks, "x o g 16")
    check_shape("scales", scales, "x o g", **sizes)
    for name, tensor in (("blocks", blocks), ("scales", scales)):
        if tensor.dtype != torch.uint8:
            raise ValueError(f"{name}: expected torch.uint8, got {tensor.dtype}")
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dtype: expected floating point of at least 16 bits, got {dtype}")
    if blocks.device != scales.device:
        raise ValueError(f"scales: expected the device of blocks, {blocks.device}, got {scales.device}")
    wide = torch.promote_types(dtype, torch.float32)
    device = blocks.device
    values = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=wide, device=device)
    codes = torch.arange(256, device=device)
    pairs = torch.stack([values[codes % 16], values[codes // 16]], -1)
    # By table: a float32 power of two below 2^-126 would depend on how the device treats subnormal numbers.
    factors = torch.tensor([2.0 ** (code - 127) for code in range(255)] + [torch.nan], dtype=wide, device=device)
    weight = torch.empty(sizes["x"], 32 * sizes["g"], sizes["o"], dtype=dtype, device=device)
    for expert, (codes, exponents) in enumerate(zip(blocks, scales, strict=True)):
        rows = pairs[codes.int()] * factors[exponents.int()][..., None, None]
        weight[expert] = rearrange(rows, "o g byte nibble -> (g byte nibble) o")
    return weight
