"""When to look, and when to stop: rules over the records of a run that tell learning from reward hacking.

A history is a sequence of dicts as :func:`lensmini.rewards.diagnostics.describe_step` returns them, one a step, parts of
which may be None.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

from lensmini.rewards.diagnostics.estimates import line_slope, t_quantile

__all__ = ["Record", "alarms", "read_series", "should_stop"]

Record = Mapping[str, Any]
LEVEL, RECENT, FEWEST = 0.99, 5, 6


def alarms(
    history: Sequence[Record],
    *,
    window: int = 20,
    min_coverage: float = 0.9,
    max_injection: float = 0.02,
    missing_growth: float = 0.03,
    control_ceiling: float = 0.5,
    control_change: float = 0.15,
    min_diversity: float = 0.5,
    max_norm_ratio: float = 1.05,
    severe_norm_ratio: float = 1.15,
    max_constant: float = 0.5,
    min_reliability: float = 0.5,
) -> list[dict[str, Any]]:
    """Everything in the records that a person should know now.

    ====================  ==========================================================================  ==========
    name                  holds if                                                                    severe
    ====================  ==========================================================================  ==========
    ``heldout_falls``     the training judge's mean rises and the held-out judge's falls: the 99 %    yes
                          intervals of both slopes exclude 0, over ``window`` records or half
    ``gap_widens``        the difference of the two rises (99 %) and the held-out one does not        no
    ``coverage``          share of known verdicts, last 5 records, is below ``min_coverage``          below 0.5
    ``missing_grows``     its complement rises (99 %), by more than ``missing_growth`` in ``window``  no
    ``injection``         verdicts lost to words in pictures, last 5, exceed ``max_injection``        no
    ``control_high:K``    controls of kind K (not the base model's), last 5, exceed the ceiling       no
    ``control_moves:K``   they changed by more than ``control_change`` since the first 5 (99 %);      no
                          a rise, and for the base model's pictures any change
    ``diversity``         last 5 over first 5 is below ``min_diversity``                              no
    ``velocity_norm``     mean ratio, last 5, exceeds ``max_norm_ratio``                              above 1.15
    ``saturation``        share of groups without spread, last 5, exceeds ``max_constant``            no
    ``judge_noise``       reliability inside groups, last 5, is below ``min_reliability``             no
    ====================  ==========================================================================  ==========

    Slopes pair both judges on the same pictures and need six records that have both. They take records as independent:
    a judge that drifts for reasons of its own can set them off.

    Args:
        history: records in the order of steps.
        window: records with both judges that a slope is over, at least 6.
        min_coverage: share of verdicts.
        max_injection: share of verdicts.
        missing_growth: share of verdicts.
        control_ceiling: reward.
        control_change: reward.
        min_diversity: share of the first records' diversity.
        max_norm_ratio: of velocities.
        severe_norm_ratio: of velocities.
        max_constant: share of groups.
        min_reliability: share of variance.

    Returns:
        One dict for each alarm that holds at the last record: ``name``, ``since_step`` (where it began to hold without a
        break), ``value``, ``bound``, ``message``, ``severe``.

    Raises:
        ValueError: if ``window`` is too short for a slope.

    Example:
        >>> [alarm["name"] for alarm in alarms([{"step": 4, "coverage": {"fraction": 0.7}}])]
        ['coverage']
    """
    bounds = _Bounds(
        window=window,
        min_coverage=min_coverage,
        max_injection=max_injection,
        missing_growth=missing_growth,
        control_ceiling=control_ceiling,
        control_change=control_change,
        min_diversity=min_diversity,
        max_norm_ratio=max_norm_ratio,
        severe_norm_ratio=severe_norm_ratio,
        max_constant=max_constant,
        min_reliability=min_reliability,
    )
    found = {alarm["name"]: alarm for alarm in _check(history, bounds)}
    open_names, end = set(found), len(history)
    while open_names:
        step = history[end - 1].get("step")
        for name in open_names:
            found[name]["since_step"] = end - 1 if step is None else step
        end -= 1
        open_names &= {alarm["name"] for alarm in _check(history[:end], bounds)} if end else set()
    return list(found.values())


def should_stop(
    history: Sequence[Record], *, window: int = 20, patience: int = 5, **bounds: float
) -> dict[str, Any] | None:
    """Whether to stop the run: a severe alarm that held at each of the last ``patience`` records.

    Args:
        history: records in the order of steps.
        window: as for :func:`alarms`.
        patience: records, at least 1.
        bounds: as for :func:`alarms`.

    Returns:
        The alarm, or None to go on.

    Raises:
        ValueError: if ``window`` or ``patience`` is too short, or a bound is unknown.

    Example:
        >>> inflated = [{"step": step, "velocity_norm": {"ratio": 1.3}} for step in range(5)]
        >>> should_stop(inflated)["name"], should_stop(inflated[:4])
        ('velocity_norm', None)
    """
    if patience < 1:
        raise ValueError(f"patience: expected at least 1, got {patience}")
    now = [alarm for alarm in alarms(history, window=window, **bounds) if alarm["severe"]]
    held = {alarm["name"] for alarm in now}
    if not held or len(history) < patience:
        return None
    read = _Bounds(window=window, **bounds)  # pyright: ignore[reportArgumentType]
    for end in range(len(history) - patience + 1, len(history)):
        held &= {alarm["name"] for alarm in _check(history[:end], read) if alarm["severe"]}
    return next((alarm for alarm in now if alarm["name"] in held), None)


def read_series(history: Sequence[Record], *path: str) -> tuple[list[float], list[float]]:
    """Steps and values of one number of the records, where it is known.

    Args:
        history: records; one without ``step`` has its position.
        path: keys from the record to the number.

    Returns:
        Steps and values, equally many.

    Example:
        >>> read_series([{"step": 2, "reward": {"mean": 0.5}}, {"step": 3, "reward": None}], "reward", "mean")
        ([2.0], [0.5])
    """
    steps, values = [], []
    for position, record in enumerate(history):
        value = _read(record, *path)
        if value is not None:
            steps.append(_step(record, position))
            values.append(value)
    return steps, values


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bounds:
    window: int
    min_coverage: float = 0.9
    max_injection: float = 0.02
    missing_growth: float = 0.03
    control_ceiling: float = 0.5
    control_change: float = 0.15
    min_diversity: float = 0.5
    max_norm_ratio: float = 1.05
    severe_norm_ratio: float = 1.15
    max_constant: float = 0.5
    min_reliability: float = 0.5

    def __post_init__(self) -> None:
        if self.window < FEWEST:
            raise ValueError(f"window: expected at least {FEWEST} records, got {self.window}")


def _check(history: Sequence[Record], bounds: _Bounds) -> list[dict[str, Any]]:
    """The alarms at the last record."""
    found: list[dict[str, Any]] = []

    def report(name: str, value: float, bound: float, message: str, severe: bool = False) -> None:
        found.append(
            {"name": name, "since_step": None, "value": value, "bound": bound, "message": message, "severe": severe}
        )

    _check_heldout(history, bounds, report)
    covered = _recent(history, bounds.window, "coverage", "fraction")
    if covered is not None and covered < bounds.min_coverage:
        message = f"{covered:.0%} of the verdicts are known: the judge fails or refuses"
        report("coverage", covered, bounds.min_coverage, message, covered < 0.5)
    steps, values = _last(history, bounds.window, "coverage", "fraction")
    growth = line_slope(steps, [1 - value for value in values], level=LEVEL) if len(steps) >= FEWEST else {}
    if growth and growth["low"] is not None and growth["low"] > 0:
        rise = growth["slope"] * (steps[-1] - steps[0])
        if rise > bounds.missing_growth:
            message = f"the share of missing verdicts has grown by {rise:.1%} in {len(steps)} records"
            report("missing_grows", rise, bounds.missing_growth, message)
    injected = _recent(history, bounds.window, "coverage", "shares", "injection", otherwise=_known_coverage)
    if injected is not None and injected > bounds.max_injection:
        message = (
            f"{injected:.1%} of the verdicts were lost to words that address the judge: the policy may be writing them"
        )
        report("injection", injected, bounds.max_injection, message)
    _check_controls(history, bounds, report)
    first, last = _ends(history, "diversity", "mean")
    if first and last and fmean(first) > 0 and fmean(last) < bounds.min_diversity * fmean(first):
        share = fmean(last) / fmean(first)
        message = f"pictures of one prompt are {share:.0%} as different as at the start"
        report("diversity", share, bounds.min_diversity, message)
    ratio = _recent(history, bounds.window, "velocity_norm", "ratio")
    if ratio is not None and ratio > bounds.max_norm_ratio:
        message = f"velocities are {ratio - 1:.1%} longer than the reference's"
        report("velocity_norm", ratio, bounds.max_norm_ratio, message, ratio > bounds.severe_norm_ratio)
    constant = _recent(history, bounds.window, "groups", "constant_share")
    if constant is not None and constant > bounds.max_constant:
        message = f"in {constant:.0%} of the groups all rewards are equal: they teach nothing"
        report("saturation", constant, bounds.max_constant, message)
    reliable = _recent(history, bounds.window, "reliability", "within")
    if reliable is not None and reliable < bounds.min_reliability:
        message = f"only {max(reliable, 0):.0%} of the reward's variance inside groups is not the judge's noise"
        report("judge_noise", reliable, bounds.min_reliability, message)
    return found


def _check_heldout(history: Sequence[Record], bounds: _Bounds, report: Any) -> None:
    # The records that have both, so that the two slopes are over the same pictures of the same steps.
    paired: list[tuple[float, float, float]] = []
    for position in range(len(history) - 1, -1, -1):
        record = history[position]
        train, heldout = _read(record, "heldout", "train_mean"), _read(record, "heldout", "mean")
        train = _read(record, "reward", "mean") if train is None else train
        if train is not None and heldout is not None:
            paired.append((_step(record, position), train, heldout))
        if len(paired) == bounds.window:
            break
    leaving: list[tuple[float, int]] = []
    # Half a window as well: exploitation that sets in after honest progress bends the long line too late.
    for most in (bounds.window, bounds.window // 2):
        if min(most, len(paired)) < FEWEST:
            continue
        steps, train, heldout = (list(reversed(column)) for column in zip(*paired[:most], strict=True))
        up, down = (line_slope(steps, values, level=LEVEL) for values in (train, heldout))
        gap = line_slope(steps, [a - b for a, b in zip(train, heldout, strict=True)], level=LEVEL)
        if gap["low"] is None:
            continue
        if up["low"] > 0 and down["high"] < 0:
            message = (
                f"the training judge's reward rises by {up['slope']:.2g} a step and the held-out judge's falls by "
                f"{-down['slope']:.2g}, over {len(steps)} records: the policy exploits its judge"
            )
            report("heldout_falls", down["slope"], 0.0, message, True)
            return
        if gap["low"] > 0 and down["low"] <= 0:
            leaving.append((gap["slope"], len(steps)))
    if leaving:
        slope, count = leaving[0]
        message = (
            f"the training judge's reward leaves the held-out judge's by {slope:.2g} a step over {count} records, and the "
            "held-out judge's does not rise"
        )
        report("gap_widens", slope, 0.0, message)


def _check_controls(history: Sequence[Record], bounds: _Bounds, report: Any) -> None:
    kinds = dict.fromkeys(kind for record in history[-bounds.window :] for kind in (record.get("controls") or {}))
    for kind in kinds:
        recent = _recent(history, bounds.window, "controls", kind, "mean")
        if recent is None:
            continue
        if kind != "base_model" and recent > bounds.control_ceiling:
            message = f"control pictures ({kind}) earn {recent:.2f}: the judge can be had"
            report(f"control_high:{kind}", recent, bounds.control_ceiling, message)
        first, last = _ends(history, "controls", kind, "mean")
        if len(first) < 2 or len(last) < 2:
            continue
        change = fmean(last) - fmean(first)
        # Welch's error with the smaller sample's degrees: wide rather than narrow.
        error = math.sqrt(variance(first) / len(first) + variance(last) / len(last))
        size = abs(change) if kind == "base_model" else change
        if size - t_quantile(min(len(first), len(last)) - 1, LEVEL) * error > 0 and size > bounds.control_change:
            message = f"control pictures ({kind}) earn {change:+.2f} against the start: the judge has moved, or is had"
            report(f"control_moves:{kind}", change, bounds.control_change, message)


def _read(record: Record, *path: str) -> float | None:
    value: Any = record
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _known_coverage(record: Record) -> float | None:
    """A record that counts verdicts and names no injection had none."""
    return 0.0 if isinstance((record.get("coverage") or {}).get("shares"), Mapping) else None


def _step(record: Record, position: int) -> float:
    step = record.get("step")
    return float(position if step is None else step)


def _last(history: Sequence[Record], most: int, *path: str) -> tuple[list[float], list[float]]:
    """Steps and values of the last records that have the number, oldest first."""
    found: list[tuple[float, float]] = []
    for position in range(len(history) - 1, -1, -1):
        value = _read(history[position], *path)
        if value is not None:
            found.append((_step(history[position], position), value))
        if len(found) == most:
            break
    found.reverse()
    return [step for step, _ in found], [value for _, value in found]


def _recent(history: Sequence[Record], window: int, *path: str, otherwise: Any = None) -> float | None:
    """Mean of the last five values within the window: some numbers are not measured at every step."""
    values: list[float] = []
    for record in reversed(history[-window:]):
        value = _read(record, *path)
        value = otherwise(record) if value is None and otherwise else value
        if value is not None:
            values.append(value)
        if len(values) == RECENT:
            break
    return fmean(values) if values else None


def _ends(history: Sequence[Record], *path: str) -> tuple[list[float], list[float]]:
    """The first and the last values, five each that do not overlap; nothing before there are so many."""
    first: list[float] = []
    for position, record in enumerate(history):
        value = _read(record, *path)
        if value is not None:
            first.append(value)
        if len(first) == RECENT:
            _, last = _last(history[position + 1 :], RECENT, *path)
            return (first, last) if len(last) == RECENT else ([], [])
    return [], []
