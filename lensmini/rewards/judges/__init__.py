"""Judges behind one protocol: questions in, verdicts out, in the same order, never an exception for a single question."""

from lensmini.rewards.judges.cache import VerdictCache
from lensmini.rewards.judges.chat import ChatJudge
from lensmini.rewards.judges.combined import EnsembleJudge, FallbackJudge, ProgramJudge, ScriptedJudge
from lensmini.rewards.judges.injection import GuardedJudge, find_injection
from lensmini.rewards.judges.lettering import edit_distance, find_lettering, quoted_strings, similarity
from lensmini.rewards.judges.local import LocalJudge, expected_score
from lensmini.rewards.judges.parse import parse_answers
from lensmini.rewards.judges.programs import (
    FoundText,
    ReadText,
    ocr_judge,
    once_per_picture,
    question_judge,
    rapid_reader,
)
from lensmini.rewards.judges.protocol import Judge, JudgeRequest, JudgeUnavailableError, judge_pictures
from lensmini.rewards.judges.red_team import InjectionGap, RedTeamPicture, injection_gap, red_team_pictures
from lensmini.rewards.judges.repeats import Repeated, nearest_in_group, repeat_near_ties

__all__ = [
    "ChatJudge",
    "EnsembleJudge",
    "FallbackJudge",
    "FoundText",
    "GuardedJudge",
    "InjectionGap",
    "Judge",
    "JudgeRequest",
    "JudgeUnavailableError",
    "LocalJudge",
    "ProgramJudge",
    "ReadText",
    "RedTeamPicture",
    "Repeated",
    "ScriptedJudge",
    "VerdictCache",
    "edit_distance",
    "expected_score",
    "find_injection",
    "find_lettering",
    "injection_gap",
    "judge_pictures",
    "nearest_in_group",
    "ocr_judge",
    "once_per_picture",
    "parse_answers",
    "question_judge",
    "quoted_strings",
    "rapid_reader",
    "red_team_pictures",
    "repeat_near_ties",
    "similarity",
]
