"""What a learned reward sees: the features of a frozen model, as two callables and a name.

Axes: n pictures, h and w pixels, d channels of image features on a map of y by x positions, c texts, l tokens, e text width.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lensmini.shapes import check_shape

__all__ = ["FrozenFeatures", "clip_features", "resize_and_normalise", "weights_digest"]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class FrozenFeatures:
    """A frozen model of pictures and a frozen model of texts.

    Example:
        >>> image = lambda images: images[..., ::8, ::8]
        >>> text = lambda texts: (torch.ones(len(texts), 2, 4), torch.ones(len(texts), 2, dtype=torch.bool))
        >>> FrozenFeatures(image=image, text=text, identity="every eighth pixel").image(torch.zeros(1, 3, 16, 24)).shape
        torch.Size([1, 3, 2, 3])
    """

    image: Callable[[Tensor], Tensor]
    """From ``[n, 3, h, w]`` in 0..1 to ``[n, d, y, x]``, differentiable. A map, because pooled features do not say where."""
    text: Callable[[Sequence[str]], tuple[Tensor, Tensor]]
    """From c texts to ``[c, l, e]`` and a mask ``[c, l]``, true for a real token."""
    identity: str
    """Names weights and preparation: a reward that was trained on other features is refused (:func:`weights_digest`)."""


def weights_digest(*modules: nn.Module) -> str:
    """Sixteen digits of the weights of modules: names, types, shapes and bytes of all parameters and buffers.

    Args:
        modules: in order.

    Returns:
        Hexadecimal digits of a SHA-256.

    Example:
        >>> one, other = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> weights_digest(one) == weights_digest(one), weights_digest(one) == weights_digest(other)
        (True, False)
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)};".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def resize_and_normalise(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pictures as a vision model wants them, differentiable in the pixels.

    The whole picture is stretched to a square, for what stands in a corner may be asked about; bicubic with antialiasing,
    which is PIL's; then ``(x - mean) / std``.

    Args:
        images: ``[n, 3, h, w]`` in 0..1.
        size: pixels of a side.
        mean: of the three channels.
        std: of the three channels, positive.

    Returns:
        ``[n, 3, size, size]``.

    Raises:
        ValueError: if the shape is wrong.

    Example:
        >>> resize_and_normalise(torch.ones(1, 3, 4, 6), 2, (0.5,) * 3, (0.5,) * 3)[0, 0]
        tensor([[1., 1.],
                [1., 1.]])
    """
    sizes = check_shape("images", images, "n 3 h w")
    if (sizes["h"], sizes["w"]) != (size, size):
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)
    shift, scale = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return (images - shift) / scale


def clip_features(
    model: nn.Module,
    tokenizer: Any,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> FrozenFeatures:
    """Features of a model of transformers that has two towers: CLIP, SigLIP, SigLIP 2 of fixed size and their like.

    Image features are the patch tokens behind the last layer, without a class token where there is one; text features are
    the tokens behind the last layer. The model is frozen and put into evaluation mode. Texts longer than it has positions
    lose their end.

    Args:
        model: has ``vision_model``, ``text_model`` and ``config`` with ``vision_config`` and ``text_config``.
        tokenizer: its tokenizer.
        mean: of the pixels; by default CLIP's own, or a half for SigLIP.
        std: of the pixels, likewise.

    Returns:
        The features.

    Raises:
        ValueError: if the model has no two towers, or its tokens are no square map.

    Example:
        >>> clip_features(nn.Linear(1, 1), None)
        Traceback (most recent call last):
        ...
        ValueError: model: expected vision_model and text_model, got Linear
    """
    vision: Any = getattr(model, "vision_model", None)
    language: Any = getattr(model, "text_model", None)
    if vision is None or language is None:
        raise ValueError(f"model: expected vision_model and text_model, got {type(model).__name__}")
    config: Any = model.requires_grad_(False).eval().config
    sigmoid = "siglip" in config.model_type
    mean = tuple(mean or ((0.5,) * 3 if sigmoid else CLIP_MEAN))
    std = tuple(std or ((0.5,) * 3 if sigmoid else CLIP_STD))
    size, side = config.vision_config.image_size, config.vision_config.image_size // config.vision_config.patch_size
    longest = config.text_config.max_position_embeddings

    def image(images: Tensor) -> Tensor:
        weight = next(model.parameters())
        pixels = resize_and_normalise(images.to(weight.device), size, mean, std).to(weight.dtype)
        tokens = vision(pixel_values=pixels).last_hidden_state
        extra = tokens.shape[1] - side**2
        if extra not in (0, 1):
            raise ValueError(f"model: expected {side} x {side} tokens and at most one more, got {tokens.shape[1]}")
        return tokens[:, extra:].transpose(1, 2).unflatten(2, (side, side))

    @torch.no_grad()
    def text(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        # SigLIP has only ever seen texts that fill all positions.
        padding = "max_length" if sigmoid else True
        options = {"max_length": longest, "truncation": True, "return_tensors": "pt"}
        batch = tokenizer(list(texts), padding=padding, **options)
        ids = batch["input_ids"].to(next(model.parameters()).device)
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask.to(ids.device)
        hidden = language(input_ids=ids, attention_mask=None if sigmoid else mask).last_hidden_state
        return hidden, mask.bool()

    name = f"{config.model_type} {weights_digest(model)} size {size} mean {mean} std {std} stretched"
    return FrozenFeatures(image=image, text=text, identity=name)
