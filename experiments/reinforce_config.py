"""Settings and presets of a rubric-RL run."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from experiments.adapter_state import AdapterConfig
from experiments.engine import EngineConfig
from experiments.precision import fast_dtype
from experiments.runs import RunConfig
from experiments.training import OptimConfig
from lensmini.data import KINDS, LENS_BUCKETS, MINIATURE_CANVASES
from lensmini.data.scene_captions import Wording
from lensmini.rewards import Missing
from lensmini.sampling import Kernel

__all__ = [
    "PRESETS",
    "EvalConfig",
    "ObjectiveConfig",
    "PromptsConfig",
    "ReinforceConfig",
    "RewardConfig",
    "RolloutConfig",
    "lens",
    "mini",
    "smallest",
]

LENS_CANVASES = tuple((b.height, b.width) for b in LENS_BUCKETS if b.height * b.width > 900_000)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptsConfig:
    """What is asked for."""

    source: Literal["scenes", "file"] = "scenes"
    """Prompts of the miniature world with their rubrics, or a file."""
    path: Path = Path("runs/prompts/prompts.jsonl")
    """With "file": ``prompts.jsonl`` of ``experiments.build_prompts``, or rubrics of ``lensmini.rewards.save_rubrics``."""
    num_prompts: int = 240
    """Scenes' prompts, equally many of each kind; a file's are all of its own. The paper has 8,406."""
    share: float = 1.0
    """Part of the set that is used, evenly over categories; the paper compares a quarter, a half and all."""
    without: tuple[str, ...] = ()
    """Categories that are left out; the paper leaves out Text."""
    wording: Wording = "synonyms"
    """Of scenes' prompts, the training captions'."""
    form: Literal["dense", "short"] = "dense"
    """Of scenes' prompts: captions of the whole scene, or bare requests that leave things open."""
    seed: int = 4_000_037
    """Of scenes' prompts; the scores' prompts have another one."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.num_prompts < 1:
            raise ValueError(
                f"share, num_prompts: expected in (0, 1] and positive, got {self.share}, {self.num_prompts}"
            )
        if self.source == "scenes" and not set(self.without) < set(KINDS):
            raise ValueError(f"without: expected some of {list(KINDS)} but not all, got {list(self.without)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """Pictures of a step: groups of one prompt each, in mixed shapes, without guidance."""

    groups: int = 48
    """Prompts of a step."""
    group_size: int = 24
    """Pictures of each."""
    canvases: tuple[tuple[int, int], ...] = LENS_CANVASES
    """Pixel sizes (height, width), mixed inside a group."""
    shapes_per_group: int = 0
    """Of these, different ones in a group, in equal parts; 0 deals them out picture by picture."""
    num_steps: int = 10
    """Sampling steps; the paper does not state them, the code it builds on takes 10."""
    mu: float | None = None
    """Time shift; none is the released model's rule. The paper does not state it."""
    chunk: int = 6
    """Pictures that are sampled, judged and trained on at once; it decides the shapes of computations, so it belongs to
    the run."""

    def __post_init__(self) -> None:
        if min(self.groups, self.group_size, self.num_steps, self.chunk) < 1 or not self.canvases:
            raise ValueError("groups, group_size, num_steps, chunk, canvases: expected at least one of each")
        if not 0 <= self.shapes_per_group <= min(self.group_size, len(self.canvases)):
            raise ValueError(f"shapes_per_group: expected 0 to {len(self.canvases)}, got {self.shapes_per_group}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """Who judges, and what happens to what is not known."""

    kind: Literal["rubric", "naive", "model"] = "rubric"
    """Rubrics and a judge; the careless reward of scenes, as a negative control; or the learned rubric reward model."""
    missing: Missing = "renormalise"
    """What a missing verdict does to its picture, see ``lensmini.rewards.aggregate``; the paper does not state it."""
    min_coverage: float = 0.8
    """Least share of a rubric's weight, with "renormalise"."""
    centred: bool = False
    """Centre each criterion in its group first (``criterion_advantages``); the paper's reward is a plain mean."""
    unavailable: Literal["stop", "skip"] = "stop"
    """When the judge is gone: save and leave, or go on with the next step and count."""
    overlap: bool = True
    """Judge a chunk in a thread while the next one is sampled; it changes no result."""
    cache: bool = True
    """Keep verdicts in ``verdicts.sqlite``, so that nothing is judged twice after a kill."""
    held_out_every: int = 0
    """Steps between questions to the held-out judge; 0 asks it never."""
    model: str = "gpt-4.1-mini"
    """Judge of a file's prompts, its name on the server."""
    url: str | None = None
    """Server, up to /v1; None for OpenAI's own."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable with the server's key."""
    calls: Literal["criterion", "picture"] = "criterion"
    """One call for each criterion (the paper), or one for a picture: an eleventh of the calls."""
    concurrency: int = 256
    """Requests in flight."""
    deadline_s: float | None = 600.0
    """For the questions of a chunk; later ones are missing."""
    max_cost: float | None = None
    """Never spend more in one start of the run; needs prices."""
    prices: tuple[float, float] | None = None
    """Of a million tokens of questions and of answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """From advantages to a gradient."""

    name: Literal["nft", "awm", "grpo"] = "nft"
    """DiffusionNFT (the paper), advantage weighted matching, or the clipped surrogate with a stochastic sampler."""
    beta: float = 1.0
    """NFT's mixture."""
    weight: Literal["self_normalised", "none"] = "self_normalised"
    """NFT's weighting in time: "adaptive" in the paper, the published code's form; or none."""
    kl: float = 1e-4
    """Weight of the distance to the reference: squared velocities, or the KL of steps for GRPO."""
    advantage_scale: Literal["batch", "group", "none"] = "batch"
    """Divisor of advantages: the std of all rewards of the step, as in the code the paper builds on; or of the group."""
    advantage_clip: float = 5.0
    """Advantages are clipped to this; the paper does not state it, the code it builds on has 5."""
    old_decay: Literal[0, 1, 2] = 1
    """How the sampling policy follows the trained one, :func:`lensmini.objectives.policy.nft_decay`; the paper: 1. GRPO and
    AWM sample with the trained one itself."""
    times: int = 0
    """Times of the sampling grid at which a picture is noised again for one update; 0 is all of them, as in the code that
    the paper builds on."""
    places: tuple[int, int] | None = None
    """First and last (exclusive) place of the sampling grid that is trained on; none is the whole grid, as in the paper. In
    the miniature advantages say something where shapes form, and only noise before."""
    updates: int = 1
    """Optimiser steps on one rollout."""
    clip: float = 0.2
    """Of the surrogate's ratio; published for AWM, with a mean over elements as here: 1e-5."""
    kernel: Kernel = "ddim"
    """GRPO's stochastic sampler."""
    eta: float = 0.7
    """Its strength."""
    shared_noise: bool = False
    """One training noise, and one order of times, for the pictures of a group that have the same size: what they have in
    common then cancels in their advantages. The paper does not state it; the code that it builds on draws one for each."""
    trained: tuple[str, ...] = ()
    """Parts of the names of the weights that are trained, where there is no adapter; empty: all of them."""
    window: int = 4
    """GRPO's stochastic steps, moving over the grid with the iterations; the others follow the ODE."""
    dwell: int = 4
    """Iterations at each place of the window."""

    def __post_init__(self) -> None:
        if self.updates < 1 or self.times < 0 or self.kl < 0 or self.window < 1 or self.dwell < 1:
            raise ValueError("updates, times, kl, window, dwell: expected positive, and at least 0 for times and kl")
        if self.places is not None and not 0 <= self.places[0] < self.places[1]:
            raise ValueError(f"places: expected 0 <= first < last, got {self.places}")
        if self.name == "grpo" and self.window % self.updates:
            raise ValueError(f"window: expected a multiple of updates = {self.updates}, got {self.window}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Scores of the miniature on prompts that training never sees, and a grid at fixed seeds."""

    num_prompts: int = 504
    """Held-out prompts, rounded up to equally many of each kind; 0 scores nothing."""
    num_guided: int = 252
    """How many of them are painted with guidance too, which costs twice as much; of the base all are."""
    num_steps: int = 8
    """Sampling steps."""
    guidance_scale: float = 4.0
    """Of the guided score; the other one has none."""
    mu: float | None = 0.0
    """Time shift."""
    variety: int = 8
    """Pictures of one prompt for the diversity, of the first twelve prompts."""
    weights: Literal["ema", "model"] = "ema"
    """Which weights are scored."""
    seed: int = 5_000_077
    """Of the prompts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReinforceConfig:
    """One run."""

    base: Path
    """What is improved: a run or ``step-N`` of ``experiments.pretrain``, or a released pipeline folder."""
    base_weights: Literal["ema", "model"] = "ema"
    """Of a run."""
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    """What is asked for."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How pictures are sampled."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """How they are judged."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is minimised."""
    optim: OptimConfig
    """Optimiser, gradient clip, average."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Low-rank updates (the paper: rank 64, alpha 128; its targets are not stated), or rank 0 for all weights."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Device and recomputation."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Measurements."""
    run: RunConfig
    """Where, how many steps (of rollouts), how often."""
    dry_run: bool = False
    """Print config, parameters, memory, FLOPs, pictures and calls, and leave."""

    def __post_init__(self) -> None:
        if self.engine.sharding != "none":
            raise ValueError(f'engine.sharding: expected "none", got {self.engine.sharding!r}')
        if self.reward.kind != "rubric" and self.prompts.source != "scenes":
            raise ValueError(f'reward.kind: expected "rubric" for prompts of a file, got {self.reward.kind!r}')
        if self.objective.trained and (self.adapter.rank or self.optim.weight_decay):
            raise ValueError(
                "objective.trained: expected no adapter and no weight decay with it, which would move the rest"
            )
        if self.rollout.groups * self.rollout.group_size < self.rollout.chunk * self.run.processes:
            raise ValueError("rollout.chunk: expected at least one chunk for each process")

    @property
    def num_updates(self) -> int:
        """Optimiser steps of the whole run."""
        return self.run.steps * self.objective.updates


def mini() -> ReinforceConfig:
    """The quickstart's model, scenes judged exactly, all weights: under ten minutes on two CPU cores."""
    return ReinforceConfig(
        base=Path("runs/quickstart"),
        rollout=RolloutConfig(
            groups=8,
            group_size=16,
            canvases=MINIATURE_CANVASES,
            shapes_per_group=2,
            num_steps=6,
            mu=0.0,
            chunk=32,
        ),
        reward=RewardConfig(held_out_every=6),
        objective=ObjectiveConfig(times=1, updates=2, window=2, places=(2, 4), shared_noise=True),
        optim=OptimConfig(
            lr=6e-4, betas=(0.9, 0.95), warmup_steps=6, decay_fraction=0.9, ema_decay=0.9, dtype=fast_dtype()
        ),
        run=RunConfig(
            out=Path("runs/reinforce"), steps=80, log_every=1, checkpoint_every=20, sample_every=20, processes=2
        ),
    )


def awm_mini() -> ReinforceConfig:
    """The same with advantage weighted matching."""
    return _changed("awm", objective={"name": "awm"})


def grpo_mini() -> ReinforceConfig:
    """The same with the clipped surrogate; ``--objective.kernel`` has four stochastic samplers."""
    return _changed("grpo", objective={"name": "grpo", "kernel": "ddim", "eta": 0.7})


def reward_model_mini() -> ReinforceConfig:
    """The same with the learned rubric reward model as the judge; it is trained first, in about two minutes."""
    return _changed("reward_model", reward={"kind": "model"})


def _changed(name: str, **changes: dict[str, Any]) -> ReinforceConfig:
    base = mini()
    parts = {part: replace(getattr(base, part), **values) for part, values in changes.items()}
    return replace(base, **parts, run=replace(base.run, out=Path(f"runs/reinforce_{name}")))


def smallest() -> ReinforceConfig:
    """A few steps of almost nothing, for tests."""
    return ReinforceConfig(
        base=Path("runs/smallest"),
        prompts=PromptsConfig(num_prompts=6),
        rollout=RolloutConfig(groups=2, group_size=3, canvases=((32, 32), (24, 40)), num_steps=2, mu=1.8, chunk=3),
        reward=RewardConfig(held_out_every=2),
        objective=ObjectiveConfig(times=1, updates=2),
        optim=OptimConfig(lr=3e-4, weight_decay=1e-4, ema_decay=0.9, dtype=fast_dtype()),
        eval=EvalConfig(num_prompts=0),
        run=RunConfig(out=Path("runs/reinforce-smallest"), steps=3, log_every=1, checkpoint_every=1),
    )


def lens() -> ReinforceConfig:
    """The paper: 180 steps of 48 groups of 24 pictures in nine shapes of 1024^2, LoRA 64 / 128, 64 A100."""
    return ReinforceConfig(
        base=Path("microsoft/Lens-Base"),
        prompts=PromptsConfig(source="file"),
        optim=OptimConfig(lr=3e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4, ema_decay=0.9),
        adapter=AdapterConfig(rank=64, alpha=128.0),
        engine=EngineConfig(device="cuda", recompute="full"),
        eval=EvalConfig(num_prompts=0, num_steps=20, guidance_scale=5.0, mu=None),
        run=RunConfig(out=Path("runs/lens-rl"), steps=180, log_every=1, checkpoint_every=10, sample_every=20),
    )


PRESETS: tuple[Callable[[], ReinforceConfig], ...] = (mini, lens, awm_mini, grpo_mini, reward_model_mini, smallest)
