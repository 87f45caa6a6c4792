"""Laws of the schedule: integers that add up, never fall, and stay near the shares, at any step."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lensmini.data.exposure import bucket_shares, make_schedule

RATES = st.lists(st.one_of(st.integers(0, 20), st.integers(0, 10**9)), min_size=1, max_size=30).filter(any)


def ideal(rates, units, step):
    return [Fraction(rate) * units * step / sum(map(Fraction, rates)) for rate in rates]


@given(RATES, st.integers(1, 200), st.integers(0, 10**7), st.data())
@example([1] * 31, 1, 0, None)
@example([7, 5, 8], 7, 0, None)
def test_counts_add_up_never_fall_and_stay_in_their_extremes(rates, units, start, data):
    sources = None if data is None else data.draw(st.lists(st.integers(0, 3), min_size=len(rates), max_size=len(rates)))
    schedule = make_schedule(rates, units, sources=sources)
    least, most = schedule.extremes()
    before = schedule.counts(start)
    for step in range(start + 1, start + 12):
        after = schedule.counts(step)
        assert sum(after) == units * step
        drawn = [b - a for a, b in zip(before, after, strict=True)]
        assert all(0 <= low <= count <= high for low, count, high in zip(least, drawn, most, strict=True))
        assert all(count == 0 for count, rate in zip(after, rates, strict=True) if rate == 0)
        before = after


@given(RATES, st.integers(1, 200), st.integers(0, 10**14), st.integers(0, 5), st.data())
@example([10**9, 1], 200, 2**53 // 200, 3, None)
def test_many_steps_at_once_are_the_steps_one_by_one(rates, units, start, more, data):
    sources = None if data is None else data.draw(st.lists(st.integers(0, 3), min_size=len(rates), max_size=len(rates)))
    schedule = make_schedule(rates, units, sources=sources)
    found = schedule.counts_between(start, start + more)
    assert found.dtype == np.int64
    assert found.tolist() == [schedule.counts(step) for step in range(start, start + more + 1)]
    with pytest.raises(ValueError, match="start, stop"):
        schedule.counts_between(start + 1, start)


@given(RATES, st.integers(1, 200), st.lists(st.integers(0, 10**12), min_size=1, max_size=8), st.data())
def test_sources_stay_within_the_stated_deviation_and_buckets_within_three(rates, units, steps, data):
    sources = data.draw(st.lists(st.integers(0, 5), min_size=len(rates), max_size=len(rates)))
    schedule = make_schedule(rates, units, sources=sources)
    for step in [*range(5), *steps]:
        off = [count - share for count, share in zip(schedule.counts(step), ideal(rates, units, step), strict=True)]
        for source in set(sources):
            assert abs(sum(o for o, label in zip(off, sources, strict=True) if label == source)) <= schedule.deviation
        assert max(map(abs, off)) <= 3


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=4))
@example([10**6, 10**6, 1, 1])
def test_four_sources_deviate_by_one_unit_at_most(rates):
    assert make_schedule(rates, 1).deviation <= 1


@given(st.lists(st.integers(50, 100), min_size=2, max_size=40), st.integers(0, 10**9))
def test_any_number_of_sources_deviate_by_one_if_each_has_a_unit_a_step(rates, step):
    schedule = make_schedule(rates, 2 * len(rates))
    assert schedule.deviation == 1
    pairs = zip(schedule.counts(step), ideal(rates, 2 * len(rates), step), strict=True)
    assert all(abs(count - share) <= 1 for count, share in pairs)


@given(st.lists(st.integers(1, 1000), min_size=5, max_size=14))
def test_the_tree_over_sources_is_a_good_one(rates):
    assert make_schedule(rates, 1).deviation <= (1.25 if len(rates) <= 12 else 1.7)


def test_long_runs_are_exact():
    rates = [Fraction(1, 3), Fraction(1, 7), 0.1, 5]
    schedule = make_schedule(rates, 7)
    step = 10**15
    pairs = zip(schedule.counts(step), ideal(rates, 7, step), strict=True)
    assert all(abs(count - share) <= 2 for count, share in pairs)


def test_the_first_steps_by_hand():
    # One unit a step, shares 1 : 3: of k units the heavy one has 3 k / 4 rounded, halves up.
    schedule = make_schedule([1, 3], 1)
    assert [schedule.counts(step)[1] for step in range(9)] == [0, 1, 2, 2, 3, 4, 5, 5, 6]
    # Four units a step, shares 1 : 2 : 1: the running totals 1, 3, 4 are whole numbers, so there is nothing to round.
    assert [make_schedule([1, 2, 1], 4).counts(step) for step in range(3)] == [[0, 0, 0], [1, 2, 1], [2, 4, 2]]


def test_shares_follow_samples_or_weights():
    assert bucket_shares([1, 0, 5], [0, 1, 2], None) == [1, 0, 5]
    shares = bucket_shares([10, 30, 0, 60], [0, 0, 1, 1], [0.25, 0.75])
    assert shares == [Fraction(1, 16), Fraction(3, 16), 0, Fraction(3, 4)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_schedule([1], 0), "units"),
        (lambda: make_schedule([0, 0], 1), "rates"),
        (lambda: make_schedule([1, -1], 1), "rates"),
        (lambda: make_schedule([1, 1], 1, sources=[0]), "sources"),
        (lambda: make_schedule([1], 1).counts(-1), "step"),
        (lambda: bucket_shares([1], [0, 1], None), "one label for each of 1"),
        (lambda: bucket_shares([1], [1], [1.0]), "labels 0 to 0"),
        (lambda: bucket_shares([1], [0], [float("nan")]), "weights"),
        (lambda: bucket_shares([1, 0], [0, 1], [1.0, 1.0]), "source 1 has weight 1.0 and no samples"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
