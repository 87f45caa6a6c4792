"""Laws of the prompt suite: prompts, their scenes and questions agree; truth scores one, the wrong prompt about zero."""

import math
from collections import Counter

import pytest
import torch

from lensmini.data import (
    KINDS,
    SCENE_VOCABULARY,
    WITHHELD_PAIRS,
    build_scene_prompts,
    chance_score,
    render_scene,
    sample_scene,
    score_images,
)
from lensmini.data.scene_captions import PLURALS, place_name
from tests.data.test_scene_captions import parse_dense


def pictures(prompts, height=32, width=32):
    return [render_scene(prompt.scene, height, width) for prompt in prompts]


@pytest.mark.parametrize("form", ["dense", "short"])
@pytest.mark.parametrize("pairs", ["seen", "withheld", "all"])
@pytest.mark.parametrize("grid", [2, 3])
def test_the_prompts_own_scene_scores_one(form, pairs, grid):
    prompts = build_scene_prompts(8, 5, form=form, pairs=pairs, grid=grid, ask_size=True)
    score = score_images(pictures(prompts, 48, 72), prompts)
    assert (score.strict, score.atom, score.loose, score.strict_error) == (1.0, 1.0, 1.0, 0.0)
    assert {kind: found.num for kind, found in score.by_kind.items()} == dict.fromkeys(KINDS, 8)


def test_both_forms_hold_the_same_requests():
    dense, short = (build_scene_prompts(10, 1, form=form) for form in ("dense", "short"))
    assert [p.scene for p in dense] == [p.scene for p in short]
    assert [p.questions for p in dense] == [p.questions for p in short]
    assert [p.kind for p in dense] == list(KINDS) * 10
    assert len({p.text for p in dense}) > 55
    assert {word for p in (*dense, *short) for word in p.text.split()} <= set(SCENE_VOCABULARY)


def test_a_prompt_depends_on_its_seed_kind_and_number_only():
    few, many = build_scene_prompts(2, 4), build_scene_prompts(5, 4)
    assert many[: len(few)] == few
    assert build_scene_prompts(2, 4, kinds=["count"]) == [p for p in few if p.kind == "count"]
    assert build_scene_prompts(2, 5) != few


def test_the_dense_form_is_a_true_caption_of_the_scene():
    for prompt in build_scene_prompts(25, 2):
        number, background, objects, relations = parse_dense(prompt.text, 2)
        things = prompt.scene.objects
        assert (number, background) == (len(things), prompt.scene.background)
        assert sorted(objects) == sorted((t.colour, t.shape, t.size, t.cell) for t in things)
        if prompt.kind == "relation":
            plain = {"over": "above", "under": "below"}
            asked = prompt.questions[-1]
            told = [(one, plain.get(relation, relation), other) for one, relation, other in relations]
            assert told == [(things[0].pair, asked.relation, things[1].pair)]


def test_the_short_form_asks_for_what_the_questions_check():
    numbers = {2: "two", 3: "three", 4: "four"}
    for prompt in build_scene_prompts(40, 3, form="short"):
        things, asked = prompt.scene.objects, [str(question) for question in prompt.questions]
        names = [f"{thing.colour} {thing.shape}" for thing in things]
        places = [f"{thing.colour} {thing.shape} in row {thing.row}, column {thing.col}" for thing in things]
        first = f"exactly {len(things)} x object"
        where = [place_name(thing.cell, 2) for thing in things]
        counts = [f"exactly 1 x {name}" for name in names]
        if prompt.kind in ("single", "two"):
            assert prompt.text == " and ".join(f"a {name}" for name in names)
            assert asked == [first, *counts] and len(things) == (1 if prompt.kind == "single" else 2)
        elif prompt.kind == "count":
            assert prompt.text == f"{numbers[len(things)]} {things[0].colour} {PLURALS[things[0].shape]}"
            assert asked == [first, f"exactly {len(things)} x {names[0]}"] and len(set(names)) == 1
        elif prompt.kind == "position":
            assert prompt.text == f"a {names[0]} at the {where[0]}"
            assert asked == [first, *places] and len(things) == 1
        elif prompt.kind == "relation":
            relation = prompt.questions[-1].relation
            assert prompt.text == f"a {names[0]} {relation} a {names[1]}"
            assert asked == [first, *counts, f"{names[0]} {relation} {names[1]}"] and len(things) == 2
        else:
            assert asked == [first, f"{prompt.scene.background} background", *places] and len(things) >= 2
            assert prompt.text.endswith(f"on a {prompt.scene.background} background")
            assert all(f"a {name} at the {place}" in prompt.text for name, place in zip(names, where, strict=True))


def test_requests_stay_inside_their_pairs():
    seen = {t.pair for p in build_scene_prompts(60, 0) for t in p.scene.objects}
    assert seen.isdisjoint(WITHHELD_PAIRS) and len(seen) == 21
    withheld = build_scene_prompts(20, 0, pairs="withheld")
    assert {p.scene.objects[0].pair for p in withheld} == WITHHELD_PAIRS
    assert Counter(len(p.scene.objects) for p in build_scene_prompts(90, 0, kinds=["count"])).keys() == {2, 3, 4}


def test_chance_is_about_one_in_a_hundred():
    prompts = build_scene_prompts(100, 0)
    wrong = chance_score(prompts)
    assert 0.002 <= wrong.strict <= 0.03
    assert wrong.strict <= wrong.loose <= 0.15
    random = [render_scene(sample_scene(generator=seed), 32, 32) for seed in range(len(prompts))]
    assert 0.0 < score_images(random, prompts).strict <= 0.03
    # A single object of one of 21 pairs: coincidence of pair alone.
    assert wrong.by_kind["single"].strict == pytest.approx(1 / 21, abs=3 * math.sqrt(1 / 21 / 100))


def test_chance_judges_each_picture_by_another_prompt_of_its_kind():
    prompts = build_scene_prompts(6, 8)
    given = pictures(prompts)
    wrong = chance_score(prompts, images=given)
    assert wrong == chance_score(prompts)
    for kind in KINDS:
        members = [index for index, prompt in enumerate(prompts) if prompt.kind == kind]
        following = [*members[1:], members[0]]
        expected = score_images([given[i] for i in following], [prompts[i] for i in members])
        assert wrong.by_kind[kind] == expected.by_kind[kind]


def test_the_mean_is_over_kinds_and_the_error_is_the_binomials():
    prompts = build_scene_prompts(8, 0, kinds=["single"]) + build_scene_prompts(2, 0, kinds=["two"])
    images = pictures(prompts)
    for index in (0, 1):
        images[index] = torch.zeros(3, 32, 32)
    score = score_images(images, prompts)
    assert (score.by_kind["single"].strict, score.by_kind["two"].strict) == (0.75, 1.0)
    assert score.strict == score.loose == 0.875
    assert score.strict_error == pytest.approx(math.sqrt(0.75 * 0.25 / 8) / 2)
    assert [report.strict for report in score.reports] == [False, False, *[True] * 8]


def test_images_may_be_a_batch_or_of_many_sizes():
    prompts = build_scene_prompts(2, 0)
    mixed = [
        image
        for p, size in zip(prompts, [(32, 32), (24, 40), (48, 24)] * 4, strict=True)
        for image in pictures([p], *size)
    ]
    assert score_images(mixed, prompts).strict == 1.0
    assert score_images(torch.stack(pictures(prompts)), prompts).strict == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_scene_prompts(0, 0), "num_per_kind"),
        (lambda: build_scene_prompts(1, 0, form="long"), "form"),
        (lambda: build_scene_prompts(1, 0, kinds=["three"]), "kinds"),
        (lambda: build_scene_prompts(1, 0, grid=5), "grid"),
        (lambda: build_scene_prompts(1, 0, pairs="none"), "pairs"),
        (lambda: score_images([], []), "at least one"),
        (lambda: score_images([torch.zeros(3, 32, 32)], build_scene_prompts(1, 0)), "each of 6 prompts"),
        (lambda: chance_score(build_scene_prompts(1, 0)), "at least two of each kind"),
        (lambda: chance_score(build_scene_prompts(2, 0), images=[]), "each of 12 prompts"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
