"""The small published models that `experiments.parity` plants differences into, and how they are run.

Every function runs one golden case with our own code and, on request, with one thing changed; nothing stays changed
afterwards, because models are loaded afresh and functions are replaced inside a `with` block only.

Axes: b samples, n image tokens, c channels, l text tokens, k text layers, e text feature width.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from lensmini.nn import LensConfig, LensTransformer, TextEncoder
from lensmini.sampling import empirical_mu, guide, sample_ode, time_grid

__all__ = [
    "CASES",
    "Change",
    "Outcome",
    "errors",
    "fingerprints",
    "golden",
    "load_transformer_case",
    "published_layer",
    "sampling_run",
    "text_features",
    "velocity",
]

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
CASES = (
    "dit_a_square",
    "dit_a_square_grads",
    "dit_b_blocks_odd",
    "dit_c_eps_holes",
    "denoise_loop_a",
    "latents_a",
    "scheduler_a",
    "text_features_a",
    "vae_a",
)

Change = Callable[[LensTransformer], object]
"""Alters a freshly loaded model in place."""
TextChange = Callable[[list[Tensor], Tensor], tuple[list[Tensor], Tensor]]
"""Alters text features, k tensors `[b, l, e]`, and their mask `[b, l]`."""
LayerInputChange = Callable[[dict[str, Any], Tensor], None]
"""Alters the keyword arguments of a decoder layer, given the mask `[b, l]` of real tokens."""


class Outcome(NamedTuple):
    """One measurement: three tensors of one shape."""

    ours: Tensor
    planted: Tensor
    published: Tensor


def errors(outcome: Outcome) -> dict[str, float]:
    """Errors of ours and of the planted difference: max |a - b| / max |b|, and |a - b|_2 / |b|_2."""
    published = outcome.published.double()
    result = {}
    for name, value in (("ours", outcome.ours), ("planted", outcome.planted)):
        if value.shape != published.shape:
            raise ValueError(f"{name}: expected the published shape {list(published.shape)}, got {list(value.shape)}")
        difference = value.double() - published
        result[name] = (difference.abs().max() / published.abs().max()).item()
        result[f"{name}_rms"] = (difference.norm() / published.norm()).item()
    return result


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of one golden case."""
    path = GOLDEN / f"{name}.safetensors"
    return load_file(path), json.loads(path.with_suffix(".json").read_text())


def fingerprints() -> dict[str, str]:
    """SHA-256 of every case's tensors, shortened: what the numbers were measured against."""
    files = {name: (GOLDEN / f"{name}.safetensors").read_bytes() for name in CASES}
    return {name: hashlib.sha256(content).hexdigest()[:12] for name, content in files.items()}


def _weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}


def load_transformer_case(name: str) -> LensTransformer:
    """The transformer of a golden case, in evaluation mode."""
    tensors, meta = golden(name)
    with torch.random.fork_rng():
        model = LensTransformer(LensConfig.from_dict(meta["model_config"]))
    model.load_state_dict(_weights(tensors))
    return model.eval()


@torch.no_grad()
def velocity(
    name: str,
    *,
    change: Change | None = None,
    during: AbstractContextManager[object] | None = None,
    text: TextChange | None = None,
    time_scale: float = 1.0,
    read_text_tail: bool = False,
) -> Tensor:
    """One forward pass of a `dit_` case: `[b, n, c]`.

    Args:
        name: of the case.
        change: alters the model.
        during: entered around the forward pass.
        text: alters text features and mask.
        time_scale: what the times are multiplied by.
        read_text_tail: run the last block's text stream to its end, which is otherwise left out.
    """
    tensors, meta = golden(name)
    model = load_transformer_case(name)
    if change is not None:
        change(model)
    _, height, width = meta["img_shapes"][0]
    latents = rearrange(tensors["inputs.hidden_states"], "b (h w) c -> b c h w", h=height, w=width).contiguous()
    features = [tensors[f"inputs.encoder_hidden_states.{i}"] for i in range(model.config.num_text_layers)]
    mask = tensors["inputs.encoder_hidden_states_mask"].bool()
    if text is not None:
        features, mask = text(features, mask)
    with during or nullcontext():
        capture = (-1,) if read_text_tail else ()
        result: Any = model(latents, tensors["inputs.timestep"] * time_scale, features, mask, capture_blocks=capture)
    return rearrange(result.velocity if read_text_tail else result, "b c h w -> b (h w) c")


Branch = Literal["masked", "absent"] | tuple[list[Tensor], Tensor]
"""A branch of guidance: features under an all-false mask, no text tokens at all, or features and mask."""


@torch.no_grad()
def sampling_run(
    *,
    change: Change | None = None,
    during: AbstractContextManager[object] | None = None,
    text: TextChange | None = None,
    time_scale: float = 1.0,
    positive: Branch | None = None,
    negative: Branch = "masked",
    rescale: bool = True,
    mu: float | None = None,
) -> Tensor:
    """The guided four-step run of `denoise_loop_a`, 96 x 64 pixels: final latents `[b, n, c]`.

    Args:
        change: alters the model.
        during: entered around the run.
        text: alters the prompt's features and mask.
        time_scale: what the model's times are multiplied by; the schedule stays.
        positive: what the conditional half sees; the prompt by default.
        negative: what the unconditional half sees; the published rule for a blank one is "masked".
        rescale: restore the norms after guidance.
        mu: shift of the schedule; the published rule by default.
    """
    tensors, meta = golden("denoise_loop_a")
    model = load_transformer_case("denoise_loop_a")
    if change is not None:
        change(model)
    height, width = meta["height"] // 16, meta["width"] // 16
    features = [tensors[f"inputs.prompt_embeds.{i}"] for i in range(model.config.num_text_layers)]
    prompt = features, tensors["inputs.prompt_mask"].bool()
    if text is not None:
        prompt = text(*prompt)

    def predict(latents: Tensor, t: Tensor, branch: Branch) -> Tensor:
        if branch == "absent":
            return model(latents, t * time_scale)  # pyright: ignore[reportReturnType]
        blank = [torch.zeros_like(layer) for layer in prompt[0]], torch.zeros_like(prompt[1])
        layers, mask = blank if isinstance(branch, str) else branch
        return model(latents, t * time_scale, layers, mask)  # pyright: ignore[reportReturnType]

    def guided(latents: Tensor, t: Tensor) -> Tensor:
        cond, uncond = predict(latents, t, positive or prompt), predict(latents, t, negative)
        return guide(cond, uncond, meta["guidance_scale"], channel_dim=1, rescale=rescale)

    noise = rearrange(tensors["inputs.latents"], "b (h w) c -> b c h w", h=height, w=width).contiguous()
    grid = time_grid(meta["steps"], empirical_mu(height * width, meta["steps"]) if mu is None else mu)
    with during or nullcontext():
        return rearrange(sample_ode(guided, noise, grid), "b c h w -> b (h w) c")


def text_features(
    *,
    layers: Sequence[int] | None = None,
    rotary: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    skip_prefix: bool = False,
    final_norm: bool = False,
    layer_inputs: LayerInputChange | None = None,
) -> Tensor:
    """Conditioning of `text_features_a`, a small GPT-OSS: valid tokens `[M, k, e]`, each layer over its published maximum.

    The scale makes the layers comparable: magnitudes of a residual stream grow with depth.

    Args:
        layers: decoder layers to read; the case's by default.
        rotary: alters the rotary settings.
        skip_prefix: do not run the five tokens that are cut afterwards.
        final_norm: apply the model's final norm to the last feature.
        layer_inputs: alters what every decoder layer is called with.
    """
    try:
        from transformers import GptOssConfig, GptOssForCausalLM
    except ImportError as error:
        raise ImportError("the text rows need transformers: pip install lensmini") from error
    tensors, meta = golden("text_features_a")
    settings = {**meta["model_config"], "attn_implementation": "eager"}
    if rotary is not None:
        settings["rope_parameters"] = rotary(settings["rope_parameters"])
    with torch.random.fork_rng():
        model = GptOssForCausalLM(GptOssConfig(**settings)).float()
    missing, unexpected = model.load_state_dict(_weights(tensors), strict=False)
    if missing != ["lm_head.weight"] or unexpected:
        raise ValueError(f"text_features_a: expected weights that fit, got missing {missing}, unexpected {unexpected}")
    encoder = TextEncoder(model, layers=layers or meta["selected_layers"])
    ids, mask = tensors["inputs.input_ids"], tensors["inputs.attention_mask"].bool()
    prefix = meta["txt_offset"]
    if skip_prefix:
        ids, mask, prefix = ids[:, prefix:], mask[:, prefix:], 0
    if layer_inputs is not None:
        real = mask

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            kwargs = dict(kwargs)
            layer_inputs(kwargs, real)
            return args, kwargs

        for layer in model.model.layers:
            layer.register_forward_pre_hook(before, with_kwargs=True)
    features, mask = encoder.encode_tokens(ids, mask, num_prefix_tokens=prefix)
    if final_norm:
        features[-1] = model.model.norm(features[-1]).detach()
    scales = [published_layer(tensors, index).abs().max() for index in range(len(features))]
    return torch.stack([layer[mask] / scale for layer, scale in zip(features, scales, strict=True)], dim=1)


def published_layer(tensors: dict[str, Tensor], index: int) -> Tensor:
    """Valid tokens `[M, e]` of one layer of the published conditioning."""
    return tensors[f"outputs.conditioning.{index}"][tensors["outputs.conditioning_mask"].bool()]
