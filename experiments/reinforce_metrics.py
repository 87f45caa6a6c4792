"""What a step of RL is told by: rewards by criterion, agreement with the held-out judge, velocities, diversity; and the page.

Axes: n pictures of a step, c criteria.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.reinforce_config import ReinforceConfig
from experiments.reinforce_rewards import Task
from experiments.reinforce_rollout import Sample
from experiments.reinforce_update import Moments
from experiments.runs import read_jsonl
from lensmini.parallel import Group
from lensmini.rewards import Rubric, ScoreTable, Verdict, aggregate, to_matrix
from lensmini.rewards.diagnostics import alarms, describe_step, write_page
from lensmini.rewards.judges import Judge, judge_pictures

__all__ = ["Judged", "describe", "held_out_rewards", "write_report"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Judged:
    """All pictures of a step with what was said about them."""

    samples: list[Sample]
    rubrics: list[Rubric]
    verdicts: list[list[Verdict]]
    group: Tensor
    """``[n]`` int64."""
    table: ScoreTable
    unavailable: str | None
    """Why there are no verdicts, if the judge is gone; the table is then empty."""

    @classmethod
    def of(
        cls, verdicts: list[list[Verdict]], samples: Sequence[Sample], tasks: Sequence[Task], unavailable: str | None
    ) -> "Judged":
        """Put verdicts in the order of the samples beside them."""
        rubrics = [tasks[sample.prompt].rubric for sample in samples]
        group = torch.tensor([sample.group for sample in samples])
        if unavailable is not None:
            empty = torch.zeros(0, 0)
            flags = empty.bool()
            table, verdicts = ScoreTable(empty, flags, empty, flags, flags, {}), []
        else:
            table = to_matrix(verdicts, rubrics)
        return cls(
            samples=list(samples),
            rubrics=rubrics,
            verdicts=verdicts,
            group=group,
            table=table,
            unavailable=unavailable,
        )


def held_out_rewards(judge: Judge, pictures: Sequence[Tensor], rubrics: Sequence[Rubric]) -> list[float | None]:
    """Mean verdict of a judge that is not trained on, None where one is missing."""
    table = to_matrix(judge_pictures(judge, pictures, rubrics), rubrics)
    values = aggregate(table.scores, table.valid, table.weights, missing="drop_sample", pitfalls=table.pitfalls)
    return [v if known else None for v, known in zip(values.values.tolist(), values.valid.tolist(), strict=True)]


def describe(
    config: ReinforceConfig,
    judged: Judged,
    rewards: Tensor,
    known: Tensor,
    moments: Sequence[Moments],
    pictures: Sequence[Tensor],
    mine: Sequence[Tensor],
    held_out: Judge | None,
    group: Group,
    step: int,
) -> dict[str, Any]:
    """One row of the metrics.

    Args:
        config: of the run.
        judged: everything that was said.
        rewards: ``[n]``.
        known: ``[n]`` bool.
        moments: of this process's updates.
        pictures: this process's.
        mine: places of these among all, by chunk.
        held_out: the judge that is not trained on.
        group: all processes.
        step: of the run, from 1.

    Returns:
        The record of :func:`lensmini.rewards.diagnostics.describe_step`, and what the updates saw.
    """
    places = torch.cat(list(mine)).tolist() if mine else []
    every = config.reward.held_out_every
    asked: list[float | None] = [None] * len(places)
    if held_out is not None and every and step % every == 0:
        asked = held_out_rewards(held_out, pictures, [judged.rubrics[place] for place in places])
    thumbnails = [torch.nn.functional.adaptive_avg_pool2d(picture.float() / 255, 8).flatten() for picture in pictures]
    norms = [(part.norms, part.reference_norms) for part in moments]
    parts = group.gather((places, asked, thumbnails, norms, sum(part.gap for part in moments)))
    order = [place for part in parts for place in part[0]]
    back = torch.tensor(order).argsort()
    other = torch.tensor([float("nan") if v is None else v for part in parts for v in part[1]])[back]
    trained, reference = (
        torch.tensor([v for part in parts for pair in part[3] for v in pair[side]]) for side in (0, 1)
    )
    criteria = {"ids": "id", "categories": "category"}
    names = {
        key: [[getattr(c, a) for c in rubric.all_criteria] for rubric in judged.rubrics] for key, a in criteria.items()
    }
    record = describe_step(
        judged.table.scores,
        judged.table.valid,
        judged.group,
        step=step,
        weights=judged.table.weights,
        pitfalls=judged.table.pitfalls,
        criterion_ids=names["ids"],
        categories=names["categories"],
        causes=judged.table.causes,
        rewards=rewards,
        reward_valid=known,
        heldout_rewards=other,
        heldout_valid=other.isfinite(),
        image_sizes=torch.tensor([sample.canvas for sample in judged.samples]),
        prompt_lengths=torch.tensor([len(rubric.prompt) for rubric in judged.rubrics]),
        velocity_norms=trained if len(trained) else None,
        reference_norms=reference if len(reference) else None,
        features=torch.stack([thumbnail for part in parts for thumbnail in part[2]])[back],
    )
    seen = max(1, config.objective.updates * int(known.sum()))
    return {**record, "gap": sum(part[4] for part in parts) / seen, "missing_causes": judged.table.causes}


def write_report(config: ReinforceConfig) -> None:
    """``page.html`` with the curves, the alarms and the newest grid of samples."""
    out = config.run.out
    history = read_jsonl(out / "metrics.jsonl")
    grids = sorted(out.glob("samples-*.png"))
    shown = [(_read_png(path), path.stem) for path in (grids[:1] + grids[-1:] if len(grids) > 1 else grids)]
    write_page(out / "page.html", history, title=f"Rubric RL, {out.name}", pictures=shown)
    (out / "alarms.json").write_text(json.dumps(alarms(history), indent=2) + "\n")


def _read_png(path: Any) -> Tensor:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
