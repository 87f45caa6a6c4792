"""Reinforcement learning of flow models: advantages, DiffusionNFT, the GRPO family's surrogate, AWM and RAM.

Everything is a function of tensors with one value per sample; what is old, reference or target is detached inside, and
samples without a valid reward are masked from rewards to loss.
"""

from lensmini.objectives.policy.advantages import GroupCounts, count_groups, group_advantages, optimality
from lensmini.objectives.policy.matching import matching_log_ratio, nft_loss, ram_target, velocity_gap
from lensmini.objectives.policy.ratio import clipped_surrogate, guarded_log_ratio
from lensmini.objectives.policy.schedules import decay_ramp, nft_decay

__all__ = [
    "GroupCounts",
    "clipped_surrogate",
    "count_groups",
    "decay_ramp",
    "group_advantages",
    "guarded_log_ratio",
    "matching_log_ratio",
    "nft_decay",
    "nft_loss",
    "optimality",
    "ram_target",
    "velocity_gap",
]
