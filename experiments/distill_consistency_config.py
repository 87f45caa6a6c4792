"""Settings of the consistency objectives of ``experiments.distill``."""

from dataclasses import dataclass
from typing import Literal, get_args

from lensmini.objectives.consistency.derivative import Method

__all__ = ["ConsistencyConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsistencyConfig:
    """Baselines that Lens does not use: the student learns the teacher's guided trajectory itself."""

    ends: Literal["clean", "segment"] = "clean"
    """Where the student's map leads: to the clean end, for a student that re-noises (walk "renoise"), or to the end of the
    student's own step, for one that walks by Euler steps. The second is a flow map u(x, t, r) with r a function of t, so it
    needs no second time and no new weights."""
    guidance: float = 5.0
    """Of the teacher's velocity along which is distilled; that of the teacher it is scored against."""
    rescale: bool = True
    """Restore the norms after guidance, as the released pipeline does."""
    substeps: int = 4
    """Discrete: steps of the teacher's solver within each of the student's."""
    solver: Literal["euler", "heun"] = "euler"
    """Discrete: the teacher's solver."""
    metric: Literal["pseudo_huber", "pseudo_huber_norm", "squared"] = "pseudo_huber"
    """Discrete: the distance."""
    c: float = 0.001
    """Discrete: its constant, LCM's."""
    derivative: Method = "forward"
    """Continuous: how the student is differentiated along the trajectory."""
    derivative_step: float | None = None
    """Continuous: step of the finite differences; none with "forward". A network that nothing made smooth in time, such as the
    quickstart's, needs a wide one: see docs/consistency.md."""
    warmup_steps: int = 50
    """Continuous: student steps until the derivative counts in full."""
    normaliser: Literal["rms", "l2"] = "rms"
    """rCM: size that bounds the tangent; published with "l2", here "rms", the same for every resolution."""
    tangent_c: float = 0.1
    """rCM: added to that size."""
    power: float = 1.0
    """MeanFlow: of its adaptive weight."""
    regulariser: float = 1.0
    """rCM: weight of the distribution-matching loss beside the consistency loss."""

    def __post_init__(self) -> None:
        kinds = (self.ends in ("clean", "segment"), self.solver in ("euler", "heun"), self.normaliser in ("rms", "l2"))
        if not all(kinds) or self.derivative not in get_args(Method):
            raise ValueError("ends, solver, normaliser, derivative: expected known names")
        if (self.derivative_step is None) != (self.derivative == "forward"):
            raise ValueError("derivative_step: expected a number with finite differences, and none with 'forward'")
        positive = (self.c, self.tangent_c)
        if self.substeps < 1 or self.warmup_steps < 0 or self.power < 0 or self.regulariser < 0 or min(positive) <= 0:
            raise ValueError("substeps, warmup_steps, power, regulariser, c, tangent_c: expected positive numbers")
