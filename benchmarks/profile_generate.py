"""Where the time of a picture goes: each part of a run beside the least that its products need.

``python -m benchmarks.profile_generate`` (any device; on a CPU a narrow model and a quarter of each side, a minute).

Parts: modulation of the schedule, projection of the text, forward passes, guidance and step. The floor of a part is its
linears and its attention alone on inputs of their own; what is left is norms, gates, positions, copies and launches. The
text encoder and the autoencoder are not ours; their seconds come with ``generate_gpu`` and from a checkpoint's own run.
"""

import argparse
import time

import torch
import torch.nn.functional as F

from benchmarks.generate_cpu import SCALE
from benchmarks.generate_gpu import TEXT, Call, floor, seconds_of
from benchmarks.timing import report
from lensmini.nn import LensConfig, LensTransformer, fuse_text_layers
from lensmini.packed import Layout
from lensmini.pipeline.passes import FastEngine
from lensmini.pipeline.schedule_modulation import schedule_modulation
from lensmini.sampling import empirical_mu, euler_step, guide, time_grid

GOAL = 1.25


def profile(
    config: LensConfig, grid: tuple[int, int], steps: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds and floor of each part of a guided run of one picture.

    Args:
        config: sizes of the model.
        grid: tokens of the picture.
        steps: of the schedule.
        dtype: of the weights.
        device: where.
        rounds: timed calls.

    Returns:
        For each part its seconds in a whole run and those of its floor.
    """
    torch.manual_seed(0)
    with device:
        model = LensTransformer(config).to(dtype).eval()
    layout = Layout.build([grid] * 2, text_lengths=[TEXT, 0], device=device)
    text = torch.randn(TEXT, config.num_text_layers, config.enc_hidden_dim, dtype=dtype, device=device)
    tokens = torch.randn(layout.num_image_tokens, config.in_channels, device=device)
    t = time_grid(steps, empirical_mu(grid[0] * grid[1], steps), device=device)
    times = t[:-1, None].expand(-1, 2)
    passes = FastEngine()(model, text, layout, times)
    rows = torch.randn(steps, config.inner_dim, dtype=dtype, device=device)
    weights = [layer[1].weight for block in model.transformer_blocks for layer in (block.img_mod, block.txt_mod)]  # pyright: ignore
    fused = text.flatten(1)
    half = layout.num_image_tokens // 2
    one, single = tokens[:half], Layout.build([grid], device=device)

    def walk() -> None:
        for step in range(steps):
            euler_step(
                one, guide(one, one, SCALE, channel_dim=-1), t[step : step + 1], t[step + 1 : step + 2], layout=single
            )

    def all_passes() -> None:
        for step in range(steps):
            passes(step, tokens)

    least = floor(config, list(layout.joint_lengths), TEXT, dtype, device)
    pairs: dict[str, tuple[Call, Call]] = {
        "modulation": (
            lambda: schedule_modulation(model, times),
            lambda: [F.linear(rows, weight) for weight in weights],
        ),
        "text": (
            lambda: fuse_text_layers(text, model.txt_norm, model.txt_in),
            lambda: F.linear(fused, model.txt_in.weight),
        ),
        "passes": (all_passes, lambda: [least() for _ in range(steps)]),
        "guidance and step": (walk, lambda: None),
    }
    calls = {
        f"{name}{kind}": call for name, both in pairs.items() for kind, call in zip(("", " floor"), both, strict=True)
    }
    seconds = seconds_of(calls, rounds)
    return {name: {"seconds": seconds[name], "floor": seconds[f"{name} floor"]} for name in pairs}


def main() -> None:
    """Profile, print the table and the result line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    start = time.perf_counter()
    if torch.cuda.is_available():
        setting = (LensConfig(), (64, 64), 20, torch.bfloat16, torch.device("cuda"))
    else:
        setting = (LensConfig(num_layers=4, num_attention_heads=8), (16, 16), 4, torch.float32, torch.device("cpu"))
    parts = profile(*setting, options.rounds)
    total, least = (sum(part[kind] for part in parts.values()) for kind in ("seconds", "floor"))
    for name, part in parts.items():
        share = 100 * part["seconds"] / total
        print(f"{name:20s}{1e3 * part['seconds']:10.2f} ms{1e3 * part['floor']:10.2f} ms floor{share:7.1f} %")
    details = {
        "parts": parts,
        "grid": setting[1],
        "steps": setting[2],
        "wall_seconds": round(time.perf_counter() - start),
    }
    ratio = total / least
    report("profile_generate", ratio=ratio, goal=GOAL, better="lower", holds=ratio <= GOAL, details=details)


if __name__ == "__main__":
    main()
