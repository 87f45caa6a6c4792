"""Linear layers of the blocks in 8-bit floating point, on the GPUs that multiply it, and its rounding anywhere.

Axes: T tokens, i and o input and output width.

An approximation: the pictures change. :func:`emulate_fp8` does the same rounding in float32 on any device, so that the
error can be measured without such a GPU.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lensmini.nn import LensTransformer
from lensmini.shapes import check_shape

__all__ = ["emulate_fp8", "fp8_linear", "quantize_fp8"]

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
CAPABILITY = (8, 9)
"""Of the GPU: Ada, Hopper and later."""


def block_linears(model: LensTransformer) -> Iterator[tuple[str, nn.Linear]]:
    """The linears that see every token: projections of attention and feed-forward layers, none that modulates."""
    for index, block in enumerate(model.transformer_blocks):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and "_mod." not in name:
                yield f"transformer_blocks.{index}.{name}", module


def round_rows(values: Tensor) -> Tensor:
    """Round each row to E4M3 with a scale of its own, ``absmax / 448``, and back.

    Example:
        >>> round_rows(torch.tensor([[448.0, 17.0], [0.0, 0.0]]))
        tensor([[448.,  16.],
                [  0.,   0.]])
    """
    wide = values.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(1e-12) / FP8_MAX
    return (wide / scale).to(torch.float8_e4m3fn).float() * scale


def fp8_linear(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer as fp8 kernels compute it: rows of input and weight rounded to E4M3, sums in float32.

    Args:
        hidden_states: ``[..., i]``; every token has a scale of its own.
        weight: ``[o, i]``; every output has one.
        bias: ``[o]``.

    Returns:
        ``[..., o]`` in the dtype of ``hidden_states``.

    Raises:
        ValueError: if a shape does not fit.

    Example:
        >>> fp8_linear(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 1.0]]))
        tensor([[2.]])
    """
    sizes = check_shape("weight", weight, "o i")
    check_shape("hidden_states", hidden_states, "... i", i=sizes["i"])
    product = F.linear(round_rows(hidden_states), round_rows(weight), None if bias is None else bias.float())
    return product.to(hidden_states.dtype)


def emulate_fp8(model: LensTransformer) -> LensTransformer:
    """Let the blocks' linears round as fp8 kernels do, in place and on any device: for measuring, not for speed.

    Example:
        >>> from lensmini.nn import LensConfig
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
        >>> type(
        ...     emulate_fp8(LensTransformer(LensConfig(num_layers=1, **sizes))).transformer_blocks[0].img_mlp.w1
        ... ).__name__
        'RoundedLinear'
    """
    for _, linear in block_linears(model):
        linear.__class__ = RoundedLinear
    return model


class RoundedLinear(nn.Linear):
    """A linear layer whose products round as in fp8."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., i]`` to ``[..., o]``."""
        return fp8_linear(input, self.weight, self.bias)


def quantize_fp8(model: LensTransformer) -> LensTransformer:
    """Quantise the blocks' linears in place: E4M3 weights and activations with a scale per row (torchao).

    Args:
        model: on a CUDA device; merge adapters before, compile after.

    Returns:
        The model.

    Raises:
        ValueError: if the model is not on a GPU that multiplies fp8.
        ImportError: without torchao.

    Example:
        >>> from lensmini.nn import LensConfig
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
        >>> quantize_fp8(LensTransformer(LensConfig(num_layers=1, **sizes)))
        Traceback (most recent call last):
        ValueError: fp8: expected a CUDA GPU of compute capability 8.9 or more, got a model on cpu
    """
    device = model.img_in.weight.device
    here = f"a model on {device}"
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is not None:
        here = f"compute capability {capability[0]}.{capability[1]}"
    if capability is None or capability < CAPABILITY:
        raise ValueError(f"fp8: expected a CUDA GPU of compute capability 8.9 or more, got {here}")
    try:
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
            quantize_,
        )
    except ImportError as error:
        raise ImportError("fp8 needs torchao: pip install lensmini[fp8]") from error
    chosen = {id(linear) for _, linear in block_linears(model)}
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(model, config, filter_fn=lambda module, name: id(module) in chosen)
    return model
