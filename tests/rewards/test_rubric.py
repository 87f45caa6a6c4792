"""Laws of rubrics: checked when made, read back unchanged, hashed by content, refused rather than repaired."""

import json
import math
import os
from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lensmini.data.prompts import GLOBAL_RUBRIC, load_prompts
from lensmini.data.prompts.build import PromptRecord
from lensmini.rewards import (
    STRUCTURAL_INTEGRITY,
    Criterion,
    Rubric,
    lens_rubric,
    load_rubrics,
    read_rubric,
    save_rubrics,
)

TEXTS = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=60).filter(str.strip)


@st.composite
def criteria(draw, name):
    scale = draw(st.sampled_from(["binary", "levels", "real"]))
    return Criterion(
        id=name,
        text="check: " + draw(TEXTS),
        category=draw(st.sampled_from(["count", "text"])),
        weight=draw(st.floats(0.01, 10)),
        scale=scale,
        levels=draw(st.integers(2, 9)),
        low=draw(st.floats(-5, 0)),
        high=draw(st.floats(1, 5)),
        polarity=draw(st.sampled_from(["positive", "pitfall"])),
        kind=draw(st.sampled_from(["judge", "program"])),
        required=draw(st.booleans()),
        needs=draw(st.sampled_from(["image", "image_and_prompt"])),
    )


@st.composite
def rubrics(draw):
    names = draw(st.lists(st.from_regex(r"[A-Za-z0-9_\-]{1,12}", fullmatch=True), min_size=1, max_size=5, unique=True))
    both = [draw(criteria(name)) for name in names]
    split = draw(st.integers(0, len(both)))
    return Rubric(
        prompt_id=draw(TEXTS),
        prompt="a prompt of its own: " + draw(TEXTS),
        criteria=tuple(both[:split]),
        global_criteria=tuple(both[split:]),
        generator=draw(st.text(max_size=10)),
    )


@given(rubrics())
def test_a_rubric_is_read_back_as_it_was(rubric):
    again = read_rubric(rubric.to_json())
    assert again == rubric and again.hash == rubric.hash
    assert [c.hash for c in again.all_criteria] == [c.hash for c in rubric.all_criteria]
    assert read_rubric(rubric.to_json().encode()) == rubric


@given(rubrics(), st.data())
def test_the_hash_follows_every_field(rubric, data):
    criterion = data.draw(st.sampled_from(rubric.all_criteria))
    changes = {
        "text": criterion.text + "!",
        "weight": criterion.weight + 1,
        "polarity": "pitfall" if criterion.polarity == "positive" else "positive",
        "required": not criterion.required,
    }
    name = data.draw(st.sampled_from(sorted(changes)))
    assert replace(criterion, **{name: changes[name]}).hash != criterion.hash
    assert replace(rubric, prompt=rubric.prompt + ".").hash != rubric.hash


class TestAnswers:
    @given(st.integers(2, 9), st.integers(-2, 12))
    def test_levels_are_spread_over_the_unit(self, levels, answer):
        criterion = Criterion(id="a", text="b", scale="levels", levels=levels)
        if 1 <= answer <= levels:
            assert criterion.normalise(answer) == (answer - 1) / (levels - 1)
        else:
            with pytest.raises(ValueError, match="answer to a: expected levels"):
                criterion.normalise(answer)

    @pytest.mark.parametrize("answer", [0.5, 2, -1, math.nan, math.inf, -math.inf, 1e300])
    def test_what_is_not_on_the_scale_is_not_clamped(self, answer):
        with pytest.raises(ValueError, match="answer to a: expected binary"):
            Criterion(id="a", text="b").normalise(answer)

    def test_real_numbers_and_binary_ones(self):
        real = Criterion(id="a", text="b", scale="real", low=-1, high=3)
        assert [real.normalise(x) for x in (-1, 0, 3)] == [0, 0.25, 1]
        assert [Criterion(id="a", text="b").normalise(x) for x in (0, 1, True)] == [0, 1, 1]


class TestLensForm:
    CHECKS = MappingProxyType(
        {"object count": "Exactly three boats.", "object count 2": "No other ship.", "colour accuracy": "All are red."}
    )

    def test_names_become_ids_and_categories_and_the_global_one_comes_last(self):
        rubric = lens_rubric("Three red boats at sea.", self.CHECKS)
        assert [c.id for c in rubric.all_criteria] == [
            "object_count",
            "object_count_2",
            "colour_accuracy",
            "structural_integrity",
        ]
        assert [c.category for c in rubric.criteria] == ["object count", "object count", "colour accuracy"]
        assert all(c.scale == "binary" and c.weight == 1 and not c.required for c in rubric.all_criteria)

    def test_prompt_records_are_taken_as_they_are(self, tmp_path):
        record = PromptRecord("Food", "Breads", "bagel", ("counting",), "Three bagels on a plate.", dict(self.CHECKS))
        rubric = lens_rubric(record.prompt, record.rubrics)
        assert rubric.prompt_id == record.id
        assert STRUCTURAL_INTEGRITY.text == GLOBAL_RUBRIC[1], "one text in both places"
        assert callable(load_prompts)

    @pytest.mark.parametrize(
        ("checks", "message"),
        [
            ({}, "checks: expected 1 to 10, got 0"),
            ({f"check {i}": f"thing {i}" for i in range(11)}, "checks: expected 1 to 10, got 11"),
            ({"a": ""}, "text: expected 1 to 600"),
            ({"a": "x" * 601}, "text: expected 1 to 600"),
            ({"a": 3}, "checks: expected texts"),
            ({"!!!": "text"}, "id: expected"),
            ({"object count": "one", "Object Count": "two"}, "expected unique ids"),
            ({"structural integrity": "one"}, "expected unique ids"),
            ({"a": "Two cups on a table, please!"}, "only repeats the prompt"),
            ({"a": "is this: two CUPS on a table?"}, "only repeats the prompt"),
            ({"a": "bell \x07"}, "control characters"),
        ],
    )
    def test_what_is_wrong_is_refused(self, checks, message):
        with pytest.raises(ValueError, match=message):
            lens_rubric("Two cups on a table", checks)


class TestRefusals:
    GOOD = lens_rubric("Two cups.", {"object count": "There are exactly 2."}).to_json()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda r: r.pop("prompt"), "prompt: Field required"),
            (lambda r: r.update(extra=1), "extra"),
            (lambda r: r.update(schema_version=2), "schema_version: expected 1, got 2"),
            (lambda r: r.update(prompt=3), "prompt: Input should be a valid string"),
            (lambda r: r.update(criteria=[], global_criteria=[]), "expected 1 to 32, got 0"),
            (lambda r: r["criteria"][0].update(weight="1"), "weight"),
            (lambda r: r["criteria"][0].update(weight=-1), "weight of object_count: expected a finite"),
            (lambda r: r["criteria"][0].update(scale="stars"), "scale"),
            (lambda r: r["criteria"][0].update(scale="levels", levels=1), "levels of object_count"),
            (lambda r: r["criteria"][0].update(scale="real", low=1.0, high=1.0), "low and high"),
            (lambda r: r["criteria"][0].update(id="a b"), "id: expected"),
            (lambda r: r["criteria"][0].update(surprise=True), "surprise"),
            (
                lambda r: [c.update(weight=0.0) for c in r["criteria"] + r["global_criteria"]],
                "at least one weight above 0",
            ),
        ],
    )
    def test_every_field_is_checked(self, change, message):
        value = json.loads(self.GOOD)
        change(value)
        with pytest.raises(ValueError, match=message):
            read_rubric(json.dumps(value))

    @given(st.text(max_size=80))
    def test_text_that_is_no_rubric_is_a_value_error(self, text):
        with pytest.raises(ValueError, match="rubric"):
            read_rubric(text)

    @given(st.integers(0, 400))
    def test_half_a_rubric_is_none(self, length):
        if length < len(self.GOOD):
            with pytest.raises(ValueError, match="rubric"):
                read_rubric(self.GOOD[:length])

    def test_not_a_number_is_not_a_weight(self):
        with pytest.raises(ValueError, match=r"rubric|weight"):
            read_rubric(self.GOOD.replace('"weight":1.0', '"weight":NaN'))


class TestFiles:
    def test_files_are_whole_and_checked_line_by_line(self, tmp_path):
        path = tmp_path / "rubrics.jsonl"
        kept = [lens_rubric(f"{n} cups.", {"object count": "As many as were asked for."}) for n in range(3)]
        save_rubrics(path, kept)
        assert load_rubrics(path) == kept
        assert os.stat(path).st_mode & 0o777 == 0o666 & ~_umask()
        path.write_text(path.read_text() + '{"prompt_id": "x"}\n')
        with pytest.raises(ValueError, match="line 4: rubric: prompt: Field required"):
            load_rubrics(path)

    def test_a_prompt_has_one_rubric(self, tmp_path):
        path = tmp_path / "rubrics.jsonl"
        one = lens_rubric("Two cups.", {"object count": "As many as were asked for."})
        with pytest.raises(ValueError, match="twice"):
            save_rubrics(path, [one, one])
        assert list(tmp_path.iterdir()) == []
        path.write_text((one.to_json() + "\n") * 2)
        with pytest.raises(ValueError, match="twice"):
            load_rubrics(path)


def _umask():
    current = os.umask(0)
    os.umask(current)
    return current
