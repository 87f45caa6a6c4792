"""Time of a guided sampling run on the CPU against the plain padded loop, and what each trick contributes.

``OMP_NUM_THREADS=1 python -m benchmarks.generate_cpu --num-steps 1 --rounds 1`` (8 layers, both cases, under 6 minutes of
one core); without options three rounds of two steps, about 20 minutes. ``--only mixed`` leaves the other case out.

The peer is the loop of diffusers' pipelines, written here on dense ``[b, n, d]`` tensors: texts padded to the longest
prompt, a batch for each size, conditional and unconditional passes one after the other, modulation and text projection in
every pass, and an unconditional half that is padding behind a mask, as the published pipeline has it. Ours is
``paint_packed`` with ``FastEngine``. Between them stand the same loop without padding and our plain passes, so that every
trick has a ratio of its own. Seconds are of the process, not of the wall, and only ratios of medians are claims.
Goals: four prompts of 20, 60, 150 and 390 tokens on four canvases >= 1.8, one image of 1024 tokens >= 1.2.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import interleaved, report
from lensmini.cost import forward_flops
from lensmini.nn import DualStreamBlock, LensConfig, LensTransformer, RotaryTable
from lensmini.packed import Layout
from lensmini.pipeline import draw_noise, paint_packed
from lensmini.pipeline.passes import FastEngine
from lensmini.sampling import empirical_mu, guide, time_grid

SCALE = 5.0
MIXED = ([(32, 32), (22, 44), (44, 22), (48, 48)], [20, 60, 150, 390])
"""512x512, 352x704, 704x352 and 768x768 in tokens, and text tokens."""
SINGLE = ([(32, 32)], [60])
GOALS = {"mixed": 1.8, "single": 1.2}
ALL_TOGETHER = 2**40
"""Tokens of a group that no batch fills."""


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm as diffusers writes it."""
    return (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotary positions on ``[b, n, h, d]`` by complex numbers, as diffusers' Qwen-Image does."""
    turns = torch.complex(table.cos, table.sin)[None, :, None]
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turns).flatten(-2).to(x.dtype)


def padded_block(
    block: DualStreamBlock, streams: list[Tensor], temb: Tensor, tables: Sequence[RotaryTable], mask: Tensor | None
) -> list[Tensor]:
    """One block on dense streams ``[b, n, d]`` and ``[b, l, d]``."""
    attn, heads = block.attn, []
    mods = [mod[:, :, None].unbind(1) for mod in block.modulation(temb)]
    for stream, project, norms, first, mod, table in zip(
        streams,
        (attn.img_qkv, attn.txt_qkv),
        ((attn.norm_q, attn.norm_k), (attn.norm_added_q, attn.norm_added_k)),
        (block.img_norm1, block.txt_norm1),
        mods,
        tables,
        strict=True,
    ):
        hidden = rms(stream, first.weight, first.eps) * (1 + mod[1]) + mod[0]
        q, k, v = project(hidden).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        q, k = (rotate(rms(x, n.weight, n.eps), table) for x, n in zip((q, k), norms, strict=True))
        heads.append((q, k, v))
    query, key, value = (torch.cat(parts, dim=1).transpose(1, 2) for parts in zip(*heads, strict=True))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
    outputs = []
    for stream, part, project, second, mlp, mod in zip(
        streams,
        attended.split([stream.shape[1] for stream in streams], dim=1),
        (attn.to_out[0], attn.to_add_out),
        (block.img_norm2, block.txt_norm2),
        (block.img_mlp, block.txt_mlp),
        mods,
        strict=True,
    ):
        stream = stream + mod[2] * project(part)
        hidden = rms(stream, second.weight, second.eps) * (1 + mod[4]) + mod[3]
        outputs.append(stream + mod[5] * mlp.w2(F.silu(mlp.w1(hidden)) * mlp.w3(hidden)))
    return outputs


def padded_forward(
    model: LensTransformer, tokens: Tensor, t: Tensor, features: Tensor, valid: Tensor | None, grid: tuple[int, int]
) -> Tensor:
    """The model on dense ``[b, n, c]`` tokens and ``[b, l, k, e]`` features; ``valid [b, l]`` or no mask."""
    layout = Layout.build([grid], text_lengths=[features.shape[1]], device=tokens.device)
    tables, temb = model.rotary(layout), model.time_text_embed(t)
    normed = [rms(features[:, :, i], norm.weight, norm.eps) for i, norm in enumerate(model.txt_norm)]  # pyright: ignore
    streams, mask = [model.img_in(tokens), model.txt_in(torch.cat(normed, dim=-1))], None
    if valid is not None:
        keys = torch.cat([valid.new_ones(len(tokens), tokens.shape[1]), valid], dim=1)
        mask = tokens.new_zeros(keys.shape).masked_fill(~keys, -torch.inf)[:, None, None]
    for block in model.transformer_blocks:
        streams = padded_block(block, streams, temb, tables, mask)  # pyright: ignore[reportArgumentType]
    scale, shift = model.norm_out.modulation(temb)[:, :, None].unbind(1)
    hidden = F.layer_norm(streams[0], streams[0].shape[-1:], eps=1e-6)
    return model.proj_out(hidden * (1 + scale) + shift)


@torch.no_grad()
def paint_loop(
    model: LensTransformer, noise: Sequence[Tensor], texts: Sequence[Tensor], num_steps: int, *, pad: bool
) -> list[Tensor]:
    """The plain loop, one size after the other (here every picture has its own).

    Args:
        model: predicts the velocity.
        noise: for each picture ``[c, h, w]``.
        texts: for each picture ``[l, k, e]``.
        num_steps: steps.
        pad: texts to the longest, and the unconditional half as much padding; else no padding and no text.
    """
    longest, painted = max(len(text) for text in texts), []
    for image, text in zip(noise, texts, strict=True):
        h, w = image.shape[1:]
        tokens = image.flatten(1).t()[None]
        length = longest if pad else len(text)
        cond = F.pad(text, (0, 0, 0, 0, 0, length - len(text)))[None]
        valid = (torch.arange(length, device=text.device) < len(text))[None] if pad else None
        none = torch.zeros_like(cond) if pad else cond[:, :0]
        for t, t_next in pairwise(time_grid(num_steps, empirical_mu(h * w, num_steps), device=image.device)):
            wanted = padded_forward(model, tokens, t[None], cond, valid, (h, w))
            without = padded_forward(model, tokens, t[None], none, None if valid is None else valid & False, (h, w))
            tokens = tokens + (t_next - t) * guide(wanted, without, SCALE, channel_dim=-1)
        painted.append(tokens[0].t().unflatten(1, (h, w)))
    return painted


def case(
    model: LensTransformer, grids: list[tuple[int, int]], lengths: list[int], num_steps: int
) -> dict[str, Callable[[], list[Tensor]]]:
    """The contestants on one set of pictures, each with one trick more than the one before."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    shape = (config.num_text_layers, config.enc_hidden_dim)
    texts = [torch.randn(length, *shape, generator=generator) for length in lengths]
    nothing = [torch.zeros(0, *shape)] * len(texts)
    noise = draw_noise(grids, config.in_channels, seeds=range(len(grids)))
    ours = {"num_steps": num_steps, "guidance_scale": SCALE}
    whole, chunks, groups = FastEngine(chunked=False), FastEngine(group=ALL_TOGETHER), FastEngine()
    return {
        "padded loop": lambda: paint_loop(model, noise, texts, num_steps, pad=True),
        "no padding": lambda: paint_loop(model, noise, texts, num_steps, pad=False),
        "packed": lambda: paint_packed(model, noise, texts, nothing, **ours),
        "once per run": lambda: paint_packed(model, noise, texts, nothing, engine=whole, **ours),
        "in chunks": lambda: paint_packed(model, noise, texts, nothing, engine=chunks, **ours),
        "in groups": lambda: paint_packed(model, noise, texts, nothing, engine=groups, **ours),
    }


def saved_flops(config: LensConfig, grids: list[tuple[int, int]], lengths: list[int]) -> float:
    """FLOPs of the padded loop over those of the packed one: what padding alone can be worth."""
    images = [h * w for h, w in grids]
    padded = sum(2 * forward_flops(config, n, max(lengths), text_tail=True) for n in images)
    packed = sum(
        forward_flops(config, n, l) + forward_flops(config, n, 0) for n, l in zip(images, lengths, strict=True)
    )
    return padded / packed


def main() -> None:
    """Measure both cases and print the table and the result line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-steps", type=int, default=2)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--num-attention-heads", type=int, default=8, help="of width 64 each")
    parser.add_argument("--only", choices=["single", "mixed"], help="one case of the two; holds is then false")
    options = parser.parse_args()
    config = LensConfig(num_layers=options.num_layers, num_attention_heads=options.num_attention_heads)
    torch.manual_seed(0)
    model = LensTransformer(config).eval()
    results, details = {}, {}
    for name, (grids, lengths), more in (("single", SINGLE, 2), ("mixed", MIXED, 0)):
        if options.only not in (None, name):
            continue
        calls = case(model, grids, lengths, options.num_steps)
        images = {key: call() for key, call in calls.items()}  # also the warm-up
        largest = max(image.abs().max() for image in images["padded loop"])
        pairs = [zip(images["padded loop"], others, strict=True) for others in images.values()]
        error = max(float((a - b).abs().max() / largest) for pair in pairs for a, b in pair)
        seconds = interleaved(calls, rounds=options.rounds + more, warmup=0, clock=time.process_time)
        results[name] = seconds["padded loop"] / seconds["in groups"]
        steps = {later: seconds[earlier] / seconds[later] for earlier, later in pairwise(seconds)}
        flops = saved_flops(config, grids, lengths)
        print(
            f"{name}: {results[name]:.3f} (goal {GOALS[name]}), padding alone by FLOPs {flops:.3f}, error {error:.1e}"
        )
        for trick, ratio in steps.items():
            print(f"  {trick:14s}{ratio:8.3f}{seconds[trick]:10.2f} s", flush=True)
        details[name] = {"ratio": round(results[name], 4), "goal": GOALS[name], "flops": round(flops, 4)}
        details[name] |= {"tricks": {key: round(value, 4) for key, value in steps.items()}, "error": error}
        details[name] |= {"cpu_seconds": {key: round(value, 3) for key, value in seconds.items()}}
    holds = all(results.get(name, 0.0) >= goal for name, goal in GOALS.items())
    main_case = "mixed" if "mixed" in results else "single"
    sizes = {"num_layers": config.num_layers, "inner_dim": config.inner_dim, "num_steps": options.num_steps}
    line = {"goal": GOALS[main_case], "better": "higher", "holds": holds}
    report("generate_cpu", ratio=results[main_case], details={**sizes, **details}, **line)


if __name__ == "__main__":
    main()
