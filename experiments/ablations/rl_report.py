"""Table, curves and pictures of the RL study."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from experiments.checkpoints import find_checkpoint, load_checkpoint
from experiments.pictures import save_grid
from experiments.reinforce_config import mini
from experiments.reinforce_eval import held_out_prompts, paint_suite
from experiments.reinforce_rollout import encode_prompt
from experiments.runs import latest_checkpoint, read_jsonl

if TYPE_CHECKING:
    from experiments.ablations.rl import RlStudy

__all__ = ["draw_curves", "draw_pictures", "write_table"]

HEAD = "| arm | strict, no guidance | minus base | strict, guided | held-out judge | foreground | diversity | CPU-s |"


def write_table(result: dict[str, Any], path: Path) -> None:
    """One row for each arm: means over seeds, the paired difference with both intervals."""
    base = result["base"]
    rows = [HEAD, "| --- | --- | --- | --- | --- | --- | --- | --- |", f"| base | {_cells(base)} |  |"]
    for name, arm in result["arms"].items():
        gap = arm["free_minus_base_free"]
        cells = _cells(arm["mean"], _gap(gap))
        cpu = arm["train_cpu_seconds"]
        rows.append(f"| {name} ({len(cpu)}) | {cells} | {sum(cpu) / len(cpu):.0f} |")
    path.write_text("\n".join(rows) + "\n")


def _cells(scores: dict[str, Any], gap: str = "") -> str:
    free, guided = scores["free"], scores["guided"]
    cells = [f"{free['strict']:.3f}", gap, f"{guided['strict']:.3f}", f"{free['held_out']:.3f}"]
    return " | ".join([*cells, f"{free['foreground']:.3f}", f"{scores['diversity']:.3f}"])


def _gap(gap: dict[str, Any]) -> str:
    text = f"{gap['mean']:+.3f}"
    if gap["interval_seeds"] is not None:
        text += " ({:+.3f} to {:+.3f})".format(*gap["interval_seeds"])
    return text


def draw_curves(out: Path, arms: Sequence[str], seeds: Sequence[int], path: Path) -> None:
    """Mean reward of rollouts by the trained judge and by the held-out one, diversity and velocity norms, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: list[tuple[str, tuple[str, str]]] = [
        ("reward (each arm's own)", ("reward", "mean")),
        ("held-out judge", ("heldout", "mean")),
        ("diversity in groups", ("diversity", "mean")),
        ("velocity norm over reference", ("velocity_norm", "ratio")),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 3), layout="constrained")
    for axis, (title, (first, second)) in zip(axes, panels, strict=True):
        for arm in arms:
            curves: dict[int, list[float]] = {}
            for seed in seeds:
                for row in read_jsonl(out / f"{arm}-{seed}" / "metrics.jsonl"):
                    value = (row.get(first) or {}).get(second)
                    if value is not None:
                        curves.setdefault(row["step"], []).append(value)
            steps = sorted(curves)
            axis.plot(steps, [sum(curves[s]) / len(curves[s]) for s in steps], label=arm, linewidth=1.2)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
    axes[0].legend(fontsize=6)
    figure.savefig(path, dpi=80)
    plt.close(figure)


@torch.no_grad()
def draw_pictures(study: "RlStudy", path: Path, *, number: int = 6) -> None:
    """The first held-out prompts at the same noise, without guidance: base and the arms of full length."""
    config = mini()
    model, world = load_checkpoint(find_checkpoint(study.base), config.base_weights, quiet=True)
    prompts = held_out_prompts(config)[: 2 * number]
    texts = [encode_prompt(world, prompt.text) for prompt in prompts]
    canvases = [config.rollout.canvases[0]] * len(prompts)
    pictures, labels = [], []
    for name in ("base", "nft", "naive_full", "grpo_ddim_slow", "awm_slow"):
        if name != "base":
            found = latest_checkpoint(study.out / f"{name}-{study.seeds[0]}")
            if found is None:
                continue
            model.load_state_dict(load_file(found[0] / "ema.safetensors"))
        pictures += paint_suite(model, world, texts, canvases, range(len(texts)), config.eval, guided=False)
        labels += [f"{name} | {prompt.scene.background}, {_short(prompt)}" for prompt in prompts]
    save_grid(pictures, labels, path, columns=2 * number)


def _short(prompt: Any) -> str:
    return ", ".join(f"{thing.colour} {thing.shape}" for thing in prompt.scene.objects)
