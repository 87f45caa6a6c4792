"""A learned rubric reward: a calibrated head on frozen vision-language features, differentiable in the pixels."""

from lensmini.rewards.model.comparison import Answers, Scorecard
from lensmini.rewards.model.features import FrozenFeatures, clip_features, weights_digest
from lensmini.rewards.model.files import load_reward_model, save_reward_model
from lensmini.rewards.model.fit import RewardFit, answer_loss, compare_reward_model, fit_reward_model, spread_levels
from lensmini.rewards.model.head import RewardHead, RewardModelConfig
from lensmini.rewards.model.judge import RewardModelJudge
from lensmini.rewards.model.judged import Judged
from lensmini.rewards.model.metrics import (
    BrierParts,
    Platt,
    accuracy,
    brier_decomposition,
    brier_score,
    expected_calibration_error,
    fit_platt,
    fit_temperature,
)
from lensmini.rewards.model.predictor import Prediction, RubricRewardModel

__all__ = [
    "Answers",
    "BrierParts",
    "FrozenFeatures",
    "Judged",
    "Platt",
    "Prediction",
    "RewardFit",
    "RewardHead",
    "RewardModelConfig",
    "RewardModelJudge",
    "RubricRewardModel",
    "Scorecard",
    "accuracy",
    "answer_loss",
    "brier_decomposition",
    "brier_score",
    "clip_features",
    "compare_reward_model",
    "expected_calibration_error",
    "fit_platt",
    "fit_reward_model",
    "fit_temperature",
    "load_reward_model",
    "save_reward_model",
    "spread_levels",
    "weights_digest",
]
