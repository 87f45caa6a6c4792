"""From text features to latents: guided sampling of packed pictures of any sizes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lensmini.nn import LensTransformer
from lensmini.packed import Layout, unpack
from lensmini.sampling import empirical_mu, guide, initial_noise, sample_ode, time_grid

__all__ = ["paint"]


@torch.no_grad()
def paint(
    model: LensTransformer,
    texts: Sequence[Tensor],
    grids: Sequence[tuple[int, int]],
    seeds: Sequence[int],
    *,
    num_steps: int,
    guidance_scale: float,
    mu: float | None = None,
    rescale: bool = True,
) -> list[Tensor]:
    """Sample one picture per text.

    Conditional and unconditional samples run packed in one forward pass, and at guidance 1 the unconditional ones do not
    run at all.

    Args:
        model: predicts the velocity.
        texts: for each picture ``[l_i, k, e]`` text features; ``[0, k, e]`` paints without text.
        grids: for each picture latent height and width.
        seeds: for each picture the seed of its noise; a picture does not depend on its batch mates.
        num_steps: Euler steps.
        guidance_scale: 1 follows the text without guidance.
        mu: time shift of the schedule; by default the released model's, from the picture's tokens and the steps.
        rescale: restore the norms after guidance, as the released model does.

    Returns:
        For each picture its latent ``[c, h_i, w_i]``, float32.
    """
    device, dtype = model.img_in.weight.device, model.img_in.weight.dtype
    guided = guidance_scale != 1.0
    lengths = [len(text) for text in texts]
    layout = Layout.build(grids, text_lengths=lengths, device=device)
    both = Layout.build([*grids] * 2, text_lengths=[*lengths, *[0] * len(texts)], device=device) if guided else layout
    text_tokens = torch.cat(list(texts)).to(device, dtype)
    shifts = [empirical_mu(h * w, num_steps) if mu is None else mu for h, w in grids]
    noise = initial_noise(seeds, model.config.in_channels, layout, device=device)

    def velocity(tokens: Tensor, t: Tensor) -> Tensor:
        if not guided:
            return model.forward_packed(tokens, t, text_tokens, layout)  # pyright: ignore[reportReturnType]
        result = model.forward_packed(torch.cat([tokens, tokens]), torch.cat([t, t]), text_tokens, both)
        cond, uncond = result.chunk(2)  # pyright: ignore[reportAttributeAccessIssue]
        return guide(cond, uncond, guidance_scale, channel_dim=-1, rescale=rescale)

    tokens = sample_ode(velocity, noise, time_grid(num_steps, shifts, device=device), layout=layout)
    return unpack(tokens, layout)
