"""Laws of the search: exactly the better candidates, one level for the whole search, budgets, the test split, kills."""

import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lensmini.endpoint import Failure, Reply
from lensmini.prompting import (
    Budget,
    ChatProposer,
    Evaluation,
    Proposal,
    ProposalRequest,
    search_pareto_front,
    search_system_prompt,
)
from lensmini.prompting.search_log import SearchLog
from lensmini.prompting.search_steps import derive_seed
from tests.chat_server import ChatServer

DEV, TEST = [f"dev {i}" for i in range(40)], [f"test {i}" for i in range(20)]
SEARCHES = pytest.mark.parametrize("search", [search_system_prompt, search_pareto_front])


class World:
    """Prompts are texts like "0.4"; a score is that quality plus noise of item and seed, the same for every prompt.

    Proposals come from a list. Everything asked for is on record.
    """

    def __init__(self, proposals, noise=0.3, cost=0.0, missing=0.0):
        self.proposals, self.noise, self.cost, self.missing = list(proposals), noise, cost, missing
        self.evaluations, self.requests = [], []

    def evaluate(self, prompt, items, seeds):
        self.evaluations.append((prompt, tuple(items), tuple(seeds)))
        return Evaluation(
            [[self.score(prompt, item, seed) for seed in seeds] for item in items],
            [f"{prompt} fails at {item}" for item in items],
            self.cost * len(items) * len(seeds),
        )

    def score(self, prompt, item, seed):
        stream = random.Random(f"{item} {seed}")
        noise = self.noise * stream.gauss(0, 1)
        return None if stream.random() < self.missing else float(prompt) + noise

    def propose(self, request):
        self.requests.append(request)
        return Proposal(self.proposals[request.number], f"analysis {request.number}", self.cost)

    @property
    def scorings(self):
        return sum(len(items) * len(seeds) for _, items, seeds in self.evaluations)


def run(world, search=search_system_prompt, **options):
    options = {"dev": DEV, "test": TEST, "budget": Budget(candidates=len(world.proposals)), **options}
    return search("0.0", world.evaluate, world.propose, **options)


class OnlyOnce(list):
    """A test split that may be asked for its length at any time and read once, when ``ready`` says so."""

    def __init__(self, items, ready):
        super().__init__(items)
        self.ready, self.reads = ready, 0

    def __iter__(self):
        assert self.ready(), "the test split is read before the search is over"
        self.reads += 1
        return super().__iter__()

    def __getitem__(self, index):
        raise AssertionError("the test split is looked into")

    __contains__ = __reversed__ = index = count = __getitem__


class TestAcceptance:
    def test_exactly_the_better_candidates_of_a_scripted_evaluator_are_accepted(self):
        world = World(["-0.1", "0.2", "0.1", "0.0001", "0.5", "0.4999", "0.6", "-3.0"])
        result = run(world)
        assert [c.accepted for c in result.candidates] == [True, False, True, False, False, True, False, True, False]
        assert [c.text for c in result.lineage] == ["0.0", "0.2", "0.5", "0.6"] and result.best.text == "0.6"
        assert [c.parent for c in result.candidates] == [None, 0, 0, 2, 2, 2, 5, 5, 7]
        assert result.test.difference == pytest.approx(0.6) and result.test.low <= 0.6 + 1e-9

    def test_the_level_is_shared_out_over_all_candidates_that_the_budget_allows(self):
        result = run(World(["0.2", "0.1", "0.3"]), alpha=0.06, budget=Budget(candidates=3))
        assert [c.comparison.alpha for c in result.candidates[1:]] == pytest.approx([0.02] * 3)

    def test_a_candidate_that_is_only_as_good_does_not_join_the_pool(self):
        # The same quality by another text: as good everywhere, better nowhere.
        result = run(World(["0.3", "0.30", "0.2"]), search_pareto_front)
        assert [c.accepted for c in result.candidates] == [True, True, False, False]

    def test_a_constant_difference_is_seen_however_small_because_the_noise_is_common(self):
        assert run(World(["0.0001"], noise=1.0)).best.text == "0.0001"

    @SEARCHES
    def test_a_search_without_anything_better_gives_the_seed_prompt_back(self, search):
        result = run(World(["-0.1", "-0.2"]), search)
        assert (
            result.best.text == "0.0"
            and result.test.difference == 0.0
            and (result.test.low, result.test.high) == (0, 0)
        )

    def test_the_pool_keeps_what_is_best_somewhere_and_ends_with_the_best(self):
        result = run(World(["0.3", "0.2", "0.4"]), search_pareto_front)
        assert [c.accepted for c in result.candidates] == [True, True, False, True]
        assert result.best.text == "0.4" and result.best.comparison.accepted

    def test_screening_saves_scorings_and_does_not_change_what_is_better(self):
        script = ["-0.5", "0.2", "0.1", "0.5"]
        plain, screened = World(script), World(script)
        one, other = run(plain), run(screened, screen=8)
        assert [c.accepted for c in one.candidates] == [c.accepted for c in other.candidates]
        assert screened.scorings < plain.scorings

    def test_patience_ends_a_search(self):
        result = run(World(["0.2", "-1", "-2", "0.9"]), patience=2)
        assert result.best.text == "0.2" and len(result.candidates) == 4 and "2 candidates" in result.stopped

    def test_missing_scores_are_left_out_and_too_many_accept_nothing(self):
        assert run(World(["0.5"], missing=0.05)).best.text == "0.5"
        assert run(World(["0.5"], missing=0.4)).best.text == "0.0"

    def test_an_answer_that_is_none_or_was_tried_is_asked_for_again(self):
        world = World([None, "0.0", " ", "0.3", "0.3", "0.4"])
        result = run(world, budget=Budget(candidates=2))
        assert [c.text for c in result.candidates] == ["0.0", "0.3", "0.4"] and result.spending.proposals == 6

    def test_an_item_without_a_score_does_not_decide_which_of_the_pool_is_best(self):
        world = World(["0.3", "0.2", "0.4"], missing=0.1)
        result = run(world, search_pareto_front, num_seeds=1)
        _, items, (seed,) = world.evaluations[0]
        assert any(world.score("0.4", item, seed) is None for item in items)
        assert result.best.text == "0.4" and result.best.comparison.difference == pytest.approx(0.4)


class TestIndependence:
    def test_every_comparison_has_noise_of_its_own_and_both_arms_share_it(self):
        world = World(["0.1", "0.2", "-1"])
        run(world)
        deciding = [e for e in world.evaluations if len(e[1]) == 26]
        pairs = list(zip(deciding[::2], deciding[1::2], strict=True))
        assert len(pairs) == 3 and all(new[1:] == old[1:] for new, old in pairs)
        seeds = [seed for new, _ in pairs for seed in new[2]]
        assert len(set(seeds)) == 9

    def test_the_proposer_reads_failures_of_other_items_than_those_that_decide(self):
        world = World(["0.1", "0.2", "-1"])
        run(world)
        read = {text.split(" at ")[1] for request in world.requests for text in request.failures}
        decided = {item for _, items, _ in world.evaluations if len(items) == 26 for item in items}
        assert read and decided and not read & decided and read | decided <= set(DEV)
        assert {item for _, items, _ in world.evaluations if len(items) == 14 for item in items} | decided == set(DEV)

    def test_the_proposer_learns_one_bit_by_candidate(self):
        world = World(["0.1", "-1", "0.2"])
        run(world)
        assert [request.history for request in world.requests] == [
            (),
            (("0.1", True),),
            (("0.1", True), ("-1", False)),
        ]
        assert all(set(request._fields) == set(ProposalRequest._fields) for request in world.requests)
        assert "failures" in ProposalRequest._fields and "scores" not in ProposalRequest._fields

    def test_the_worst_failures_come_first(self):
        world = World(["0.1"])
        run(world, num_failures=5)
        _, items, seeds = world.evaluations[0]
        means = {item: sum(world.score("0.0", item, seed) for seed in seeds) for item in items}
        worst = sorted(items, key=lambda item: means[item])[:5]
        assert [text.split(" at ")[1] for text in world.requests[0].failures] == worst

    @SEARCHES
    def test_the_test_split_is_read_once_and_last(self, search):
        world = World(["0.3", "0.2", "0.5"])
        test = OnlyOnce(TEST, lambda: len(world.requests) == 3)
        run(world, search, test=test)
        assert test.reads == 1
        on_test = [index for index, e in enumerate(world.evaluations) if e[1][0].startswith("test")]
        assert on_test == [len(world.evaluations) - 2, len(world.evaluations) - 1]
        assert world.evaluations[-1][1:] == world.evaluations[-2][1:]

    def test_the_test_split_may_not_be_the_development_set(self):
        with pytest.raises(ValueError, match="not in dev, got 1 of 20"):
            run(World(["0.3"]), test=[*TEST[:19], DEV[5]])


class Null:
    """Every prompt is equally good: 0/1 scores whose noise is partly common and partly the prompt's own."""

    def __init__(self, seed):
        self.seed = seed

    def evaluate(self, prompt, items, seeds):
        def score(item, seed):
            common = random.Random(f"{self.seed} {item} {seed}")
            own = random.Random(f"{self.seed} {item} {seed} {prompt}")
            return float((common if common.random() < 0.7 else own).random() < 0.4)

        return Evaluation([[score(item, seed) for seed in seeds] for item in items], ["wrong"] * len(items))

    def propose(self, request):
        return Proposal(f"prompt {request.number}")


@SEARCHES
@pytest.mark.parametrize("trials", [30, pytest.param(400, marks=pytest.mark.slow)])
def test_a_whole_search_accepts_anything_at_most_at_its_level_if_nothing_is_better(search, trials):
    accepted = 0
    for trial in range(trials):
        null = Null(trial)
        result = search(
            "seed",
            null.evaluate,
            null.propose,
            dev=DEV,
            test=TEST,
            budget=Budget(candidates=10),
            seed=trial,
            num_seeds=2,
        )
        accepted += result.best.number > 0
    assert accepted <= trials * 0.05 + 3 * math.sqrt(trials * 0.05 * 0.95), accepted


class TestBudget:
    @SEARCHES
    @pytest.mark.parametrize("extra", [0, 1, 77, 200, 350])
    def test_scorings_never_exceed_the_bound_and_the_test_split_is_always_read(self, search, extra):
        least = 40 * 3 + 26 * 3 + 60 * 2 if search is search_system_prompt else 20 * 2 * 3 + 20 * 2 * 3 + 60 * 2
        world = World([str(0.1 * k) for k in range(1, 9)])
        result = run(world, search, budget=Budget(candidates=8, scorings=least + extra))
        assert world.scorings == result.spending.scorings <= least + extra
        assert world.evaluations[-1][1][0].startswith("test")
        assert "scorings" in result.stopped and len(result.candidates) >= 2

    def test_proposals_never_exceed_the_bound(self):
        world = World(["0.1", None, "0.2", "0.3", "0.4"])
        result = run(world, budget=Budget(candidates=5, max_proposals=3))
        assert len(world.requests) == 3 == result.spending.proposals and "proposals" in result.stopped
        assert [c.text for c in result.candidates] == ["0.0", "0.1", "0.2"]

    @pytest.mark.parametrize("cost", [4.0, 5.0, 7.5])
    def test_money_is_never_exceeded_although_its_use_is_known_afterwards_only(self, cost):
        world = World([str(0.1 * k) for k in range(1, 9)], cost=0.01)
        budget = Budget(candidates=8, cost=cost, cost_of_scoring=0.01, cost_of_proposal=0.01)
        result = run(world, budget=budget)
        assert result.spending.cost <= cost and result.spending.cost == pytest.approx(
            0.01 * (world.scorings + len(world.requests))
        )
        assert "cost" in result.stopped and world.evaluations[-1][1][0].startswith("test")

    @SEARCHES
    def test_a_budget_below_one_round_is_refused_before_anything_is_spent(self, search):
        world = World(["0.1"])
        with pytest.raises(ValueError, match="budget"):
            run(world, search, budget=Budget(candidates=1, scorings=200))
        assert world.evaluations == []

    @pytest.mark.parametrize(
        "fields", [{"candidates": 0}, {"scorings": 0}, {"cost": 1.0}, {"cost": -1.0, "cost_of_scoring": 0.1}]
    )
    def test_a_bound_that_cannot_be_meant_is_refused(self, fields):
        with pytest.raises(ValueError, match=next(iter(fields))):
            Budget(**{"candidates": 1, **fields})

    @SEARCHES
    @pytest.mark.parametrize("extra", range(0, 60, 3))
    def test_proposals_that_are_none_never_use_up_what_the_comparison_takes(self, search, extra):
        least = 40 * 3 + 26 * 3 + 60 * 2 if search is search_system_prompt else 14 * 2 * 3 + 26 * 2 * 3 + 60 * 2
        world = World([None, "0.3", None, None, None, "0.4", None, None, "0.5"], cost=0.01)
        budget = Budget(
            candidates=3, max_proposals=9, cost=0.01 * (least + 1 + extra), cost_of_scoring=0.01, cost_of_proposal=0.01
        )
        result = run(world, search, feedback_share=0.35, budget=budget)
        assert result.spending.cost <= budget.cost * (1 + 1e-9) and world.evaluations[-1][1][0].startswith("test")
        deciding = [e for e in world.evaluations if len(e[1]) == 26]
        assert len(deciding) % 2 == 0, "no comparison is begun that cannot be paid to its end"

    @pytest.mark.parametrize("price", [0.01, 0.1, 0.07, 1 / 3])
    def test_a_budget_of_exactly_one_round_is_one_round(self, price):
        scorings = 14 * 3 + 26 * 2 * 3 + 20 * 2 * 3
        for cost in (scorings * price + price, round((scorings + 1) * price, 10)):
            budget = Budget(candidates=1, cost=cost, cost_of_scoring=price, cost_of_proposal=price)
            assert run(World(["0.3"], cost=price), budget=budget).best.text == "0.3"

    @SEARCHES
    @pytest.mark.parametrize("cost", [math.nan, math.inf, -1.0])
    def test_a_cost_that_is_none_would_lift_the_bound_and_is_refused(self, search, cost, tmp_path):
        for who in ("evaluate", "propose"):
            world = World(["0.3"])
            calls = {"evaluate": world.evaluate, "propose": world.propose}
            calls[who] = lambda *arguments, call=calls[who]: call(*arguments)._replace(cost=cost)
            with pytest.raises(ValueError, match=f"{who}: expected a cost"):
                search("0.0", *calls.values(), dev=DEV, test=TEST, budget=Budget(candidates=1), log=tmp_path / who)
            assert run(World(["0.3"]), search, log=tmp_path / who).best.text == "0.3", "nothing of it is on record"


class TestArguments:
    @pytest.mark.parametrize(
        ("scores", "message"),
        [
            ([[0.0] * 3] * 3, "expected scores of"),
            ([[0.0] * 2] * 26, "under 3 seeds"),
            ([[math.nan] * 3] * 26, "finite"),
        ],
    )
    def test_what_an_evaluator_returns_is_checked(self, scores, message):
        def evaluate(prompt, items, seeds):
            return Evaluation(scores[: len(items)] if len(items) <= len(scores) else scores)

        with pytest.raises(ValueError, match=message):
            search_system_prompt(
                "a", evaluate, lambda r: Proposal("b"), dev=DEV, test=TEST, budget=Budget(candidates=1)
            )

    def test_a_development_set_that_cannot_be_split_is_refused(self):
        with pytest.raises(ValueError, match="dev"):
            run(World(["0.1"]), dev=DEV[:3])

    @SEARCHES
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("test", []),
            ("test", ["test 0"]),
            ("alpha", 0.0),
            ("alpha", 0.6),
            ("alpha", math.nan),
            ("dev", [*DEV, DEV[3]]),
        ],
    )
    def test_what_cannot_be_a_search_is_refused_before_anything_is_paid(self, search, name, value):
        world = World(["0.3", "0.2"])
        with pytest.raises(ValueError, match=name):
            run(world, search, **{name: value})
        assert world.evaluations == [] and world.requests == []

    def test_items_may_be_of_any_type(self):
        def evaluate(prompt, items, seeds):
            return Evaluation([[float(prompt) + 0.01 * (s % 7) + item["x"][0].item() for s in seeds] for item in items])

        dev, test = ([{"x": torch.full((3,), i)} for i in range(first, first + 20)] for first in (0, 50))
        result = search_system_prompt(
            "0.0", evaluate, lambda request: Proposal("0.3"), dev=dev, test=test, budget=Budget(candidates=1)
        )
        assert result.best.text == "0.3"
        with pytest.raises(ValueError, match="not in dev, got 1"):
            search_system_prompt(
                "0.0",
                evaluate,
                lambda request: Proposal("0.3"),
                dev=dev,
                test=[*test, dev[4]],
                budget=Budget(candidates=1),
            )


class TestRecord:
    @SEARCHES
    def test_a_search_that_breaks_off_at_any_call_goes_on_to_the_same_end(self, search, tmp_path):
        script = ["0.3", "0.2", "0.5"]
        whole = run(World(script), search, log=tmp_path / "whole.jsonl")
        for last in range(len((tmp_path / "whole.jsonl").read_text().splitlines())):
            world, path = World(script), tmp_path / f"{last}.jsonl"
            counter = {"left": last}

            def step(call, counter=counter):
                def stepping(*arguments):
                    if counter["left"] == 0:
                        raise KeyboardInterrupt
                    counter["left"] -= 1
                    return call(*arguments)

                return stepping

            try:
                calls = (step(world.evaluate), step(world.propose))
                search("0.0", *calls, dev=DEV, test=TEST, budget=Budget(candidates=3), log=path)
            except KeyboardInterrupt:
                again = World(script)
                result = run(again, search, log=path)
                assert len(again.evaluations) + len(again.requests) + last == sum(
                    "question" in json.loads(line) for line in path.read_text().splitlines()
                )
                assert result == whole
                assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    def test_a_torn_line_is_made_again(self, tmp_path):
        path = tmp_path / "log.jsonl"
        whole = run(World(["0.3", "0.2"]), log=path)
        data = path.read_bytes()
        for cut in range(1, len(data), 997):
            path.write_bytes(data[:cut])
            assert run(World(["0.3", "0.2"]), log=path) == whole and path.read_bytes() == data

    def test_a_record_of_another_search_is_refused_and_kept(self, tmp_path):
        path = tmp_path / "log.jsonl"
        run(World(["0.3"]), log=path)
        data = path.read_bytes()
        for options in (
            {"seed": 1},
            {"alpha": 0.01},
            {"budget": Budget(candidates=1, scorings=9999)},
            {"dev": DEV[:30]},
        ):
            with pytest.raises(ValueError, match="log: expected this search"):
                run(World(["0.3"]), log=path, **options)
        assert path.read_bytes() == data

    def test_a_file_that_is_no_record_is_refused(self, tmp_path):
        path = tmp_path / "log.jsonl"
        path.write_text('{"a": 1}\n')
        with pytest.raises(ValueError, match="line 1"):
            run(World(["0.3"]), log=path)

    @pytest.mark.parametrize("text", ['{"a": 1}', "precious", '{"question', "\n", "\nprecious", '{"fact": 1}\n{"a'])
    def test_a_file_of_somebody_else_is_refused_and_kept_also_without_a_last_line_end(self, text, tmp_path):
        path = tmp_path / "log.jsonl"
        path.write_text(text)
        if text == '{"question':  # may be what a kill left
            assert run(World(["0.3"]), log=path).best.text == "0.3"
            return
        with pytest.raises(ValueError, match="log: expected steps"):
            run(World(["0.3"]), log=path)
        assert path.read_text() == text

    def test_a_refused_file_is_let_go(self, tmp_path):
        path = tmp_path / "log.jsonl"
        path.write_text("no record\n")
        with pytest.raises(ValueError, match="line 1") as caught:
            run(World(["0.3"]), log=path)
        path.write_text("")
        assert run(World(["0.3"]), log=path).best.text == "0.3" and caught.value is not None

    def test_two_processes_cannot_write_one_record(self, tmp_path):
        with SearchLog(tmp_path / "log.jsonl"), pytest.raises(ValueError, match="no other process"):
            run(World(["0.3"]), log=tmp_path / "log.jsonl")

    def test_odd_texts_survive_the_record(self, tmp_path):
        odd = 'half \ud83d, nul \x00, line \u2028, quote " and \\'
        for _ in range(2):
            with SearchLog(tmp_path / "log.jsonl") as log:
                assert log.call({"ask": odd}, lambda: {"said": odd}) == {"said": odd}


SLOW_SEARCH = """
import sys, time
sys.path.insert(0, {root!r})
from tests.prompting.test_search import DEV, TEST, World
from lensmini.prompting import Budget, search_system_prompt
world = World(["0.3", "0.2", "0.5", "0.4", "0.7"])
def slowly(*arguments):
    time.sleep(0.05)
    return world.evaluate(*arguments)
result = search_system_prompt(
    "0.0", slowly, world.propose, dev=DEV, test=TEST, budget=Budget(candidates=5), log=sys.argv[1]
)
print(result.report())
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_and_resume_give_the_same_report(tmp_path):
    root = str(Path(__file__).parents[2])
    script = SLOW_SEARCH.format(root=root)
    whole = run(World(["0.3", "0.2", "0.5", "0.4", "0.7"])).report()
    log, kills = tmp_path / "log.jsonl", 0
    for attempt in range(40):
        with subprocess.Popen([sys.executable, "-c", script, str(log)], stdout=subprocess.PIPE, text=True) as process:
            # Far enough to get past the imports, a little further each time.
            begun = log.stat().st_size if log.exists() else 0
            started = time.monotonic()
            while process.poll() is None and time.monotonic() - started < 60:
                if log.exists() and log.stat().st_size > begun:
                    time.sleep(0.02 * (attempt % 5))
                    os.kill(process.pid, signal.SIGKILL)
                    kills += 1
                    break
                time.sleep(0.005)
            output = process.stdout.read()
            if process.wait() == 0:
                assert output.strip() == whole.strip() and kills >= 3
                return
    pytest.fail("the search never came to its end")


def test_the_report_tells_every_decision_and_the_lineage_line_by_line():
    world = World(["0.2", "-1", "0.5"])
    report = run(world).report()
    assert "| 2 | 1 |" in report and "0 -> 1 -> 3" in report and "-0.0" in report and "+0.2" in report
    assert "analysis 2" in report and "read once (20 items)" in report and "difference +0.500" in report


def test_a_test_split_of_which_one_item_has_a_score_has_no_interval():
    class Once(World):
        def score(self, prompt, item, seed):
            return None if item.startswith("test") and item != "test 3" else super().score(prompt, item, seed)

    result = run(Once(["0.5"]))
    assert result.best.text == "0.5" and result.test.num_items == 1 and result.test.difference == pytest.approx(0.5)
    assert math.isnan(result.test.low) and math.isnan(result.test.high)


def test_the_examples_of_the_documentation_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "reasoner.md").read_text()
    rewriting, searching = [block.partition("```")[0] for block in text.split("```python\n")[1:]]

    def answer(body):
        data = json.loads(body["messages"][1]["content"])
        if "failures" in data:
            return "Colours." if len(body["messages"]) == 2 else f"<system_prompt>Try {body['seed']}.</system_prompt>"
        return 'Two red foxes sit below a wooden sign with the text "OPEN" in white letters on it.'

    with ChatServer(answer) as server:
        for block in (rewriting, searching):
            exec(block.replace("http://localhost:8000/v1", server.url), {})
    said = capsys.readouterr().out
    assert said.startswith("rewritten None Two red foxes") and "0 scorings" in said and "| 3 | 0 |" in said


def test_seeds_are_pinned():
    # A changed rule would make old records unreadable.
    assert [derive_seed(0, "split"), derive_seed(0, "noise", "test", 0), derive_seed(1, "noise", "round", 3, 2)] == [
        int.from_bytes(hashlib.sha256(text).digest()[:4], "big") & 0x7FFFFFFF
        for text in (b"0/split", b"0/noise/test/0", b"1/noise/round/3/2")
    ]


class Chat:
    """Says one thing after the other; None is a failure."""

    model = "chat"

    def __init__(self, *texts):
        self.texts, self.asked = list(texts), []

    def ask_all(self, requests):
        self.asked += requests
        found = [self.texts.pop(0) for _ in requests]
        return [Failure("timeout") if text is None else Reply(text, "stop", 1, 1) for text in found]

    def forget(self, request): ...


class TestProposer:
    REQUEST = ProposalRequest(
        "Be brief.", ("asked: a <b>fox</b>; wrong: no fox",), (("Be long.", False), ("Be", True)), 3
    )

    def test_it_analyses_first_and_sees_failures_as_data(self):
        chat = Chat("<think>Hm.</think>Colours are lost.", "<system_prompt>Name colours.</system_prompt>")
        proposal = ChatProposer(chat)(self.REQUEST)
        assert proposal.text == "Name colours." and proposal.analysis == "Colours are lost."
        first, second = chat.asked
        data = json.loads(first.messages[1]["content"])
        assert data == {
            "instructions": "Be brief.",
            "failures": list(self.REQUEST.failures),
            "rejected_versions": ["Be long."],
        }
        assert "<" not in first.messages[1]["content"]
        assert second.messages[:2] == first.messages and second.messages[2]["content"] == "Colours are lost."

    @pytest.mark.parametrize(
        "texts",
        [
            (None,),
            ("", "<system_prompt>a</system_prompt>"),
            ("Analysis.", None),
            ("Analysis.", "Be brief."),
            ("Analysis.", "<system_prompt>a</system_prompt><system_prompt>b</system_prompt>"),
            ("Analysis.", "<system_prompt></system_prompt>"),
            ("Analysis.", "<system_prompt>" + "word " * 50 + "</system_prompt>"),
            ("Analysis.", "<system_prompt>a <|end|></system_prompt>"),
        ],
    )
    def test_an_answer_without_one_prompt_is_no_proposal(self, texts):
        assert ChatProposer(Chat(*texts), max_words=40)(self.REQUEST).text is None
