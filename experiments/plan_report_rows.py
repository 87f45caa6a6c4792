"""The rows of the plan's report: a plan measured slot by slot, priced for a cluster.

Axes: k steps, s slots of a step, j buckets, n samples.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lensmini.cost import activation_bytes, parameter_count
from lensmini.data import BatchPlan
from lensmini.data.exposure import bucket_shares
from lensmini.data.permute import derive_key
from lensmini.nn import LensConfig

__all__ = [
    "ClusterConfig",
    "PlanConfig",
    "SlotTable",
    "Source",
    "TextLengths",
    "make_plan",
    "measure_slots",
    "report_rows",
]

Mode = Literal["bucket", "packed", "same_bucket"]

STATE_BYTES = 4 + 4 + 8 + 4
"""Per parameter: float32 weight, gradient, two AdamW moments, average."""
TEMPLATE_TOKENS = 97
"""Tokens before each caption that the language model reads and the transformer does not get."""
RECOMPUTE = ("none", "selective", "full")
_CAPTIONS = 0x7E87
_QUANTILES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """How samples become slots (the batch of one rank at once) and steps."""

    modes: tuple[Mode, ...] = ("bucket", "packed", "same_bucket")
    """Compared side by side: slots of one bucket (the paper), slots of mixed shapes, steps of one bucket."""
    num_slots: int = 128
    """Slots of a step, one per rank in the paper; fewer ranks take several in turn, more get one each."""
    images_per_slot: tuple[int, ...] = ()
    """Images of a slot for each base, but for packed; empty: as many squares as slot_tokens hold."""
    slot_tokens: int = 24_576
    """Image tokens of a slot for that: the paper's 24, 10 and 6 images at 512, 768 and 1024."""
    mean_images: int | None = None
    """Mean images of a packed slot; by default the mean of the bucket slots, or what max_tokens surely holds."""
    max_tokens: int | None = None
    """Most image and text tokens of a packed slot."""
    weights: tuple[float, ...] = ()
    """Share of the images that each base gets; empty: every sample once an epoch."""
    seed: int = 0
    """Seed of the order."""
    steps: int = 48
    """Steps that are measured."""

    def __post_init__(self) -> None:
        if not self.modes or len(set(self.modes)) < len(self.modes):
            raise ValueError(f"plan.modes: expected different modes, got {list(self.modes)}")
        for name in ("num_slots", "slot_tokens", "steps", "mean_images", "max_tokens", "images_per_slot"):
            value = getattr(self, name)
            if value is not None and np.min(value, initial=1) < 1:
                raise ValueError(f"plan.{name}: expected at least 1, got {value}")
        if self.weights and not (all(0 <= weight < math.inf for weight in self.weights) and any(self.weights)):
            raise ValueError(f"plan.weights: expected finite numbers, none negative, got {list(self.weights)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """GPUs and what is assumed of them; the defaults are A100 of 80 GB."""

    ranks: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    """GPUs."""
    memory_gb: float = 80.0
    """Memory of one, 10^9 bytes."""
    reserve_gb: float = 4.0
    """Of which not counted here: gathered blocks, workspaces, fragments; an assumption."""
    peak_tflops: float = 312.0
    """Dense bfloat16 TFLOP/s of one."""
    mfu: float = 0.40
    """Share of the peak that a rank reaches while it computes; an assumption."""
    shard_over: int = 8
    """Ranks that share one copy of the training state: the GPUs of a node (HSDP)."""
    node_gb_per_s: float = 200.0
    """What a rank sends within its node, 10^9 bytes a second; an assumption."""
    network_gb_per_s: float = 25.0
    """What a rank sends to other nodes, likewise."""
    encoders_online: bool = True
    """Encode pictures and captions in the step, not before."""
    image_gflops: float = 1.19
    """Of the autoencoder per image token: FLUX.2's at 1024x1024 (1.09 at 512x512)."""
    text_gflops: float = 6.06
    """Of the language model per text token: GPT-OSS-20B without its output layer."""
    encoder_gb: float = 42.0
    """Weights of both encoders in bfloat16, sharded as the training state; nothing if not online."""

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 1 or len(set(self.ranks)) < len(self.ranks):
            raise ValueError(f"cluster.ranks: expected different numbers of at least 1, got {list(self.ranks)}")
        for name in ("shard_over", "memory_gb", "peak_tflops", "mfu", "node_gb_per_s", "network_gb_per_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"cluster.{name}: expected a finite number above 0, got {getattr(self, name)}")
        for name in ("reserve_gb", "image_gflops", "text_gflops", "encoder_gb"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"cluster.{name}: expected a finite number of at least 0, got {getattr(self, name)}")


class TextLengths:
    """Text tokens of n samples that nobody stores: sample i's is a lognormal quantile, picked by hashing i.

    Example:
        >>> lengths = TextLengths(10**9, mean=150, spread=0.5, cap=2000, seed=0)
        >>> len(lengths), bool(lengths[7] == lengths[np.array([3, 7])][1]), round(float(lengths[: 10**6].mean()))
        (1000000000, True, 150)
    """

    def __init__(self, n: int, *, mean: float, spread: float, cap: int, seed: int) -> None:
        uniform = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES
        lengths = torch.exp(math.log(mean) - spread**2 / 2 + spread * torch.special.ndtri(uniform))
        self._table = lengths.round().clamp(1, cap).numpy().astype(np.int64)
        self._n, self._seed = n, seed

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, samples: Any) -> Any:
        if isinstance(samples, slice):
            samples = np.arange(*samples.indices(self._n))
        return self._table[derive_key(self._seed, _CAPTIONS, samples) >> 48]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a plan needs to know of the samples."""

    name: str
    sizes: NDArray[np.int64]
    """``[j]`` samples of each bucket."""
    tokens: NDArray[np.int64]
    """``[j]`` image tokens of a sample."""
    bases: tuple[int, ...]
    """Base resolutions."""
    labels: NDArray[np.int64]
    """``[j]`` place in ``bases`` of each bucket's."""
    text_lengths: Any
    """``[n]`` text tokens: an array, memory-mapped or not, or :class:`TextLengths`."""
    text_cap: int
    """Bound of ``text_lengths``."""
    note: str = ""


def make_plan(source: Source, config: PlanConfig, model: LensConfig, mode: Mode, num_slots: int) -> BatchPlan:
    """The plan that training would follow; the library refuses what cannot be."""
    for name in ("images_per_slot", "weights"):
        given = getattr(config, name)
        if given and len(given) != len(source.bases):
            raise ValueError(f"plan.{name}: expected one for each base of {list(source.bases)}, got {list(given)}")
    by_base = config.images_per_slot or [max(1, config.slot_tokens // (base // 16) ** 2) for base in source.bases]
    images = [by_base[label] for label in source.labels]
    labels, weights = source.labels.tolist(), list(config.weights) or None
    if mode == "packed":
        images = config.mean_images
        if images is None and config.max_tokens is None:
            shares = bucket_shares(source.sizes.tolist(), labels, weights)
            slots = sum(share / by_base[label] for share, label in zip(shares, labels, strict=True))
            images = max(1, int(sum(shares) / slots))
    return BatchPlan(
        source.sizes,
        source.tokens,
        num_slots=num_slots,
        seed=config.seed,
        mode=mode,
        images_per_slot=images,
        max_tokens=config.max_tokens if mode == "packed" else None,
        text_tokens=source.text_cap,
        text_lengths=source.text_lengths,
        sources=labels,
        weights=weights,
        model=model,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotTable:
    """Slots of some steps, each array ``[k, s]`` but for the exposure."""

    images: NDArray[np.int64]
    image_tokens: NDArray[np.int64]
    text_tokens: NDArray[np.int64]
    padded: NDArray[np.int64]
    """Tokens if each sample were padded to the slot's longest."""
    flops: NDArray[np.float64]
    """Of a training step without recomputation."""
    activations: dict[str, NDArray[np.float64]]
    """Bytes held for the backward, by what is recomputed."""
    bound: dict[str, float] | None
    """The most of them that any slot of any step can hold; None where nothing bounds it."""
    exposure: NDArray[np.int64]
    """``[j]`` images drawn from each bucket."""


def measure_slots(plan: BatchPlan, model: LensConfig, steps: int) -> SlotTable:
    """Draw the first steps of a plan and add up what each slot holds."""
    samples, offsets = plan.assign(0, steps)
    image, text = plan.lengths(samples)
    begin, shape = offsets[:-1], (steps, plan.num_slots)

    def total(values: NDArray[Any]) -> NDArray[Any]:
        return np.add.reduceat(values, begin).reshape(shape)

    images = np.diff(offsets).reshape(shape)
    return SlotTable(
        images=images,
        image_tokens=total(image),
        text_tokens=total(text),
        padded=images * np.maximum.reduceat(image + text, begin).reshape(shape),
        flops=total(plan.costs(image, text)),
        activations={name: total(activation_bytes(model, image, text, recompute=name)) for name in RECOMPUTE},
        bound=_bound(plan, model),
        exposure=np.bincount(plan.bucket_of(samples), minlength=len(plan.sizes)),
    )


def _bound(plan: BatchPlan, model: LensConfig) -> dict[str, float] | None:
    """A bucket's slot is fullest with its longest captions; a capped one with the sample of most bytes per token.

    Bytes and tokens are linear in the text, so their ratio is largest with no text or with the longest.
    """
    packed, text, bound = plan.mode == "packed", plan.text_tokens, {}
    if packed and plan.max_tokens is None:
        return None
    drawn = np.array([share > 0 for share in bucket_shares(plan.sizes.tolist(), plan.sources, plan.weights)])
    image, images = plan.tokens[drawn], plan.images_per_slot[drawn]
    for name in RECOMPUTE:
        full = activation_bytes(model, image, np.full_like(image, text), recompute=name)
        bare = activation_bytes(model, image, np.zeros_like(image), recompute=name)
        held = plan.max_tokens * np.maximum(bare / image, full / (image + text)) if packed else images * full
        bound[name] = float(held.max())
    return bound


def report_rows(
    source: Source,
    config: PlanConfig,
    cluster: ClusterConfig,
    model: LensConfig,
    *,
    steps: int,
    images: float | None = None,
) -> list[dict[str, Any]]:
    """A row for every mode and number of ranks, all for the same images: of the first mode's steps if not given."""
    rows = []
    for mode in config.modes:
        tables: dict[int, SlotTable] = {}
        if images is None:
            plan = make_plan(source, config, model, mode, config.num_slots)
            tables[config.num_slots] = measure_slots(plan, model, config.steps)
            images = steps * float(tables[config.num_slots].images.sum(1).mean())
        for ranks in cluster.ranks:
            num_slots = max(config.num_slots, ranks)
            if num_slots not in tables:
                plan = make_plan(source, config, model, mode, num_slots)
                tables[num_slots] = measure_slots(plan, model, config.steps)
            priced = _price(tables[num_slots], ranks, cluster, model, images)
            epochs = _epochs(source, tables[num_slots], images)
            rows.append({"mix": source.name, "mode": mode, "ranks": ranks, **priced, "epochs": epochs})
    return rows


def _price(table: SlotTable, ranks: int, cluster: ClusterConfig, model: LensConfig, images: float) -> dict[str, Any]:
    tokens, steps = table.image_tokens + table.text_tokens, len(table.images)
    num_slots = table.images.shape[1]
    micro_steps, parameters = num_slots // ranks, parameter_count(model)

    def slowest(flops: NDArray[np.float64]) -> NDArray[np.float64]:
        """``[k]`` FLOPs of the slowest rank, which all wait for after every micro-step: slot m ranks + r is rank r's."""
        return flops.reshape(steps, micro_steps, ranks).max(2).sum(1)

    useful, waiting = table.flops.sum(1), ranks * slowest(table.flops)
    encoder_gb = cluster.encoder_gb if cluster.encoders_online else 0.0
    fixed = (STATE_BYTES * parameters / 1e9 + encoder_gb) / cluster.shard_over + cluster.reserve_gb
    held = table.bound or {name: float(measured.max()) for name, measured in table.activations.items()}
    memory = {name: fixed + most / 1e9 for name, most in held.items()}
    recompute = next((name for name in RECOMPUTE if memory[name] <= cluster.memory_gb), None)
    work = table.flops * (1 if recompute in ("none", "selective") else 4 / 3)
    encoders = np.zeros_like(work)
    if cluster.encoders_online:
        read = table.text_tokens + TEMPLATE_TOKENS * table.images
        encoders = 1e9 * (cluster.image_gflops * table.image_tokens + cluster.text_gflops * read)
    compute = slowest(work + encoders) / (1e12 * cluster.peak_tflops * cluster.mfu)
    communication = _communication(parameters, ranks, micro_steps, cluster)
    seconds = float(np.maximum(compute, communication).mean())
    images_per_step = float(table.images.sum(1).mean())
    days = images / images_per_step * seconds / 86_400
    return {
        "num_slots": num_slots,
        "micro_steps": micro_steps,
        "images_per_step": images_per_step,
        "image_tokens_per_step": float(table.image_tokens.sum(1).mean()),
        "text_tokens_per_step": float(table.text_tokens.sum(1).mean()),
        "balance": float(useful.sum() / waiting.sum()),
        "worst_balance": float((useful / waiting).min()),
        "padding": float(1 - tokens.sum() / table.padded.sum()),
        "most_slot_tokens": int(tokens.max()),
        "slot_tokens": np.percentile(tokens, [0, 5, 50, 95, 100]).tolist(),
        "fixed_gb": fixed,
        "memory_gb": memory,
        "memory_is": "bound" if table.bound else "measured",
        "recompute": recompute,
        "compute_seconds": float(compute.mean()),
        "communication_seconds": communication,
        "seconds_per_step": seconds,
        "encoder_share": float(encoders.sum() / (work + encoders).sum()),
        "mfu": float(useful.mean()) / (ranks * 1e12 * cluster.peak_tflops * seconds),
        "images_of_run": images,
        "steps_of_run": images / images_per_step,
        "days": days,
        "gpu_hours": 24 * ranks * days,
    }


def _communication(parameters: int, ranks: int, micro_steps: int, cluster: ClusterConfig) -> float:
    """Seconds that a rank sends in a step.

    Every micro-step it gathers bfloat16 weights twice and scatters float32 gradients within the node; once a step its
    share of the gradients is averaged over the nodes.
    """
    shards, nodes = cluster.shard_over, ranks // cluster.shard_over
    inside = micro_steps * (2 * 2 + 4) * parameters * (shards - 1) / shards
    across = 2 * 4 * parameters / shards * (nodes - 1) / nodes
    return inside / (1e9 * cluster.node_gb_per_s) + across / (1e9 * cluster.network_gb_per_s)


def _epochs(source: Source, table: SlotTable, images: float) -> dict[str, float]:
    epochs = {}
    for place, base in enumerate(source.bases):
        mine = source.labels == place
        held = int(source.sizes[mine].sum())
        if held:
            epochs[str(base)] = float(table.exposure[mine].sum() / table.exposure.sum() * images / held)
    return epochs
