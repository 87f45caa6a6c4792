"""What a pre-training run would be, without running it: config, parameters, memory and FLOPs."""

import json
from typing import TYPE_CHECKING

import torch

from experiments.runs import config_dict
from lensmini.cost import activation_bytes, parameter_count, train_flops
from lensmini.nn import LensTransformer

if TYPE_CHECKING:
    from experiments.pretrain_config import PretrainConfig

__all__ = ["describe_run"]

A100_FLOPS = 312e12
STATE_BYTES = 4 + 4 + 8 + 4
"""Per parameter: float32 weight, gradient, two AdamW moments, average."""


def describe_run(config: "PretrainConfig") -> str:
    """The report of ``--dry-run``, built on the meta device."""
    with torch.device("meta"):
        model = LensTransformer(config.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    counted = parameter_count(config.model)
    if counted != parameters:
        raise RuntimeError(f"cost.py counts {counted} parameters, the model has {parameters}")
    lines = [json.dumps(config_dict(config), indent=2), "", f"parameters          {parameters:,}"]
    data, steps = config.data, config.run.steps
    buckets = getattr(data, "buckets", None)
    if buckets:
        bases = sorted({round((b.height * b.width) ** 0.5 / 256) * 256 for b in buckets})
        rows = []
        for base in bases:
            images = data.images_per_rank[bases.index(base)]  # pyright: ignore[reportAttributeAccessIssue]
            tokens = [b.tokens() for b in buckets if round((b.height * b.width) ** 0.5 / 256) * 256 == base]
            mean = sum(tokens) / len(tokens)
            text = data.mean_text_tokens  # pyright: ignore[reportAttributeAccessIssue]
            flops = images * float(train_flops(config.model, round(mean), text))
            memory = images * float(activation_bytes(config.model, round(mean), text))
            recomputed = images * float(activation_bytes(config.model, round(mean), text, recompute="full"))
            rows.append((base, images, mean, flops, memory, recomputed))
        lines.append("base  images/rank  tokens  train TFLOP/rank-step  activations GB (kept / recomputed)")
        for base, images, mean, flops, memory, recomputed in rows:
            lines.append(
                f"{base:4d}  {images:11d}  {mean:6.0f}  {flops / 1e12:21.1f}  "
                f"{memory / 1e9:14.1f} / {recomputed / 1e9:.1f}"
            )
        ranks = data.num_ranks  # pyright: ignore[reportAttributeAccessIssue]
        images = ranks * sum(row[1] for row in rows) / len(rows)
        flops = ranks * sum(row[3] for row in rows) / len(rows)
        lines += [
            f"images per step     {images:,.0f} on {ranks} ranks (bases equally often: not in the paper)",
            f"FLOPs per step      {flops:.3e} without recomputation",
            f"FLOPs of the run    {flops * steps:.3e} in {steps:,} steps",
            f"A100 hours at 40 %  {flops * steps / (0.4 * A100_FLOPS) / 3600:,.0f}, encoders not counted",
            f"training state      {STATE_BYTES * parameters / 1e9:.1f} GB in all, per GPU "
            f"{STATE_BYTES * parameters / 8e9:.1f} over 8 ranks, {STATE_BYTES * parameters / ranks / 1e9:.2f} over {ranks}",
        ]
    else:
        tokens, text, batch = 64, 45, data.batch_size  # pyright: ignore[reportAttributeAccessIssue]
        flops = batch * float(train_flops(config.model, tokens, text))
        memory = batch * float(activation_bytes(config.model, tokens, text))
        lines += [
            f"FLOPs per step      {flops:.3e} (about {tokens} image and {text} text tokens a sample)",
            f"FLOPs of the run    {flops * steps:.3e} in {steps:,} steps",
            f"training state      {STATE_BYTES * parameters / 1e6:.1f} MB, activations {memory / 1e6:.1f} MB",
        ]
    return "\n".join(lines)
