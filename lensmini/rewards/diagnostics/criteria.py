"""What the verdicts of one step look like, criterion by criterion: pass rates, spread inside groups, coverage, correlation.

Axes: n pictures, c columns of verdicts. Columns have names by row, because rubrics differ between prompts.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lensmini.rewards.diagnostics.estimates import number
from lensmini.rewards.diagnostics.reliability import flips_by_label
from lensmini.shapes import check_shape

__all__ = ["Names", "Table", "correlate_criteria", "describe_coverage", "describe_criteria", "read_table"]

Names = Sequence[str] | Sequence[Sequence[str]]
"""One name by column, or for each picture the names of its columns (fewer where its rubric is shorter)."""
Causes = Sequence[Sequence[str | None]]
"""For each picture and column why the verdict is missing, or None."""


class Table(NamedTuple):
    """Scores turned so that high is good, with what is due, known and in which group."""

    good: Tensor
    """``[n, c]`` float64, 0 where not known."""
    known: Tensor
    """``[n, c]`` bool: due and answered."""
    due: Tensor
    """``[n, c]`` bool: the picture has this criterion."""
    group: Tensor
    """``[n]`` int64."""
    weights: Tensor
    """``[n, c]`` float64."""


def read_table(
    scores: Tensor, valid: Tensor, group: Tensor, *, weights: Tensor | None = None, pitfalls: Tensor | None = None
) -> Table:
    """Check the tensors of a step and bring them into one form, on the CPU in float64.

    Args:
        scores: ``[n, c]`` in [0, 1] where valid; anything elsewhere.
        valid: ``[n, c]`` bool.
        group: ``[n]`` integers.
        weights: ``[n, c]``, 0 where a picture does not have the criterion; none are all 1.
        pitfalls: ``[n, c]`` bool, where a high score is bad.

    Returns:
        The table.

    Raises:
        ValueError: if shapes or types differ, or a valid score is no number in [0, 1].

    Example:
        >>> read_table(
        ...     torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool), torch.zeros(0, dtype=torch.long)
        ... ).good.shape
        torch.Size([0, 3])
    """
    sizes = check_shape("scores", scores, "n c")
    check_shape("valid", valid, "n c", **sizes)
    check_shape("group", group, "n", n=sizes["n"])
    if not scores.is_floating_point() or valid.dtype != torch.bool:
        raise ValueError(f"scores and valid: expected floating point and bool, got {scores.dtype} and {valid.dtype}")
    if group.is_floating_point() or group.dtype == torch.bool:
        raise ValueError(f"group: expected integer ids, got {group.dtype}")
    known, values = valid.detach().cpu(), scores.detach().cpu().double()
    weight = torch.ones_like(values) if weights is None else weights.detach().cpu().double()
    turned = torch.zeros_like(known) if pitfalls is None else pitfalls.detach().cpu()
    check_shape("weights", weight, "n c", **sizes)
    check_shape("pitfalls", turned, "n c", **sizes)
    if turned.dtype != torch.bool:
        raise ValueError(f"pitfalls: expected bool, got {turned.dtype}")
    due = weight > 0
    known = known & due
    good = torch.where(known, torch.where(turned, 1 - values, values), 0.0)
    if not bool(((good >= 0) & (good <= 1)).all()):
        raise ValueError("scores: expected numbers in [0, 1] where valid is true")
    return Table(good, known, due, group.detach().cpu().long(), weight)


def describe_criteria(
    table: Table,
    names: Names | None = None,
    *,
    causes: Causes | None = None,
    repeats: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Any]:
    """For each name how often it passes, how much it tells pictures of a group apart, and how often it is known.

    ``pass_rate`` is the mean score (of binary verdicts the share that passes; pitfalls turned round); ``spread`` the
    std inside groups, pooled over (group, column) with ``n - 1``; ``constant_share`` the share of groups with at least
    two verdicts in which all are equal, where the criterion teaches nothing.

    Args:
        table: of the step.
        names: of criteria, or of categories; by default the number of the column.
        causes: for each picture and column why the verdict is missing.
        repeats: scores and validity ``[r, n, c]`` of the same questions asked r times.

    Returns:
        By name ``pass_rate``, ``spread``, ``valid_fraction``, ``due``, ``valid``, ``constant_share``, ``causes`` (counts, of
        missing verdicts) and ``flips`` as :func:`flip_rate` has them; the last two None where they were not given.

    Raises:
        ValueError: if names or causes have another shape.

    Example:
        >>> scores = torch.tensor([[1.0], [0.0], [1.0]])
        >>> table = read_table(scores, scores >= 0, torch.tensor([5, 5, 5]))
        >>> round(describe_criteria(table, ["count"])["count"]["spread"], 4)
        0.5774
    """
    found, label = _read_names(names, *table.good.shape)
    due, known = table.due & (label >= 0), table.known & (label >= 0)
    num = len(found)
    per_label = torch.zeros(num, dtype=torch.float64)
    num_due = torch.bincount(label[due], minlength=num)
    num_known = torch.bincount(label[known], minlength=num)
    rows, columns = known.nonzero(as_tuple=True)
    values, owner = table.good[known], label[known]
    total = per_label.index_add(0, owner, values)
    # A cell is one criterion inside one group: what a spread may compare.
    cells, cell = torch.unique(torch.stack([table.group[rows], columns, owner]), dim=1, return_inverse=True)
    zeros = torch.zeros(cells.shape[1], dtype=torch.float64)
    count = zeros.index_add(0, cell, torch.ones_like(values))
    mean = zeros.index_add(0, cell, values) / count.clamp_min(1)
    low, high = (
        zeros.scatter_reduce(0, cell, values, kind, include_self=False) if len(values) else zeros
        for kind in ("amin", "amax")
    )
    squares = per_label.index_add(0, owner, (values - mean[cell]).square())
    degrees = per_label.index_add(0, cells[2], count - 1)
    plural = (count > 1).double()
    compared = per_label.index_add(0, cells[2], plural)
    constant = per_label.index_add(0, cells[2], plural * (low == high))
    reasons = _causes_by_label(causes, due & ~known, label, num)
    flips = [None] * num if repeats is None else flips_by_label(*repeats, torch.where(due, label, -1), num)
    return {
        name: {
            "pass_rate": _ratio(total[i], num_known[i]),
            "spread": None if degrees[i] < 1 else float((squares[i] / degrees[i]).sqrt()),
            "valid_fraction": _ratio(num_known[i], num_due[i]),
            "due": int(num_due[i]),
            "valid": int(num_known[i]),
            "constant_share": _ratio(constant[i], compared[i]),
            "causes": None if causes is None else dict(reasons[i]),
            "flips": flips[i],
        }
        for i, name in enumerate(found)
    }


def describe_coverage(table: Table, causes: Mapping[str, int] | Causes | None = None) -> dict[str, Any]:
    """How many verdicts there should be, how many there are, and why the others are missing.

    Args:
        table: of the step.
        causes: counts by cause, as ``ScoreTable.causes`` has them, or the cause of each picture and column. What
            nobody explains counts as ``"unknown"``.

    Returns:
        ``due``, ``valid``, ``fraction``, ``causes`` (counts) and ``shares`` (of what is due).

    Raises:
        ValueError: if causes have another shape.

    Example:
        >>> scores = torch.tensor([[1.0, torch.nan]])
        >>> table = read_table(scores, scores.isfinite(), torch.tensor([0]))
        >>> describe_coverage(table, {"timeout": 1})["shares"]
        {'timeout': 0.5}
    """
    lacking = table.due & ~table.known
    missing, due = int(lacking.sum()), int(table.due.sum())
    if causes is None or isinstance(causes, Mapping):
        counts = Counter({str(cause): int(count) for cause, count in (causes or {}).items() if count})
        unexplained = missing - counts.total()
        if unexplained > 0:
            counts["unknown"] += unexplained
    else:
        counts = _causes_by_label(causes, lacking, torch.zeros_like(lacking, dtype=torch.int64), 1)[0]
    return {
        "due": due,
        "valid": int(table.known.sum()),
        "fraction": _ratio(table.known.sum(), due),
        "causes": dict(counts),
        "shares": {cause: count / due for cause, count in counts.items()} if due else {},
    }


def correlate_criteria(
    table: Table, names: Names | None = None, *, within_groups: bool = True, most: int = 24
) -> dict[str, Any]:
    """Pearson's correlation of each two criteria over the pictures where both are known.

    Inside groups by default: between prompts nearly everything correlates, because some prompts are hard. High values
    inside groups say that the judge repeats itself (a halo), or that two criteria are one.

    Args:
        table: of the step.
        names: of criteria, each at most once by picture.
        within_groups: about the mean of each group, over the pictures of the pair.
        most: the criteria that are known most often, to keep records small.

    Returns:
        ``ids`` and the symmetric ``matrix``; None where a criterion is constant over the pictures of the pair.

    Raises:
        ValueError: if names have another shape, or a picture has one twice.

    Example:
        >>> scores = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
        >>> correlate_criteria(read_table(scores, scores >= 0, torch.tensor([0, 0])))["matrix"][0]
        [1.0, 1.0, None]
    """
    found, label = _read_names(names, *table.good.shape)
    known = table.known & (label >= 0)
    counts = torch.bincount(label[known], minlength=len(found))
    kept = torch.argsort(counts, descending=True, stable=True)[:most].sort().values
    position = torch.full((len(found) + 1,), -1).index_copy(0, kept, torch.arange(len(kept)))
    column = position[torch.where(known, label, len(found))]
    rows, columns = (column >= 0).nonzero(as_tuple=True)
    if len(rows) and len(torch.unique(torch.stack([rows, column[rows, columns]]), dim=1)[0]) < len(rows):
        raise ValueError("names: expected each at most once by picture")
    values = torch.zeros(len(label), len(kept), dtype=torch.float64)
    present = torch.zeros_like(values)
    values[rows, column[rows, columns]] = table.good[rows, columns]
    present[rows, column[rows, columns]] = 1
    index = torch.unique(table.group, return_inverse=True)[1] if within_groups else torch.zeros_like(table.group)
    products = _sums_by_group(values[:, :, None] * values[:, None, :], index)
    first = _sums_by_group(values[:, :, None] * present[:, None, :], index)
    squares = _sums_by_group(values.square()[:, :, None] * present[:, None, :], index)
    pairs = _sums_by_group(present[:, :, None] * present[:, None, :], index).clamp_min(1)
    covariance = (products - first * first.mT / pairs).sum(0)
    variance = (squares - first.square() / pairs).sum(0)
    usable = (variance > 1e-10) & (variance.mT > 1e-10)  # rounding leaves about 1e-13 of a constant
    value = covariance / torch.where(usable, variance * variance.mT, 1.0).sqrt()
    matrix = [
        [number(value[i, j].clamp(-1, 1)) if bool(usable[i, j]) else None for j in range(len(kept))]
        for i in range(len(kept))
    ]
    return {"ids": [found[i] for i in kept.tolist()], "matrix": matrix}


def _read_names(names: Names | None, rows: int, columns: int) -> tuple[list[str], Tensor]:
    """The distinct names in order of appearance, and ``[n, c]`` which of them a column has (-1: none)."""
    if names is None:
        names = [str(column) for column in range(columns)]
    by_row: list[list[str]]
    if all(isinstance(name, str) for name in names) and (rows or names):
        if len(names) != columns:
            raise ValueError(f"names: expected {columns} names, or a sequence for each picture, got {len(names)}")
        by_row = [[str(name) for name in names]] * rows
    else:
        by_row = [list(row) for row in names]
        if len(by_row) != rows or any(len(row) > columns for row in by_row):
            raise ValueError(f"names: expected {rows} sequences of at most {columns} names, got {len(by_row)}")
    index: dict[str, int] = {}
    padded = [[index.setdefault(name, len(index)) for name in row] + [-1] * (columns - len(row)) for row in by_row]
    return list(index), torch.tensor(padded, dtype=torch.int64).reshape(rows, columns)


def _sums_by_group(values: Tensor, index: Tensor) -> Tensor:
    num = int(index.max()) + 1 if len(index) else 1
    return torch.zeros(num, *values.shape[1:], dtype=values.dtype).index_add(0, index, values)


def _causes_by_label(causes: Causes | None, lacking: Tensor, label: Tensor, num: int) -> list[Counter[str]]:
    counters: list[Counter[str]] = [Counter() for _ in range(num)]
    if causes is not None and len(causes) != len(lacking):
        raise ValueError(f"causes: expected one sequence for each of {len(lacking)} pictures, got {len(causes)}")
    for row, column in lacking.nonzero().tolist():
        given = causes[row] if causes is not None else ()
        cause = given[column] if column < len(given) else None
        counters[int(label[row, column])][str(cause or "unknown")] += 1
    return counters


def _ratio(part: Tensor | int, whole: Tensor | int) -> float | None:
    return float(part) / float(whole) if float(whole) > 0 else None
