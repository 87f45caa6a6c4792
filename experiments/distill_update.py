"""One update of a distillation run: micro-batches, gradients over all processes, and the guard's word on applying them."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from experiments.bank import Batch, FeatureBank
from experiments.distill_config import DistillConfig
from experiments.distill_draws import Draws, draw
from experiments.distill_objectives import Losses
from experiments.distill_state import DistillState
from experiments.guards import Guard, RunawayError
from experiments.runs import append_jsonl
from experiments.shard_data import ShardBank
from lensmini.data import BatchPlan, loss_weights
from lensmini.parallel import Group

__all__ = ["Run", "descend"]


class Run(NamedTuple):
    """What every update needs."""

    config: DistillConfig
    group: Group
    bank: FeatureBank | ShardBank
    plan: BatchPlan
    state: DistillState
    guards: dict[str, Guard]
    """Of "critic" and "student", whose losses and gradients have sizes of their own."""

    @property
    def skipped(self) -> int:
        """Updates that were not applied."""
        return sum(guard.skipped for guard in self.guards.values())

    def batch(self, update: int, slot: int) -> tuple[Batch, Draws]:
        """A micro-batch and its random numbers; updates of critic and student are counted together."""
        config, group = self.config, self.group
        self.bank.prepare(self.plan, update, group.rank, group.world_size)
        planned = self.plan.step(update)
        batch = self.bank.collate(
            planned.slot(slot).tolist(),
            repeats=planned.repeats(slot).tolist(),
            seed=config.run.seed,
            step=update,
            text_dropout=config.data.text_dropout,
        ).to(config.engine.torch_device())
        num_walk = config.student.num_steps - 1 if config.student.walk == "renoise" else 0
        return batch, draw(batch, config.run.seed, update, num_walk=num_walk)


def descend(
    run: Run,
    update: int,
    function: Callable[[DistillState, Batch, Draws, DistillConfig], Losses],
    who: Literal["critic", "student"],
) -> dict[str, float]:
    """Add up an update's gradient over micro-batches and processes, and apply it unless something has diverged.

    Args:
        run: the run.
        update: number of the update.
        function: of (state, batch, draws, config): its losses.
        who: whose update it is.

    Returns:
        The means of the losses by name, norms and rate; a skipped update has ``skipped`` 1 instead.

    Raises:
        RunawayError: if the guard stops the run; ``events.jsonl`` says what happened.
    """
    config, group, plan, guard = run.config, run.group, run.plan, run.guards[who]
    trained = run.state.student if who == "student" else run.state.fake
    assert trained is not None
    sums: dict[str, Tensor] = {}
    slots = range(group.rank, plan.num_slots, group.world_size)
    for slot in slots:
        batch, draws = run.batch(update, slot)
        trained.begin(last=slot == slots[-1])
        losses = function(run.state, batch, draws, config)
        weights = loss_weights(batch.layout, plan.totals(plan.step(update)), config.data.weighting)
        (weights * losses.total).sum().backward()
        trained.accumulate()
        for name, part in {"loss": losses.total.detach(), **losses.parts}.items():
            sums[name] = sums.get(name, 0.0) + (weights * part).sum()
    trained.collect(group, [])
    means = dict(zip(sums, group.sum_(torch.stack(list(sums.values()))).tolist(), strict=True))
    step, norm = run.state.step, trained.gradient_norm()
    cause = guard.cause(step, means["loss"], norm)
    if cause is None:
        return means | (run.state.update_student() if who == "student" else run.state.update_critic())
    if group.rank == 0:
        told = {name: str(value) for name, value in means.items()}
        append_jsonl(config.run.out / "events.jsonl", {"step": step + 1, "update": update, "cause": cause, **told})
    try:
        guard.action()
    except RunawayError as error:
        raise RunawayError(
            f"step {step + 1}, {function.__name__}: {cause}; {error}. Lower optim.lr or critic.lr, or see --guard.policy. The "
            f"last checkpoint in {config.run.out} is from before; events.jsonl there has the losses"
        ) from None
    trained.skip()
    if run.state.head is not None:
        run.state.head.zero_grad()
    return {"skipped": 1.0}
