"""The numbers of a run's estimate: parameters by part, FLOPs, bytes held and sent by a GPU, seconds, days.

Counted from ``lensmini.cost`` and the shapes of the run; what is assumed is a named field or constant. GB are 10^9 bytes.
Symbols: d inner width, m MLP width, n image tokens, l text tokens, r rank of an adapter, g GPUs of a node.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.plan_report import buckets_of
from experiments.plan_report_rows import RECOMPUTE, TEMPLATE_TOKENS, ClusterConfig
from lensmini.cost import ModelSize, activation_bytes, operation_flops, parameter_count, train_flops
from lensmini.data import Bucket
from lensmini.nn import LensConfig

Sharding = Literal["ddp", "fsdp", "hsdp"]
Gpu = Literal["a100_80gb", "h100", "h200", "rtx4090"]

SHARDINGS: tuple[Sharding, ...] = ("ddp", "fsdp", "hsdp")
ENCODE_TFLOPS = {256: 0.27, 512: 1.12, 1024: 4.89}
"""FLUX.2's autoencoder, encoding one square picture: counted once with torch's counter on the meta device."""
STATE = {"weights, float32": 4, "gradients, float32": 4, "two AdamW moments, float32": 8, "EMA, float32": 4}
"""Bytes of each trained parameter."""

CLUSTERS: dict[str, ClusterConfig] = {
    "a100_80gb": ClusterConfig(node_gb_per_s=300.0),
    "h100": ClusterConfig(peak_tflops=989.0, node_gb_per_s=450.0, network_gb_per_s=50.0),
    "h200": ClusterConfig(peak_tflops=989.0, memory_gb=141.0, node_gb_per_s=450.0, network_gb_per_s=50.0),
    "rtx4090": ClusterConfig(
        peak_tflops=165.0, memory_gb=24.0, reserve_gb=2.0, node_gb_per_s=12.0, network_gb_per_s=3.0
    ),
}
"""Machines of 8 GPUs. Peaks are dense bfloat16; rates are what one GPU sends: NVLink and a network card for each GPU in
the data centre, PCIe through the host and 25 Gbit/s for the RTX 4090. Rates and reserve are assumptions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One stage: what a GPU takes at once, and how much of it."""

    name: str = "train"
    """What the report calls it."""
    bases: tuple[int, ...] = (512,)
    """Base resolutions in pixels; a GPU draws one for each micro-batch."""
    images_per_gpu: tuple[int, ...] = (24,)
    """Images of a micro-batch for each base."""
    shares: tuple[float, ...] = ()
    """How often each base is drawn; empty: equally often (the paper does not state it)."""
    aspects: Literal["square", "all"] = "square"
    """Squares only, or the nine buckets of each base, equally often."""
    images: int = 1_000_000
    """Images of the whole stage, repeats included."""

    def __post_init__(self) -> None:
        if not self.bases or min(self.bases) < 16 or any(base % 16 for base in self.bases):
            raise ValueError(f"stages.bases: expected multiples of 16 pixels, got {list(self.bases)}")
        if len(self.images_per_gpu) != len(self.bases) or min(self.images_per_gpu) < 1:
            raise ValueError(
                f"stages.images_per_gpu: expected {len(self.bases)} numbers of at least 1, got {list(self.images_per_gpu)}"
            )
        good = all(0 <= share < float("inf") for share in self.shares) and any(self.shares)
        if self.shares and (len(self.shares) != len(self.bases) or not good):
            raise ValueError(f"stages.shares: expected {len(self.bases)} finite shares, got {list(self.shares)}")
        if self.images < 1:
            raise ValueError(f"stages.images: expected at least 1, got {self.images}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What is trained and how."""

    sharding: Sharding = "hsdp"
    """A copy on every GPU (ddp), one copy over all GPUs (fsdp), or one in every node (hsdp)."""
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    """What the backward computes again; auto is the least that fits."""
    micro_steps: int = 1
    """Micro-batches of a GPU before the optimiser's step."""
    lora_rank: int = 0
    """Rank of adapters on every qkv, attention-output and MLP linear, the model frozen in bfloat16; 0 trains the model."""
    average: bool = True
    """Keep an EMA of what is trained."""
    text_tokens: int = 150
    """Text tokens of a caption: the paper's 109 words; an assumption."""
    encoders: Literal["online", "precomputed"] = "online"
    """Encode pictures and captions in every step, or once before."""
    distinct_images: int = 0
    """Pictures that are encoded once, if precomputed; 0: their features are there already."""

    def __post_init__(self) -> None:
        for name, least in (("micro_steps", 1), ("lora_rank", 0), ("text_tokens", 0), ("distinct_images", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"train.{name}: expected at least {least}, got {getattr(self, name)}")
        if self.distinct_images and self.encoders == "online":
            raise ValueError(f"train.distinct_images: only for precomputed encoders, got {self.distinct_images}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RentConfig:
    """The machines that are rented."""

    gpu: Gpu = "a100_80gb"
    """Kind of GPU, in nodes of 8."""
    gpus: int = 8
    """How many."""
    mfu: float = 0.45
    """Share of the peak that all work reaches, recomputed and encoders' included; an ASSUMPTION: measure yours."""
    node_gb_per_s: float | None = None
    """What a GPU sends within its node, 10^9 bytes a second, instead of the table's."""
    network_gb_per_s: float | None = None
    """What a GPU sends to other nodes, likewise."""

    def __post_init__(self) -> None:
        if self.gpu not in CLUSTERS:
            raise ValueError(f"cluster.gpu: expected one of {', '.join(CLUSTERS)}, got {self.gpu!r}")
        if not self.mfu <= 1:
            raise ValueError(f"cluster.mfu: expected a share of at most 1, got {self.mfu}")
        node = self.cluster().shard_over
        if self.gpus < 1 or (self.gpus > node and self.gpus % node):
            raise ValueError(f"cluster.gpus: expected 1 to {node}, or a multiple of {node}, got {self.gpus}")

    def cluster(self) -> ClusterConfig:
        """The machines as the plan's report describes them.

        Example:
            >>> RentConfig(gpu="h200", gpus=16).cluster().memory_gb
            141.0
        """
        table = CLUSTERS[self.gpu]
        node = table.node_gb_per_s if self.node_gb_per_s is None else self.node_gb_per_s
        network = table.network_gb_per_s if self.network_gb_per_s is None else self.network_gb_per_s
        ranks = (max(1, self.gpus),)
        return replace(table, ranks=ranks, mfu=self.mfu, node_gb_per_s=node, network_gb_per_s=network)

    def shards(self, sharding: Sharding) -> int:
        """GPUs that share one copy of the training state.

        Example:
            >>> [RentConfig(gpus=16).shards(sharding) for sharding in ("ddp", "fsdp", "hsdp")]
            [1, 16, 8]
        """
        return {"ddp": 1, "fsdp": self.gpus, "hsdp": min(self.gpus, self.cluster().shard_over)}[sharding]


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateConfig:
    """One run to be priced."""

    stages: tuple[StageConfig, ...]
    """What is trained on, one stage after the other."""
    model: LensConfig = field(default_factory=LensConfig)
    """The transformer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """What is trained and how."""
    cluster: RentConfig = field(default_factory=RentConfig)
    """The machines."""
    out: Path | None = None
    """Folder for estimate.json; nothing is written without it."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages: expected at least one, got none")


class MicroBatch(NamedTuple):
    """What a GPU may draw: images of one bucket."""

    base: int
    bucket: Bucket
    images: int
    share: float
    """Of the draws."""


def micro_batches(stage: StageConfig) -> list[MicroBatch]:
    """Everything a GPU may draw in a stage; the shares sum to 1.

    Example:
        >>> micro_batches(StageConfig(bases=(256, 512), images_per_gpu=(8, 2)))[1]
        MicroBatch(base=512, bucket=Bucket(height=512, width=512), images=2, share=0.5)
    """
    shares = stage.shares or (1.0,) * len(stage.bases)
    found = []
    for base, images, share in zip(stage.bases, stage.images_per_gpu, shares, strict=True):
        buckets = buckets_of(base) if stage.aspects == "all" else (Bucket(base, base),)
        found += [MicroBatch(base, bucket, images, share / sum(shares) / len(buckets)) for bucket in buckets]
    return found


def parameter_parts(model: ModelSize) -> dict[str, int]:
    """Parameters by part; they sum to ``parameter_count``.

    Example:
        >>> f"{parameter_parts(LensConfig())['modulation']:,}"
        '1,359,839,232'
    """
    d, streams, text = model.inner_dim, 2 * model.num_layers, model.num_text_layers * model.enc_hidden_dim
    return {
        "image_in": (model.in_channels + 1) * d,
        "text_in": (text + 1) * d,
        "time": (256 + 1) * d + (d + 1) * d,
        "modulation": streams * (d + 1) * 6 * d,
        "qkv": streams * (d + 1) * 3 * d,
        "attention_out": streams * (d + 1) * d,
        "mlp": streams * 3 * d * model.mlp_dim,
        "norms": streams * 2 * (d + model.attention_head_dim) + text,
        "output": (d + 1) * 2 * d + (d + 1) * model.patch_size**2 * model.out_channels,
    }


def parameters_per_token(model: ModelSize) -> int:
    """Weights that one token is multiplied with: ``(4 d^2 + 3 d m) L``, 12 d^2 L where m = 8 d / 3.

    Example:
        >>> parameters_per_token(LensConfig()) == 12 * 1536**2 * 48
        True
    """
    d = model.inner_dim
    return model.num_layers * (4 * d * d + 3 * d * model.mlp_dim)


def adapter_parameters(model: ModelSize, rank: int) -> int:
    """Parameters of adapters on all qkv (r 4d), attention-output (r 2d) and three MLP linears (r (d + m) each).

    Example:
        >>> f"{adapter_parameters(LensConfig(), 64):,}"
        '160,432,128'
    """
    return 2 * model.num_layers * rank * (9 * model.inner_dim + 3 * model.mlp_dim)


def adapter_flops(model: ModelSize, n: int, l: int, rank: int) -> int:
    """FLOPs of all adapters in one forward; the last block skips its text tail."""
    d, tokens = model.inner_dim, model.num_layers * (n + l)
    return 2 * rank * (4 * d * tokens + (5 * d + 3 * model.mlp_dim) * (tokens - l))


def image_flops(config: EstimateConfig, n: int, recompute: str = "none") -> float:
    """FLOPs of training on one image without the encoders: three forwards, four with full recomputation.

    A frozen model needs no gradient of its weights: two forwards of its linears, three of the attention, one of what
    comes before the first adapter (image, text and time inputs, modulation); the adapters themselves take three.
    """
    model, l, rank = config.model, config.train.text_tokens, config.train.lora_rank
    if not rank:
        return float(train_flops(model, n, l, recompute=recompute))  # pyright: ignore[reportArgumentType]
    operations, adapters = operation_flops(model, n, l), adapter_flops(model, n, l, rank)
    times = {"attention": 3, "qkv": 2, "attention_out": 2, "mlp": 2, "output": 2}
    again = adapters + sum(operations.values()) if recompute == "full" else 0
    return float(sum(times.get(name, 1) * flops for name, flops in operations.items()) + 3 * adapters + again)


def encoder_flops(config: EstimateConfig, bucket: Bucket) -> tuple[float, float]:
    """FLOPs of encoding one picture (per pixel, between the measured sizes) and its caption, template included.

    Example:
        >>> config = EstimateConfig(stages=(StageConfig(),))
        >>> [round(flops / 1e12, 2) for flops in encoder_flops(config, Bucket(512, 512))]
        [1.12, 1.5]
    """
    pixels, sizes = bucket.height * bucket.width, [base**2 for base in ENCODE_TFLOPS]
    each = [1e12 * flops / size for flops, size in zip(ENCODE_TFLOPS.values(), sizes, strict=True)]
    text = 1e9 * config.cluster.cluster().text_gflops * (config.train.text_tokens + TEMPLATE_TOKENS)
    return float(np.interp(pixels, sizes, each)) * pixels, text


def image_bytes(config: EstimateConfig, n: int, recompute: str) -> float:
    """Bytes of activations held for one image; adapters add their r-wide middles, five for each block and stream."""
    model, l = config.model, config.train.text_tokens
    blocks = 1 if recompute == "full" else model.num_layers
    middles = 2 * 5 * config.train.lora_rank * blocks * (n + l)
    return float(activation_bytes(model, n, l, recompute=recompute)) + middles  # pyright: ignore[reportArgumentType]


def state_bytes(config: EstimateConfig, sharding: Sharding) -> dict[str, float]:
    """Bytes that a GPU holds before any activation, row by row.

    Blocks at work are bfloat16 copies: of all that is trained where every GPU has a copy (autocast keeps them for the
    backward), of two blocks and of what is outside the blocks where they are gathered one ahead.
    """
    model, cluster, shards = config.model, config.cluster.cluster(), config.cluster.shards(sharding)
    total, rank = parameter_count(model), config.train.lora_rank
    adapters = adapter_parameters(model, rank)
    trained = adapters if rank else total
    rows = {"model, frozen, bfloat16": 2 * total / shards} if rank else {}
    for name, size in STATE.items():
        if config.train.average or not name.startswith("EMA"):
            rows["adapters: " * bool(rank) + name] = size * trained / shards
    if config.train.encoders == "online":
        rows["frozen encoders, bfloat16"] = 1e9 * cluster.encoder_gb / shards
    blocks = total - parameter_count(replace(model, num_layers=1)) if model.num_layers > 1 else 0
    block = blocks // max(1, model.num_layers - 1) + adapters // model.num_layers
    gathered = total + adapters - max(0, model.num_layers - 2) * block
    rows["blocks at work, bfloat16"] = 2 * (trained if sharding == "ddp" else gathered)
    return rows | {"reserve (workspaces, fragments; assumed)": 1e9 * cluster.reserve_gb}


def memory_report(config: EstimateConfig) -> dict[str, Any]:
    """Bytes per GPU by sharding and recomputation, what fits, and the most images of each base that would."""
    room = 1e9 * config.cluster.cluster().memory_gb
    drawn = [batch for stage in config.stages for batch in micro_batches(stage)]
    held = {}
    for name in RECOMPUTE:
        bytes_of = {batch: batch.images * image_bytes(config, batch.bucket.tokens(), name) for batch in drawn}
        held[name] = max(bytes_of.values())
    fullest = max(drawn, key=lambda batch: batch.images * image_bytes(config, batch.bucket.tokens(), "none"))
    report: dict[str, Any] = {"gpu": room, "activations": held, "shardings": {}}
    report["fullest"] = {"images": fullest.images, "height": fullest.bucket.height, "width": fullest.bucket.width}
    for sharding in SHARDINGS:
        rows = state_bytes(config, sharding)
        fixed = sum(rows.values())
        most = {}
        for base in sorted({batch.base for batch in drawn}):
            # The bucket of the base that holds the most bytes per image.
            tokens = max(batch.bucket.tokens() for batch in drawn if batch.base == base)
            images = {name: max(0, int((room - fixed) // image_bytes(config, tokens, name))) for name in RECOMPUTE}
            most[str(base)] = {name: {"images": count, "tokens": count * tokens} for name, count in images.items()}
        totals = {name: fixed + activations for name, activations in held.items()}
        fits = {name: total <= room for name, total in totals.items()}
        report["shardings"][sharding] = {"rows": rows, "fixed": fixed, "total": totals, "fits": fits, "most": most}
    return report


def chosen_recompute(config: EstimateConfig, memory: dict[str, Any]) -> str:
    """What is computed again: as configured, or the least that fits; everything where nothing does."""
    fits = memory["shardings"][config.train.sharding]["fits"]
    if config.train.recompute != "auto":
        return config.train.recompute
    return next((name for name in RECOMPUTE if fits[name]), "full")


def expected_slowest(costs: Sequence[float], shares: Sequence[float], draws: int) -> float:
    """Mean of the largest of independent draws: ``sum_i c_i (F_i^k - F_(i-1)^k)``, costs ascending, F their distribution.

    Example:
        >>> expected_slowest([1.0, 3.0], [0.5, 0.5], 2)
        2.5
    """
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    order = np.argsort(costs)
    below = np.cumsum(np.asarray(shares, dtype=float)[order])
    below = (below / below[-1]) ** draws
    return float(np.dot(np.asarray(costs, dtype=float)[order], np.diff(below, prepend=0.0)))
