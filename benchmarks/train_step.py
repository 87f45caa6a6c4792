"""Time, utilisation and memory of one training step of the Lens transformer: forward and backward, no optimizer.

``python -m benchmarks.train_step`` (about 3 minutes on two cores; on a GPU set ``PYTORCH_ALLOC_CONF=expandable_segments:True``,
so that contestants of different sizes share the card without fragments). ``--out FILE`` keeps the JSON line.

On CUDA: the released 48 blocks in bfloat16 at 1024^2, at 512^2 and on a packed mixture of the 27 buckets, eager and with
``compile_blocks()``. On the CPU the same code with few, narrow blocks, float32 and a quarter of each side. Per cell:
seconds over the floor (all linears of the model at the same shapes and torch's attention, forward and backward, nothing
else), model FLOP/s and their share of the device's peak, and seconds over diffusers' Flux of equal FLOPs per token, which
takes samples of one size only. Then bytes kept per token by recomputation mode, the largest batch that fits (CUDA),
attention backends on the mixture's lengths, and the kernels of a step (CUDA). Goal: no cell above 1.3 times the floor.
"""

import argparse
import contextlib
import io
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import interleaved, report
from benchmarks.train_step_parts import (
    Batch,
    Call,
    activations_per_token,
    attention_calls,
    floor_step,
    largest_batches,
    make_batch,
    make_ours,
    make_peer,
    our_step,
    peer_step,
    release,
    summarise_kernels,
    usable,
)
from lensmini.cost import train_flops
from lensmini.data.buckets import LENS_BUCKETS
from lensmini.nn import LensConfig, LensTransformer
from lensmini.packed import Layout

GOAL, TOKEN_SIDE = 1.3, 16
PEER = "diffusers FluxTransformer2DModel, double-stream blocks only"
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
"""Dense bfloat16 FLOP/s of the SXM cards, by what their names contain."""
PROBE = ((32, 32), 200)
"""Grid and text of the images that the search for the largest batch packs."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured, and on what."""

    config: LensConfig
    """Sizes of the model."""
    cases: Mapping[str, tuple[list[tuple[int, int]], list[int]]]
    """Token grids and text lengths of each packed batch; the last is profiled and gives the lengths for attention."""
    device: torch.device
    """Where."""
    dtype: torch.dtype
    """Of weights and inputs."""
    reduced: bool
    """True if this is not the released model at its own sizes."""
    rounds: int = 5
    """Timed calls of each contestant."""
    compile_options: Mapping[str, object] = field(default_factory=dict)
    """Passed on to ``torch.compile``, for ours and the peer."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds: expected at least 1, got {self.rounds}")


def uniform(grid: int, text: int, images: int) -> tuple[str, tuple[list[tuple[int, int]], list[int]]]:
    """Name and batch of square images of equal size."""
    return f"{TOKEN_SIDE * grid}^2", ([(grid, grid)] * images, [text] * images)


def mixture(step: int, shrink: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Every ``step``-th of the 27 buckets with sides divided by ``shrink``, and texts of 150 to 256 tokens likewise."""
    side = TOKEN_SIDE * shrink
    grids = [(bucket.height // side, bucket.width // side) for bucket in LENS_BUCKETS[::step]]
    return grids, [(150 + 37 * index % 107) // shrink for index in range(len(grids))]


def setting_for(device: str, rounds: int = 5) -> Setting:
    """The released model on CUDA; on the CPU, what two cores do in minutes.

    Args:
        device: ``"auto"``, ``"cuda"`` or ``"cpu"``.
        rounds: timed calls.

    Raises:
        ValueError: if the device is unknown or not there.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"device: expected auto, cuda or cpu, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device for cuda, got a machine where torch sees none")
    if device == "cpu" or not torch.cuda.is_available():
        return Setting(
            config=LensConfig(num_layers=4, num_attention_heads=12, enc_hidden_dim=1440),
            cases=dict([uniform(16, 50, 2), uniform(8, 50, 6)]) | {"mixed": mixture(7, 4)},
            device=torch.device("cpu"),
            dtype=torch.float32,
            reduced=True,
            rounds=rounds,
        )
    return Setting(
        config=LensConfig(),
        cases=dict([uniform(64, 200, 4), uniform(32, 200, 14)]) | {"mixed": mixture(3, 1)},
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        reduced=False,
        rounds=rounds,
    )


def peak_flops(name: str) -> float | None:
    """Peak of a device by its name, or None if the table lacks it (the slower PCIe cards are not in it)."""
    return None if "PCIe" in name else next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def batch_flops(config: LensConfig, layout: Layout) -> int:
    """``cost.train_flops`` of a packed batch."""
    return sum(train_flops(config, n, l) for n, l in zip(layout.image_lengths, layout.text_lengths, strict=True))


def peer_of(setting: Setting) -> tuple[nn.Module | None, str | None]:
    """The peer, or why there is none."""
    try:
        return make_peer(setting.config, setting.dtype, setting.device), None
    except ImportError:
        return None, 'diffusers is not installed: pip install "lensmini[diffusers]"'
    except torch.OutOfMemoryError as error:
        return None, str(error).splitlines()[0]


def time_cell(
    setting: Setting, model: LensTransformer, peer: nn.Module | None, batch: Batch
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Time one case in the models' present mode: the cell's numbers, and who did not fit with the reason.

    Raises:
        MemoryError: if our own step or the floor does not fit.
    """
    layout = batch.layout
    calls: dict[str, Call] = {
        "ours": our_step(model, batch),
        "floor": floor_step(setting.config, layout, setting.dtype),
    }
    if peer is not None and len(set(layout.joint_lengths)) == 1:
        calls["peer"] = peer_step(peer, batch)
    calls, left_out = usable(calls)
    if not calls.keys() >= {"ours", "floor"}:
        raise MemoryError(f"{len(batch.layout.joint_order)} packed tokens do not fit on {setting.device}: {left_out}")
    seconds = interleaved(calls, rounds=setting.rounds, warmup=1)
    rate = batch_flops(setting.config, layout) / seconds["ours"]
    peak = peak_flops(torch.cuda.get_device_name()) if setting.device.type == "cuda" else None
    cell = {
        "seconds": seconds["ours"],
        "floor_seconds": seconds["floor"],
        "peer_seconds": seconds.get("peer"),
        "over_floor": seconds["ours"] / seconds["floor"],
        "over_peer": seconds["ours"] / seconds["peer"] if "peer" in seconds else None,
        "tflops": rate / 1e12,
        "mfu": None if peak is None else rate / peak,
        "images_per_second": layout.batch_size / seconds["ours"],
    }
    model.zero_grad(set_to_none=True)
    if peer is not None:
        peer.zero_grad(set_to_none=True)
    release()
    return {key: None if value is None else float(f"{value:.4g}") for key, value in cell.items()}, left_out


def compile_both(setting: Setting, model: LensTransformer, peer: nn.Module | None) -> None:
    """Compile the blocks of both in the same way: dynamic shapes, one graph."""
    model.compile_blocks(**setting.compile_options)
    if peer is not None:
        for block in peer.transformer_blocks:  # pyright: ignore
            block.compile(**{"dynamic": True, "fullgraph": True, **setting.compile_options})


def time_attention(setting: Setting, layout: Layout) -> dict[str, object]:
    """Attention alone, forward and backward, by every backend on the same packed lengths."""
    # An unsupported kernel raises as it likes: from ValueError of ours to errors of the compiler.
    calls, reasons = usable(attention_calls(setting.config, layout, setting.dtype), (Exception,))
    seconds = interleaved(calls, rounds=max(setting.rounds, 5), warmup=2)
    flops = 12 * setting.config.inner_dim * sum(length**2 for length in layout.joint_lengths)
    rows = {name: {"ms": round(1e3 * s, 3), "tflops": float(f"{flops / s / 1e12:.4g}")} for name, s in seconds.items()}
    return {"lengths": layout.joint_lengths, "backends": rows, "unavailable": reasons}


def profile_step(call: Call, device: torch.device) -> dict[str, object]:
    """Kernels of one call (operators on the CPU), by torch's profiler."""
    cuda = device.type == "cuda"
    call()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        call()
        if cuda:
            torch.cuda.synchronize()
    rows = []
    for event in profiler.key_averages():
        if event.device_type.name == ("CUDA" if cuda else "CPU") and not getattr(event, "is_user_annotation", False):
            time = event.self_device_time_total if cuda else event.self_cpu_time_total  # microseconds
            rows.append((event.key, time / 1e6, event.count))
    return summarise_kernels(rows)


def versions() -> dict[str, str]:
    """Versions of what was measured."""
    found = {}
    for name in ("torch", "diffusers", "xformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def measure(setting: Setting) -> dict[str, object]:
    """Measure everything and print the table: the details of the result line."""
    torch.manual_seed(0)
    start, cuda = time.perf_counter(), setting.device.type == "cuda"
    config = setting.config
    layouts = {
        name: Layout.build(grids, text_lengths=texts, device=setting.device)
        for name, (grids, texts) in setting.cases.items()
    }
    batches = {name: make_batch(config, layout, setting.dtype) for name, layout in layouts.items()}
    last = [*batches][-1]
    model = make_ours(config, setting.dtype, setting.device)
    kind = "reduced model" if setting.reduced else "released model"
    print(f"{kind}: {config.num_layers} blocks of width {config.inner_dim}, {setting.dtype} on {setting.device}")
    # Both before anything is compiled, and before the peer takes its share of the card.
    activations = activations_per_token(model, batches[last])
    largest = largest_batches(model, *PROBE) if cuda else None
    peer, no_peer = peer_of(setting)
    cells: dict[str, dict[str, float | None]] = {}
    left_out = {} if no_peer is None else {"all": {"peer": no_peer}}
    kernels = {}
    print(f"{'case':12s}{'mode':10s}{'tokens':>8s}{'ms':>10s}{'floor':>8s}{'peer':>8s}{'TFLOP/s':>9s}{'MFU':>7s}")
    for mode in ("eager", "compiled"):
        if mode == "compiled":
            compile_both(setting, model, peer)
        for name, batch in batches.items():
            try:
                cell, reasons = time_cell(setting, model, peer, batch)
            except MemoryError as error:
                left_out[f"{name}, {mode}"] = {"ours": str(error)}
                print(f"{name:12s}{mode:10s}{error}")
                continue
            cells[f"{name}, {mode}"] = cell
            left_out |= {f"{name}, {mode}": reasons} if reasons else {}
            print(table_row(name, mode, len(batch.layout.joint_order), cell), flush=True)
        if cuda and f"{last}, {mode}" in cells:
            kernels[mode] = profile_step(our_step(model, batches[last]), setting.device)
            kernels[mode]["idle_seconds"] = max(0.0, cells[f"{last}, {mode}"]["seconds"] - kernels[mode]["seconds"])
            print(f"{last}, {mode}: largest gap {kernels[mode]['largest_gap']}")
    del model, peer
    release()
    attention = time_attention(setting, layouts[last])
    for name, row in attention["backends"].items():  # pyright: ignore
        print(f"attention, {last}, {name:14s}{row['ms']:10.2f} ms{row['tflops']:9.3g} TFLOP/s")
    for name, reason in attention["unavailable"].items():  # pyright: ignore
        print(f"attention, {last}, {name:14s} unavailable: {reason}")
    for mode, row in activations.items():
        held = "does not fit" if row["measured"] is None else f"{row['measured']:,d} bytes per token after the forward"
        print(f"activations, {mode:10s}{held}, {row['cost']:,d} by cost at the start of the backward")
    batch_sizes = {
        name: {"images": l.batch_size, "image_tokens": l.num_image_tokens, "text_tokens": l.num_text_tokens}
        for name, l in layouts.items()
    }
    return {
        "device": setting.device.type,
        "reduced": setting.reduced,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "num_layers": config.num_layers,
        "inner_dim": config.inner_dim,
        "versions": versions(),
        "peer": PEER,
        "batches": batch_sizes,
        "cells": cells,
        "left_out": left_out,
        "activation_bytes_per_token": activations,
        "largest_batch": largest,
        "attention": attention,
        "kernels": kernels or None,
        "allocation_retries": torch.cuda.memory_stats()["num_alloc_retries"] if cuda else None,
        "wall_seconds": round(time.perf_counter() - start),
    }


def table_row(name: str, mode: str, tokens: int, cell: Mapping[str, float | None]) -> str:
    """One aligned line of the table."""
    peer, mfu = ("-" if cell[key] is None else f"{cell[key]:.3f}" for key in ("over_peer", "mfu"))
    over = f"{1e3 * (cell['seconds'] or 0):10.1f}{cell['over_floor']:8.3f}{peer:>8s}"
    return f"{name:12s}{mode:10s}{tokens:8d}{over}{cell['tflops']:9.3g}{mfu:>7s}"


def result_line(details: Mapping[str, object], out: Path | None = None) -> None:
    """Print the result line, and keep it in a file; nothing holds if nothing fitted."""
    worst = max((cell["over_floor"] for cell in details["cells"].values()), default=float("inf"))  # pyright: ignore
    line = io.StringIO()
    with contextlib.redirect_stdout(line):
        report("train_step", ratio=worst, goal=GOAL, better="lower", holds=worst <= GOAL, details=details)
    if out is not None:
        out.write_text(line.getvalue())
    print(line.getvalue(), end="", flush=True)


def main() -> None:
    """Read the options, measure, and print table and result line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each contestant")
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    options = parser.parse_args()
    try:
        setting = setting_for(options.device, options.rounds)
    except ValueError as error:
        parser.error(str(error))
    result_line(measure(setting), options.out)


if __name__ == "__main__":
    main()
