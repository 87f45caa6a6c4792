"""Time of a Lens block and of an 8-layer model against diffusers' FLOP-equal double-stream blocks, and against the floor.

``python -m benchmarks.block`` (about 15 minutes on two cores; ``--quick`` for a look at the eager cells of one block).

Flux and QwenImage blocks of equal width do the same ``12 d^2`` multiply-adds per token and the same attention. The floor is
the block's own linears and its attention kernel on ready-made contiguous inputs, nothing between them. Contestants take
turns; every cell is a ratio of medians. Goals: geometric mean against the peers <= 0.85 with no cell above 1.0, and
against the floor <= 1.25.
"""

import argparse
import gc
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import geometric_mean, interleaved, report
from lensmini.nn import DualStreamBlock, RotaryEmbedding3D
from lensmini.packed import Layout

GRID, TEXT, HEAD = (32, 32), 128, 64
Call = Callable[[], object]


class _Stack(nn.Module):
    """A number of blocks of one kind on the same inputs: the part of a model that takes its time."""

    def __init__(
        self, blocks: list[nn.Module], step: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__()
        self.blocks, self.step = nn.ModuleList(blocks), step

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            image, text = self.step(block, image, text)
        return image, text


def ours(dim: int, depth: int, dtype: torch.dtype) -> _Stack:
    """Lens blocks on one packed 512x512 image."""
    layout = Layout.build([GRID], text_lengths=[TEXT])
    tables, temb = RotaryEmbedding3D()(layout), torch.randn(1, dim, dtype=dtype)
    blocks = [DualStreamBlock(dim, dim // HEAD).to(dtype) for _ in range(depth)]
    return _Stack(blocks, lambda block, image, text: block(image, text, temb, tables, layout))  # pyright: ignore


def flux(dim: int, depth: int, dtype: torch.dtype) -> _Stack:
    """diffusers' Flux double-stream blocks."""
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed, FluxTransformerBlock

    ids = torch.zeros(TEXT + GRID[0] * GRID[1], 3)
    ids[TEXT:, 1:] = torch.cartesian_prod(torch.arange(GRID[0]), torch.arange(GRID[1])).float()
    rotary, temb = FluxPosEmbed(10000, [8, 28, 28])(ids), torch.randn(1, dim, dtype=dtype)
    blocks = [FluxTransformerBlock(dim, dim // HEAD, HEAD).to(dtype) for _ in range(depth)]

    def step(block: nn.Module, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        text, image = block(image[None], text[None], temb, image_rotary_emb=rotary)
        return image[0], text[0]

    return _Stack(blocks, step)  # pyright: ignore


def qwen(dim: int, depth: int, dtype: torch.dtype) -> _Stack:
    """diffusers' QwenImage double-stream blocks."""
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope, QwenImageTransformerBlock

    rope = QwenEmbedRope(10000, [8, 28, 28], scale_rope=True)
    rotary = rope([(1, *GRID)], device=torch.device("cpu"), max_txt_seq_len=TEXT)
    temb = torch.randn(1, dim, dtype=dtype)
    blocks = [QwenImageTransformerBlock(dim, dim // HEAD, HEAD).to(dtype) for _ in range(depth)]

    def step(block: nn.Module, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        text, image = block(image[None], text[None], None, temb, image_rotary_emb=rotary)
        return image[0], text[0]

    return _Stack(blocks, step)  # pyright: ignore


def floor(dim: int, depth: int, dtype: torch.dtype, *, backward: bool) -> Call:
    """Only the linears and the attention of ``depth`` blocks, each on a contiguous input of its own."""
    mlp = 8 * dim // 3
    tokens = (GRID[0] * GRID[1], TEXT)
    shapes = [(n, i, o) for n in tokens for i, o in ((dim, 3 * dim), (dim, dim), (dim, mlp), (dim, mlp), (mlp, dim))]
    shapes += [(1, dim, 6 * dim)] * 2
    parts = []
    for _ in range(depth):
        for rows, inputs, outputs in shapes:
            x = torch.randn(rows, inputs, dtype=dtype, requires_grad=backward)
            weight = torch.randn(outputs, inputs, dtype=dtype, requires_grad=backward)
            parts.append((F.linear, (x, weight), torch.randn(rows, outputs, dtype=dtype)))
        size = (1, dim // HEAD, sum(tokens), HEAD)
        qkv = tuple(torch.randn(size, dtype=dtype, requires_grad=backward) for _ in range(3))
        parts.append((F.scaled_dot_product_attention, qkv, torch.randn(size, dtype=dtype)))

    def run() -> None:
        for function, inputs, grad in parts:
            result = function(*inputs)
            if backward:
                torch.autograd.grad(result, inputs, grad)

    return run


def runner(stack: _Stack, dim: int, dtype: torch.dtype, *, backward: bool) -> Call:
    """One call of a stack, with its backward to inputs and parameters if asked."""
    image = torch.randn(GRID[0] * GRID[1], dim, dtype=dtype, requires_grad=backward)
    text = torch.randn(TEXT, dim, dtype=dtype, requires_grad=backward)
    grads = [torch.randn_like(image), torch.randn_like(text)]

    def run() -> None:
        with torch.set_grad_enabled(backward):
            outputs = stack(image, text)
        if backward:
            stack.zero_grad()
            torch.autograd.backward(outputs, grads)

    return run


def main() -> None:
    """Run all cells and print the table and the result line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--quick", action="store_true", help="one block, eager, three rounds")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    cells: dict[str, dict[str, float]] = {}
    for dim, depth in ((1536, 1),) if options.quick else ((1536, 1), (768, 8)):
        for dtype in (torch.float32, torch.bfloat16):
            stacks = {"ours": ours(dim, depth, dtype), "flux": flux(dim, depth, dtype), "qwen": qwen(dim, depth, dtype)}
            for mode in ("eager",) if options.quick else ("eager", "compiled"):
                if mode == "compiled":
                    for stack in stacks.values():
                        for block in stack.blocks:
                            block.compile(dynamic=False)
                for backward in (False, True):
                    calls = {n: runner(s, dim, dtype, backward=backward) for n, s in stacks.items()}
                    calls["floor"] = floor(dim, depth, dtype, backward=backward)
                    seconds = interleaved(calls, rounds=3 if options.quick else options.rounds)
                    kind = "block" if depth == 1 else f"{depth} layers"
                    name = f"{kind}, {str(dtype)[6:]}, {mode}, {'forward+backward' if backward else 'forward'}"
                    cells[name] = {n: seconds["ours"] / seconds[n] for n in ("flux", "qwen", "floor")}
                    cells[name]["ms"] = 1e3 * seconds["ours"]
                    row = "  ".join(f"{key} {value:7.3f}" for key, value in cells[name].items())
                    print(f"{name:52s} {row}", flush=True)
            del stacks
            gc.collect()
            torch.compiler.reset()
    peers = [cell[name] for cell in cells.values() for name in ("flux", "qwen")]
    floors = [cell["floor"] for cell in cells.values()]
    ratio, worst, over_floor = geometric_mean(peers), max(peers), geometric_mean(floors)
    print(f"against peers {ratio:.3f} (worst cell {worst:.3f}), against the floor {over_floor:.3f}")
    details = {"worst_cell": round(worst, 4), "over_floor": round(over_floor, 4), "floor_goal": 1.25}
    rounded = {name: {key: round(value, 3) for key, value in cell.items()} for name, cell in cells.items()}
    holds = ratio <= 0.85 and worst <= 1.0 and over_floor <= 1.25
    report("block", ratio=ratio, goal=0.85, better="lower", holds=holds, details={**details, "cells": rounded})


if __name__ == "__main__":
    main()
