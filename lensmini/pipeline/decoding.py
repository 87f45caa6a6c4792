"""From sampled latents to images in the form that a caller asked for, one picture at a time.

Axes: b pictures, c latent channels, h and w latent height and width, H and W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from lensmini.nn import Autoencoder, decode_in_strips, to_uint8, unpatchify
from lensmini.pipeline.picture import to_picture
from lensmini.pipeline.published import published_denormalize
from lensmini.shapes import check_shape

__all__ = ["OUTPUT_TYPES", "LensPipelineOutput", "decode_picture", "finish_pictures", "stack_equal"]

OutputType = Literal["pil", "pt", "np", "latent"]
OUTPUT_TYPES: tuple[OutputType, ...] = ("pil", "pt", "np", "latent")


@dataclass(frozen=True)
class LensPipelineOutput:
    """What a call of :class:`lensmini.pipeline.LensPipeline` returns.

    Example:
        >>> LensPipelineOutput(images=[], metadata=[]).images
        []
    """

    images: Any
    """b images: PIL; or ``[b, 3, H, W]`` ("pt") and ``[b, H, W, 3]`` ("np") in [0, 1]; or latents ``[b, c, h, w]``.
    Lists of b arrays where sizes differ."""
    metadata: list[dict[str, Any]]
    """For each image how it was made; PIL images carry it too, see :func:`lensmini.pipeline.picture.save_png`."""


@torch.no_grad()
def decode_picture(
    autoencoder: Autoencoder, latents: Tensor, *, published_bf16: bool = False, strips: bool = False
) -> Tensor:
    """Decode one picture.

    Args:
        autoencoder: the latents' own.
        latents: ``[c, h, w]``.
        published_bf16: undo the normalisation in the dtype of the latents, as a pipeline that is bf16 throughout does.
        strips: walk the decoder in strips of rows (:mod:`lensmini.nn.strips`): the same picture in less memory.

    Returns:
        ``[3, H, W]`` float32, nominally in [-1, 1].

    Raises:
        ValueError: if the shape is wrong, or the decoder is not one that can be walked in strips.

    Example:
        >>> from types import SimpleNamespace as Result
        >>> from lensmini.nn import LatentNormalizer
        >>> vae = torch.nn.Conv2d(3, 3, 1)
        >>> vae.decode = lambda z: Result(sample=z)
        >>> autoencoder = Autoencoder(vae, LatentNormalizer(torch.zeros(12), torch.ones(12)), downsample=2)
        >>> decode_picture(autoencoder, torch.zeros(12, 2, 3)).shape
        torch.Size([3, 4, 6])
    """
    check_shape("latents", latents, "c h w", c=autoencoder.channels)
    device = autoencoder.normalizer.mean.device
    if not published_bf16 and not strips:
        return autoencoder.decode(latents[None].to(device).float())[0]
    normalizer = autoencoder.normalizer
    if published_bf16:
        raw = published_denormalize(latents[None].to(device), normalizer.mean, normalizer.var, eps=normalizer.eps)
    else:
        raw = normalizer.denormalize(latents[None].to(device).float())
    raw = unpatchify(raw, autoencoder.patch_size).to(next(autoencoder.vae.parameters()).dtype)
    pictures = decode_in_strips(autoencoder.vae, raw) if strips else autoencoder.vae.decode(raw).sample
    return pictures[0].float()


def stack_equal(tensors: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """One tensor where all have one shape, else a list.

    Example:
        >>> stack_equal([torch.zeros(2), torch.zeros(2)]).shape, len(stack_equal([torch.zeros(2), torch.zeros(3)]))
        (torch.Size([2, 2]), 2)
    """
    return torch.stack(list(tensors)) if len({tensor.shape for tensor in tensors}) == 1 else list(tensors)


def finish_pictures(
    latents: Sequence[Tensor],
    autoencoder: Autoencoder | None,
    output_type: OutputType,
    metadata: Sequence[Mapping[str, Any]],
    *,
    published_bf16: bool = False,
    strips: bool = False,
) -> Any:
    """Decode pictures one after the other, so that memory is that of one.

    Args:
        latents: for each picture ``[c, h, w]``.
        autoencoder: may be None for "latent".
        output_type: "pil", "pt" or "np" in [0, 1], or "latent".
        metadata: for each picture how it was made; PIL images carry it.
        published_bf16: as :func:`decode_picture`.
        strips: as :func:`decode_picture`.

    Returns:
        A list of PIL images; ``[b, 3, H, W]`` ("pt"), ``[b, H, W, 3]`` ("np") or ``[b, c, h, w]`` ("latent"), or lists
        of b arrays where sizes differ.

    Raises:
        ValueError: if there is no autoencoder, or the output type is unknown.

    Example:
        >>> finish_pictures([torch.zeros(8, 2, 3)] * 2, None, "latent", [{}, {}]).shape
        torch.Size([2, 8, 2, 3])
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    if output_type == "latent":
        return stack_equal(latents)
    if autoencoder is None:
        raise ValueError(f'output_type: expected "latent" without an autoencoder, got {output_type!r}')
    decoded = (decode_picture(autoencoder, x, published_bf16=published_bf16, strips=strips) for x in latents)
    if output_type == "pil":
        return [to_picture(to_uint8(x).cpu(), notes) for x, notes in zip(decoded, metadata, strict=True)]
    images = [((x + 1) / 2).clamp(0, 1).cpu() for x in decoded]
    if output_type == "pt":
        return stack_equal(images)
    arrays = [rearrange(x, "c H W -> H W c").contiguous().numpy() for x in images]
    return np.stack(arrays) if len({array.shape for array in arrays}) == 1 else arrays
