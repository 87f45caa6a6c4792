"""What a run of an ablation costs: FLOPs of a step, CPU-seconds that were spent, GPU-hours on 128 A100 at full scale.

GPU-hours follow from counted FLOPs and the ASSUMED utilisation of ``experiments.estimate``; frozen encoders are priced as the
released ones.
"""

import json
from functools import cache

import numpy as np
import torch

from experiments.estimate import stage_row
from experiments.estimate_rows import (
    EstimateConfig,
    RentConfig,
    StageConfig,
    TrainConfig,
    chosen_recompute,
    memory_report,
)
from experiments.pretrain_config import PretrainConfig
from experiments.pretrain_data import SceneConfig
from experiments.runs import read_jsonl
from experiments.shard_data import ShardsConfig
from lensmini.cost import parameter_count, train_flops
from lensmini.data import describe_scene, sample_scene
from lensmini.nn import LensTransformer

__all__ = ["GPUS", "count_parameters", "full_cost", "step_flops", "train_cpu_seconds"]

GPUS = 128
"""A100 of 80 GB, as the paper had."""
_TEMPLATE_TOKENS = 4
_COUNTED_CAPTIONS = 512


@cache
def _text_lengths(data: SceneConfig) -> np.ndarray:
    """Text tokens of the first training captions; every word is one token, and the template's end has four."""
    lengths = []
    for number in range(min(data.num_captions, _COUNTED_CAPTIONS)):
        key = number + data.seed * 2**42
        density = ("dense", "brief")[number % 2] if data.density == "mixed" else data.density
        caption = describe_scene(sample_scene(generator=key), density=density, wording=data.wording, generator=key)  # pyright: ignore
        lengths.append(len(caption.split()) + _TEMPLATE_TOKENS)
    return np.array(lengths)


def step_flops(config: PretrainConfig) -> float:
    """Training FLOPs of a mean step; frozen parts and the optimiser are not counted.

    Scenes have the lengths of their own captions, shards those of ``mean_text_tokens``.
    """
    data = config.data
    if isinstance(data, ShardsConfig):
        each = data.images_per_rank * (len(data.bases) // len(data.images_per_rank))
        images = [each[data.bases.index(data.base_of(bucket))] for bucket in data.buckets]
        tokens = [bucket.tokens() for bucket in data.buckets]
        costs = [
            n * float(train_flops(config.model, t, data.mean_text_tokens)) for n, t in zip(images, tokens, strict=True)
        ]
        return data.num_ranks * sum(costs) / len(costs)
    assert isinstance(data, SceneConfig)
    image = np.array([height * width // 16 for height, width in data.canvases])[:, None]
    told = train_flops(config.model, image, _text_lengths(data)[None]).mean()
    silent = train_flops(config.model, image, np.zeros((1, 1), dtype=np.int64)).mean()
    return data.batch_size * float((1 - data.text_dropout) * told + data.text_dropout * silent)


def train_cpu_seconds(config: PretrainConfig) -> float:
    """CPU-seconds of a run's loop: the first process's, of every start, times the number of processes."""
    total = last = 0.0
    for row in read_jsonl(config.run.out / "timing.jsonl"):
        total += last if row["cpu_seconds"] < last else 0.0
        last = row["cpu_seconds"]
    processes = json.loads((config.run.out / "config.json").read_text())["run"]["processes"]
    return (total + last) * processes


def full_cost(config: PretrainConfig) -> dict[str, float]:
    """Parameters, steps, images, FLOPs and GPU-hours of a full-scale run, by the accounting of ``experiments.estimate``.

    Args:
        config: a run from shards, of squares or of all nine ratios of each base.

    Returns:
        ``parameters`` (of the model on the meta device), ``steps``, ``images``, ``flops``, ``gpu_hours``.

    Raises:
        ValueError: if it is no run from shards, or its buckets are others.
    """
    data = config.data
    if not isinstance(data, ShardsConfig):
        raise ValueError(f"data: expected shards, got {type(data).__name__}")
    bases, square = tuple(data.bases), all(one.height == one.width for one in data.buckets)
    if len(data.buckets) != len(bases) * (1 if square else 9):
        raise ValueError(f"data.buckets: expected squares or the nine ratios of each base, got {len(data.buckets)}")
    if data.num_ranks % GPUS:
        raise ValueError(f"data.num_ranks: expected a multiple of {GPUS}, got {data.num_ranks}")
    per_rank = data.images_per_rank * (len(bases) // len(data.images_per_rank))
    images = round(config.run.steps * data.num_ranks * sum(per_rank) / len(per_rank))
    stage = StageConfig(bases=bases, images_per_gpu=per_rank, aspects="square" if square else "all", images=images)
    # Features that are encoded ahead and thrown away cost what they cost online.
    train = TrainConfig(
        recompute=config.engine.recompute,
        micro_steps=data.num_ranks // GPUS,
        text_tokens=data.mean_text_tokens,
        encoders="precomputed" if data.features == "precomputed" else "online",
    )
    estimate = EstimateConfig(stages=(stage,), model=config.model, train=train, cluster=RentConfig(gpus=GPUS))
    row = stage_row(estimate, stage, chosen_recompute(estimate, memory_report(estimate)))
    hours = row["gpu_hours"]
    if data.mode != "bucket":
        # One shape in a step, or slots of equal cost: nobody waits.
        hours *= row["balance"]
    return {
        "parameters": count_parameters(config),
        "steps": config.run.steps,
        "images": images,
        "flops": row["training_flops"],
        "gpu_hours": hours,
    }


def count_parameters(config: PretrainConfig) -> int:
    """Parameters of the transformer, from the meta device and by ``lensmini.cost``, which have to agree."""
    with torch.device("meta"):
        model = LensTransformer(config.model)
    number = sum(parameter.numel() for parameter in model.parameters())
    if number != parameter_count(config.model):
        raise RuntimeError(f"cost.py counts {parameter_count(config.model)} parameters, the model has {number}")
    return number
