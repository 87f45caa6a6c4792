"""From text features to latents as the miniature paints: seeded noise, guidance against no text at all."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lensmini.nn import LensTransformer
from lensmini.pipeline.painting import draw_noise, paint_packed

__all__ = ["paint"]


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
    noise = [part.to(texts[0].device) for part in draw_noise(grids, model.config.in_channels, seeds=seeds)]
    blank = None if guidance_scale == 1 else [text[:0] for text in texts]
    options: dict[str, Any] = {"num_steps": num_steps, "guidance_scale": guidance_scale, "mu": mu, "rescale": rescale}
    return paint_packed(model, noise, texts, blank, **options)
