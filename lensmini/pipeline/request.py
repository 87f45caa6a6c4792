"""What a caller asks of the pipeline, checked before anything runs: prompts, numbers, sizes and noise.

Axes: b pictures, c latent channels, h and w latent height and width.
"""

import math
import secrets
from collections.abc import Sequence
from operator import index as as_index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lensmini.nn import Autoencoder, LensConfig, LensTransformer
from lensmini.pipeline.canvas import check_size
from lensmini.pipeline.decoding import OUTPUT_TYPES
from lensmini.pipeline.painting import draw_noise
from lensmini.shapes import check_shape

__all__ = [
    "Noise",
    "check_options",
    "check_parts",
    "check_sizes",
    "choose_noise",
    "for_each",
    "latent_sizes",
    "read_features",
    "read_prompts",
]


class Noise(NamedTuple):
    """Where the pictures start."""

    latents: list[Tensor]
    """For each picture ``[c, h, w]``."""
    seeds: list[int | None]
    """For each picture its seed, None where it came from a generator or was given."""


def check_parts(transformer: LensTransformer, autoencoder: Autoencoder | None, text_layers: int | None) -> None:
    """Refuse components that do not fit together.

    Raises:
        ValueError: naming the component.

    Example:
        >>> from lensmini.nn import LensConfig
        >>> transformer = LensTransformer(LensConfig(num_layers=1, num_attention_heads=1, enc_hidden_dim=8))
        >>> check_parts(transformer, None, text_layers=3)
        Traceback (most recent call last):
        ValueError: text_encoder: expected 4 layers of features, got 3
    """
    config = transformer.config
    if config.output_dim != config.in_channels:
        raise ValueError(
            f"transformer: expected as many channels out as in, got {config.output_dim} and {config.in_channels}"
        )
    if autoencoder is not None and autoencoder.channels != config.in_channels:
        raise ValueError(f"autoencoder: expected {config.in_channels} latent channels, got {autoencoder.channels}")
    if text_layers is not None and text_layers != config.num_text_layers:
        raise ValueError(f"text_encoder: expected {config.num_text_layers} layers of features, got {text_layers}")


def check_options(
    *,
    num_inference_steps: int,
    guidance_scale: float,
    num_images_per_prompt: int,
    batch_size: int | None,
    output_type: str,
    decodes: bool,
) -> None:
    """Refuse numbers and an output type that cannot be meant.

    Raises:
        ValueError: naming the argument, what was expected and what it was.

    Example:
        >>> numbers = {"guidance_scale": 5.0, "num_images_per_prompt": 1, "batch_size": None}
        >>> check_options(num_inference_steps=0, output_type="pil", decodes=True, **numbers)
        Traceback (most recent call last):
        ValueError: num_inference_steps: expected a positive integer, got 0
    """
    numbers = {"num_inference_steps": num_inference_steps, "num_images_per_prompt": num_images_per_prompt}
    numbers |= {"batch_size": 1 if batch_size is None else batch_size}
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    if not math.isfinite(guidance_scale) or guidance_scale < 0:
        raise ValueError(f"guidance_scale: expected a finite number of at least 0, got {guidance_scale}")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    if output_type != "latent" and not decodes:
        raise ValueError(f'output_type: expected "latent" without an autoencoder, got {output_type!r}')


def check_sizes(sizes: Sequence[tuple[int, int]], *, num: int, downsample: int, released: bool) -> None:
    """Refuse sizes that the autoencoder cannot do or, with ``released``, that the released model was not made for.

    Raises:
        ValueError: naming the size and, with ``released``, the nearest legal one; or if there are not ``num``.

    Example:
        >>> check_sizes([(24, 40)], num=1, downsample=8, released=False)
    """
    if len(sizes) != num:
        raise ValueError(f"latents: expected {num}, one for each picture, got {len(sizes)}")
    for height, width in sizes:
        if released:
            check_size(height, width)
        whole = all(isinstance(side, int) and not isinstance(side, bool) for side in (height, width))
        if not whole or min(height, width) < downsample or height % downsample or width % downsample:
            raise ValueError(f"height, width: expected positive multiples of {downsample}, got {height!r} x {width!r}")


def latent_sizes(latents: Tensor | Sequence[Tensor], downsample: int) -> list[tuple[int, int]]:
    """Height and width in pixels of pictures whose latents are given.

    Raises:
        ValueError: if they are not ``[b, c, h, w]`` or tensors ``[c, h, w]``.

    Example:
        >>> latent_sizes(torch.zeros(1, 8, 4, 6), 16)
        [(64, 96)]
    """
    sizes = [check_shape(f"latents[{index}]", x, "c h w") for index, x in enumerate(latents)]
    return [(size["h"] * downsample, size["w"] * downsample) for size in sizes]


def read_prompts(prompt: Any, num_embeds: int | None) -> list[str]:
    """The prompts as a list; empty only where features stand for them.

    Args:
        prompt: one text, several or None.
        num_embeds: number of prompts given as features, None without.

    Returns:
        The texts.

    Raises:
        ValueError: if there is neither, a prompt is not a string, or the numbers disagree.

    Example:
        >>> read_prompts("a cat", None), read_prompts(None, 2)
        (['a cat'], [])
    """
    texts: list[str] = [prompt] if isinstance(prompt, str) else [*(prompt or ())]
    if num_embeds is None and not texts:
        raise ValueError(f"prompt: expected a text, several or prompt_embeds, got {prompt!r}")
    if num_embeds == 0:
        raise ValueError("prompt_embeds: expected at least one tensor [l, k, e], got none")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"prompt[{index}]: expected a string, got {text!r}")
    if texts and num_embeds is not None and len(texts) != num_embeds:
        raise ValueError(f"prompt: expected one for each of {num_embeds} prompt_embeds, got {len(texts)}")
    return texts


def read_features(
    name: str, features: Sequence[Tensor], config: LensConfig, *, allow_empty: bool = False
) -> list[Tensor]:
    """Text features as a list, each of the transformer's sizes; a late wrong one is found before anything is painted.

    Args:
        name: of the argument, for messages.
        features: for each prompt ``[l, k, e]``.
        config: of the transformer.
        allow_empty: whether a prompt may have no tokens.

    Returns:
        The features.

    Raises:
        ValueError: naming the first that does not fit by its position.

    Example:
        >>> read_features("prompt_embeds", [torch.zeros(5, 4, 8)], LensConfig(enc_hidden_dim=4))
        Traceback (most recent call last):
        ValueError: prompt_embeds[0]: expected [l, 4, 4], got [5, 4, 8]
    """
    for index, x in enumerate(features):
        sizes = check_shape(f"{name}[{index}]", x, "l k e")
        if (sizes["k"], sizes["e"]) != (config.num_text_layers, config.enc_hidden_dim):
            wanted = f"[l, {config.num_text_layers}, {config.enc_hidden_dim}]"
            raise ValueError(f"{name}[{index}]: expected {wanted}, got {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name}[{index}]: expected floating point, got {x.dtype}")
        if not allow_empty and not sizes["l"]:
            raise ValueError(f"{name}[{index}]: expected at least one token, got {list(x.shape)}")
    return list(features)


def for_each(name: str, values: Any, num: int) -> list[Any]:
    """One value for all prompts, or one for each, as a list of ``num``.

    Raises:
        ValueError: if there is another number of them.

    Example:
        >>> for_each("negative_prompt", "blurry", 2), for_each("negative_prompt", ["a", "b"], 2)
        (['blurry', 'blurry'], ['a', 'b'])
    """
    if not isinstance(values, (str, Sequence, Tensor)):
        raise ValueError(f"{name}: expected one, or one for each of {num} prompts, got {values!r}")
    listed = [values] if isinstance(values, str) else list(values)
    if name == "negative_prompt" and not all(isinstance(value, str) for value in listed):
        raise ValueError(f"{name}: expected strings, got {listed!r}")
    if len(listed) not in (1, num):
        raise ValueError(f"{name}: expected one, or one for each of {num} prompts, got {len(listed)}")
    return listed * num if len(listed) == 1 else listed


def choose_noise(
    grids: Sequence[tuple[int, int]],
    channels: int,
    *,
    seeds: int | Sequence[int] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: Tensor | Sequence[Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Noise:
    """Noise from seeds, generators or as given; from fresh seeds if from nothing.

    Args:
        grids: for each of the b pictures latent height and width.
        channels: c.
        seeds: b of them, or one that counts up.
        generator: one, or one for each picture.
        latents: ``[b, c, h, w]`` or b tensors ``[c, h, w]``.
        dtype: to draw in, or to give the latents.
        device: where to put the result.

    Returns:
        The noise and, where known, its seeds.

    Raises:
        ValueError: if more than one source is given, or numbers or shapes disagree.

    Example:
        >>> choose_noise([(2, 2)] * 3, 8, seeds=5).seeds
        [5, 6, 7]
    """
    given = {"seeds": seeds, "generator": generator, "latents": latents}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)}: expected at most one of seeds, generator and latents")
    num = len(grids)
    if latents is not None:
        found, wanted = [tuple(x.shape) for x in latents], [(channels, *grid) for grid in grids]
        if found != wanted:
            raise ValueError(f"latents: expected shapes [c, h, w] {wanted}, got {found}")
        return Noise([x.to(device, dtype) for x in latents], [None] * num)
    if generator is not None:
        return Noise(draw_noise(grids, channels, generator=generator, dtype=dtype, device=device), [None] * num)
    if seeds is None:
        # The system's own entropy: no state of torch changes, and the metadata says which seeds these were.
        numbers = [secrets.randbelow(2**31) for _ in grids]
    else:
        try:
            first = as_index(seeds)  # pyright: ignore[reportArgumentType]
            numbers = [first + number for number in range(num)]
        except TypeError:
            numbers = [as_index(seed) for seed in seeds]  # pyright: ignore[reportGeneralTypeIssues]
        if any(not 0 <= seed < 2**64 for seed in numbers):
            raise ValueError(f"seeds: expected integers from 0 to 2^64 - 1, got {seeds}")
    if len(numbers) != num:
        raise ValueError(f"seeds: expected one that counts up, or one for each of {num} pictures, got {len(numbers)}")
    return Noise(draw_noise(grids, channels, seeds=numbers, dtype=dtype, device=device), [*numbers])
