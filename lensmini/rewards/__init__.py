"""Structured rewards: rubrics, verdicts that say when they do not know, and how they become one number by picture."""

from lensmini.rewards.aggregate import Aggregate, Missing, aggregate, criterion_advantages
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
    "ScoreTable",
    "Verdict",
    "aggregate",
    "criterion_advantages",
    "lens_rubric",
    "load_rubrics",
    "read_rubric",
    "save_rubrics",
    "to_matrix",
]
