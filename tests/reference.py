"""The released transformer written a second time: slow, for one sample, with loops over heads, tokens and pairs.

It follows the description of the architecture only, shares nothing with the library, and computes in the dtype of
its input (use float64). Axes: n image tokens, l text tokens (masked ones included), e text width, d inner width,
k head width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Batch",
    "attention",
    "batch_forward",
    "lens_forward",
    "random_batch",
    "random_weights",
    "rms_norm",
    "rope_angles",
    "rotate",
    "sinusoid",
    "stack_samples",
    "swiglu",
    "tensor_shapes",
    "text_fusion",
    "time_embedding",
]

TEXT_NORM_EPS = 1e-5
BLOCK_NORM_EPS = 1e-6
QK_NORM_EPS = 1e-6
OUT_NORM_EPS = 1e-6


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every key of the checkpoint with its shape."""
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    width, hidden = heads * head, int(heads * head / 3 * 8)
    layers, text = len(config["selected_layer_index"]), config["enc_hidden_dim"]
    out = config["patch_size"] ** 2 * config["out_channels"]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        shapes[f"{name}.bias"] = (rows,)

    linear("time_text_embed.timestep_embedder.linear_1", width, 256)
    linear("time_text_embed.timestep_embedder.linear_2", width, width)
    linear("img_in", width, config["in_channels"])
    linear("txt_in", width, layers * text)
    linear("norm_out.linear", 2 * width, width)
    linear("proj_out", out, width)
    for layer in range(layers):
        shapes[f"txt_norm.{layer}.weight"] = (text,)
    for block in range(config["num_layers"]):
        prefix = f"transformer_blocks.{block}"
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            shapes[f"{prefix}.attn.{norm}.weight"] = (head,)
        linear(f"{prefix}.attn.to_out.0", width, width)
        linear(f"{prefix}.attn.to_add_out", width, width)
        for stream in ("img", "txt"):
            linear(f"{prefix}.attn.{stream}_qkv", 3 * width, width)
            linear(f"{prefix}.{stream}_mod.1", 6 * width, width)
            shapes[f"{prefix}.{stream}_norm1.weight"] = (width,)
            shapes[f"{prefix}.{stream}_norm2.weight"] = (width,)
            shapes[f"{prefix}.{stream}_mlp.w1.weight"] = (hidden, width)
            shapes[f"{prefix}.{stream}_mlp.w2.weight"] = (width, hidden)
            shapes[f"{prefix}.{stream}_mlp.w3.weight"] = (hidden, width)
    return shapes


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """Weights with no zero and no special value, float32; every branch has about the size of its input."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in tensor_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            weights[key] = noise / math.sqrt(shape[1])
        else:
            weights[key] = 0.2 * noise if key.endswith("bias") else 1 + 0.2 * noise
    return weights


def linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """x W^T + bias, without the bias where the checkpoint has none."""
    result = x @ weights[f"{name}.weight"].T
    return result + weights[f"{name}.bias"] if f"{name}.bias" in weights else result


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return x / (1 + torch.exp(-x))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Each row divided by its root mean square, times the weight."""
    mean_square = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return weight * x / torch.sqrt(mean_square + eps)


def sinusoid(t: Tensor, width: int = 256) -> Tensor:
    """Cosines, then sines, of 1000 t times frequencies falling from 1 to almost 1/10000: [] to [width]."""
    half = width // 2
    frequencies = [10000 ** (-k / half) for k in range(half)]
    angles = [1000 * t * frequency for frequency in frequencies]
    return torch.stack([torch.cos(a) for a in angles] + [torch.sin(a) for a in angles])


def time_embedding(t: Tensor, weights: Mapping[str, Tensor], prefix: str) -> Tensor:
    """[] to [d]."""
    weights_dtype = weights[f"{prefix}.linear_1.weight"].dtype
    hidden = silu(linear(sinusoid(t).to(weights_dtype), weights, f"{prefix}.linear_1"))
    return linear(hidden, weights, f"{prefix}.linear_2")


@lru_cache(maxsize=256)
def rope_angles(
    height: int, width: int, text_length: int, axes_dim: tuple[int, ...], theta: float = 10000.0
) -> tuple[list[list[float]], list[list[float]]]:
    """The rotation angle of every pair of every image token and of every text slot."""

    def angles(positions: tuple[int, int, int]) -> list[float]:
        return [
            position * theta ** (-2 * k / dim)
            for position, dim in zip(positions, axes_dim, strict=True)
            for k in range(dim // 2)
        ]

    image = []
    for y in range(height):
        for x in range(width):
            image.append(angles((0, y - math.ceil(height / 2), x - math.ceil(width / 2))))
    start = max(height // 2, width // 2)
    text = [angles((start + j, start + j, start + j)) for j in range(text_length)]
    return image, text


def rotate(x: Tensor, angles: list[list[float]]) -> Tensor:
    """Rotate channels (2i, 2i + 1) of each token's head by the i-th angle of the token: [n, k] to [n, k]."""
    angle = torch.tensor(angles, dtype=torch.float64, device=x.device).reshape(len(angles), x.shape[-1] // 2)
    columns = []
    for pair in range(x.shape[-1] // 2):
        cos, sin = angle[:, pair].cos().to(x.dtype), angle[:, pair].sin().to(x.dtype)
        columns.append(x[:, 2 * pair] * cos - x[:, 2 * pair + 1] * sin)
        columns.append(x[:, 2 * pair] * sin + x[:, 2 * pair + 1] * cos)
    return torch.stack(columns, dim=1)


def swiglu(x: Tensor, weights: Mapping[str, Tensor], prefix: str) -> Tensor:
    """w2(SiLU(w1 x) * w3 x)."""
    gate, up = linear(x, weights, f"{prefix}.w1"), linear(x, weights, f"{prefix}.w3")
    return linear(silu(gate) * up, weights, f"{prefix}.w2")


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of one sample, head by head: queries [q, heads, k], keys and values [s, heads, k]."""
    heads = []
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head].T / math.sqrt(query.shape[-1])
        weight = torch.exp(scores - scores.amax(1, keepdim=True).detach())
        heads.append(weight @ value[:, head] / weight.sum(1, keepdim=True))
    return torch.stack(heads, dim=1)


def text_fusion(features: Sequence[Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """Normalise each layer with its own weight, join on channels in order, project: layers of [l, e] to [l, d]."""
    normed = [rms_norm(layer, weights[f"txt_norm.{i}.weight"], TEXT_NORM_EPS) for i, layer in enumerate(features)]
    return linear(torch.cat(normed, dim=1), weights, "txt_in")


def _heads(joined: Tensor, part: int, heads: int) -> Tensor:
    """Query (0), key (1) or value (2) of a fused projection, [n, 3 d] to [n, heads, k]."""
    width = joined.shape[1] // 3
    rows = joined[:, part * width : (part + 1) * width]
    head = width // heads
    return torch.stack([rows[:, i * head : (i + 1) * head] for i in range(heads)], dim=1)


def joint_attention(
    image: Tensor,
    text: Tensor,
    valid: list[int],
    angles: tuple[list[list[float]], list[list[float]]],
    weights: Mapping[str, Tensor],
    prefix: str,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """All image tokens and all text slots look at all image tokens and at the valid text slots."""
    parts = []
    for stream, tokens, names, angle in (
        ("img", image, ("norm_q", "norm_k"), angles[0]),
        ("txt", text, ("norm_added_q", "norm_added_k"), angles[1]),
    ):
        joined = linear(tokens, weights, f"{prefix}.{stream}_qkv")
        query, key, value = (_heads(joined, part, heads) for part in range(3))
        query = rms_norm(query, weights[f"{prefix}.{names[0]}.weight"], QK_NORM_EPS)
        key = rms_norm(key, weights[f"{prefix}.{names[1]}.weight"], QK_NORM_EPS)
        query = torch.stack([rotate(query[:, head], angle) for head in range(heads)], dim=1)
        key = torch.stack([rotate(key[:, head], angle) for head in range(heads)], dim=1)
        parts.append((query, key, value))
    (image_q, image_k, image_v), (text_q, text_k, text_v) = parts
    keys, values = torch.cat([image_k, text_k[valid]]), torch.cat([image_v, text_v[valid]])
    attended = attention(torch.cat([image_q, text_q]), keys, values).flatten(1)
    count = image.shape[0]
    return (
        linear(attended[:count], weights, f"{prefix}.to_out.0"),
        linear(attended[count:], weights, f"{prefix}.to_add_out"),
    )


def modulation(temb: Tensor, weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The six rows [d] that a block applies to one stream."""
    names = ("shift_attn", "scale_attn", "gate_attn", "shift_mlp", "scale_mlp", "gate_mlp")
    rows = linear(silu(temb)[None], weights, name)[0]
    width = len(temb)
    return {part: rows[i * width : (i + 1) * width] for i, part in enumerate(names)}


def lens_forward(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    image_tokens: Tensor,
    grid: tuple[int, int],
    t: Tensor,
    text_features: Sequence[Tensor],
    text_mask: Tensor,
) -> dict[str, Tensor]:
    """The velocity of one sample and everything on the way to it.

    Args:
        weights: by checkpoint key, in the dtype to compute in.
        config: by the checkpoint's setting names.
        image_tokens: ``[n, c]`` in row-major order.
        grid: latent height and width with ``n = height * width``.
        t: ``[]`` noise level in [0, 1].
        text_features: one ``[l, e]`` per text layer.
        text_mask: ``[l]`` bool.

    Returns:
        ``sample`` [n, out]; ``img_in``, ``txt_in``, ``temb``, ``norm_out``; ``attn.I.img``, ``attn.I.txt``
        (after their output projections), ``block.I.img``, ``block.I.txt``.
    """
    dtype, heads = image_tokens.dtype, config["num_attention_heads"]
    length = text_features[0].shape[0]
    valid = [j for j in range(length) if bool(text_mask[j])]
    angles = rope_angles(*grid, length, tuple(config["axes_dims_rope"]))
    image = linear(image_tokens, weights, "img_in")
    text = text_fusion(text_features, weights)
    temb = time_embedding(t, weights, "time_text_embed.timestep_embedder").to(dtype)
    seen = {"img_in": image, "txt_in": text, "temb": temb}
    for index in range(config["num_layers"]):
        prefix = f"transformer_blocks.{index}"
        streams = {"img": image, "txt": text}
        mods = {s: modulation(temb, weights, f"{prefix}.{s}_mod.1") for s in streams}
        inputs = {}
        for s, x in streams.items():
            normed = rms_norm(x, weights[f"{prefix}.{s}_norm1.weight"], BLOCK_NORM_EPS)
            inputs[s] = normed * (1 + mods[s]["scale_attn"]) + mods[s]["shift_attn"]
        attended = joint_attention(inputs["img"], inputs["txt"], valid, angles, weights, f"{prefix}.attn", heads)
        for s, update in zip(streams, attended, strict=True):
            seen[f"attn.{index}.{s}"] = update
            x = streams[s] + mods[s]["gate_attn"] * update
            normed = rms_norm(x, weights[f"{prefix}.{s}_norm2.weight"], BLOCK_NORM_EPS)
            update = swiglu(normed * (1 + mods[s]["scale_mlp"]) + mods[s]["shift_mlp"], weights, f"{prefix}.{s}_mlp")
            seen[f"block.{index}.{s}"] = streams[s] = x + mods[s]["gate_mlp"] * update
        image, text = streams["img"], streams["txt"]
    scale, shift = linear(silu(temb)[None], weights, "norm_out.linear")[0].chunk(2)
    centred = image - image.mean(1, keepdim=True)
    normed = centred / torch.sqrt((centred * centred).mean(1, keepdim=True) + OUT_NORM_EPS)
    seen["norm_out"] = normed * (1 + scale) + shift
    seen["sample"] = linear(seen["norm_out"], weights, "proj_out")
    return seen


def stack_samples(results: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the results of samples that share a grid and a text length on a new first axis."""
    return {key: torch.stack([result[key] for result in results]) for key in results[0]}


@dataclass
class Batch:
    """A mixed-resolution batch in the list form: b images ``[c, h_i, w_i]`` with time, text and mask."""

    latents: list[Tensor]
    t: Tensor
    text_features: list[Tensor]
    text_mask: Tensor

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Latent height and width of each sample."""
        return [(image.shape[1], image.shape[2]) for image in self.latents]

    def select(self, samples: Sequence[int]) -> "Batch":
        """The batch of some of the samples, in the given order."""
        chosen = list(samples)
        features = [layer[chosen] for layer in self.text_features]
        return Batch([self.latents[i] for i in chosen], self.t[chosen], features, self.text_mask[chosen])

    def tensors(self) -> list[Tensor]:
        """Every tensor a gradient may be taken of."""
        return [*self.latents, self.t, *self.text_features]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply a function to every floating tensor."""
        features = [function(layer) for layer in self.text_features]
        return Batch([function(image) for image in self.latents], function(self.t), features, self.text_mask)


def random_batch(
    config: Mapping[str, Any],
    grids: Sequence[tuple[int, int]],
    text_mask: Tensor,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """A batch of random inputs; text of the later layers is larger, as it is in a language model."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    latents = [randn(config["in_channels"], *grid) for grid in grids]
    t = torch.rand(len(grids), generator=generator, dtype=torch.float64).to(dtype)
    layers = range(len(config["selected_layer_index"]))
    features = [10.0**layer * randn(*text_mask.shape, config["enc_hidden_dim"]) for layer in layers]
    return Batch(latents, t, features, text_mask)


def batch_forward(weights: Mapping[str, Tensor], config: Mapping[str, Any], batch: Batch) -> list[dict[str, Tensor]]:
    """:func:`lens_forward` for each sample; ``sample`` is arranged as ``[c, h_i, w_i]``."""
    results = []
    for i, ((height, width), image) in enumerate(zip(batch.grids, batch.latents, strict=True)):
        tokens = torch.stack([image[:, y, x] for y in range(height) for x in range(width)])
        features = [layer[i] for layer in batch.text_features]
        seen = lens_forward(weights, config, tokens, (height, width), batch.t[i], features, batch.text_mask[i])
        seen["sample"] = seen["sample"].T.reshape(-1, height, width)
        results.append(seen)
    return results
