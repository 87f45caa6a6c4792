"""Laws of the miniature's reasoner: captions read back, requests held out, the scripted server, the search's mechanism."""

import json
import random
from dataclasses import replace

import pytest
import torch

from experiments import reasoner, search_prompt
from experiments.miniature.caption_reader import intent_lost, read_caption
from experiments.miniature.language_model import build_language_model, smallest_language_model
from experiments.miniature.rewriter import (
    RewriterConfig,
    indirect_request,
    is_held_out,
    request_pairs,
    train_rewriter,
)
from experiments.miniature.scripted_chat import RULES, SEED_PROMPT, read_request, scripted_answer, with_rules
from experiments.miniature.tokenizer import build_tokenizer
from experiments.reasoner import cluster_interval, held_out_suite
from lensmini.data import (
    SCENE_VOCABULARY,
    build_scene_prompts,
    describe_scene,
    render_scene,
    sample_scene,
    verify_scene,
)
from lensmini.endpoint import Endpoint
from lensmini.prompting import Budget, ChatProposer, Evaluation, Rewriter, SystemPrompt, search_system_prompt
from tests.chat_server import ChatServer, Fault

SHORT = build_scene_prompts(40, 5, form="short")
CONFIG = RewriterConfig(steps=2, group=1, batch_size=4)


def same(scene, other):
    plain = [sorted((t.cell, t.colour, t.shape, t.size) for t in s.objects) for s in (scene, other)]
    return plain[0] == plain[1] and scene.background == other.background


class TestCaptions:
    @pytest.mark.parametrize("wording", ["plain", "synonyms"])
    def test_every_dense_caption_is_read_back_into_its_scene(self, wording):
        for number in range(300):
            scene = sample_scene(generator=number)
            found = read_caption(describe_scene(scene, wording=wording, generator=number))
            assert found is not None and same(found, scene)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "a red circle",
            "two objects on a white background . a large red circle at the top left .",
            "one object on a red background . a large red circle at the top left .",
            "one object on a white background . a large red circle at the middle left .",
            "one object on a white background . two large red circles at the top left .",
            "two objects on a white background . two large red circles at the top left and the top left .",
        ],
    )
    def test_what_describes_no_scene_is_none(self, text):
        assert read_caption(text) is None

    def test_lost_intent_is_counted_by_the_requests_own_questions(self):
        prompt = build_scene_prompts(1, 0, form="short", kinds=["single"])[0]
        thing = prompt.scene.objects[0]
        right = f"one object on a white background . a large {thing.colour} {thing.shape} at the top left ."
        other = "blue" if thing.colour != "blue" else "red"
        wrong = f"one object on a white background . a large {other} {thing.shape} at the top left ."
        assert intent_lost([right, wrong, "a box"], [prompt] * 3) == [(0, 2), (1, 2), None]


class TestRequests:
    def test_the_same_text_is_always_on_the_same_side(self):
        sides = {}
        for prompt in SHORT + build_scene_prompts(40, 6, form="short"):
            assert sides.setdefault(prompt.text, is_held_out(prompt)) == is_held_out(prompt)
        assert 0.15 < sum(sides.values()) / len(sides) < 0.35

    def test_no_evaluated_request_is_trained_on_or_searched_with(self):
        evaluated = {prompt.text for seed in range(3) for prompt in held_out_suite(5, seed)}
        indirect = {indirect_request(p, s) for s in range(3) for p in held_out_suite(5, s)}
        trained = {pair.caption for number in range(300) for pair in request_pairs(number, CONFIG)}
        dev, test = search_prompt.search_suites(search_prompt.mini())
        searched = {prompt.text for prompt in dev + test}
        assert not evaluated & trained and not evaluated & searched and not indirect & trained
        assert not {p.text for p in dev} & {p.text for p in test} and (len(dev), len(test)) == (150, 60)

    def test_indirect_requests_are_other_words_of_the_same_vocabulary(self):
        for number, prompt in enumerate(SHORT):
            text = indirect_request(prompt, number)
            assert set(text.split()) <= {*SCENE_VOCABULARY} and text != prompt.text
            assert read_request(text, random.Random(0)) is None, "the scripted server cannot read them"

    def test_a_trained_caption_fulfils_its_request_and_names_things_in_its_order(self):
        prompts = {p.text: p for n in range(60) for p in build_scene_prompts(1, 1_000_003 + n, form="short")}
        pairs = [pair for n in range(60) for pair in request_pairs(n, CONFIG) if pair.caption in prompts]
        assert len(pairs) > 60
        for request, caption in pairs:
            scene, prompt = read_caption(caption), prompts[request]
            assert scene is not None and all(verify_scene(render_scene(scene, 32, 32), prompt.questions).answers)
            assert [thing.pair for thing in scene.objects] == [thing.pair for thing in prompt.scene.objects]


def test_fine_tuning_learns_and_leaves_the_encoder_as_it_is(tmp_path):
    tokenizer = build_tokenizer()
    model = build_language_model(smallest_language_model(), len(tokenizer)).requires_grad_(False).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = RewriterConfig(steps=20, group=5, batch_size=4, learning_rate=1e-2, muon_rate=1e-2, warmup=1)
    for name in ("one", "two"):
        train_rewriter(config, model, tokenizer, tmp_path / name)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    rows = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


class TestScripted:
    def ask(self, rules, prompt, seed=0, facts=None):
        data = {"request": prompt.text} | ({} if facts is None else {"facts": facts})
        messages = [{"role": "system", "content": with_rules(*rules)}, {"role": "user", "content": json.dumps(data)}]
        return scripted_answer({"messages": messages, "seed": seed})

    def test_with_the_four_good_rules_it_writes_captions_that_fulfil_their_requests(self):
        for number, prompt in enumerate(SHORT):
            scene = read_caption(self.ask(["opening", "place", "size", "relation"], prompt, number))
            assert scene is not None, prompt.text
            assert all(verify_scene(render_scene(scene, 32, 32), prompt.questions).answers), prompt.text

    def test_without_rules_it_changes_nothing_and_every_rule_changes_something(self):
        prompt = next(prompt for prompt in SHORT if prompt.kind == "two")
        assert self.ask([], prompt) == prompt.text
        base = self.ask(["opening", "place"], prompt, 3)
        changed = [
            self.ask(["opening", "place", rule], prompt, 3) != base
            for rule in RULES
            if rule not in ("opening", "place")
        ]
        assert all(changed)

    def test_facts_count_where_the_request_cannot_be_read(self):
        prompt = SHORT[0]
        indirect = replace(prompt, text=indirect_request(prompt, 0))
        assert self.ask(["opening", "place", "size"], indirect) == indirect.text
        told = self.ask(["opening", "place", "size"], indirect, facts={"request": prompt.text})
        assert read_caption(told) is not None


GOOD = ("opening", "place", "size")


@pytest.mark.slow
def test_through_the_protocol_the_search_takes_the_good_rules_and_leaves_the_distractors():
    """Judged by the captions themselves, without painting: more good rules are better, every distractor is worse."""

    def evaluate(text, items, seeds):
        rewriter = Rewriter(endpoint, SystemPrompt("candidate", text, 1, 300), required=(), max_tokens=400)
        rewriter.rewrite_all([item.text for item in items])
        rules = {name for name, rule in RULES.items() if rule in text.splitlines()}
        quality = 0.2 * len(rules & {*GOOD}) - 0.1 * len(rules - {*GOOD})
        scores = [[quality + random.Random(f"{item.text} {seed}").gauss(0, 0.3) for seed in seeds] for item in items]
        return Evaluation(scores, [f"asked: {item.text}; wrong: something" for item in items])

    with ChatServer(scripted_answer) as server:
        endpoint = Endpoint("scripted", base_url=server.url)
        result = search_system_prompt(
            SEED_PROMPT,
            evaluate,
            ChatProposer(endpoint),
            dev=SHORT[:30],
            test=SHORT[30:48],
            budget=Budget(candidates=14),
            num_seeds=1,
        )
        proposals = [body for body in server.requests if "failures" in json.loads(body["messages"][1]["content"])]
    found = {name for name, rule in RULES.items() if rule in result.best.text}
    assert found == {*GOOD} and any(not candidate.accepted for candidate in result.candidates)
    read = "".join(body["messages"][1]["content"] for body in proposals)
    decided = [item.text for item in SHORT[:30] if f"asked: {item.text};" not in read]
    assert len(decided) >= 19, "the proposer reads the failures of the other third only"


def test_an_interval_of_clusters_is_that_of_their_number_and_not_of_the_values():
    values = [float(n % 2) for n in range(40) for _ in range(25)]
    clusters = [str(n) for n in range(40) for _ in range(25)]
    low, high = cluster_interval(values, clusters)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 40**0.5, rel=0.15)
    narrow = cluster_interval(values, [str(n) for n in range(1000)])
    assert narrow[1] - narrow[0] < 0.3 * (high - low)


def test_a_dry_run_says_what_it_would_take(capsys):
    config = replace(search_prompt.lens(), dry_run=True, prices=(1.0, 4.0), max_cost=50.0)
    assert search_prompt.main(config) is None
    told = capsys.readouterr().out
    assert "10710 pictures" in told and "bounded by 50" in told and "level 0.0042" in told
    assert config.budget.cost == 50.0 and config.budget.cost_of_scoring == pytest.approx(
        (2 * 2000 + 22 * 1500 + 4 * (2 * 1200 + 22 * 400)) / 1e6
    )


def test_scores_of_another_config_or_checkpoint_are_not_taken_over(tmp_path, monkeypatch):
    for module in (reasoner, search_prompt):
        monkeypatch.setattr(module, "find_checkpoint", lambda path: path or tmp_path / "step-1")
    config = replace(search_prompt.mini(), out=tmp_path)
    search_prompt._check_record(config)
    search_prompt._check_record(replace(config, rewriter_url="http://localhost:9/v1", dry_run=True))
    for other in ({"num_steps": 3}, {"checkpoint": tmp_path / "step-2"}, {"rewriter": "other"}, {"mu": None}):
        with pytest.raises(ValueError, match="out: expected a directory without a search of another config"):
            search_prompt._check_record(replace(config, **other))
    base, arm = reasoner.mini(), "short / fine-tuned"
    key = reasoner._key(base, arm, "rewriter-1")
    assert reasoner._key(replace(base, out=tmp_path, num_seeds=9), arm, "rewriter-1") == key
    others = [
        reasoner._key(replace(base, **o), arm, "rewriter-1") for o in ({"num_steps": 3}, {"checkpoint": tmp_path})
    ]
    assert len({key, reasoner._key(base, arm, "rewriter-2"), *others}) == 4


class Painted:
    """Stands in for what paints: remembers texts, and every picture is the same."""

    def __init__(self, monkeypatch):
        self.texts = []
        monkeypatch.setattr(search_prompt, "paint_prompts", self)

    def __call__(self, model, world, texts, canvases, config, *, seeds):
        self.texts += texts
        scene = SHORT[0].scene
        return [render_scene(scene, 32, 32)] * len(texts)


def test_what_a_server_did_not_answer_is_a_missing_score_and_not_the_candidates(monkeypatch):
    Painted(monkeypatch)

    def fault(body, number):
        broken = SHORT[1].text in body["messages"][1]["content"]
        return Fault(status=400) if broken else None

    with ChatServer(scripted_answer, fault) as server:
        evaluate = search_prompt.scene_evaluator(
            search_prompt.quick(), None, None, Endpoint("scripted", base_url=server.url)
        )
        scores = evaluate(with_rules("opening"), SHORT[:3], [1, 2]).scores
    assert scores[1] == [None, None] and all(value is not None for row in (scores[0], scores[2]) for value in row)


@pytest.mark.parametrize("fields", [{"num_dev": 0}, {"candidates": 0}, {"num_seeds": 0}])
def test_a_search_that_cannot_be_meant_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        replace(search_prompt.mini(), **fields)
    with pytest.raises(ValueError, match="per_kind"):
        replace(reasoner.mini(), per_kind=1)
