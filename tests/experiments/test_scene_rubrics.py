"""Rubrics of the miniature world: what each sentence asks, and two judges that agree on pictures that both can read."""

from dataclasses import replace

import pytest
import torch

from experiments.miniature.rubrics import (
    answer_sentence,
    held_out_judge,
    naive_rubric,
    request_rubric,
    scene_judge,
    scene_rubric,
)
from lensmini.data import (
    BACKGROUNDS,
    COLOURS,
    MINIATURE_CANVASES,
    SHAPES,
    Scene,
    SceneObject,
    SceneReading,
    build_scene_prompts,
    render_scene,
    verify_scene,
)
from lensmini.rewards import aggregate, to_matrix
from lensmini.rewards.judges import judge_pictures

PROMPTS = build_scene_prompts(12, 5, pairs="all")
JUDGES = {"verifier": scene_judge(), "templates": held_out_judge()}


def rewards(judge, images, rubrics):
    table = to_matrix(judge_pictures(judge, images, rubrics), rubrics)
    assert not table.causes
    return aggregate(table.scores, table.valid, table.weights, missing="raise").values


@pytest.mark.parametrize("name", JUDGES)
def test_the_scene_itself_meets_all_criteria_on_every_canvas(name):
    canvases = [MINIATURE_CANVASES[number % 5] for number in range(len(PROMPTS))]
    images = [render_scene(prompt.scene, *canvas) for prompt, canvas in zip(PROMPTS, canvases, strict=True)]
    for make in (scene_rubric, naive_rubric):
        torch.testing.assert_close(rewards(JUDGES[name], images, [make(p) for p in PROMPTS]), torch.ones(len(PROMPTS)))


def test_a_rubric_has_six_criteria_and_one_for_each_object_besides_the_global_one():
    for prompt in PROMPTS:
        rubric = scene_rubric(prompt)
        assert len(rubric.criteria) == 6 + len(prompt.scene.objects) <= 10
        assert [criterion.id for criterion in rubric.global_criteria] == ["whole_shapes"]


def test_a_requests_criteria_are_its_questions_one_by_one():
    """Against the verifier itself, on pictures of all kinds of other prompts."""
    asked = build_scene_prompts(4, 11, form="short", pairs="all")
    pictures = [render_scene(prompt.scene, 32, 32) for prompt in build_scene_prompts(8, 12, pairs="all")]
    pictures += [render_scene(prompt.scene, 32, 32) for prompt in asked]
    seen = set()
    for prompt in asked:
        rubric = request_rubric(prompt)
        assert len(rubric.criteria) == len(prompt.questions)
        for picture, said in zip(
            pictures, judge_pictures(scene_judge(), pictures, [rubric] * len(pictures)), strict=True
        ):
            scores = {verdict.criterion_id: verdict.score for verdict in said}
            right = verify_scene(picture, prompt.questions).answers
            assert [scores[f"question_{number}"] for number in range(len(right))] == [float(one) for one in right]
            seen |= {(type(q).__name__, one) for q, one in zip(prompt.questions, right, strict=True)}
    assert len(seen) == 8  # every sort of question was answered both ways


def test_an_extra_object_costs_a_requests_rubric_but_not_the_careless_one():
    for prompt in build_scene_prompts(4, 2, form="short", kinds=["single", "two", "relation"]):
        free = next(c for c in ((0, 0), (0, 1), (1, 0), (1, 1)) if c not in {t.cell for t in prompt.scene.objects})
        colour = next(c for c in COLOURS if c not in {t.colour for t in prompt.scene.objects})
        more = replace(prompt.scene, objects=(*prompt.scene.objects, SceneObject("square", colour, "large", *free)))
        pictures = [render_scene(prompt.scene, 32, 32), render_scene(more, 32, 32)]
        assert rewards(scene_judge(), pictures, [naive_rubric(prompt, placed=False)] * 2).tolist() == [1.0, 1.0]
        precise = rewards(scene_judge(), pictures, [request_rubric(prompt)] * 2).tolist()
        assert precise[0] == 1.0 > precise[1]


@pytest.mark.parametrize("name", JUDGES)
def test_each_mistake_fails_the_criteria_that_ask_for_it(name):
    thing = SceneObject("circle", "red", "large", 0, 0)
    scene = Scene("white", (thing, SceneObject("square", "blue", "large", 1, 1)))
    rubric = scene_rubric(replace(PROMPTS[0], scene=scene))

    def failed(changed):
        said = judge_pictures(JUDGES[name], [render_scene(changed, 32, 32)], [rubric])[0]
        return {verdict.criterion_id for verdict in said if verdict.score == 0}

    def with_first(**changes):
        return replace(scene, objects=(replace(thing, **changes), scene.objects[1]))

    assert failed(with_first(colour="green")) == {"colour_top_left"}
    assert failed(with_first(shape="cross")) == {"shape_top_left"}
    assert failed(with_first(col=1)) == {"colour_top_left", "shape_top_left", "free_top_right"}
    assert failed(replace(scene, background="black")) == {"background"}
    extra = SceneObject("cross", "pink", "large", 0, 1)
    assert failed(replace(scene, objects=(*scene.objects, extra))) == {"free_top_right", "number"}
    assert failed(replace(scene, objects=(thing,))) == {"colour_bottom_right", "shape_bottom_right", "number"}


def test_painting_everything_full_pays_under_the_careless_reward_only():
    prompts = [p for p in PROMPTS if len(p.scene.objects) == 1]
    full = []
    for prompt in prompts:
        one = prompt.scene.objects[0]
        rest = [
            SceneObject("square", c, "large", r, k)
            for c, (r, k) in zip(COLOURS, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=False)
        ]
        things = (one, *(other for other in rest if other.cell != one.cell))
        full.append(render_scene(Scene("black", things), 32, 32))
    assert rewards(JUDGES["verifier"], full, [naive_rubric(p) for p in prompts]).min() == 1.0
    assert rewards(JUDGES["verifier"], full, [scene_rubric(p) for p in prompts]).max() < 0.6


@pytest.mark.parametrize("name", JUDGES)
def test_a_uniform_picture_meets_nothing_but_free_cells_and_its_background(name):
    rubric = scene_rubric(PROMPTS[0])
    colour = torch.tensor(BACKGROUNDS["gray"], dtype=torch.uint8)[:, None, None]
    said = judge_pictures(JUDGES[name], [colour.expand(3, 32, 32)], [rubric])[0]
    met = {verdict.criterion_id for verdict in said if verdict.score == 1}
    background = {"background"} if PROMPTS[0].scene.background == "gray" else set()
    assert met == {c.id for c in rubric.criteria if c.id.startswith("free")} | {"whole_shapes"} | background


def test_noise_is_no_shape():
    noise = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for judge in JUDGES.values():
        said = judge_pictures(judge, [noise], [scene_rubric(PROMPTS[0])])[0]
        scores = {verdict.criterion_id: verdict.score for verdict in said}
        assert not any(scores[c.id] for c in scene_rubric(PROMPTS[0]).criteria if c.id.startswith("shape"))


def test_sentences_of_others_are_refused_and_become_missing_verdicts():
    with pytest.raises(ValueError, match="sentence"):
        answer_sentence("Nothing stands at the top leftish.", SceneReading("white", ()))
    with pytest.raises(ValueError, match="sentence"):
        answer_sentence("Something is redx", SceneReading("white", ()))
    rubric = replace(
        scene_rubric(PROMPTS[0]), criteria=(replace(scene_rubric(PROMPTS[0]).criteria[0], text="It is nice."),)
    )
    said = judge_pictures(scene_judge(), [torch.zeros(3, 32, 32, dtype=torch.uint8)], [rubric])[0]
    assert (said[0].state, said[0].cause, said[1].state) == ("missing", "error", "scored")


def test_every_sentence_has_one_answer_for_every_word():
    scene = Scene("gray", (SceneObject("triangle", "cyan", "small", 1, 0),))
    image = render_scene(scene, 40, 24)
    for reader in ("verifier", "templates"):
        prompt = replace(PROMPTS[0], scene=scene)
        base = scene_rubric(prompt).criteria[0]
        right = {f"Something is {c}.": c == "cyan" for c in COLOURS} | {
            f"There is a {s}.": s == "triangle" for s in SHAPES
        }
        right |= {f"The background is {b}.": b == "gray" for b in BACKGROUNDS}
        right |= {f"There are exactly {n} objects.": False for n in ("no", "two", "three", "four")}
        right["There is exactly one object."] = True
        for number, (text, truth) in enumerate(right.items()):
            rubric = replace(scene_rubric(prompt), criteria=(replace(base, id=f"c{number}", text=text),))
            assert judge_pictures(JUDGES[reader], [image], [rubric])[0][0].score == float(truth), text
