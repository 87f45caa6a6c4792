"""The reasoner in front of the image model, and the search for its system prompt (arXiv 2605.21573)."""

from lensmini.prompting.answers import ANSWER_CAUSES, Answer, read_answer
from lensmini.prompting.compare import Comparison, bootstrap_interval, compare_paired
from lensmini.prompting.intent import INTENT_KINDS, IntentReport, check_intent
from lensmini.prompting.local import LocalChat, attach_head
from lensmini.prompting.proposer import ChatProposer
from lensmini.prompting.reasoner import REWRITE_CAUSES, ChatModel, Rewrite, Rewriter, as_data
from lensmini.prompting.search import search_pareto_front, search_system_prompt
from lensmini.prompting.search_budget import Budget
from lensmini.prompting.search_report import SearchResult
from lensmini.prompting.search_steps import Candidate, Evaluation, Proposal, ProposalRequest
from lensmini.prompting.system_prompts import COMPOSITIONAL, DESIGN, GENERAL, LONG_TEXT, SystemPrompt

__all__ = [
    "ANSWER_CAUSES",
    "COMPOSITIONAL",
    "DESIGN",
    "GENERAL",
    "INTENT_KINDS",
    "LONG_TEXT",
    "REWRITE_CAUSES",
    "Answer",
    "Budget",
    "Candidate",
    "ChatModel",
    "ChatProposer",
    "Comparison",
    "Evaluation",
    "IntentReport",
    "LocalChat",
    "Proposal",
    "ProposalRequest",
    "Rewrite",
    "Rewriter",
    "SearchResult",
    "SystemPrompt",
    "as_data",
    "attach_head",
    "bootstrap_interval",
    "check_intent",
    "compare_paired",
    "read_answer",
    "search_pareto_front",
    "search_system_prompt",
]
