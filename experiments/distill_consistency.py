"""Consistency objectives of ``experiments.distill``: discrete distillation, MeanFlow over the student's steps, and rCM.

Not in the paper: baselines beside its recipe, from the same teacher, on the same batches, scored alike. Real pictures are
noised to a time, the guided teacher says which way its trajectory runs there, and the student learns where it leads.
Axes: b samples, N image tokens, c channels.
"""

import torch
from torch import Tensor

from experiments.bank import Batch
from experiments.distill_config import DistillConfig
from experiments.distill_draws import Draws
from experiments.distill_objectives import Losses, StudentLoss, condition, dmd_loss
from experiments.distill_state import DistillState
from lensmini.nn import LensTransformer
from lensmini.objectives import (
    adaptive_weight,
    consistency_loss,
    directional_derivative,
    mean_velocity_target,
    normalise_tangent,
    rf_to_trig,
    tangent_warmup,
    teacher_step,
    trig_prediction,
    trigflow_direction,
    trigflow_tangent,
    velocity_gap,
)
from lensmini.packed import Layout
from lensmini.paths import interpolate
from lensmini.sampling import Velocity, empirical_mu, euler_step, guide, time_grid

__all__ = ["CONSISTENCY_LOSSES", "discrete_loss", "guided", "meanflow_loss", "rcm_loss"]


def guided(teacher: LensTransformer, batch: Batch, scale: float, *, rescale: bool) -> Velocity:
    """The teacher's guided velocity, conditional and unconditional half in one packed pass, without gradient."""
    layout = batch.layout
    grids = [(h, n // h) for h, n in zip(layout.heights, layout.image_lengths, strict=True)]
    double = Layout.build(grids * 2, text_lengths=[*layout.text_lengths, *[0] * len(grids)])
    double = double.to(batch.text_tokens.device)

    @torch.no_grad()
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        both = teacher.forward_packed(torch.cat([x, x]), torch.cat([t, t]), batch.text_tokens, double)
        cond, uncond = both.chunk(2)  # pyright: ignore
        return guide(cond, uncond, scale, channel_dim=-1, rescale=rescale)

    return velocity if scale != 1 else torch.no_grad()(condition(teacher, batch))


def discrete_loss(state: DistillState, batch: Batch, draws: Draws, config: DistillConfig) -> Losses:
    """Consistency distillation: two predictions, one solver step of the teacher apart, agree (arXiv 2303.01469)."""
    wanted, layout = config.consistency, batch.layout
    num = config.student.num_steps * wanted.substeps
    grid, share = _grid(config, layout, num), _share(batch)
    step = (share * num).long().clamp_max(num - 1)[:, None]
    t, t_next = (grid.gather(1, step + ahead)[:, 0] for ahead in (0, 1))
    end = _ends(t, config, layout)
    noisy = interpolate(batch.image_tokens, draws.real, t, layout=layout)
    teacher = guided(state.teacher.model, batch, wanted.guidance, rescale=wanted.rescale)
    there = teacher_step(teacher, noisy, t, t_next, solver=wanted.solver, layout=layout)
    student = condition(state.student.compute, batch)
    # The map to the end is one Euler step with the student's output: at the clean end, its clean prediction.
    target = teacher_step(student, there, t_next, end, layout=layout)
    prediction = euler_step(noisy, student(noisy, t), t, end, layout=layout)
    loss = consistency_loss(prediction, target, metric=wanted.metric, c=wanted.c, layout=layout)
    return Losses(loss, {"consistency": loss.detach()})


def meanflow_loss(state: DistillState, batch: Batch, draws: Draws, config: DistillConfig) -> Losses:
    """MeanFlow (arXiv 2505.13447) along the guided teacher, with r the end of the student's own step or the clean end.

    The derivative is along the teacher's marginal velocity, not along ``noise - latents``, as in the improved form
    (arXiv 2512.02012). Within a step of the student r does not change, so ``dr/dt = 0`` and one time input is enough.
    """
    wanted, layout = config.consistency, batch.layout
    t = _grid_time(_share(batch), config, layout)
    end = _ends(t, config, layout)
    noisy = interpolate(batch.image_tokens, draws.real, t, layout=layout)
    flow = guided(state.teacher.model, batch, wanted.guidance, rescale=wanted.rescale)(noisy, t)
    value, slope = directional_derivative(
        condition(state.student.compute, batch),
        (noisy, t),
        (flow, torch.ones_like(t)),
        method=wanted.derivative,
        step=wanted.derivative_step,
    )
    warmup = tangent_warmup(state.step, wanted.warmup_steps)
    loss = velocity_gap(value, mean_velocity_target(flow, warmup * slope, t, end, layout=layout), layout=layout)
    known = loss.detach().isfinite()
    weight = adaptive_weight(loss, p=wanted.power, mask=known)
    parts = {"meanflow": loss.detach(), "slope": layout.mean(slope.square()).sqrt()}
    return Losses(torch.where(known, weight * loss, torch.nan), parts)


def rcm_loss(state: DistillState, batch: Batch, draws: Draws, config: DistillConfig) -> Losses:
    """rCM (arXiv 2510.08431): continuous consistency in TrigFlow, and distribution matching on the student's own samples."""
    wanted, layout = config.consistency, batch.layout
    t = _grid_time(_share(batch), config, layout)
    straight = interpolate(batch.image_tokens, draws.real, t, layout=layout)
    flow = guided(state.teacher.model, batch, wanted.guidance, rescale=wanted.rescale)(straight, t)
    noisy, teacher, angle = rf_to_trig(straight, flow, t, layout=layout)
    student = condition(state.student.compute, batch)
    value, slope = directional_derivative(
        lambda x, a: trig_prediction(student, x, a, layout=layout),
        (noisy, angle),
        trigflow_direction(teacher, angle, layout=layout),
        method=wanted.derivative,
        step=wanted.derivative_step,
    )
    warmup = tangent_warmup(state.step, wanted.warmup_steps)
    tangent = trigflow_tangent(value, teacher, noisy, slope, angle, warmup=warmup, variant="rcm", layout=layout)
    known = layout.mean(tangent).isfinite() & layout.mean(value.detach()).isfinite()
    bounded = normalise_tangent(tangent, wanted.tangent_c, wanted.normaliser, mask=known, layout=layout)
    loss = velocity_gap(value, value.detach() + bounded, mask=known, layout=layout)
    parts = {"consistency": loss.detach(), "tangent": layout.mean(tangent.square()).sqrt()}
    total = torch.where(known, loss, torch.nan)
    if wanted.regulariser and state.fake is not None:
        matching = dmd_loss(state, batch, draws, config)
        total, parts = total + wanted.regulariser * matching.total, {**parts, **matching.parts}
    return Losses(total, parts)


CONSISTENCY_LOSSES: dict[str, StudentLoss] = {
    "consistency": discrete_loss,
    "meanflow": meanflow_loss,
    "rcm": rcm_loss,
}
"""By ``config.method``."""


def _share(batch: Batch) -> Tensor:
    """``[b]`` uniform in [0, 1]: independent of the numbers that the walk of distribution matching reads."""
    return torch.special.ndtr(batch.normal)


def _shifts(config: DistillConfig, layout: Layout) -> list[float]:
    mu, num = config.student.mu, config.student.num_steps
    return [empirical_mu(n, num) if mu is None else mu for n in layout.image_lengths]


def _grid(config: DistillConfig, layout: Layout, num_steps: int) -> Tensor:
    """``[b, num_steps + 1]`` with the student's shift, so that it contains the student's grid if it is a multiple."""
    return time_grid(num_steps, _shifts(config, layout), device=layout.grids.device)


def _grid_time(share: Tensor, config: DistillConfig, layout: Layout) -> Tensor:
    """A time as likely in every step of the student: the grid's rule at a place in between; share 0 is noise."""
    mu = torch.tensor(_shifts(config, layout), device=share.device)
    return torch.sigmoid(mu + torch.logit(1 - share)).clamp_min(1e-4)


def _ends(t: Tensor, config: DistillConfig, layout: Layout) -> Tensor:
    """``[b]``: where the student's map leads from t."""
    if config.consistency.ends == "clean":
        return torch.zeros_like(t)
    grid = _grid(config, layout, config.student.num_steps)
    later = grid < t[:, None] - 1e-6
    return torch.where(later, grid, -1.0).max(1).values.clamp_min(0)
