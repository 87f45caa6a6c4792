"""Settings and presets of ``experiments.distill``."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from experiments.distill_consistency_config import ConsistencyConfig
from experiments.engine import EngineConfig
from experiments.guards import GuardConfig
from experiments.precision import fast_dtype
from experiments.pretrain_config import CLUSTER
from experiments.pretrain_data import SceneConfig
from experiments.runs import RunConfig
from experiments.shard_data import ShardsConfig
from experiments.training import OptimConfig
from lensmini.data import LENS_BUCKETS
from lensmini.objectives.distribution_matching import Divergence, Normaliser, Schedule

__all__ = ["PRESETS", "AdversaryConfig", "CriticConfig", "DistillConfig", "MatchingConfig", "StudentConfig", "Walk"]

Walk = Literal["euler", "renoise"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """How the student samples, and so on which states it is trained."""

    num_steps: int = 4
    """Steps of the student."""
    mu: float | None = None
    """Time shift of its grid; none is the released pipeline's rule for that many steps. The paper does not state its grid."""
    walk: Walk = "euler"
    """From step to step: "euler" keeps the noise that the student predicts, as the released pipeline samples; "renoise" draws
    fresh noise, as DMD2 does. The paper does not state it."""
    stop: Literal["update", "sample"] = "update"
    """One step of the grid drawn for all samples of an update, or one for each sample; the paper does not state it."""

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.walk not in get_args(Walk) or self.stop not in ("update", "sample"):
            raise ValueError(
                f"num_steps, walk, stop: expected at least 1, one of {get_args(Walk)} and 'update' or 'sample', got "
                f"{self.num_steps}, {self.walk!r}, {self.stop!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchingConfig:
    """The two directions of the student's loss, ``weight * (L_DM + L_CA)``."""

    weight: float = 0.1
    """lambda_d of the paper."""
    matching: bool = True
    """Whether L_DM takes part, from the fake score to the teacher's."""
    augmentation: bool = True
    """Whether L_CA takes part, from the teacher without text to the teacher with it."""
    guidance: float = 5.0
    """Scale inside L_CA."""
    schedule: Schedule = "hybrid"
    """Noise levels of the two; the paper does not state which of Decoupled-DMD's it used."""
    low: float = 0.02
    """Lowest noise level; the paper does not state it, DMD2 has 0.02."""
    high: float = 0.98
    """Highest noise level; the paper does not state it, DMD2 has 0.98."""
    level_mu: float = 0.0
    """Shift of the noise levels towards noise (or, negative, away from it) inside their range; the paper does not state one."""
    normaliser: Normaliser = "mean_abs"
    """Of L_DM's direction; the paper does not state it, DMD2 has "mean_abs"."""
    augmentation_normaliser: Normaliser = "mean_abs"
    """Of L_CA's direction; the paper does not state it."""
    floor: float = 1e-3
    """Least divisor; the paper does not state it."""
    divergence: Divergence = "reverse_kl"
    """Which divergence L_DM descends; others weigh it by the discriminator's logit. The paper: the reverse KL."""

    def __post_init__(self) -> None:
        if self.weight < 0 or self.floor <= 0 or not 0 <= self.low < self.high <= 1:
            raise ValueError("weight, floor, low, high: expected >= 0, > 0 and 0 <= low < high <= 1")
        normalisers = (self.normaliser, self.augmentation_normaliser)
        if self.schedule not in get_args(Schedule) or not set(normalisers) <= set(get_args(Normaliser)):
            raise ValueError(f"schedule, normalisers: expected known names, got {self.schedule!r}, {normalisers}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdversaryConfig:
    """The discriminator head on the frozen teacher's features, and the student's adversarial loss."""

    weight: float = 0.001
    """lambda_g of the paper; 0 trains no discriminator."""
    blocks: tuple[int, ...] = (12, 24, 36)
    """Blocks of the teacher whose features it reads; the paper does not state them."""
    hidden_dim: int = 256
    """Width of the head; the paper does not state its design."""
    lr: float = 1e-4
    """Of the head's AdamW."""
    gamma: float = 1.0
    """Weight of the approximate R1 penalty, halved; 0 leaves it out."""
    alpha: float = 0.1
    """Standard deviation of its perturbation of the noised real sample."""

    def __post_init__(self) -> None:
        if min(self.weight, self.gamma) < 0 or self.lr <= 0 or self.alpha <= 0 or self.hidden_dim < 1:
            raise ValueError("weight, gamma, lr, alpha, hidden_dim: expected >= 0, >= 0, > 0, > 0 and at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class CriticConfig:
    """How the fake score follows the student."""

    updates: int = 4
    """Updates of fake score and discriminator before each of the student."""
    lr: float = 5e-7
    """Of the fake score's AdamW."""
    ida: float = 0.03
    """mu of SenseFlow's implicit distribution alignment, after each update of the student; 0 leaves it out."""

    def __post_init__(self) -> None:
        if self.updates < 0 or self.lr <= 0 or not 0 <= self.ida <= 1:
            raise ValueError("updates, lr, ida: expected >= 0, > 0 and in [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSettings:
    """What is painted and judged at the end of a run on scenes."""

    num_prompts: int = 0
    """Prompts, rounded up to equally many of each kind; 0 scores nothing."""
    seed: int = 3_000_017
    """Of the prompts; the noise is the prompt's number, the same for everybody who paints."""
    teacher_steps: int = 20
    """Steps of the teacher that the student is compared with."""
    teacher_guidance: float = 5.0
    """Its guidance."""
    mu: float | None = 1.8
    """Time shift of its grid."""
    samples: int = 12
    """Pictures of the grid that shows teacher and student side by side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """One distillation run."""

    teacher: Path | None = None
    """The model after RL: a run or step-N directory, a released folder or a Hub repository; by default runs/quickstart."""
    teacher_weights: Literal["ema", "model"] = "ema"
    """Which weights of a run."""
    lora: Path | None = None
    """Adapter of reinforcement learning, merged into the teacher first."""
    lora_scale: float = 1.0
    """Its strength."""
    data: SceneConfig | ShardsConfig
    """Pictures (the discriminator's reals) and captions; a batch is that of one update."""
    method: str = "dmd"
    """Objective of the student: "dmd" is the paper's; "consistency", "meanflow" and "rcm" are baselines."""
    warm_start: int = 0
    """Student steps of regression on guided segments of the teacher's trajectory before the method; not in the paper."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """How it samples."""
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    """Distribution matching and guidance augmentation."""
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    """Of the methods that are not the paper's."""
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    """Discriminator."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """Fake score."""
    optim: OptimConfig
    """The student's AdamW; moments, clipping and arithmetic are the fake score's too."""
    run: RunConfig
    """Where, how long (steps count the student's updates), how often."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How processes share student and fake score; teacher and head are on every one."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What happens to a diverged step; there is no going back by itself."""
    score: ScoreSettings = field(default_factory=ScoreSettings)
    """Score at the end."""
    dry_run: bool = False
    """Print config, networks, memory and FLOPs and leave."""

    def __post_init__(self) -> None:
        if self.guard.policy == "restore":
            raise ValueError('guard.policy: expected "stop" or "skip", got "restore"')
        if self.student.stop == "sample" and self.engine.sharding != "none":
            raise ValueError(
                'student.stop: expected "update" with sharding, where all ranks walk equally far, got "sample"'
            )
        if self.run.keep_checkpoints < 2:
            raise ValueError(
                f"run.keep_checkpoints: expected at least 2, so that three networks have one in common, got "
                f"{self.run.keep_checkpoints}"
            )
        if self.data.num_slots % self.run.processes:
            raise ValueError(
                f"processes: expected a divisor of data.num_slots = {self.data.num_slots}, got {self.run.processes}"
            )
        if self.warm_start < 0 or self.warm_start > self.run.steps:
            raise ValueError(f"warm_start: expected 0 to run.steps = {self.run.steps}, got {self.warm_start}")


def mini() -> DistillConfig:
    """The quickstart's model to four steps without guidance: minutes on two CPU cores.

    The rates move a weight as far, for its size, as the paper's 1,000 steps of 5e-7 do; the head's is larger, since it starts
    from nothing and has few steps.
    """
    return DistillConfig(
        data=replace(SceneConfig(), text_dropout=0.0, batch_size=32, num_slots=1, mode="same_bucket"),
        student=StudentConfig(mu=1.8, walk="renoise"),
        matching=MatchingConfig(augmentation_normaliser="none"),
        adversary=AdversaryConfig(blocks=(1,), hidden_dim=128, lr=1e-3),
        critic=CriticConfig(lr=5e-5),
        optim=OptimConfig(lr=5e-5, betas=(0.0, 0.9), grad_clip=10.0, ema_decay=0.9, dtype=fast_dtype()),
        run=RunConfig(out=Path("runs/distill"), steps=40, checkpoint_every=20),
        score=ScoreSettings(num_prompts=1008),
    )


def lens() -> DistillConfig:
    """Lens-Turbo: 1K steps from the RL model, 4 pictures on each of 8 A100 of 80 GB."""
    return DistillConfig(
        teacher=Path("microsoft/Lens"),
        data=ShardsConfig(
            path=Path("shards/distill_100k"),
            buckets=LENS_BUCKETS,
            images_per_rank=(4,),
            num_ranks=8,
            mode="packed",
            text_dropout=0.0,
            features="precomputed",
        ),
        optim=OptimConfig(lr=5e-7, betas=(0.0, 0.9), grad_clip=1.0, ema_decay=0.0),
        run=RunConfig(out=Path("runs/turbo"), steps=1000, checkpoint_every=100, keep_checkpoints=2),
        engine=replace(CLUSTER, sharding="full"),
        score=ScoreSettings(mu=None),
    )


def _ablated(**changes: Any) -> DistillConfig:
    base = mini()
    parts = {name: replace(getattr(base, name), **values) for name, values in changes.items()}
    return replace(base, **parts)


def dm_only() -> DistillConfig:
    """Ablation: distribution matching without guidance augmentation."""
    return _ablated(matching={"augmentation": False}, run={"out": Path("runs/distill_dm_only")})


def ca_only() -> DistillConfig:
    """Ablation: guidance augmentation without distribution matching."""
    return _ablated(matching={"matching": False}, run={"out": Path("runs/distill_ca_only")})


def no_ida() -> DistillConfig:
    """Ablation: the fake score follows by its own updates alone."""
    return _ablated(critic={"ida": 0.0}, run={"out": Path("runs/distill_no_ida")})


def no_adversary() -> DistillConfig:
    """Ablation: no discriminator."""
    return _ablated(adversary={"weight": 0.0}, run={"out": Path("runs/distill_no_adversary")})


def consistency_mini() -> DistillConfig:
    """Baseline: discrete consistency distillation of the guided teacher, sampled with fresh noise at every step."""
    return _regressed("consistency", steps=120)


def meanflow_mini() -> DistillConfig:
    """Baseline: MeanFlow over each of the student's own steps, sampled by Euler steps like the paper's student."""
    wanted = ConsistencyConfig(ends="segment", derivative="central", derivative_step=2**-5)
    return replace(_regressed("meanflow", steps=100, walk="euler"), consistency=wanted)


def rcm_mini() -> DistillConfig:
    """Baseline: rCM, continuous consistency with distribution matching as its regulariser."""
    base = _regressed("rcm", steps=36)
    wanted = ConsistencyConfig(derivative="central", derivative_step=2**-4, warmup_steps=12)
    return replace(base, consistency=wanted, critic=replace(mini().critic, lr=1e-4, updates=2))


def _regressed(method: str, *, steps: int, walk: Walk = "renoise") -> DistillConfig:
    base = mini()
    return replace(
        base,
        method=method,
        student=replace(base.student, walk=walk),
        adversary=replace(base.adversary, weight=0.0),
        critic=replace(base.critic, updates=0),
        optim=replace(base.optim, lr=1e-4, betas=(0.9, 0.99)),
        run=replace(base.run, out=Path(f"runs/distill_{method}"), steps=steps),
    )


PRESETS: tuple[Callable[[], DistillConfig], ...] = (
    mini,
    lens,
    dm_only,
    ca_only,
    no_ida,
    no_adversary,
    consistency_mini,
    meanflow_mini,
    rcm_mini,
)
