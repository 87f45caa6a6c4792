"""Laws of the published rules: what they promise and what they lack follows from the rule, and the benchmarks run."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks import plan_balance, plan_resume
from benchmarks.peers_scenarios import SCENARIOS, Scenario, count_wrong
from benchmarks.published_rules import (
    bagel_batches,
    bagel_resume,
    greedy_fill,
    mixed_batches,
    nemo_batches,
    nemo_resume,
    open_sora_batches,
    open_sora_resume,
    pixart_batches,
    pixart_resume,
    token_budget,
)
from lensmini.cost import train_flops
from lensmini.data.plan import BatchPlan

MODEL = SimpleNamespace(
    num_layers=2, inner_dim=12, mlp_dim=32, num_attention_heads=2, attention_head_dim=6, in_channels=4,
    out_channels=1, patch_size=2, enc_hidden_dim=8, num_text_layers=1,
)  # fmt: skip


def split(batches):
    samples, offsets = batches
    return [samples[begin:end] for begin, end in pairwise(offsets)]


@st.composite
def pools(draw):
    """Bucket of each sample, ranks, images: enough of one bucket for a step, and others of any size."""
    ranks, images = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(0, 40), max_size=4))
    buckets = np.repeat(np.arange(len(sizes) + 1), [2 * ranks * images, *sizes])
    return buckets, ranks, images, np.random.default_rng(draw(st.integers(0, 999)))


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 60), st.integers(1, 60), st.integers(0, 4), st.data())
def test_greedy_fill_is_never_over_the_cap_and_loses_nothing(sizes, cap, target, buffer_size, data):
    before = data.draw(st.sampled_from([0, target / 2, target, cap]))
    fill = greedy_fill(
        range(len(sizes)), np.array(sizes, np.int64), target=target, cap=cap, buffer_size=buffer_size,
        prefer_buffer_before=before,
    )  # fmt: skip
    sequences = list(fill)
    assert all(0 < sum(sizes[sample] for sample in sequence) <= cap for sequence in sequences)
    # A sequence stops at the target: without its last sample it was below.
    assert all(sum(sizes[sample] for sample in sequence[:-1]) < target for sequence in sequences)
    assert sorted(sample for sequence in sequences for sample in sequence) == list(range(len(sizes)))


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 60), st.integers(1, 60))
def test_without_a_buffer_a_greedy_sequence_ends_only_where_it_must(sizes, cap, target):
    sequences = list(greedy_fill(range(len(sizes)), np.array(sizes, np.int64), target=target, cap=cap, buffer_size=0))
    assert [sample for sequence in sequences for sample in sequence] == list(range(len(sizes)))
    for sequence in sequences[:-1]:
        held = sum(sizes[sample] for sample in sequence)
        assert held >= target or held + sizes[sequence[-1] + 1] > cap


def test_a_sample_that_waits_twice_is_not_lost():
    # The example of BAGEL's pull request 308: 6, 6, 3 and 6 tokens, at most 10, the buffer first.
    sizes = np.array([6, 6, 3, 6])
    sequences = greedy_fill(range(4), sizes, target=10, cap=10, prefer_buffer_before=10)
    assert list(sequences) == [[0], [1, 2], [3]]
    # Without that preference the small one fills the gap.
    assert list(greedy_fill(range(4), sizes, target=9, cap=10, prefer_buffer_before=0)) == [[0, 2], [3], [1]]
    with pytest.raises(ValueError, match="cap: expected room for every sample, got 5 and a sample of 6"):
        list(greedy_fill(range(4), sizes, target=5, cap=5))


def test_a_token_budget_gives_the_batch_sizes_of_the_paper():
    assert token_budget(np.array([1024, 2304, 4096, 30_000]), 24_576).tolist() == [24, 10, 6, 1]


@given(pools())
def test_every_rule_shows_a_sample_at_most_once_in_whole_steps(pool):
    buckets, ranks, images, rng = pool
    sizes = np.arange(1, buckets.max() + 2) % images + 1
    tokens = buckets + 1
    rules = {
        "pixart": pixart_batches(buckets, ranks, images, rng),
        "open_sora": open_sora_batches(buckets, sizes, ranks, rng),
        "nemo": nemo_batches(buckets, ranks, images, rng),
        "mixed": mixed_batches(len(buckets), ranks, images, rng),
    }
    if (tokens.sum() - tokens.max()) / ranks > 3 * images * tokens.max():
        rules["bagel"] = bagel_batches(tokens, ranks, images * tokens.mean(), 2 * images * tokens.max(), rng)
    for name, (samples, offsets) in rules.items():
        assert len(np.unique(samples)) == len(samples) == offsets[-1], name
        assert (len(offsets) - 1) % ranks == 0, name
        assert np.diff(offsets).min() > 0, name
    for name in ("pixart", "open_sora", "nemo"):
        for batch in split(rules[name]):
            bucket = buckets[batch[0]]
            assert (buckets[batch] == bucket).all()
            assert len(batch) == (sizes[bucket] if name == "open_sora" else images)
    assert all(len(batch) == images for batch in split(rules["mixed"]))
    # At most a batch of each bucket, and a step of batches, are left over.
    assert len(buckets) - len(rules["pixart"][0]) < images * (buckets.max() + 1 + ranks)


@given(pools())
def test_ranks_share_a_bucket_until_it_is_used_up(pool):
    buckets, ranks, images, rng = pool
    samples, _ = nemo_batches(buckets, ranks, images, rng)
    steps = buckets[samples].reshape(-1, ranks * images)
    assert (steps == steps[:, :1]).all()
    visited = steps[:, 0]
    assert (np.diff(visited) != 0).sum() == len(np.unique(visited)) - 1
    whole = np.bincount(buckets) // (ranks * images)
    assert np.array_equal(np.bincount(visited, minlength=len(whole)), whole)


def test_ranks_draw_buckets_of_their_own():
    buckets = np.repeat(np.arange(4), 400)
    for samples, _ in (
        pixart_batches(buckets, 8, 4, np.random.default_rng(0)),
        open_sora_batches(buckets, np.full(4, 4), 8, np.random.default_rng(0)),
    ):
        steps = buckets[samples].reshape(-1, 8, 4)[:, :, 0]
        # Eight draws of four buckets: 3.6 different ones are expected.
        assert np.mean([len(np.unique(step)) for step in steps]) > 3.2


# Balance


def pool_of(image, text):
    image, text = np.array(image), np.array(text)
    return plan_balance.Pool(np.array([len(image)]), np.array([1]), np.zeros(len(image), np.int64), image, text)


def test_equal_samples_are_in_balance_padded_or_not():
    pool = pool_of([7] * 12, [3] * 12)
    for padded in (False, True):
        cell = plan_balance.measure((np.arange(12), np.arange(0, 13, 3)), pool, MODEL, 2, padded=padded)
        assert cell == plan_balance.Cell(1, 1, 1, 3, 0, 30)


def test_waiting_and_padding_are_waste():
    pool = pool_of([4, 4, 4, 9], [2, 2, 2, 1])
    # Two samples beside one: a quarter of the time is waited.
    two_and_one = np.array([0, 1, 2]), np.array([0, 2, 3])
    assert plan_balance.measure(two_and_one, pool, MODEL, 2, padded=True).balance == pytest.approx(3 / 4)
    # Two steps, one in balance and one not, weigh by their time.
    both = np.array([0, 1, 0, 1, 2]), np.array([0, 1, 2, 4, 5])
    cell = plan_balance.measure(both, pool, MODEL, 2, padded=False)
    assert cell[:3] == pytest.approx((5 / 6, 3 / 4, 7 / 8))
    # One rank, two shapes, each padded to the longest image and the longest text.
    mixed = np.array([2, 3]), np.array([0, 2])
    cell = plan_balance.measure(mixed, pool, MODEL, 1, padded=True)
    useful = train_flops(MODEL, 4, 2) + train_flops(MODEL, 9, 1)
    assert cell.balance == pytest.approx(useful / (2 * train_flops(MODEL, 9, 2)))
    assert cell.padding == pytest.approx(1 - 16 / 22) and cell.most_tokens == 22
    assert plan_balance.measure(mixed, pool, MODEL, 1, padded=False).balance == pytest.approx(1)


def test_the_rules_are_measured_as_the_plan_reports():
    pool = plan_balance.make_pool({512: 1, 1024: 2}, 2000)
    plan = BatchPlan(
        pool.sizes, pool.bucket_tokens, num_slots=4, seed=0, mode="bucket", images_per_slot=3, text_tokens=400,
        text_lengths=pool.text, model=MODEL,
    )  # fmt: skip
    said, cell = plan.report(20), plan_balance.measure(plan.assign(0, 20), pool, MODEL, 4, padded=False)
    assert (cell.balance, cell.worst_step) == pytest.approx((said.balance, said.worst_balance))
    assert cell.most_tokens == said.most_slot_tokens


def test_the_tightest_cap_is_the_last_that_the_plan_accepts():
    pool = plan_balance.make_pool({256: 1, 512: 1}, 1000)
    cap = plan_balance.tightest_cap(pool, 4)
    plan_balance.our_plan(pool, None, 4, mode="packed", images_per_slot=8, max_tokens=cap)
    with pytest.raises(ValueError, match="may not fit"):
        plan_balance.our_plan(pool, None, 4, mode="packed", images_per_slot=8, max_tokens=cap - 1)


# Resuming

BUCKETS = np.repeat(np.arange(4), [900, 1300, 1100, 1500])
IMAGES_OF_BUCKET = np.array([6, 4, 3, 5])
STEPS = st.integers(1, 8)


def test_wrong_samples_are_counted_step_by_step_with_their_number():
    shown = {None: [["a", "a"], ["b", "c"], ["d", "e"]], 1: [["e", "d"], ["d", "x"]]}
    scenario = Scenario("one", ((1, 8), (2, 8)))

    def run(state, num_steps, num_ranks):
        return shown[state][:num_steps], 1

    # b and c are missing, d is there, e is not.
    assert count_wrong(run, scenario) == 3
    assert count_wrong(run, scenario, [["a", "b"], ["d", "d"], ["x", "d"]]) == 1 + 1 + 0
    with pytest.raises(ValueError, match="expected 2 steps, got 3"):
        count_wrong(run, scenario, [["a"], ["b"]])


@given(STEPS, STEPS, STEPS)
def test_counting_since_the_resume_is_exact_once_and_goes_back_the_second_time(first, second, third):
    run = nemo_resume(BUCKETS)
    assert count_wrong(run, Scenario("once", ((first, 8), (second + third, 8)))) == 0
    # All 64 samples of every step after the second resume are those of another step.
    assert count_wrong(run, Scenario("twice", ((first, 8), (second, 8), (third, 8)))) == 64 * third
    assert count_wrong(run, Scenario("fewer ranks", ((first, 8), (second, 4)))) > 0


@given(STEPS, STEPS, st.sampled_from([1, 2, 4, 8, 16]))
def test_without_a_state_all_is_wrong_after_a_resume(first, second, ranks):
    assert count_wrong(pixart_resume(BUCKETS), Scenario("one", ((first, 8), (second, ranks)))) == 64 * second


@given(st.lists(st.tuples(STEPS, st.sampled_from([1, 2, 4, 8, 16])), min_size=1, max_size=4), st.integers(1, 8))
def test_the_true_step_times_ranks_is_exact_and_what_was_fetched_ahead_is_not(later, ahead):
    scenario = Scenario("any", ((3, 8), *later))
    assert count_wrong(open_sora_resume(BUCKETS, images_of_bucket=IMAGES_OF_BUCKET), scenario) == 0
    # On more ranks than before, a batch too many can be less than a step and change nothing.
    assume(later[0][1] <= 8)
    loader = open_sora_resume(BUCKETS, images_of_bucket=IMAGES_OF_BUCKET, fetched_ahead=ahead)
    assert count_wrong(loader, scenario) > 0


def test_reader_places_suffice_only_without_buffer_and_random_choice():
    rng = np.random.default_rng(0)
    one, two = np.zeros(len(BUCKETS), np.int64), BUCKETS % 2
    equal, mixed = np.full(len(BUCKETS), 10), rng.integers(3, 20, len(BUCKETS))
    same_ranks, fewer = Scenario("same", ((5, 8), (4, 8), (6, 8))), Scenario("fewer", ((5, 8), (6, 4)))

    def wrong(tokens, sources, scenario):
        return count_wrong(bagel_resume(tokens, sources, target=40, cap=45), scenario)

    assert wrong(equal, one, same_ranks) == 0
    assert wrong(mixed, one, same_ranks) > 0
    assert wrong(equal, two, same_ranks) > 0
    assert wrong(equal, one, fewer) > 0


def test_skipping_batches_of_a_distributed_sampler_needs_the_rank_count():
    same, elastic = SCENARIOS[2], SCENARIOS[3]
    after = {scenario: 64 * sum(steps for steps, _ in scenario.segments[1:]) for scenario in (same, elastic)}
    again, taken, steps = (plan_resume.distributed_sampler_run(how, 4096) for how in ("epoch", "batches", "steps"))
    assert [count_wrong(again, scenario) for scenario in (same, elastic)] == [after[same], after[elastic]]
    assert [count_wrong(taken, scenario) for scenario in (same, elastic)] == [0, after[elastic]]
    assert [count_wrong(steps, scenario) for scenario in (same, elastic)] == [0, 0]


# The benchmarks


def last_line(capsys):
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == {"name", "ratio", "goal", "better", "holds", "details"}
    return result


def test_the_balance_benchmark_runs(capsys):
    plan_balance.main(num_ranks=4, steps=24, mixes={"two": {256: 1, 512: 1}})
    result = last_line(capsys)
    cells = result["details"]["cells"]
    assert (result["name"], result["goal"], result["better"]) == ("plan_balance", 0.97, "higher")
    assert result["ratio"] == pytest.approx(cells["ours, packed"]["two"]["balance"], abs=1e-4)
    assert result["holds"] == (result["ratio"] >= 0.97)
    assert len(cells) == 12 and all(
        0 < row["two"]["worst_step"] <= row["two"]["balance"] <= 1 for row in cells.values()
    )


def test_the_resume_benchmark_runs_without_peers_and_ours_is_exact(capsys):
    plan_resume.main(Path("no") / "python", workers=False)
    result = last_line(capsys)
    rows = result["details"]["wrong_samples"]
    assert (result["name"], result["ratio"], result["goal"], result["better"]) == ("plan_resume", 0, 0, "lower")
    assert result["holds"] is True
    assert rows["mosaicml-streaming"] == rows["webdataset"] == "not installed: make peers"
    ours = [row for name, row in rows.items() if name.startswith("ours")]
    assert [list(row.values()) for row in ours] == [[0, 0, 0, 0]] * 3
