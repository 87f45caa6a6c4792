"""The page about rewards says what is so: its code runs, and it names every judge, cause and rule there is."""

import re
from pathlib import Path
from typing import get_args

import pytest

from lensmini.rewards import CAUSES, Missing
from lensmini.rewards import judges as package

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"
OTHERS = ("Diagnostics", "The learned reward model")
"""Sections that are not about judges, with tests of their own."""


def sections():
    """By title, the page's first part included."""
    parts = re.split(r"^#{1,2} (.+)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return {title: body for title, body in zip(parts[::2], parts[1::2], strict=True) if title not in OTHERS}


def test_the_code_of_the_page_runs_from_top_to_bottom(capsys):
    pytest.importorskip("openai")
    blocks = re.findall(r"^```python\n(.*?)^```", "".join(sections().values()), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    names = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
    printed = capsys.readouterr().out.split("\n")
    assert printed[0].endswith("0.0 0.0 0.0"), "a judge that looks at brightness is not talked round"


def test_the_page_names_all_there_is():
    text = "".join(sections().values())
    named = {name for name in package.__all__ if name.endswith("Judge") and name != "Judge"}
    for name in (*named, *CAUSES, *get_args(Missing), "repeat_near_ties", "injection_gap", "red_team_pictures"):
        assert f"`{name}" in text, name
