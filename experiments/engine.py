"""Which engine a run trains on: settings, the processes' device, and the state that fits them."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from experiments.adapter_state import AdapterConfig, AdapterState
from experiments.sharded_state import ShardedState, Sharding
from experiments.training import OptimConfig, TrainingState
from lensmini.nn import LensConfig
from lensmini.parallel import Group
from lensmini.parallel.recompute import Recompute

__all__ = ["EngineConfig", "make_state", "peak_flops"]

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "B200": 2250.0, "L40S": 362.0, "4090": 165.0, "3090": 71.0}
"""Dense bfloat16 of cards, by a part of their name, from their makers' data sheets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How processes share a model. Nothing here decides what is computed, up to the order of sums."""

    sharding: Literal["none", "replicate", "hybrid", "full"] = "none"
    """"none": every process has all and sums one flat gradient, for the miniature; "replicate": DDP, in float32; "hybrid":
    FSDP2 inside a node and copies across nodes; "full": FSDP2 over all ranks."""
    shard_size: int = 0
    """Ranks that share a copy with "hybrid"; 0 is the ranks of a node."""
    recompute: Recompute = "none"
    """Activations that are computed again in the backward: "none", "selective" (norms and products) or "full"."""
    compile: bool = False
    """Compile every block, one graph for all shapes."""
    prefetch: int = 1
    """Blocks whose parameters are gathered ahead."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; "auto" is the GPU where sharding is on and there is one."""
    batches_ahead: int = 0
    """Micro-batches that a thread reads and encodes ahead; 0 reads when they are needed."""
    background: bool = True
    """Whether sharded checkpoints are written while training goes on."""
    timeout_minutes: float = 10.0
    """After which a rank that waits for another gives the job up."""
    peak_tflops: float | None = None
    """Peak of one device in 10^12 FLOP/s, for the utilisation; none takes it from the card's name."""

    def __post_init__(self) -> None:
        if self.sharding not in ("none", *get_args(Sharding)) or self.recompute not in get_args(Recompute):
            raise ValueError(f"sharding, recompute: expected known names, got {self.sharding!r} and {self.recompute!r}")
        for name in ("shard_size", "prefetch", "batches_ahead"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.timeout_minutes <= 0 or (self.peak_tflops is not None and self.peak_tflops <= 0):
            raise ValueError("timeout_minutes, peak_tflops: expected positive numbers")

    def torch_device(self) -> torch.device:
        """The device of this process; under torchrun each has its own."""
        on_gpu = self.device == "cuda" or (
            self.device == "auto" and self.sharding != "none" and torch.cuda.is_available()
        )
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def make_state(
    engine: EngineConfig,
    model: LensConfig,
    optim: OptimConfig,
    *,
    seed: int,
    group: Group,
    adapter: AdapterConfig | None = None,
    base: Path | None = None,
) -> TrainingState | ShardedState | AdapterState:
    """The weights, averages and optimisers of this process.

    Args:
        engine: which engine.
        model: sizes of the transformer.
        optim: optimiser settings.
        seed: of the initial weights.
        group: the job.
        adapter: train low-rank updates of ``base`` only.
        base: released weights that an adapter belongs to.

    Raises:
        ValueError: if the engine cannot hold the model, or needs a job of several processes that does not run.
    """
    if adapter is not None and adapter.rank:
        assert base is not None
        device = engine.torch_device()
        return AdapterState(base, adapter, optim, seed=seed, group=group, device=device, recompute=engine.recompute)
    if engine.sharding == "none":
        return TrainingState(model, optim, seed=seed, group=group)
    # The last block hands its text on as it came, which torch warns of on every rank; nothing here changes it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    return ShardedState(
        model,
        optim,
        seed=seed,
        group=group,
        sharding=engine.sharding,
        shard_size=engine.shard_size,
        recompute=engine.recompute,
        compile=engine.compile,
        prefetch=engine.prefetch,
        device=engine.torch_device(),
        background=engine.background,
    )


def peak_flops(engine: EngineConfig) -> float | None:
    """Peak FLOP/s of one rank's device, or None where nobody said: a CPU, an unknown card."""
    if engine.peak_tflops is not None:
        return engine.peak_tflops * 1e12
    device = engine.torch_device()
    if device.type != "cuda":
        return None
    name: Any = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)
