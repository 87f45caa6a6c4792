"""What painting a benchmark costs: FLOPs of one picture by part, and GPU-hours on one kind of card."""

import json
from collections.abc import Sequence
from pathlib import Path

from experiments.estimate_rl import DECODE_TFLOPS
from experiments.estimate_rows import Gpu, RentConfig
from experiments.plan_report_rows import TEMPLATE_TOKENS
from experiments.runs import latest_checkpoint
from lensmini.cost import forward_flops
from lensmini.nn import LensConfig

__all__ = ["model_sizes", "painting_flops", "painting_hours"]

SCENE_TOKENS, SCENE_SIDE = 45, 4
"""Tokens of a scene's caption, and pixels of a latent position, in the miniature."""


def model_sizes(checkpoint: Path | None) -> tuple[LensConfig, bool]:
    """The sizes of a run's transformer, and whether it is one; of all else the released ones.

    Example:
        >>> model_sizes(None)[1], model_sizes(Path("microsoft/Lens"))[0].num_layers
        (False, 48)
    """
    if checkpoint is None:
        return LensConfig(), False
    newest = latest_checkpoint(checkpoint)
    step = checkpoint if newest is None else newest[0]
    if not (step / "run.json").is_file():
        return LensConfig(), False
    return LensConfig.from_dict(json.loads((step / "config.json").read_text())), True


def painting_flops(
    model: LensConfig,
    sizes: Sequence[tuple[int, int]],
    *,
    num_steps: int,
    guidance_scale: float,
    text_tokens: int,
    miniature: bool = False,
) -> dict[str, float]:
    """FLOPs of one picture, the mean over the sizes.

    A step is a forward with text and, with guidance, one without any. The released model's text encoder reads the
    template too; the miniature's encoder and autoencoder are too small to be counted.

    Args:
        model: sizes of the transformer.
        sizes: heights and widths in pixels.
        num_steps: of the sampler.
        guidance_scale: 1 needs no second forward.
        text_tokens: of a prompt.
        miniature: whether pixels of a latent position are 4 instead of 16.

    Returns:
        ``sampling``, ``text`` and ``decoding``.

    Example:
        >>> parts = painting_flops(LensConfig(), [(1024, 1024)], num_steps=4, guidance_scale=1.0, text_tokens=256)
        >>> {name: round(flops / 1e12, 1) for name, flops in parts.items()}
        {'sampling': 69.7, 'text': 2.1, 'decoding': 10.5}
    """
    side = SCENE_SIDE if miniature else 16
    sampling = decoding = 0.0
    for height, width in sizes:
        tokens = height * width // side**2
        once = float(forward_flops(model, tokens, text_tokens))  # pyright: ignore[reportArgumentType]
        if guidance_scale != 1:
            once += float(forward_flops(model, tokens, 0))  # pyright: ignore[reportArgumentType]
        sampling += num_steps * once / len(sizes)
        decoding += 0.0 if miniature else 1e12 * DECODE_TFLOPS * height * width / 1024**2 / len(sizes)
    text = 0.0 if miniature else 1e9 * RentConfig().cluster().text_gflops * (text_tokens + TEMPLATE_TOKENS)
    return {"sampling": sampling, "text": text, "decoding": decoding}


def painting_hours(flops: float, gpu: Gpu, mfu: float) -> float:
    """Hours of one card at a share of its peak.

    Example:
        >>> painting_hours(312e12 * 3600, "a100_80gb", 0.5)
        2.0
    """
    return flops / (1e12 * RentConfig(gpu=gpu, gpus=1).cluster().peak_tflops * mfu) / 3600
