"""Lens on one page of plain torch: model, loss, sampler and training on scenes, equal to the library where they overlap.

    python -m experiments.nano_lens                        two CPU cores, a few minutes: runs/nano_lens/samples.png
    python -m experiments.nano_lens --steps 20             a look at the machinery

To read first, or to copy. The model has the library's parameter names, so weights go both ways with ``strict=True``. What
it leaves out: packing, resume, averages, sharding, the autoencoder (it paints 4 x 4 patches of pixels), the language model
(frozen random vectors of words stand in for its layers). Axes: b samples, n image tokens, l text tokens, d width.
"""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportUnusedExpression=false
import math
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from torch import Tensor, nn
from torchvision.utils import save_image

from lensmini.data import SCENE_VOCABULARY, build_scene_prompts, describe_scene, render_scene, score_images
from lensmini.data import sample_scene as draw_scene

Pair = tuple[Tensor, Tensor]
Text = list[Tensor]


class Norm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(*io, bias=False) for io in ((dim, hidden), (hidden, dim), (dim, hidden)))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def angles(height: int, width: int, num_text: int, dims: tuple[int, int, int]) -> Pair:
    """Rotary angles [n, dim / 2] and [l, dim / 2]: frame 0, rows and columns centred; text follows on the diagonal."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rows, columns = rows.flatten() - (height - height // 2), columns.flatten() - (width - width // 2)
    text = max(height // 2, width // 2) + torch.arange(num_text)

    def table(*positions: Tensor) -> Tensor:
        bands = [p[:, None] * 10_000.0 ** (-torch.arange(0, d, 2) / d) for p, d in zip(positions, dims, strict=True)]
        return torch.cat(bands, 1)

    return table(torch.zeros_like(rows), rows, columns), table(text, text, text)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Turn neighbouring channel pairs of [b, tokens, heads, dim] by their angles."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.img_qkv, self.txt_qkv = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3 * dim)
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (Norm(dim // heads) for _ in range(4))
        self.to_out, self.to_add_out = nn.ModuleList([nn.Linear(dim, dim)]), nn.Linear(dim, dim)

    def forward(self, image: Tensor, text: Tensor, rope: Pair, mask: Tensor) -> Pair:
        q, k, v = self.img_qkv(image).unflatten(-1, (3, self.heads, -1)).unbind(2)
        tq, tk, tv = self.txt_qkv(text).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q = torch.cat([rotate(self.norm_q(q), rope[0]), rotate(self.norm_added_q(tq), rope[1])], 1)
        k = torch.cat([rotate(self.norm_k(k), rope[0]), rotate(self.norm_added_k(tk), rope[1])], 1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, torch.cat([v, tv], 1)))
        keys = torch.cat([mask.new_ones(image.shape[:2]), mask], 1)[:, None, None]  # masked words are no keys
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).flatten(2)
        return self.to_out[0](out[:, : image.shape[1]]), self.to_add_out(out[:, image.shape[1] :])


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(dim, heads)
        self.img_mod, self.txt_mod = (nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim)) for _ in range(2))
        self.img_norm1, self.img_norm2, self.txt_norm1, self.txt_norm2 = (Norm(dim) for _ in range(4))
        self.img_mlp, self.txt_mlp = SwiGLU(dim, 8 * dim // 3), SwiGLU(dim, 8 * dim // 3)

    def forward(self, x: Tensor, y: Tensor, temb: Tensor, rope: Pair, mask: Tensor) -> Pair:
        xs, xc, xg, xs2, xc2, xg2 = self.img_mod(temb)[:, None].chunk(6, -1)  # shift, scale, gate; attention, then MLP
        ys, yc, yg, ys2, yc2, yg2 = self.txt_mod(temb)[:, None].chunk(6, -1)
        a, b = self.attn(self.img_norm1(x) * (1 + xc) + xs, self.txt_norm1(y) * (1 + yc) + ys, rope, mask)
        x, y = x + xg * a, y + yg * b
        x = x + xg2 * self.img_mlp(self.img_norm2(x) * (1 + xc2) + xs2)
        return x, y + yg2 * self.txt_mlp(self.txt_norm2(y) * (1 + yc2) + ys2)


class NanoLens(nn.Module):
    def __init__(self, *, channels: int, text_dim: int, text_layers: int, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        head = dim // heads
        self.rope_dims = (head // 8, 7 * head // 16, 7 * head // 16)  # 8, 28, 28 of 64
        self.img_in, self.txt_in = nn.Linear(channels, dim), nn.Linear(text_layers * text_dim, dim)
        self.txt_norm = nn.ModuleList(Norm(text_dim, 1e-5) for _ in range(text_layers))
        embedder = {"linear_1": nn.Linear(256, dim), "linear_2": nn.Linear(dim, dim)}
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": nn.ModuleDict(embedder)})
        self.transformer_blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm_out, self.proj_out = nn.ModuleDict({"linear": nn.Linear(dim, 2 * dim)}), nn.Linear(dim, channels)
        mods = [mod[1] for block in self.transformer_blocks for mod in (block.img_mod, block.txt_mod)]
        for linear in [self.norm_out["linear"], self.proj_out, *mods]:  # adaLN-zero: blocks start as the identity
            nn.init.zeros_(linear.weight), nn.init.zeros_(linear.bias)
        for linear in mods:  # but for gates slightly open, which saves a short run its first hundred steps
            nn.init.constant_(linear.bias.view(6, dim)[2::3], 0.1)

    def forward(self, latents: Tensor, t: Tensor, text: Text, mask: Tensor) -> Tensor:
        """Velocity [b, c, h, w] of latents [b, c, h, w] at t [b] (1 is noise); text layers [b, l, e], mask true for words."""
        _, _, height, width = latents.shape
        angle = 1000 * t[:, None] * torch.exp(torch.arange(128) * (-math.log(10_000) / 128))
        embed = self.time_text_embed["timestep_embedder"]
        temb = embed["linear_2"](F.silu(embed["linear_1"](torch.cat([angle.cos(), angle.sin()], 1))))
        x = self.img_in(rearrange(latents, "b c h w -> b (h w) c"))
        y = self.txt_in(torch.cat([norm(layer) for norm, layer in zip(self.txt_norm, text, strict=True)], -1))
        rope = angles(height, width, y.shape[1], self.rope_dims)
        for block in self.transformer_blocks:
            x, y = block(x, y, temb, rope, mask)
        scale, shift = self.norm_out["linear"](F.silu(temb))[:, None].chunk(2, -1)
        x = self.proj_out(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        return rearrange(x, "b (h w) c -> b c h w", h=height)


def flow_loss(model: NanoLens, clean: Tensor, noise: Tensor, t: Tensor, text: Text, mask: Tensor) -> Tensor:
    """Flow matching, one number by sample: |v(x_t, t) - (noise - clean)|^2 with x_t = (1 - t) clean + t noise."""
    s = t[:, None, None, None]
    error = model((1 - s) * clean + s * noise, t, text, mask) - (noise - clean)
    return error.square().mean((1, 2, 3))


@torch.no_grad()
def sample(model: NanoLens, x: Tensor, text: Text, mask: Tensor, *, steps: int, guidance: float, mu: float) -> Tensor:
    """Euler from noise to data on the shifted grid; guidance against no text at all, its norms restored per token."""
    base = torch.linspace(1, 1 / steps, steps)
    times = torch.cat([math.exp(mu) / (math.exp(mu) + 1 / base - 1), torch.zeros(1)])
    for t, t_next in pairwise(times):
        cond = model(x, t.expand(len(x)), text, mask)
        free = model(x, t.expand(len(x)), text, torch.zeros_like(mask))
        both = free + guidance * (cond - free)
        x = x + (t_next - t) * both * cond.norm(dim=1, keepdim=True) / both.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return x


def read(captions: list[str], vectors: Tensor) -> tuple[Text, Tensor]:
    """One text layer [b, l, e] from the vectors of the words, and the mask."""
    rows = [[SCENE_VOCABULARY.index(word) for word in caption.split()] for caption in captions]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-1)
    return [vectors[ids.clamp_min(0)]], ids >= 0


def main(
    steps: int = 1500, batch: int = 32, lr: float = 2e-3, seed: int = 0, out: Path = Path("runs/nano_lens")
) -> None:
    """Train on fresh scenes, then paint prompts of the scene suite and let the verifier count what is right."""
    torch.manual_seed(seed)
    model = NanoLens(channels=48, text_dim=64, text_layers=1, dim=128, heads=2, layers=4)
    vectors = torch.randn(len(SCENE_VOCABULARY), 64)
    optimiser = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.98))
    for step in range(steps):
        scenes = [draw_scene(generator=seed * 10**9 + step * batch + i) for i in range(batch)]
        pictures = torch.stack([render_scene(scene, 32, 32, dtype=torch.float32) for scene in scenes]) * 2 - 1
        clean = rearrange(pictures, "b c (h p) (w q) -> b (c p q) h w", p=4, q=4)
        text, mask = read([describe_scene(s, generator=step * batch + i) for i, s in enumerate(scenes)], vectors)
        mask = mask & (torch.rand(batch, 1) > 0.1)  # a tenth sees no text: what guidance compares with
        t = torch.sigmoid(1.0 + torch.randn(batch))  # logit-normal, leaning to noise
        loss = flow_loss(model, clean, torch.randn_like(clean), t, text, mask).mean()
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50, (steps - step) / (0.4 * steps))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}", flush=True)
    prompts = build_scene_prompts(8, seed)
    text, mask = read([prompt.text for prompt in prompts], vectors)
    tokens = sample(model, torch.randn(len(prompts), 48, 8, 8), text, mask, steps=12, guidance=4.0, mu=1.0)
    pictures = rearrange(tokens, "b (c p q) h w -> b c (h p) (w q)", p=4, q=4).add(1).div(2).clamp(0, 1)
    score = score_images(pictures, prompts)
    out.mkdir(parents=True, exist_ok=True)
    save_image(F.interpolate(pictures, scale_factor=3.0), out / "samples.png")
    print(f"{score.strict:.3f} of {len(prompts)} prompts without a mistake, {score.loose:.3f} by colour; see {out}")


if __name__ == "__main__":
    tyro.cli(main)
