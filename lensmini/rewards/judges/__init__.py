"""Judges behind one protocol: questions in, verdicts out, in the same order, never an exception for a single question."""

from lensmini.rewards.judges.cache import VerdictCache
from lensmini.rewards.judges.chat import ChatJudge
from lensmini.rewards.judges.combined import EnsembleJudge, FallbackJudge, ProgramJudge, ScriptedJudge
from lensmini.rewards.judges.parse import parse_answers
from lensmini.rewards.judges.protocol import Judge, JudgeRequest, JudgeUnavailableError, judge_pictures

__all__ = [
    "ChatJudge",
    "EnsembleJudge",
    "FallbackJudge",
    "Judge",
    "JudgeRequest",
    "JudgeUnavailableError",
    "ProgramJudge",
    "ScriptedJudge",
    "VerdictCache",
    "judge_pictures",
    "parse_answers",
]
