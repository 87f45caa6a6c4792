"""What a distillation run would be, without running it: networks, memory and FLOPs."""

import json

import torch

from experiments.checkpoints import find_checkpoint
from experiments.distill_config import DistillConfig
from experiments.dry_run import A100_FLOPS
from experiments.runs import config_dict
from experiments.shard_data import ShardsConfig
from lensmini.cost import activation_bytes, forward_flops, parameter_count, train_flops
from lensmini.nn import DiscriminatorHead, LensConfig

__all__ = ["describe_distillation", "step_flops"]

GB = 1e9


def step_flops(config: DistillConfig, model: LensConfig, image_tokens: int, text_tokens: int) -> dict[str, float]:
    """FLOPs of one picture's part in a step, by network.

    The student walks to a step of its grid, on average halfway; critic updates train the fake score and read features of
    fake, real and perturbed pictures; the student's update asks the fake score once and the teacher three times, and
    goes back through the features.
    """
    forward, train = (float(count(model, image_tokens, text_tokens)) for count in (forward_flops, train_flops))
    updates, walk = config.critic.updates, (config.student.num_steps - 1) / 2
    depth = (max(config.adversary.blocks) + 1) / model.num_layers if config.adversary.weight and updates else 0.0
    read = (3 if config.adversary.gamma else 2) * depth
    return {
        "student": updates * (walk + 1) * forward + walk * forward + train,
        "fake score": updates * train + forward,
        "teacher": (updates * read + 3) * forward + depth * (forward + forward),
    }


def describe_distillation(config: DistillConfig) -> str:
    """The report of ``--dry-run``; a miniature's sizes come from its teacher, other teachers are taken to be Lens."""
    data = config.data
    if isinstance(data, ShardsConfig):
        model, tokens = LensConfig(), sum(bucket.tokens() for bucket in data.buckets) // len(data.buckets)
        text, images, ranks = data.mean_text_tokens, data.images_per_rank[0] * data.num_ranks, data.num_ranks
        largest = max(bucket.tokens() for bucket in data.buckets)
    else:
        model = LensConfig.from_dict(json.loads((find_checkpoint(config.teacher) / "config.json").read_text()))
        tokens, text, images, ranks = 64, 55, data.batch_size, 1
        largest = max(height * width // 16 for height, width in data.canvases)
    parameters = parameter_count(model)
    with torch.device("meta"):
        head = DiscriminatorHead(model.inner_dim, config.adversary.blocks, hidden_dim=config.adversary.hidden_dim)
    head_parameters = sum(parameter.numel() for parameter in head.parameters())
    flops = step_flops(config, model, tokens, text)
    total, steps = images * sum(flops.values()), config.run.steps
    kept = activation_bytes(model, largest, text, recompute=config.engine.recompute)
    per_rank = max(1, images // ranks)
    trained, frozen = 20 * parameters, (2 if config.optim.dtype == "bfloat16" else 4) * parameters
    share = ranks if config.engine.sharding == "full" else 1
    lines = [
        json.dumps(config_dict(config), indent=2),
        "",
        f"parameters          student, fake score and teacher {parameters:,} each, head {head_parameters:,}",
        f"updates of a step   {config.critic.updates} of fake score and head, 1 of the student, {images} pictures each",
        f"FLOPs per step      {total:.3e} ({', '.join(f'{k} {images * v / total:.0%}' for k, v in flops.items())}; "
        f"{tokens} image and {text} text tokens a picture, recomputation not counted)",
        f"FLOPs of the run    {total * steps:.3e} in {steps:,} steps, {steps * images:,} pictures of the student's updates",
        f"A100 hours at 40 %  {total * steps / (0.4 * A100_FLOPS) / 3600:,.1f}, encoders not counted",
        f"training state      {trained / GB:.3g} GB for each of student and fake score (weights, gradient, moments, average), "
        f"{2 * trained / share / GB:.3g} GB on each of {ranks} ranks; teacher {frozen / GB:.3g} GB on every rank",
        f"activations         {per_rank * float(kept) / GB:.3g} GB on a rank for its {per_rank} largest pictures "
        f'({largest} tokens, recompute "{config.engine.recompute}")',
    ]
    return "\n".join(lines)
