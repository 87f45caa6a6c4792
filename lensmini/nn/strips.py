"""A convolutional decoder walked in strips of rows: the same picture, in less than half of the memory.

Group norms see the whole map, so a decoder cut into tiles paints something else. Here only convolutions are cut: each layer
is computed for the whole picture before the next one, a strip of rows at a time with the rows that its kernel reaches, and
norms get the statistics of the whole map first. What a layer no longer needs is overwritten, so that two to three maps live
at a time and not six.

Axes: c channels, h and w height and width of a map.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lensmini.shapes import check_shape

__all__ = ["check_decodes_in_strips", "decode_in_strips", "decodes_in_strips"]


def check_decodes_in_strips(vae: nn.Module) -> None:
    """Refuse an autoencoder whose decoder this module does not know.

    Args:
        vae: as diffusers' ``AutoencoderKL`` and ``AutoencoderKLFlux2``: ``decoder`` with ``conv_in``, ``mid_block``,
            ``up_blocks`` of residual blocks with group norms and 3 x 3 convolutions, ``conv_norm_out``, ``conv_act``,
            ``conv_out``.

    Raises:
        ValueError: naming the part that is different.

    Example:
        >>> check_decodes_in_strips(nn.Identity())
        Traceback (most recent call last):
        ValueError: vae: expected a decoder of residual blocks as diffusers' AutoencoderKL has, got Identity without decoder
    """
    decoder: Any = getattr(vae, "decoder", None)
    parts = ("conv_in", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out")
    found: str | None = None
    if decoder is None:
        found = f"{type(vae).__name__} without decoder"
    elif missing := [name for name in parts if not hasattr(decoder, name)]:
        found = f"{type(decoder).__name__} without {', '.join(missing)}"
    elif not (_is_local(decoder.conv_in) and _is_local(decoder.conv_out)):
        found = "conv_in or conv_out other than 3 x 3"
    elif not isinstance(decoder.conv_norm_out, nn.GroupNorm):
        found = f"{type(decoder.conv_norm_out).__name__} as conv_norm_out"
    else:
        for index, block in enumerate(decoder.up_blocks):
            if (found := _foreign(block)) is not None:
                found = f"{found} in up_blocks.{index}"
                break
    if found is not None:
        raise ValueError(f"vae: expected a decoder of residual blocks as diffusers' AutoencoderKL has, got {found}")


def decodes_in_strips(vae: nn.Module) -> bool:
    """Whether :func:`check_decodes_in_strips` has nothing against it.

    Example:
        >>> decodes_in_strips(nn.Identity())
        False
    """
    try:
        check_decodes_in_strips(vae)
    except ValueError:
        return False
    return True


def _foreign(block: Any) -> str | None:
    if not {name for name, _ in block.named_children()} <= {"resnets", "upsamplers"}:
        return type(block).__name__
    for layer in block.resnets:
        if not {name for name, _ in layer.named_children()} <= _RESNET or layer.time_emb_proj is not None:
            return type(layer).__name__
        if not (isinstance(layer.norm1, nn.GroupNorm) and isinstance(layer.norm2, nn.GroupNorm)):
            return f"norms {type(layer.norm1).__name__}, {type(layer.norm2).__name__}"
        if not (_is_local(layer.conv1) and _is_local(layer.conv2)):
            return "another convolution than 3 x 3"
        if layer.conv_shortcut is not None and layer.conv_shortcut.kernel_size != (1, 1):
            return "a shortcut other than 1 x 1"
        if layer.upsample is not None or layer.downsample is not None:
            return "a residual block that changes the size"
    for layer in block.upsamplers or ():
        plain = getattr(layer, "use_conv", False) and getattr(layer, "interpolate", False) and layer.norm is None
        if not plain or layer.use_conv_transpose or not _is_local(getattr(layer, "conv", None)):
            return type(layer).__name__
    return None


_RESNET = {"norm1", "norm2", "conv1", "conv2", "dropout", "nonlinearity", "conv_shortcut"}


def _is_local(conv: Any) -> bool:
    wanted = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    return isinstance(conv, nn.Conv2d) and wanted == (
        conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode,
    )  # fmt: skip


@torch.no_grad()
def decode_in_strips(vae: nn.Module, latents: Tensor, *, rows: int = 32) -> Tensor:
    """What ``vae.decode(latents).sample`` is, up to rounding.

    Args:
        vae: see :func:`check_decodes_in_strips`; a plain forward pass, so no gradients.
        latents: ``[b, c, h, w]`` in the dtype of its weights; one sample after the other.
        rows: height of a strip, in rows of a layer's output; at least 1.

    Returns:
        ``[b, 3, H, W]``.

    Raises:
        ValueError: if the decoder is of another kind, or a shape or ``rows`` is wrong.

    Example:
        >>> import diffusers
        >>> blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        >>> vae = diffusers.AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, **blocks).eval()
        >>> latents = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(0))
        >>> bool((decode_in_strips(vae, latents, rows=3) - vae.decode(latents).sample).abs().max() < 1e-5)
        True
    """
    check_shape("latents", latents, "b c h w")
    if rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")
    check_decodes_in_strips(vae)
    return torch.stack([_decode(vae, one[None], rows)[0] for one in latents])


def _decode(vae: Any, x: Tensor, rows: int) -> Tensor:
    decoder = vae.decoder
    if getattr(vae, "post_quant_conv", None) is not None:
        x = vae.post_quant_conv(x)
    x, spare = decoder.mid_block(decoder.conv_in(x), None), None
    for block in decoder.up_blocks:
        for layer in block.resnets:
            x, spare = _residual(layer, x, spare, rows)
        spare = None
        for layer in block.upsamplers or ():
            x = x.clone() if x.untyped_storage().nbytes() > x.nbytes else x  # let go of the spare half
            x = _upsample(layer.conv, x, rows)
    image = x.new_empty(x.shape[0], decoder.conv_out.out_channels, *x.shape[2:])
    for (first, last), part in _activated(decoder.conv_norm_out, decoder.conv_act, x, rows):
        image[:, :, first:last] = _convolve(decoder.conv_out, part)
    return image


def _residual(layer: Any, x: Tensor, spare: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    """``(shortcut(x) + conv2(act(norm2(conv1(act(norm1(x))))))) / scale``, and a map for the next layer to write on.

    ``x`` is used up: the result lies in its place, or both do where they are not wider than half of it.
    """
    width = layer.conv1.out_channels
    shape = (x.shape[0], width, *x.shape[2:])
    if layer.conv_shortcut is None:
        hidden, kept = (x.new_empty(shape) if spare is None or spare.shape != shape else spare), x
    elif x.shape[1] >= 2 * width:
        hidden, kept = x[:, :width], x[:, width : 2 * width]
    else:
        hidden, kept = x.new_empty(shape), x.new_empty(shape)
    for (first, last), part in _activated(layer.norm1, layer.nonlinearity, x, rows):
        inner = None if layer.conv_shortcut is None else layer.conv_shortcut(x[:, :, first:last])
        hidden[:, :, first:last] = _convolve(layer.conv1, part)
        if inner is not None:
            kept[:, :, first:last] = inner
    for (first, last), part in _activated(layer.norm2, layer.nonlinearity, hidden, rows):
        kept[:, :, first:last] += _convolve(layer.conv2, part)
    return kept if layer.output_scale_factor == 1 else kept.div_(layer.output_scale_factor), hidden


def _upsample(conv: nn.Conv2d, x: Tensor, rows: int) -> Tensor:
    """Each position four times, then the convolution."""
    height, width = 2 * x.shape[2], 2 * x.shape[3]
    out = x.new_empty(x.shape[0], conv.out_channels, height, width)
    for first in range(0, height, rows):
        last = min(first + rows, height)
        low, high = max(first - 1, 0), min(last + 1, height)
        part = x[:, :, low // 2 : (high + 1) // 2].repeat_interleave(2, 2).repeat_interleave(2, 3)
        part = part[:, :, low % 2 : low % 2 + high - low]
        out[:, :, first:last] = _convolve(conv, F.pad(part, (0, 0, int(first == 0), int(last == height))))
    return out


def _activated(norm: nn.GroupNorm, act: nn.Module, x: Tensor, rows: int) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Strips of ``act(norm(x))`` with a row more on each side, zeros beyond the map.

    The rows of a strip may be overwritten before the next one is asked for: the row that that one still needs is kept here.
    """
    scale, shift = _affine(norm, x, rows)
    height, above = x.shape[2], None
    for first in range(0, height, rows):
        last = min(first + rows, height)
        below = min(last + 1, height)
        part = x[:, :, first:below]
        part = part.clone() if above is None else torch.cat([above, part], dim=2)
        above = x[:, :, last - 1 : last].clone()
        part = act((part.to(scale.dtype) * scale).add_(shift).to(x.dtype))
        yield (first, last), F.pad(part, (0, 0, int(first == 0), int(last == height)))


def _affine(norm: nn.GroupNorm, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Scale and shift ``[1, c, 1, 1]`` that a group norm amounts to on this map; sums are merged strip by strip in float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    grouped = x.unflatten(1, (norm.num_groups, -1))
    count, mean, square = 0, torch.zeros((), device=x.device), torch.zeros((), device=x.device)
    for first in range(0, x.shape[2], rows):
        part = grouped[:, :, :, first : first + rows].to(wide)
        var, own = torch.var_mean(part, dim=(2, 3, 4), correction=0)
        num = part[0, 0].numel()
        gap, total = own.double() - mean, count + num
        mean = mean + gap * num / total
        square = square + var.double() * num + gap.square() * count * num / total
        count = total
    std = (square / count + norm.eps).sqrt()
    each = x.shape[1] // norm.num_groups
    inverse, centre = ((1 / std).repeat_interleave(each, 1), (mean / std).repeat_interleave(each, 1))
    weight = torch.ones_like(inverse[0]) if norm.weight is None else norm.weight.double()
    bias = torch.zeros_like(inverse[0]) if norm.bias is None else norm.bias.double()
    scale, shift = inverse * weight, bias - centre * weight
    return scale[:, :, None, None].to(wide), shift[:, :, None, None].to(wide)


def _convolve(conv: nn.Conv2d, part: Tensor) -> Tensor:
    """The convolution of rows that have their neighbours already."""
    return F.conv2d(part, conv.weight, conv.bias, padding=(0, 1))
