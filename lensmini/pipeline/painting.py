"""From text features and noise to latents: guided sampling of packed pictures of any sizes, exact or as published.

Axes: b pictures, l text tokens of one picture, k text layers, e text feature width, N image tokens of the whole
batch, c channels, h and w latent height and width.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lensmini.nn import LensTransformer
from lensmini.packed import Layout, pack, unpack
from lensmini.pipeline.passes import Engine, plain_passes
from lensmini.pipeline.published import published_euler_step, published_guide, published_timestep
from lensmini.sampling import empirical_mu, euler_step, guide, initial_noise, time_grid
from lensmini.shapes import check_shape

__all__ = ["draw_noise", "paint_packed"]

Grid = tuple[int, int]
OnStep = Callable[[int, Tensor, list[Tensor]], Sequence[Tensor] | Tensor | None]


def draw_noise(
    grids: Sequence[Grid],
    channels: int,
    *,
    seeds: Sequence[int] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """Standard normal latents, drawn in token order ``[h * w, c]``, the order of published seeds.

    A seed gives the same noise alone and in any batch, on any device. One generator draws pictures of one size at once
    as ``[b, h * w, c]``, which is what the published pipeline does, and pictures of several sizes one after the other.

    Args:
        grids: for each picture latent height and width.
        channels: c.
        seeds: for each picture its seed; the draw is made on the CPU.
        generator: instead of seeds, one for all pictures or one for each; the draw is made on its device.
        dtype: floating dtype to draw in. Another dtype is another draw.
        device: where to put the result.

    Returns:
        For each picture ``[c, h, w]``.

    Raises:
        ValueError: if there are not either seeds or a generator, or not one for each picture.

    Example:
        >>> [x.shape for x in draw_noise([(2, 3), (1, 4)], 8, seeds=[0, 1])]
        [torch.Size([8, 2, 3]), torch.Size([8, 1, 4])]
    """
    if (seeds is None) == (generator is None):
        raise ValueError("seeds and generator: expected one of them")
    layout = Layout.build(grids)
    if seeds is not None:
        tokens = initial_noise(seeds, channels, layout, dtype=dtype)
    elif isinstance(generator, torch.Generator):
        where = generator.device
        if len(set(grids)) == 1:
            shape = (len(grids), layout.image_lengths[0], channels)
            tokens = torch.randn(shape, generator=generator, dtype=dtype, device=where).flatten(0, 1)
        else:
            rows = [(length, channels) for length in layout.image_lengths]
            tokens = torch.cat([torch.randn(r, generator=generator, dtype=dtype, device=where) for r in rows])
    else:
        generators = list(generator or ())
        if len(generators) != len(grids):
            raise ValueError(
                f"generator: expected one, or one for each of {len(grids)} pictures, got {len(generators)}"
            )
        pairs = zip(layout.image_lengths, generators, strict=True)
        tokens = torch.cat(
            [torch.randn(n, channels, generator=g, dtype=dtype, device=g.device).to(device) for n, g in pairs]
        )
    return [latents.contiguous() for latents in unpack(tokens.to(device), layout)]


@torch.no_grad()
def paint_packed(
    model: LensTransformer,
    noise: Sequence[Tensor],
    texts: Sequence[Tensor],
    negative_texts: Sequence[Tensor] | None = None,
    *,
    num_steps: int,
    guidance_scale: float = 1.0,
    rescale: bool = True,
    mu: float | None = None,
    published_bf16: bool = False,
    on_step: OnStep | None = None,
    engine: Engine = plain_passes,
) -> list[Tensor]:
    """Sample pictures of any sizes in one packed forward pass a step, conditional and unconditional together.

    Euler steps on the released schedule, each picture on its own (:func:`lensmini.sampling.empirical_mu`), with
    norm-rescaled guidance (:func:`lensmini.sampling.guide`).

    Args:
        model: predicts the velocity.
        noise: for each picture ``[c, h, w]`` at time 1. The state keeps its dtype: float32 for exact sampling.
        texts: for each picture ``[l, k, e]`` text features.
        negative_texts: for each picture the features of the unconditional half; ``[0, k, e]`` is no text at all.
            None samples without guidance.
        num_steps: steps, at least 1.
        guidance_scale: 1 follows the text without guidance, and the unconditional half does not run.
        rescale: restore the norms after guidance, as the released model does.
        mu: time shift of the schedule; by default the released model's, from each picture's tokens and the steps.
        published_bf16: round as the published pipeline does, see :mod:`lensmini.pipeline.published`: time, guidance and state.
            The unconditional half then runs at guidance 1 too, since its roundings stay.
        on_step: called after each step with its index, the times ``[b]`` at which the model was asked and the new
            latents; latents that it returns replace them.
        engine: makes the forward passes; :class:`lensmini.pipeline.passes.FastEngine` gives the same ones sooner.

    Returns:
        For each picture its latents ``[c, h, w]`` in the dtype of the noise.

    Raises:
        ValueError: if numbers or shapes disagree, or guidance has no ``negative_texts``.

    Example:
        >>> from lensmini.nn import LensConfig
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
        >>> config = LensConfig(num_layers=1, in_channels=16, out_channels=4, enc_hidden_dim=8, **sizes)
        >>> model = LensTransformer(config).init_weights(0)
        >>> noise = draw_noise([(2, 3), (1, 4)], 16, seeds=[0, 1])
        >>> [x.shape for x in paint_packed(model, noise, [torch.zeros(5, 4, 8)] * 2, num_steps=2)]
        [torch.Size([16, 2, 3]), torch.Size([16, 1, 4])]
    """
    guided = negative_texts is not None and (published_bf16 or guidance_scale != 1)
    if negative_texts is None and guidance_scale != 1:
        raise ValueError(f"negative_texts: expected features for guidance_scale {guidance_scale}, got none")
    if negative_texts is None:
        negative_texts = []
    lengths_match = len(texts) == len(noise) and (not guided or len(negative_texts) == len(noise))
    if not lengths_match:
        raise ValueError(
            f"texts: expected one for each of {len(noise)} pictures, got {len(texts)} and {len(negative_texts)} negative"
        )
    weight, config = model.img_in.weight, model.config
    tokens = pack(noise).to(weight.device)
    grids: list[Grid] = [(image.shape[1], image.shape[2]) for image in noise]
    halves = [*texts, *negative_texts] if guided else [*texts]
    for index, text in enumerate(halves):
        check_shape(f"texts[{index}]", text, "l k e", k=config.num_text_layers, e=config.enc_hidden_dim)
    text_tokens = torch.cat([text.to(weight.device, weight.dtype) for text in halves])
    layout = Layout.build(grids, device=weight.device)
    full = Layout.build(
        grids * 2 if guided else grids, text_lengths=[len(text) for text in halves], device=weight.device
    )
    step = published_euler_step if published_bf16 else euler_step
    combine = published_guide if published_bf16 else guide
    shifts = [empirical_mu(h * w, num_steps) if mu is None else mu for h, w in grids]
    times = time_grid(num_steps, shifts, device=weight.device)

    grid = times.t().contiguous()
    seen = [published_timestep(t, dtype=weight.dtype).to(t.dtype) if published_bf16 else t for t in grid[:-1]]
    ask = engine(model, text_tokens, full, torch.stack([torch.cat([t, t]) if guided else t for t in seen]))

    for index, (t, t_next) in enumerate(pairwise(grid)):
        velocity = ask(index, torch.cat([tokens, tokens]) if guided else tokens)
        if guided:
            cond, uncond = velocity.chunk(2)
            velocity = combine(cond, uncond, guidance_scale, channel_dim=-1, rescale=rescale)
        tokens = step(tokens, velocity, t, t_next, layout=layout)
        changed = None if on_step is None else on_step(index, t, unpack(tokens, layout))
        if changed is not None:
            replaced = pack(changed)
            check_shape("latents of the callback", replaced, "N c", N=tokens.shape[0], c=tokens.shape[1])
            tokens = replaced.to(tokens)
    return unpack(tokens, layout)
