"""Is the reward still worth climbing? Numbers about verdicts, judges and the policy, alarms over a run, and a page."""

from lensmini.rewards.diagnostics.agreement import judge_agreement, reward_agreement
from lensmini.rewards.diagnostics.alarms import alarms, read_series, should_stop
from lensmini.rewards.diagnostics.bias import length_bias, resolution_bias, within_group_trend
from lensmini.rewards.diagnostics.controls import ControlPicture, control_pictures, describe_controls, text_picture
from lensmini.rewards.diagnostics.criteria import (
    correlate_criteria,
    describe_coverage,
    describe_criteria,
    read_table,
)
from lensmini.rewards.diagnostics.estimates import wilson_interval
from lensmini.rewards.diagnostics.health import group_diversity, velocity_norm_ratio
from lensmini.rewards.diagnostics.page import write_page
from lensmini.rewards.diagnostics.reliability import (
    disagreement_of_flips,
    flip_rate,
    flip_reliability,
    flips_of_disagreement,
    judge_reliability,
    reward_std,
    verdict_noise,
)
from lensmini.rewards.diagnostics.step import describe_groups, describe_step, reward_histogram

__all__ = [
    "ControlPicture",
    "alarms",
    "control_pictures",
    "correlate_criteria",
    "describe_controls",
    "describe_coverage",
    "describe_criteria",
    "describe_groups",
    "describe_step",
    "disagreement_of_flips",
    "flip_rate",
    "flip_reliability",
    "flips_of_disagreement",
    "group_diversity",
    "judge_agreement",
    "judge_reliability",
    "length_bias",
    "read_series",
    "read_table",
    "resolution_bias",
    "reward_agreement",
    "reward_histogram",
    "reward_std",
    "should_stop",
    "text_picture",
    "velocity_norm_ratio",
    "verdict_noise",
    "wilson_interval",
    "within_group_trend",
    "write_page",
]
