"""Prompts for reinforcement learning with rubrics: a taxonomy of things, meta-prompts, answers read with care."""

from lensmini.data.prompts.build import BuildReport, PromptRecord, build_prompts, coverage_table, load_prompts
from lensmini.data.prompts.meta_prompts import (
    DIMENSIONS,
    GLOBAL_RUBRIC,
    RUBRIC_NAMES,
    draw_dimensions,
    prompt_request,
    rubric_request,
)
from lensmini.data.prompts.parse import ANSWER_CAUSES, parse_items, parse_prompts, parse_rubrics
from lensmini.data.prompts.taxonomy import CATEGORIES, Item, Taxonomy, extend_taxonomy, load_taxonomy, save_taxonomy

__all__ = [
    "ANSWER_CAUSES",
    "CATEGORIES",
    "DIMENSIONS",
    "GLOBAL_RUBRIC",
    "RUBRIC_NAMES",
    "BuildReport",
    "Item",
    "PromptRecord",
    "Taxonomy",
    "build_prompts",
    "coverage_table",
    "draw_dimensions",
    "extend_taxonomy",
    "load_prompts",
    "load_taxonomy",
    "parse_items",
    "parse_prompts",
    "parse_rubrics",
    "prompt_request",
    "rubric_request",
    "save_taxonomy",
]
