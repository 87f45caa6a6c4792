"""Laws of verdicts: three states, no number without a score; and the table keeps columns, masks and causes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensmini.rewards import CAUSES, Criterion, Rubric, Verdict, lens_rubric, to_matrix


def scored(name, score):
    return Verdict(criterion_id=name, state="scored", score=score)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"state": "scored"}, r"score of a: expected a number in \[0, 1\], got None"),
        ({"state": "scored", "score": math.nan}, "score of a"),
        ({"state": "scored", "score": 1.01}, "score of a"),
        ({"state": "scored", "score": -0.1}, "score of a"),
        ({"state": "scored", "score": 1.0, "cause": "timeout"}, "cause of a"),
        ({"state": "scored", "score": 1.0, "variance": -1.0}, "variance of a"),
        ({"state": "missing"}, "cause of a"),
        ({"state": "missing", "cause": "tired"}, "cause of a"),
        ({"state": "missing", "cause": "timeout", "score": 0.0}, "score of a: expected None"),
        ({"state": "missing", "cause": "timeout", "variance": 0.0}, "score of a: expected None"),
        ({"state": "not_applicable", "score": 1.0}, "score of a: expected None"),
        ({"state": "not_applicable", "cause": "timeout"}, "cause of a"),
        ({"state": "perhaps"}, "state of a"),
    ],
)
def test_a_state_and_its_number_belong_together(fields, message):
    with pytest.raises(ValueError, match=message):
        Verdict(criterion_id="a", **fields)


@given(st.data())
def test_the_table_is_what_the_verdicts_say_whatever_their_order(data):
    num = data.draw(st.integers(1, 4))
    rubrics, given_verdicts, expected = [], [], []
    for row in range(num):
        names = [f"c{k}" for k in range(data.draw(st.integers(1, 4)))]
        parts = tuple(
            Criterion(
                id=name,
                text="a check",
                weight=1.0 + k,
                polarity=data.draw(st.sampled_from(["positive", "pitfall"])),
                required=data.draw(st.booleans()),
            )
            for k, name in enumerate(names)
        )
        rubrics.append(Rubric(prompt_id=str(row), prompt="prompt", criteria=parts))
        said = []
        for name in names:
            state = data.draw(st.sampled_from(["scored", "missing", "not_applicable"]))
            if state == "scored":
                said.append(scored(name, data.draw(st.sampled_from([0.0, 0.25, 1.0]))))
            else:
                cause = data.draw(st.sampled_from(CAUSES)) if state == "missing" else None
                said.append(Verdict(criterion_id=name, state=state, cause=cause))
        expected.append((parts, said))
        given_verdicts.append(data.draw(st.permutations(said)))
    table = to_matrix(given_verdicts, rubrics)
    width = max(len(parts) for parts, _ in expected)
    assert table.scores.shape == (num, width)
    causes = {}
    for row, (parts, said) in enumerate(expected):
        for column in range(width):
            cell = [value[row, column].item() for value in table[:5]]
            if column >= len(parts) or said[column].state == "not_applicable":
                assert math.isnan(cell[0]) and cell[1:] == [False, 0, False, False]
                continue
            criterion, verdict = parts[column], said[column]
            assert cell[1] == (verdict.score is not None)
            assert cell[0] == verdict.score if verdict.score is not None else math.isnan(cell[0])
            assert cell[2:] == [criterion.weight, criterion.polarity == "pitfall", criterion.required]
            if verdict.cause:
                causes[verdict.cause] = causes.get(verdict.cause, 0) + 1
    assert table.causes == causes


@pytest.mark.parametrize(
    "said",
    [
        [],
        [scored("object_count", 1)],
        [scored("object_count", 1), scored("object_count", 1)],
        [scored("object_count", 1), scored("other", 1)],
        [scored("object_count", 1), scored("structural_integrity", 1), scored("other", 1)],
    ],
)
def test_verdicts_of_another_rubric_are_refused(said):
    rubric = lens_rubric("Two cups.", {"object count": "There are exactly 2."})
    with pytest.raises(ValueError, match=r"verdicts\[0\]: expected one for each"):
        to_matrix([said], [rubric])
    with pytest.raises(ValueError, match="verdicts: expected one sequence"):
        to_matrix([said, said], [rubric])


def test_missing_verdicts_cannot_become_numbers_unnoticed():
    rubric = lens_rubric("Two cups.", {"object count": "There are exactly 2."})
    said = [scored("structural_integrity", 1.0), Verdict(criterion_id="object_count", state="missing", cause="http")]
    table = to_matrix([said], [rubric])
    assert torch.isnan(table.scores.mean())
