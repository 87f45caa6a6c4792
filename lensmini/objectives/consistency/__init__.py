"""Consistency models and flow maps: discrete and continuous distillation, MeanFlow, TrigFlow, and their derivatives.

A consistency model carries the velocity network's own parametrisation, ``f(x, t) = x - t F(x, t)``
(:func:`lensmini.paths.clean_prediction`), so a teacher is also a student's start. Targets and tangents are detached
inside; everything is a function of tensors with one value per sample.
"""

from lensmini.objectives.consistency.derivative import DerivativeError, check_derivative, directional_derivative
from lensmini.objectives.consistency.discrete import consistency_loss, consistency_target, teacher_step
from lensmini.objectives.consistency.flow_maps import adaptive_weight, mean_velocity_loss, mean_velocity_target
from lensmini.objectives.consistency.gaps import curriculum_steps, sample_time_pairs, shrinking_gap
from lensmini.objectives.consistency.tangents import (
    normalise_tangent,
    tangent_warmup,
    trigflow_direction,
    trigflow_tangent,
)
from lensmini.objectives.consistency.trigflow import rf_to_trig, trig_prediction, trig_to_rf

__all__ = [
    "DerivativeError",
    "adaptive_weight",
    "check_derivative",
    "consistency_loss",
    "consistency_target",
    "curriculum_steps",
    "directional_derivative",
    "mean_velocity_loss",
    "mean_velocity_target",
    "normalise_tangent",
    "rf_to_trig",
    "sample_time_pairs",
    "shrinking_gap",
    "tangent_warmup",
    "teacher_step",
    "trig_prediction",
    "trig_to_rf",
    "trigflow_direction",
    "trigflow_tangent",
]
