"""Steps that must not be applied: losses and gradients that are no numbers, and spikes.

A verdict is a function of numbers that every rank has, so no rank needs to ask another.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from experiments.runs import write_json

__all__ = ["Guard", "GuardConfig", "RunawayError"]

Policy = Literal["stop", "skip", "restore"]


class RunawayError(FloatingPointError):
    """Training cannot go on by itself; the message says since when and what to change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """What happens to a step whose loss or gradient is NaN, infinite or a spike."""

    policy: Policy = "stop"
    """"stop" ends the run; "skip" leaves the step out; "restore" does too and, when ``patience`` such steps follow each
    other, goes back to the last checkpoint and leaves those steps and ``margin`` before them out."""
    spike_factor: float = 0.0
    """A gradient norm above this many times the median of the last ``window`` applied steps is a spike; 0 looks for none."""
    window: int = 100
    """Applied steps of that median; spikes are looked for once there are as many."""
    patience: int = 3
    """Bad steps in a row that are borne."""
    margin: int = 0
    """Steps before the first bad one that "restore" leaves out as well (PaLM, arXiv 2204.02311, section 5.1: about 100)."""
    max_restores: int = 10
    """Times that a run goes back before it stops."""

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            raise ValueError(f"policy: expected one of {get_args(Policy)}, got {self.policy!r}")
        if self.spike_factor != 0 and self.spike_factor <= 1:
            raise ValueError(f"spike_factor: expected 0 or more than 1, got {self.spike_factor}")
        for name, least in (("window", 1), ("patience", 1), ("margin", 0), ("max_restores", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")


class Guard:
    """Watches a run.

    Args:
        config: what is bad and what happens then.
        out: directory of the run; ``left_out.json`` in it keeps the steps that going back left out.

    Example:
        >>> guard = Guard(GuardConfig(policy="skip", spike_factor=10, window=2), getfixture("tmp_path"))
        >>> [guard.cause(k, 1.0, norm) for k, norm in enumerate((1.0, 1.2, float("inf"), 30.0, 1.1))]
        [None, None, 'gradient inf', 'spike: gradient norm 30 over 10 x 1.1', None]
    """

    def __init__(self, config: GuardConfig, out: Path) -> None:
        self.config, self.file = config, Path(out) / "left_out.json"
        self.norms: list[float] = []
        self.skipped, self.bad = 0, list[int]()
        self.left_out: list[list[int]] = json.loads(self.file.read_text()) if self.file.exists() else []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"norms": self.norms, "skipped": self.skipped, "bad": self.bad}

    def resume(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what a checkpoint kept; from nothing, start again."""
        known = state or {"norms": [], "skipped": 0, "bad": []}
        self.norms, self.skipped, self.bad = list(known["norms"]), known["skipped"], list(known["bad"])

    def leaves_out(self, step: int) -> bool:
        """Whether going back has left this step (counted from zero) out."""
        return any(first <= step < end for first, end in self.left_out)

    def cause(self, step: int, loss: float, norm: float) -> str | None:
        """Why a step must not be applied, or None; call it once for every step that was computed."""
        cause = None
        if not math.isfinite(loss):
            cause = f"loss {loss}"
        elif not math.isfinite(norm):
            cause = f"gradient {norm}"
        elif self.config.spike_factor and len(self.norms) == self.config.window:
            usual = median(self.norms)
            if norm > self.config.spike_factor * usual:
                cause = f"spike: gradient norm {norm:.4g} over {self.config.spike_factor:g} x {usual:.4g}"
        if cause is None:
            self.norms = [*self.norms, norm][-self.config.window :] if self.config.spike_factor else []
            self.bad = []
        else:
            self.skipped += 1
            self.bad.append(step)
        return cause

    def action(self) -> Literal["skip", "restore"]:
        """What to do about the bad step that :meth:`cause` has just found.

        Raises:
            RunawayError: if the run should stop.
        """
        config, first = self.config, self.bad[0]
        borne = len(self.bad) < config.patience
        if config.policy != "stop" and borne:
            return "skip"
        if config.policy == "restore" and len(self.left_out) < config.max_restores:
            return "restore"
        told = {
            "stop": "guard.policy is stop",
            "skip": f"{len(self.bad)} bad steps in a row",
            "restore": f"it went back {len(self.left_out)} times",
        }
        raise RunawayError(f"bad steps since step {first + 1}: {told[config.policy]}")

    def leave_out(self, *, write: bool) -> None:
        """Remember for good that the bad steps are not to be computed again; one rank writes it."""
        self.left_out.append([max(0, self.bad[0] - self.config.margin), self.bad[-1] + 1])
        if write:
            write_json(self.file, self.left_out)
