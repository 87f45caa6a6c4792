"""Gates of the miniature's stages: numbers that must reach a threshold before anything is built on a stage."""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["GateError", "GateReport", "require"]


class GateError(RuntimeError):
    """A trained stage is not good enough to build on."""


@dataclass(frozen=True, slots=True)
class GateReport:
    """What was measured, and what falls short."""

    stage: str
    """Name of the stage, for messages."""
    numbers: dict[str, float]
    """Every measurement."""
    failures: tuple[str, ...]
    """One sentence for each number below its threshold."""

    @property
    def passed(self) -> bool:
        """Whether nothing falls short."""
        return not self.failures

    @classmethod
    def judge(cls, stage: str, numbers: Mapping[str, float], least: Mapping[str, float]) -> "GateReport":
        """Compare numbers with the least that they must be. One that is no number (NaN) falls short.

        Example:
            >>> GateReport.judge("letters", {"share": 0.5, "loss": 2.0}, {"share": 0.9}).failures
            ('share is 0.5000, expected at least 0.9',)
        """
        failures = tuple(
            f"{name} is {numbers[name]:.4f}, expected at least {bound:g}"
            for name, bound in least.items()
            if not numbers[name] >= bound
        )
        return cls(stage, dict(numbers), failures)


def require(report: GateReport) -> GateReport:
    """Give the report back if it passed.

    Raises:
        GateError: if it did not, with every failure.

    Example:
        >>> require(GateReport.judge("letters", {"share": 0.95}, {"share": 0.9})).passed
        True
    """
    if not report.passed:
        raise GateError(f"{report.stage}: gate failed: {'; '.join(report.failures)}")
    return report
