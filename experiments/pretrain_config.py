"""Settings and presets of ``experiments.pretrain``."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments.adapter_state import AdapterConfig
from experiments.engine import EngineConfig
from experiments.folder_data import FolderConfig
from experiments.guards import GuardConfig
from experiments.miniature.world import MiniatureConfig
from experiments.precision import fast_dtype
from experiments.pretrain_data import SceneConfig
from experiments.runs import RunConfig
from experiments.shard_data import ShardsConfig
from experiments.training import OptimConfig
from lensmini.data import LENS_BUCKETS, Bucket
from lensmini.nn import LensConfig

__all__ = ["PRESETS", "EvalConfig", "PretrainConfig", "ShardsConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """What is measured while training."""

    validate_every: int = 250
    """Steps between losses on held-out pictures with fixed noise and times, per canvas; 0 never."""
    score_every: int = 0
    """Steps between short runs of the scene suite; 0 never."""
    num_prompts: int = 96
    """Prompts of each of these."""
    num_steps: int = 12
    """Sampling steps."""
    guidance_scale: float = 4.0
    """Guidance of samples and scores."""
    mu: float | None = 1.8
    """Time shift of the sampling schedule; none is the released model's rule, 0 equal steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """One pre-training run."""

    model: LensConfig
    """The transformer."""
    data: SceneConfig | FolderConfig | ShardsConfig
    """The samples."""
    optim: OptimConfig
    """Optimisers, schedule, times."""
    run: RunConfig
    """Where, how long, how often."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Measurements."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How processes share the model."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Low-rank updates of released weights (``init_from``), in place of all weights."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What happens to steps that are no numbers, and to spikes."""
    miniature: MiniatureConfig = field(default_factory=MiniatureConfig)
    """The miniature's language model and autoencoder, trained on first use (not read where the data name their own)."""
    init_from: Path | None = None
    """Checkpoint directory (step-N) of an earlier stage, or a released folder, to start from."""
    init_weights: str = "ema"
    """Which of its weights: "model" or "ema"; the paper does not state it."""
    reset_optimizer: bool = True
    """Start with fresh moments rather than the checkpoint's; the paper does not state it."""
    dry_run: bool = False
    """Print config, parameters, memory and FLOPs and leave."""

    def __post_init__(self) -> None:
        if self.init_weights not in ("model", "ema"):
            raise ValueError(f'init_weights: expected "model" or "ema", got {self.init_weights!r}')
        if self.adapter.rank and self.init_from is None:
            raise ValueError("adapter.rank: expected init_from with it, the released weights that it changes")
        if self.adapter.rank and self.engine.sharding != "none":
            raise ValueError(f'adapter.rank: expected engine.sharding "none", got {self.engine.sharding!r}')
        if self.data.num_slots % self.run.processes:
            raise ValueError(
                f"processes: expected a divisor of data.num_slots = {self.data.num_slots}, got {self.run.processes}"
            )


MINI_MODEL = LensConfig(
    num_layers=4,
    num_attention_heads=2,
    attention_head_dim=64,
    axes_dims_rope=(8, 28, 28),
    in_channels=16,
    out_channels=4,
    enc_hidden_dim=128,
    selected_layer_index=(0, 1, 2, 3),
)
CLUSTER = EngineConfig(sharding="hybrid", shard_size=8, recompute="full", compile=True, batches_ahead=2)
WATCHED = GuardConfig(policy="restore", spike_factor=10.0, patience=3, margin=50)


def mini() -> PretrainConfig:
    """Scenes, several ratios, a tiny GPT-OSS encoder: minutes on two CPU cores."""
    return PretrainConfig(
        model=MINI_MODEL,
        data=SceneConfig(),
        optim=OptimConfig(
            lr=5e-3,
            muon_lr=1e-2,
            betas=(0.9, 0.98),
            warmup_steps=20,
            decay_fraction=0.4,
            ema_decay=0.99,
            time_mu=1.8,
            dtype=fast_dtype(),
            init_gate=0.1,
        ),
        run=RunConfig(out=Path("runs/mini"), steps=1750, checkpoint_every=400, sample_every=400, processes=2),
    )


def folder() -> PretrainConfig:
    """Your own captioned pictures, at about 32 pixels with the miniature's encoders unless you name others."""
    base = mini()
    run = replace(base.run, out=Path("runs/folder"), steps=1000)
    return replace(base, data=FolderConfig(), run=run)


def stage1() -> PretrainConfig:
    """The paper's low-resolution stage: 512x512, 400K steps, 3072 images a step, 128 A100."""
    return PretrainConfig(
        model=LensConfig(),
        data=ShardsConfig(features="rolling"),
        optim=OptimConfig(lr=2e-4),
        run=RunConfig(out=Path("runs/stage1"), steps=400_000, checkpoint_every=1000, log_every=10, keep_checkpoints=3),
        eval=EvalConfig(validate_every=5000, num_steps=20, mu=None),
        engine=CLUSTER,
        guard=WATCHED,
    )


def stage2() -> PretrainConfig:
    """The paper's mixed-resolution stage: 27 buckets, 400K steps, 24 / 10 / 6 images a GPU, from stage 1."""
    base = stage1()
    return replace(
        base,
        data=ShardsConfig(buckets=LENS_BUCKETS, images_per_rank=(24, 10, 6)),
        optim=OptimConfig(lr=1e-4),
        run=replace(base.run, out=Path("runs/stage2")),
        init_from=Path("runs/stage1/step-400000"),
    )


def toy_1b() -> PretrainConfig:
    """The paper's 1.2B ablation backbone (its sizes are ours: 36 blocks of width 960), 256x256, 8 GPUs."""
    return PretrainConfig(
        model=LensConfig(num_layers=36, num_attention_heads=15),
        data=ShardsConfig(buckets=(Bucket(256, 256),), images_per_rank=(64,), num_ranks=8, features="precomputed"),
        optim=OptimConfig(lr=2e-4, warmup_steps=1000),
        run=RunConfig(out=Path("runs/toy_1b"), steps=100_000, checkpoint_every=1000, log_every=10),
        eval=EvalConfig(validate_every=5000, num_steps=20, mu=None),
        engine=CLUSTER,
        guard=WATCHED,
    )


def lab_8gpu() -> PretrainConfig:
    """0.6B parameters (28 blocks of width 768), 256x256, 8 A100: the first of two parts of a two-day run."""
    return PretrainConfig(
        model=LensConfig(num_layers=28, num_attention_heads=12),
        data=ShardsConfig(buckets=(Bucket(256, 256),), images_per_rank=(128,), num_ranks=8, features="precomputed"),
        optim=OptimConfig(lr=3e-4, muon_lr=1e-2, warmup_steps=1000),
        run=RunConfig(out=Path("runs/lab_8gpu"), steps=150_000, checkpoint_every=2000, log_every=10),
        eval=EvalConfig(validate_every=5000, num_steps=20, mu=None),
        engine=replace(CLUSTER, shard_size=1, recompute="none"),
        guard=WATCHED,
    )


def lab_8gpu_512() -> PretrainConfig:
    """The second part: nine ratios at about 512x512, packed so that all GPUs take equally long."""
    base = lab_8gpu()
    buckets = tuple(bucket for bucket in LENS_BUCKETS if round((bucket.height * bucket.width) ** 0.5 / 256) == 2)
    return replace(
        base,
        data=replace(base.data, buckets=buckets, images_per_rank=(64,), mode="packed"),
        optim=replace(base.optim, lr=1e-4, muon_lr=4e-3, decay_fraction=0.3),
        run=replace(base.run, out=Path("runs/lab_8gpu_512"), steps=60_000),
        engine=replace(base.engine, recompute="selective"),
        init_from=Path("runs/lab_8gpu/step-150000"),
    )


def finetune_24gb() -> PretrainConfig:
    """Low-rank updates (rank 64) of the released 3.8B weights on your shards, 512x512, one GPU of 24 GB."""
    return PretrainConfig(
        model=LensConfig(),
        data=ShardsConfig(images_per_rank=(2,), num_ranks=8, features="precomputed"),
        optim=OptimConfig(lr=1e-4, warmup_steps=50, ema_decay=0.99),
        run=RunConfig(out=Path("runs/finetune_24gb"), steps=2000, checkpoint_every=250, log_every=10),
        eval=EvalConfig(validate_every=250, num_steps=20, mu=None),
        engine=EngineConfig(device="cuda", recompute="full", batches_ahead=2),
        adapter=AdapterConfig(rank=64, alpha=128.0),
        init_from=Path("microsoft/Lens-Base"),
    )


PRESETS: tuple[Callable[[], PretrainConfig], ...] = (
    mini,
    folder,
    finetune_24gb,
    toy_1b,
    lab_8gpu,
    lab_8gpu_512,
    stage1,
    stage2,
)
