"""Structured rewards: rubrics, verdicts that say when they do not know, and how they become one number by picture."""

from lensmini.rewards.aggregate import Aggregate, Missing, aggregate, criterion_advantages
from lensmini.rewards.diagnostics import alarms, control_pictures, describe_step, should_stop, write_page
from lensmini.rewards.model import RubricRewardModel, fit_reward_model
from lensmini.rewards.rubric import (
    STRUCTURAL_INTEGRITY,
    Criterion,
    Rubric,
    lens_rubric,
    load_rubrics,
    read_rubric,
    save_rubrics,
)
from lensmini.rewards.verdicts import CAUSES, ScoreTable, Verdict, to_matrix

__all__ = [
    "CAUSES",
    "STRUCTURAL_INTEGRITY",
    "Aggregate",
    "Criterion",
    "Missing",
    "Rubric",
    "RubricRewardModel",
    "ScoreTable",
    "Verdict",
    "aggregate",
    "alarms",
    "control_pictures",
    "criterion_advantages",
    "describe_step",
    "fit_reward_model",
    "lens_rubric",
    "load_rubrics",
    "read_rubric",
    "save_rubrics",
    "should_stop",
    "to_matrix",
    "write_page",
]
