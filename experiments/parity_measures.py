"""One row of the parity page, and the measurements that rows are made of: ours, planted and published side by side."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from experiments.parity_cases import (
    Branch,
    Change,
    Outcome,
    golden,
    published_layer,
    sampling_run,
    text_features,
    velocity,
)
from experiments.parity_plants import keep_all_text, mask_with
from lensmini.nn import LatentNormalizer, unpatchify
from lensmini.nn.autoencoder import to_uint8
from lensmini.objectives import sample_times, training_mu
from lensmini.sampling import empirical_mu, time_grid

__all__ = [
    "GROUPS",
    "Trap",
    "both_errors",
    "feature_errors",
    "latent_error",
    "mask_fill_error",
    "other_patch_order",
    "rounded_pixels",
    "run_error",
    "scheduler_mu",
    "template_for_blank",
    "time_error",
    "training_times",
    "velocity_error",
]

Measure = Callable[[], Outcome]

GROUPS = {
    "transformer": "Transformer",
    "text": "Text conditioning",
    "sampling": "Schedule and guidance",
    "pixels": "Latents and pixels",
    "training": "Training",
    "all": "Everything recorded of one implementation at once",
    "unmeasured": "Not measurable on small models",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trap:
    """One row of the page."""

    name: str
    group: str
    point: str
    published: str
    differs: tuple[str, ...]
    """Who differs; the first words name the implementation."""
    planted: str = ""
    """What was planted, as the page says it."""
    measures: Mapping[str, Measure] = field(default_factory=dict)
    """For each place where it shows, how to measure it there; none if it cannot be simulated."""
    kind: Literal["harmful", "equivalent", "unmeasured"] = "harmful"
    note: str = ""
    """What else to know; for a row without a measure, the reason."""


def velocity_error(name: str, **plant: object) -> Measure:
    def measure() -> Outcome:
        published = golden(name)[0]["outputs.sample"]
        return Outcome(velocity(name), velocity(name, **plant), published)  # pyright: ignore[reportArgumentType]

    return measure


def run_error(ours: Mapping[str, object] | None = None, **plant: object) -> Measure:
    def measure() -> Outcome:
        published = golden("denoise_loop_a")[0]["outputs.final_latents"]
        return Outcome(sampling_run(**(ours or {})), sampling_run(**plant), published)  # pyright: ignore

    return measure


def both_errors(change: Change, name: str = "dit_b_blocks_odd") -> dict[str, Measure]:
    return {"velocity": velocity_error(name, change=change), "final latents": run_error(change=change)}


def feature_errors(**plant: object) -> dict[str, Measure]:
    def measure() -> Outcome:
        tensors, meta = golden("text_features_a")
        layers = [published_layer(tensors, index) for index in range(len(meta["selected_layers"]))]
        published = torch.stack([layer / layer.abs().max() for layer in layers], dim=1)
        return Outcome(text_features(), text_features(**plant), published)  # pyright: ignore[reportArgumentType]

    return {"features": measure}


def time_error(planted_mu: Callable[[int, int], float], key: str = "s20_h1024_w1024") -> Measure:
    """Sampling times at a released size, first and last left out, which are 1 and 0 whatever the shift."""

    def measure() -> Outcome:
        tensors, meta = golden("scheduler_a")
        entry = next(entry for entry in meta["entries"] if entry["key"] == key)
        steps, tokens = entry["steps"], entry["image_tokens"]
        grids = [time_grid(steps, rule(tokens, steps)) for rule in (empirical_mu, planted_mu)]
        return Outcome(*(grid[1:-1] for grid in (*grids, tensors[f"{key}.sigmas"])))

    return measure


def mask_fill_error(fill: float) -> Measure:
    def measure() -> Outcome:
        tensors, _ = golden("dit_a_square")
        mask = tensors["inputs.encoder_hidden_states_mask"].bool()
        during = mask_with(fill, mask)
        planted = velocity("dit_a_square", text=keep_all_text, during=during)
        return Outcome(velocity("dit_a_square"), planted, tensors["outputs.sample"])

    return measure


def latent_error(plant: Callable[[Tensor, LatentNormalizer], Tensor]) -> Measure:
    def measure() -> Outcome:
        tensors, meta = golden("latents_a")
        normalizer = LatentNormalizer.from_batch_norm(tensors, eps=meta["batch_norm_eps"])
        height, width = meta["grid"]
        tokens = rearrange(tensors["decode.tokens"], "b (h w) c -> b c h w", h=height, w=width)
        ours = unpatchify(normalizer.denormalize(tokens))
        return Outcome(ours, plant(tokens, normalizer), tensors["decode.vae_latent"])

    return measure


def other_patch_order(tokens: Tensor, normalizer: LatentNormalizer) -> Tensor:
    wide = normalizer.denormalize(tokens)
    return rearrange(wide, "b (dy dx c) h w -> b c (h dy) (w dx)", dy=2, dx=2)


def rounded_pixels() -> Outcome:
    images = golden("vae_a")[0]["decode.image"]
    # Level g begins at g / 127.5 - 1: truncation as a search among the 256 levels, in float64.
    levels = torch.arange(1, 256, dtype=torch.float64) / 127.5 - 1
    published = torch.bucketize(images.double(), levels, right=True)
    rounded = ((images.clamp(-1, 1) + 1) * 127.5).round()
    return Outcome(to_uint8(images), rounded, published)


def template_for_blank() -> Outcome:
    tensors = golden("denoise_loop_a")[0]
    prompt = tensors["inputs.prompt_embeds.0"]
    generator = torch.Generator().manual_seed(0)
    # The case has no rendered blank prompt: noise of the prompt's size stands for one.
    features = [
        torch.randn(prompt.shape, generator=generator) * tensors[f"inputs.prompt_embeds.{i}"].std() for i in range(4)
    ]
    negative: Branch = features, torch.ones(prompt.shape[:2], dtype=torch.bool)
    return Outcome(sampling_run(), sampling_run(negative=negative), tensors["outputs.final_latents"])


def training_times() -> Outcome:
    tokens, normals = 1024, 10_000
    anchors = torch.tensor([training_mu(n) for n in (256, 1024, 4096)])

    def times(mu: float) -> Tensor:
        return sample_times(normals, mu=mu, generator=torch.Generator().manual_seed(0)).sort().values

    # One normal and its logit-normal in float64 are the published law; seeds are shared, so only the centre differs.
    normal = torch.randn(normals, generator=torch.Generator().manual_seed(0)).double()
    published = (1.06 + normal).sigmoid().sort().values
    return Outcome(times(float(anchors[1])), times(scheduler_mu(tokens // 4, 0)), published)


def scheduler_mu(tokens: int, steps: int) -> float:
    """The shift that the scheduler's own settings describe: a line from 0.5 at 256 tokens to 1.15 at 4096."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
