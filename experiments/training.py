"""The state of a training run that a checkpoint holds: float32 weights, their average, and the optimisers' moments."""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.muon import Muon
from experiments.runs import atomic_directory, config_dict, keep_last, latest_checkpoint, provenance, write_json
from lensmini.averaging import lerp_parameters_
from lensmini.nn import LensConfig, LensTransformer
from lensmini.parallel import Group

__all__ = [
    "HIDDEN_MATRICES",
    "OptimConfig",
    "SettingsError",
    "TrainingState",
    "check_same_run",
    "learning_rate_factor",
    "read_run",
]

HIDDEN_MATRICES = ("qkv.weight", "to_out.0.weight", "to_add_out.weight", "w1.weight", "w2.weight", "w3.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimisers and schedule. The paper: AdamW, betas 0.9 and 0.999, clip 1.0, constant rate, bf16."""

    lr: float = 2e-4
    """AdamW's learning rate."""
    muon_lr: float = 0.0
    """Learning rate of Muon on the blocks' attention and feed-forward matrices; 0 leaves them to AdamW (the paper)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moments."""
    eps: float = 1e-8
    """AdamW's epsilon; the paper does not state it."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; the paper does not state it."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient."""
    warmup_steps: int = 0
    """Steps of linear warm-up; the paper does not state them."""
    decay_fraction: float = 0.0
    """Last part of the run in which the rate falls linearly to 0; 0 is the paper's constant rate."""
    ema_decay: float = 0.9999
    """Decay per step of the averaged weights; the paper does not state one."""
    time_mu: float | None = None
    """Mean of the logit-normal times; none is the paper's rule, from 1.0 at 256 tokens to 1.3 at 4096."""
    time_std: float = 1.0
    """Spread of the logit-normal times; the paper does not state it."""
    dtype: str = "bfloat16"
    """Arithmetic of forward and backward; weights, moments and averages are float32."""
    init_gate: float = 0.0
    """Initial bias of the blocks' gates; 0 is adaLN-zero."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f'dtype: expected "float32" or "bfloat16", got {self.dtype!r}')
        if self.lr <= 0 or self.muon_lr < 0 or self.grad_clip <= 0 or not 0 <= self.ema_decay < 1:
            raise ValueError("lr, muon_lr, grad_clip, ema_decay: expected > 0, >= 0, > 0 and in [0, 1)")
        if self.warmup_steps < 0 or not 0 <= self.decay_fraction <= 1:
            raise ValueError("warmup_steps, decay_fraction: expected >= 0 and in [0, 1]")


def learning_rate_factor(step: int, num_steps: int, config: OptimConfig) -> float:
    """Factor of both learning rates at a step: linear warm-up, constant, linear decay.

    Example:
        >>> [learning_rate_factor(s, 10, OptimConfig(warmup_steps=2, decay_fraction=0.5)) for s in (0, 1, 4, 9)]
        [0.5, 1.0, 1.0, 0.2]
    """
    factor = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.decay_fraction:
        factor = min(factor, (num_steps - step) / (config.decay_fraction * num_steps))
    return factor


class TrainingState:
    """Weights, a low-precision copy that does the arithmetic, the average and the optimisers.

    The gradient of all parameters is one flat float32 buffer with room for a few numbers that the processes add up too.

    Args:
        model_config: of the transformer.
        optim: optimiser settings.
        seed: of the initial weights.
        group: the processes that train together.
    """

    NUM_EXTRA = 3

    def __init__(self, model_config: LensConfig, optim: OptimConfig, *, seed: int, group: Group | None = None) -> None:
        self.optim, self.group = optim, group or Group(0, 1)
        self.model = LensTransformer(model_config).init_weights(seed, gate=optim.init_gate)
        self.ema = deepcopy(self.model).requires_grad_(False)
        dtype = getattr(torch, optim.dtype)
        self.compute = deepcopy(self.model).to(dtype) if dtype != torch.float32 else self.model
        parameters = dict(self.model.named_parameters())
        self.flat = torch.zeros(sum(p.numel() for p in parameters.values()) + self.NUM_EXTRA)
        self.extra = self.flat[-self.NUM_EXTRA :]
        pieces = self.flat[: -self.NUM_EXTRA].split([p.numel() for p in parameters.values()])
        self.grads = [piece.view_as(p) for piece, p in zip(pieces, parameters.values(), strict=True)]
        hidden = {n: p for n, p in parameters.items() if optim.muon_lr and n.endswith(HIDDEN_MATRICES)}
        rest = [p for n, p in parameters.items() if n not in hidden]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, optim.lr, optim.betas, optim.eps, optim.weight_decay, foreach=True)
        ]
        if hidden:
            self.optimizers.append(Muon(hidden, lr=optim.muon_lr, splits={"qkv.weight": 3}, group=group))
        self.step, self.accumulating = 0, False

    def begin(self, *, last: bool) -> None:
        """Before each micro-batch; nothing to do, since the gradient meets in :meth:`collect`."""

    def finish(self) -> None:
        """Nothing is written in the background."""

    def gradient_norm(self) -> float:
        """Norm of the whole gradient of a step."""
        return torch.linalg.vector_norm(self.flat[: -self.NUM_EXTRA]).item()

    def skip(self) -> None:
        """Go to the next step without applying this one's gradient."""
        self.step += 1

    def refresh(self) -> None:
        """Copy the float32 weights into the low-precision copy."""
        if self.compute is not self.model:
            torch._foreach_copy_([p.data for p in self.compute.parameters()], [p.data for p in self.model.parameters()])  # pyright: ignore

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add a micro-batch's gradients to the flat buffer in float32, whatever they were computed in, and clear them.

        The first call of a step starts from zero.
        """
        if not self.accumulating:
            self.flat.zero_()
            self.accumulating = True
        pairs = [(g, p.grad) for g, p in zip(self.grads, self.compute.parameters(), strict=True) if p.grad is not None]
        if pairs:
            torch._foreach_add_([g for g, _ in pairs], [grad.to(g.dtype) for g, grad in pairs])  # pyright: ignore
        for parameter in self.compute.parameters():
            parameter.grad = None

    @torch.no_grad()
    def collect(self, group: Group, numbers: list[float]) -> list[float]:
        """Accumulate what is left, and add gradients and numbers up over all processes; ends the step's gradient."""
        self.accumulate()
        self.accumulating = False
        self.extra[: len(numbers)] = torch.tensor(numbers)
        group.sum_(self.flat)
        return self.extra[: len(numbers)].tolist()

    @torch.no_grad()
    def update(self, num_steps: int) -> dict[str, float]:
        """One optimiser step from the flat gradient; returns its norm and the learning rate."""
        norm = torch.linalg.vector_norm(self.flat[: -self.NUM_EXTRA])
        self.flat.mul_(torch.clamp(self.optim.grad_clip / (norm + 1e-6), max=1.0))
        for parameter, grad in zip(self.model.parameters(), self.grads, strict=True):
            parameter.grad = grad
        factor = learning_rate_factor(self.step, num_steps, self.optim)
        for optimizer, rate in zip(self.optimizers, (self.optim.lr, self.optim.muon_lr), strict=False):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
        for parameter in self.model.parameters():
            parameter.grad = None
        # The average of early steps would hold the initial weights for long: its decay grows with the step.
        decay = min(self.optim.ema_decay, (1 + self.step) / (10 + self.step))
        lerp_parameters_(self.ema, self.model, 1 - decay)
        self.step += 1
        self.refresh()
        return {"grad_norm": norm.item(), "lr": self.optim.lr * factor}

    def save(
        self,
        out: Path,
        config: Any,
        *,
        keep: int,
        plan: str | None = None,
        notes: Mapping[str, Any] | None = None,
        others: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> Path:
        """Write ``out/step-N`` atomically, with the fingerprint of the plan and other tensors by file, and drop older ones.

        Every process may call it; the first writes.
        """
        path = out / f"step-{self.step:06d}"
        if self.group.rank:
            return path
        moments = {}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                moments |= {f"{names[parameter]}.{key}": value for key, value in state.items()}  # pyright: ignore
        with atomic_directory(path) as new:
            save_file(_contiguous(self.model.state_dict()), new / "model.safetensors")
            save_file(_contiguous(self.ema.state_dict()), new / "ema.safetensors")
            save_file(_contiguous(moments), new / "optimizer.safetensors")
            for name, tensors in (others or {}).items():
                save_file(_contiguous(tensors), new / f"{name}.safetensors")
            write_json(new / "config.json", self.model.config.to_dict())
            run = {"step": self.step, "plan": plan, "config": config, "provenance": provenance()}
            write_json(new / "run.json", {**run, **(notes or {})})
        keep_last(out, keep)
        return path

    def resume(self, out: Path) -> bool:
        """Continue from the newest checkpoint of ``out``, if there is one."""
        found = latest_checkpoint(out)
        if found is None:
            self.refresh()
            return False
        path, self.step = found
        if not (path / "model.safetensors").exists():
            raise SettingsError(
                f"{path} is a sharded checkpoint: go on with the engine.sharding that made it, or make it whole "
                "(python -m experiments.consolidate)"
            )
        self.load(path, which="model", optimizer=True)
        self.ema.load_state_dict(load_file(path / "ema.safetensors"), strict=True)
        return True

    def load(self, path: Path, *, which: str, optimizer: bool) -> None:
        """Take weights (``"model"`` or ``"ema"``), and the optimisers' moments if wanted, from a checkpoint."""
        weights = load_file(path / f"{which}.safetensors")
        self.model.load_state_dict(weights, strict=True)
        self.ema.load_state_dict(weights, strict=True)
        if optimizer:
            moments = load_file(path / "optimizer.safetensors")
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            for one in self.optimizers:
                for parameter in one.param_groups[0]["params"]:
                    found = {key.removeprefix(f"{names[parameter]}."): key for key in moments}
                    state = {
                        short: moments[key] for short, key in found.items() if f"{names[parameter]}.{short}" == key
                    }
                    wanted = {"momentum"} if isinstance(one, Muon) else {"exp_avg", "exp_avg_sq", "step"}
                    if not wanted <= state.keys():
                        raise SettingsError(
                            f"{path}: expected moments {sorted(wanted)} of {names[parameter]}, got {sorted(state)}: they "
                            "are another optimiser's; start with fresh ones (--reset-optimizer)"
                        )
                    one.state[parameter] = state
        self.refresh()


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def read_run(path: Path) -> dict[str, Any]:
    """The ``run.json`` of a checkpoint: step, resolved config and provenance."""
    return json.loads((path / "run.json").read_text())


class SettingsError(ValueError):
    """A run that its directory or checkpoint does not fit; the message is for whoever chose the settings."""


_FREE = ("run.out", "run.processes", "run.threads", "run.checkpoint_every", "run.keep_checkpoints", "run.log_every")
_FREE_GROUPS = ("engine.",)
"""Settings that a run may change when it goes on: they do not decide what it computes, up to the order of sums."""


def check_same_run(out: Path, config: Any, plan: str | None = None) -> None:
    """Refuse to continue a directory's run with other settings, or with samples in another order.

    Args:
        out: the run's directory.
        config: settings of the run that wants to go on.
        plan: fingerprint of its order of samples; not compared if it is None.

    Raises:
        SettingsError: if a setting differs that decides what is computed; the message names the first four.
    """
    found = latest_checkpoint(out)
    if found is None:
        return
    run = read_run(found[0])
    if plan is not None and run.get("plan") != plan:
        raise SettingsError(
            f"run.out: {out} holds a run whose samples came in another order ({run.get('plan')}, now {plan}): the data have "
            "changed since, or an older version made it; name another directory"
        )
    before, now = _flat(run["config"]), _flat(config_dict(config))
    names = sorted(name for name in {*before, *now} - {*_FREE} if not name.startswith(_FREE_GROUPS))
    changed = [name for name in names if before.get(name) != now.get(name)]
    if changed:
        told = ", ".join(f"{name} {before.get(name)} -> {now.get(name)}" for name in changed[:4])
        raise SettingsError(f"run.out: {out} holds a run with other settings ({told}); name another directory")


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {name: values}
    return {k: v for key, value in values.items() for k, v in _flat(value, f"{name}.{key}".strip(".")).items()}
