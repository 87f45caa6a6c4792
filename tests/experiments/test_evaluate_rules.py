"""Laws of the benchmarks' rules: GenEval's for boxes, words of the text benchmarks, resampled prompts."""

import itertools
import math
import statistics
from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from experiments.evaluation.boxes import (
    COLOURS,
    POSITIONS,
    Found,
    box_overlap,
    check_objects,
    keep_confident,
    relations_between,
)
from experiments.evaluation.detectors import PALETTE, pixel_colours
from experiments.evaluation.intervals import stratified_interval
from experiments.evaluation.texts import (
    clean_text,
    match_exact_words,
    match_words,
    oneig_text_score,
    quoted_words,
    split_joined,
    word_similarities,
)
from lensmini.data import sample_scene
from lensmini.data.scenes import BACKGROUNDS, render_scene

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
corners = st.tuples(*[st.integers(0, 60)] * 2, *[st.integers(1, 40)] * 2)
boxes = corners.map(lambda c: (float(c[0]), float(c[1]), float(c[0] + c[2]), float(c[1] + c[3])))
words = st.lists(st.sampled_from(["stay", "calm", "Stay", "no", "no!", "42"]), max_size=7)


def square(x, y, side=10.0):
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


def dogs(*scores, label="dog"):
    return [Found(label, score, square(20.0 * index, 0)) for index, score in enumerate(scores)]


def never(found, name):
    raise AssertionError("no colour was asked for")


class TestRelations:
    @pytest.mark.parametrize(
        ("dx", "dy", "expected"),
        [
            # Squares of 10: an offset of d along one axis leaves d - 2, and (d - 2) / d exceeds a half from 4 on.
            (-4.5, 0, {"left of"}),
            (-4, 0, set()),
            (4.5, 0, {"right of"}),
            (0, -4.5, {"above"}),
            (0, 4.5, {"below"}),
            (1.9, 0, set()),
            (30, 30, {"right of", "below"}),
            (-30, 3, {"left of"}),
            (0, 0, set()),
        ],
    )
    def test_borders_are_where_the_arithmetic_puts_them(self, dx, dy, expected):
        assert relations_between(square(50 + dx, 50 + dy), square(50, 50)) == expected

    def test_sizes_of_both_objects_count_along_their_own_axis(self):
        wide, tall = (0.0, 45.0, 100.0, 55.0), (0.0, 0.0, 10.0, 100.0)
        # Centres 12 apart downwards, heights 10 and 10: 12 - 2 of 12; beside a tall one 12 - 11 of 12.
        assert relations_between((45.0, 57.0, 55.0, 67.0), wide) == {"below"}
        assert relations_between((0.0, 57.0, 10.0, 67.0), tall) == set()

    @given(one=boxes, other=boxes)
    def test_seen_from_the_other_side_everything_is_opposite(self, one, other):
        assert {OPPOSITE[name] for name in relations_between(one, other)} == relations_between(other, one)

    @given(one=boxes, other=boxes, shift=st.integers(-50, 50), scale=st.sampled_from([2, 4, 16]))
    def test_they_do_not_depend_on_where_the_scene_is_or_on_its_size(self, one, other, shift, scale):
        def moved(box):
            return tuple(scale * (value + shift) for value in box)

        assert relations_between(moved(one), moved(other)) == relations_between(one, other)

    @given(one=boxes, other=boxes)
    def test_at_most_one_relation_of_each_axis_holds_and_mirrors_mirror_it(self, one, other):
        found = relations_between(one, other)
        assert not {"left of", "right of"} <= found
        assert not {"above", "below"} <= found
        mirrored = [(-box[2], box[1], -box[0], box[3]) for box in (one, other)]
        swap = {**{name: name for name in POSITIONS}, "left of": "right of", "right of": "left of"}
        assert relations_between(*mirrored) == {swap[name] for name in found}


class TestConfidence:
    def test_the_threshold_itself_is_not_enough_and_the_best_come_first(self):
        kept = keep_confident(dogs(0.31, 0.9, 0.3, 0.5), threshold=0.3)
        assert [one.score for one in kept["dog"]] == [0.9, 0.5, 0.31]
        assert keep_confident(dogs(0.1), threshold=0.3) == {}

    def test_of_a_class_only_the_best_sixteen_count(self):
        found = dogs(*[0.4 + 0.01 * index for index in range(20)]) + dogs(0.35, label="cat")
        kept = keep_confident(found)
        assert len(kept["dog"]) == 16 and min(one.score for one in kept["dog"]) == pytest.approx(0.44)
        assert len(kept["cat"]) == 1

    def test_overlapping_detections_of_one_class_alone_are_merged_if_wanted(self):
        same = (0.0, 0.0, 10.0, 10.0)
        found = [Found("dog", 0.9, same), Found("dog", 0.8, (0.0, 0.0, 10.0, 8.0)), Found("cat", 0.7, same)]
        assert {name: len(kept) for name, kept in keep_confident(found).items()} == {"dog": 2, "cat": 1}
        assert {name: len(kept) for name, kept in keep_confident(found, max_overlap=0.8).items()} == {
            "dog": 1,
            "cat": 1,
        }
        assert {name: len(kept) for name, kept in keep_confident(found, max_overlap=0.81).items()} == {
            "dog": 2,
            "cat": 1,
        }

    @given(one=boxes, other=boxes)
    def test_overlap_is_the_share_of_common_pixels(self, one, other):
        sets = [
            {(x, y) for x in range(int(b[0]), int(b[2])) for y in range(int(b[1]), int(b[3]))} for b in (one, other)
        ]
        assert box_overlap(one, other) == pytest.approx(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))


class TestObjects:
    @pytest.mark.parametrize(("number", "right"), [(2, False), (3, True), (4, False)])
    def test_counting_wants_exactly_the_number(self, number, right):
        wanted = {"include": [{"class": "dog", "count": 3}], "exclude": [{"class": "dog", "count": 4}]}
        assert check_objects({"dog": dogs(*[0.95] * number)}, wanted, never).correct == right

    @given(extra=st.integers(0, 9))
    def test_without_exclusion_more_objects_do_no_harm(self, extra):
        wanted = {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]}
        objects = {"dog": dogs(*[0.9] * (1 + extra)), "cat": dogs(0.5, label="cat"), "car": dogs(0.5, label="car")}
        assert check_objects(objects, wanted, never).correct
        assert not check_objects({"dog": objects["dog"]}, wanted, never).correct

    def test_colours_are_asked_of_the_most_confident_ones_only(self):
        asked = []

        def colours(found, name):
            asked.append((name, [one.score for one in found]))
            return ["blue" if one.score > 0.85 else "red" for one in found]

        objects = keep_confident(dogs(0.6, 0.8, 0.9))
        assert not check_objects(objects, {"include": [{"class": "dog", "count": 1, "color": "red"}]}, colours).correct
        assert not check_objects(objects, {"include": [{"class": "dog", "count": 2, "color": "red"}]}, colours).correct
        assert check_objects(objects, {"include": [{"class": "dog", "count": 1, "color": "blue"}]}, colours).correct
        assert asked == [("dog", [0.9]), ("dog", [0.9, 0.8]), ("dog", [0.9])]

    def test_a_position_is_that_of_the_entry_to_the_one_it_names(self):
        cat, dog = Found("cat", 0.9, square(10, 50)), Found("dog", 0.9, square(90, 50))
        objects = {"cat": [cat], "dog": [dog]}
        right = {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]}
        wrong = {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["right of", 0]}]}
        assert check_objects(objects, right, never).correct
        assert check_objects(objects, wrong, never).reasons == ("expected cat right of dog, found left of",)
        # Every pair has to stand so.
        three = {"include": [{"class": "dog", "count": 2}, right["include"][1]]}
        beside = Found("dog", 0.8, square(0, 50))
        assert not check_objects({"cat": [cat], "dog": [dog, beside]}, three, never).correct

    def test_nothing_stands_anywhere_from_what_is_not_there(self):
        wanted = {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]}
        verdict = check_objects({"cat": dogs(0.9, label="cat")}, wanted, never)
        assert len(verdict.reasons) == 2 and not verdict.correct

    @given(st.lists(st.sampled_from(COLOURS), min_size=1, max_size=4))
    def test_flat_colours_are_named_as_painted(self, names):
        picture = torch.full((3, 16, 16 * len(names)), 119, dtype=torch.uint8)
        found = []
        for index, name in enumerate(names):
            picture[:, 2:14, 16 * index + 2 : 16 * index + 14] = torch.tensor(PALETTE[name]).view(3, 1, 1)
            found.append(Found("dog", 0.9, (16.0 * index, 0.0, 16.0 * index + 16, 16.0)))
        assert pixel_colours(picture)(found, "dog") == names

    def test_boxes_at_and_beyond_the_border_have_a_colour(self):
        picture = torch.zeros(3, 4, 4, dtype=torch.uint8)
        for box in [(-9.0, -9.0, -5.0, -5.0), (3.9, 3.9, 4.0, 4.0), (7.0, 7.0, 9.0, 9.0)]:
            assert pixel_colours(picture)([Found("dog", 0.9, box)], "dog") == ["black"]


class TestScenes:
    """The rules on rendered pictures: a box around what is not background in a cell, the colour from the pixels."""

    @staticmethod
    def detect(scene, side=96):
        picture, half = render_scene(scene, side, side), side // 2
        ground = torch.tensor(BACKGROUNDS[scene.background]).view(3, 1, 1)
        drawn = ((picture.int() - ground).abs() > 40).any(0)
        found = []
        for thing in scene.objects:
            top, left = thing.row * half, thing.col * half
            ys, xs = drawn[top : top + half, left : left + half].nonzero().unbind(1)
            box = (left + xs.min(), top + ys.min(), left + xs.max() + 1, top + ys.max() + 1)
            found.append(Found(thing.shape, 0.95, tuple(map(float, box))))
        return picture, found

    @given(seed=st.integers(0, 10_000))
    def test_counts_colours_and_places_of_a_drawn_scene_hold_and_their_opposites_do_not(self, seed):
        scene = sample_scene(generator=seed)
        picture, found = self.detect(scene)
        objects = keep_confident(found, threshold=0.9)
        shapes = Counter(thing.shape for thing in scene.objects)

        def holds(*include, exclude=()):
            return check_objects(objects, {"include": include, "exclude": exclude}, pixel_colours(picture)).correct

        for shape, count in shapes.items():
            asked = {"class": shape, "count": count}
            assert holds(asked, exclude=[{"class": shape, "count": count + 1}])
            assert not holds({"class": shape, "count": count + 1})
            assert not holds(asked, exclude=[{"class": shape, "count": count}])
        single = [thing for thing in scene.objects if shapes[thing.shape] == 1]
        for thing in single:
            # GenEval has no cyan; the other five are nearest to their own name.
            if thing.colour != "cyan":
                for colour in ("red", "green", "blue", "yellow", "pink", "black", "white"):
                    asked = {"class": thing.shape, "count": 1, "color": colour}
                    assert holds(asked) == (colour == thing.colour)
        for one, other in itertools.permutations(single, 2):
            if one.row == other.row:
                place = "left of" if one.col < other.col else "right of"
            elif one.col == other.col:
                place = "above" if one.row < other.row else "below"
            else:
                continue
            target = {"class": other.shape, "count": 1}
            for position in POSITIONS:
                asked = {"class": one.shape, "count": 1, "position": [position, 0]}
                assert holds(target, asked) == (position == place)


class TestWords:
    @given(wanted=words, read=words, language=st.sampled_from(["en", "zh"]))
    @example(wanted=["no", "no"], read=["no"], language="en")
    def test_matched_words_are_those_that_can_be_crossed_out(self, wanted, read, language):
        goal, text = " ".join(wanted), " ".join(read)
        if language == "en":
            goals, left = ([w.strip("!").lower() for w in part] for part in (wanted, read))
        else:
            goals, left = (list(part.replace(" ", "").replace("!", "")) for part in (goal, text))
        total, found = len(goals), 0
        for word in goals:
            if word in left:
                left.remove(word)
                found += 1
        assert match_words(goal, text, language) == (found, total)

    @pytest.mark.parametrize(
        ("text", "language", "clean"),
        [
            ("Don't\n\tpanic -- 50%", "en", "Dont panic 50"),
            ("caf\xe9 \xc0 \xf1o", "en", "caf\xe9 \xc0 o"),
            ("\u6b22\u8fce Bob\uff0c100\u5206\u3002", "zh", "\u6b22\u8fceBob100\u5206"),
            ("\u6b22\u8fce \u4f60", "en", "\u6b22\u8fce \u4f60"),
        ],
    )
    def test_other_characters_go(self, text, language, clean):
        assert clean_text(text, language) == clean

    def test_oneig_is_its_formula(self):
        # Edit distances 0 and 4; one of two complete; 1 + 1 of 1 + 2 words.
        score = oneig_text_score(["Open", "Shut door"], ["Open", "Shut d"], "en")
        assert score["edit_distance"] == 1.5 and score["completion"] == 0.5
        assert score["word_accuracy"] == pytest.approx(2 / 3)
        assert score["text"] == pytest.approx(1 - 1.5 * 0.5 * (1 / 3) / 100)
        far = oneig_text_score(["a" * 300], ["b"], "en")
        assert far["edit_distance"] == 300 and far["text"] == 0
        assert oneig_text_score(["Open"], ["open"], "en")["completion"] == 0  # case counts
        chinese = oneig_text_score(["\u6b22\u8fce\u4f60"], ["\u4f60 \u6b22\u559c"], "zh")
        assert chinese["word_accuracy"] == pytest.approx(2 / 3)
        assert chinese["text"] == pytest.approx(1 - 3 * (1 / 3) / 50)

    def test_cvtg_takes_its_words_from_single_quotation_marks(self):
        assert quoted_words("On 'Main St' a 'Cafe' and \"no\" don't") == ["main", "st", "cafe"]
        assert quoted_words("nothing here") == []

    @given(wanted=words, read=words)
    def test_cvtg_counts_a_word_as_often_as_it_is_wanted_and_exact_ones_are_wholly_alike(self, wanted, read):
        found = match_exact_words(wanted, read)
        assert found == (sum(any(word == other for other in read) for word in wanted), len(wanted))
        similar = word_similarities(wanted, read)
        assert [value == 1 for value in similar] == [word in read for word in wanted]
        assert all(0 <= value <= 1 for value in similar)

    @given(
        joined=st.lists(
            st.lists(st.sampled_from(["stay", "calm", "no", "non", "on"]), min_size=1, max_size=4), max_size=4
        )
    )
    @example(joined=[["non", "on"], ["no", "no", "on"]])
    def test_joined_words_come_apart_without_a_letter_lost(self, joined):
        vocabulary = {word for words in joined for word in words}
        read = ["".join(words) for words in joined]
        apart = split_joined(read, vocabulary)
        assert "".join(apart) == "".join(read) and set(apart) <= vocabulary
        # The fewest parts: never more than were joined, and what is a word already stays one.
        assert len(apart) <= sum(map(len, joined)) and split_joined(apart, vocabulary) == apart

    def test_words_with_another_letter_stay_as_they_were_read(self):
        read = ["stayscalm", "stay", "staycal", "calmstay", ""]
        assert split_joined(read, ["stay", "calm"]) == ["stayscalm", "stay", "staycal", "calm", "stay", ""]
        assert split_joined(["stay"], []) == ["stay"]
        # Whole words first, then the fewest parts.
        words = ["to", "get", "her", "together", "a", "way", "away"]
        assert split_joined(["together", "togetheraway"], words) == ["together", "together", "away"]

    def test_ned_is_one_minus_edits_by_the_longer_word(self):
        assert word_similarities(["sale", "kitten"], ["sitting", "sa"]) == [0.5, pytest.approx(1 - 3 / 7)]
        assert word_similarities(["sale"], []) == [0.0]


class TestIntervals:
    def test_it_is_the_normal_one_for_many_prompts_and_groups_count_alike(self):
        groups = [[1.0] * 300 + [0.0] * 100, [1.0] * 10 + [0.0] * 90]
        low, high = stratified_interval(groups, seed=0)
        error = math.sqrt(0.75 * 0.25 / 400 + 0.1 * 0.9 / 100) / 2
        assert low == pytest.approx(0.425 - 1.96 * error, abs=0.15 * error)
        assert high == pytest.approx(0.425 + 1.96 * error, abs=0.15 * error)

    @given(st.lists(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=6), min_size=1, max_size=3))
    def test_it_lies_within_what_can_be_drawn(self, groups):
        low, high = stratified_interval(groups, seed=1, resamples=200)
        assert statistics.mean(map(min, groups)) - 1e-12 <= low <= high <= statistics.mean(map(max, groups)) + 1e-12
        assert stratified_interval(groups, seed=1, resamples=200) == (low, high)

    def test_empty_groups_are_refused(self):
        with pytest.raises(ValueError, match="groups: expected at least one prompt in each, got sizes"):
            stratified_interval([[1.0], []], seed=0)
