"""Pure losses: tensors in, one value per sample out. They take callables and tensors, never modules or configs."""

from lensmini.objectives.flow_matching import flow_matching_loss
from lensmini.objectives.policy import (
    clipped_surrogate,
    count_groups,
    decay_ramp,
    group_advantages,
    guarded_log_ratio,
    matching_log_ratio,
    nft_decay,
    nft_loss,
    optimality,
    ram_target,
    velocity_gap,
)
from lensmini.objectives.times import sample_times, training_mu

__all__ = [
    "clipped_surrogate",
    "count_groups",
    "decay_ramp",
    "flow_matching_loss",
    "group_advantages",
    "guarded_log_ratio",
    "matching_log_ratio",
    "nft_decay",
    "nft_loss",
    "optimality",
    "ram_target",
    "sample_times",
    "training_mu",
    "velocity_gap",
]
