"""Laws of evening out: the same samples, never worse, never over the cap, and no exchange left that gains."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lensmini.data.assign import assign_slots
from lensmini.data.exchange import even_out

ITEMS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 50)), min_size=1, max_size=40)


def contents(order, offsets):
    return [order[begin:end].tolist() for begin, end in pairwise(offsets.tolist())]


DEALT = st.tuples(st.integers(1, 30), st.integers(1, 50), st.integers(0, 5))


# Nothing may go over to the cheaper slot, because it is full of tokens; what comes back would not fit.
@example([(1, 10, 0), (1, 10, 0), (20, 1, 1)], 2, 0)
@example([(10, 20, 0), (10, 10, 0), (15, 5, 1), (5, 1, 1)], 2, 0)
@given(st.lists(DEALT, min_size=1, max_size=40), st.integers(1, 6), st.one_of(st.none(), st.integers(0, 12)))
def test_evening_out_keeps_samples_cap_and_filled_slots_and_never_makes_it_worse(items, num_slots, spare):
    tokens, costs = np.array([item[0] for item in items]), np.array([float(item[1]) for item in items])
    # Any dealing may come in, not only a good one.
    slot_of = np.array([item[2] % num_slots for item in items])
    order = np.argsort(slot_of, kind="stable")
    offsets = np.cumsum([0, *np.bincount(slot_of, minlength=num_slots)])
    before = contents(order, offsets)
    cap = None if spare is None else max(int(tokens[slot].sum()) for slot in before) + spare
    copies = order.copy(), offsets.copy()
    after = contents(*even_out(order, offsets, tokens, costs, cap))
    assert np.array_equal(order, copies[0]) and np.array_equal(offsets, copies[1])
    assert sorted(index for slot in after for index in slot) == list(range(len(items)))
    assert max(costs[slot].sum() for slot in after) <= max(costs[slot].sum() for slot in before)
    assert cap is None or max(tokens[slot].sum() for slot in after) <= cap
    assert all(new for old, new in zip(before, after, strict=True) if old)


def gains(slots, tokens, costs, cap):
    """What one exchange between the most expensive slot and the cheapest can take off the dearer of the two, slowly."""
    loads = [sum(costs[i] for i in slot) for slot in slots]
    heavy, light = int(np.argmax(loads)), int(np.argmin(loads))
    held = [sum(tokens[i] for i in slots[index]) for index in (heavy, light)]
    for one in slots[heavy]:
        for other in [*slots[light], None]:
            cost = costs[one] - (0 if other is None else costs[other])
            size = tokens[one] - (0 if other is None else tokens[other])
            fits = cap is None or (held[0] - size <= cap and held[1] + size <= cap)
            if fits and (other is not None or len(slots[heavy]) > 1):
                yield loads[heavy] - max(loads[heavy] - cost, loads[light] + cost)


TOKENS = (11, 9, 4, 29, 19, 21, 29, 24, 28, 3, 19, 26, 17, 6, 11, 27, 19, 25)
COSTS = (3, 2, 1, 1, 1, 1, 1, 1, 1, 50, 2, 2, 3, 3, 1, 50, 50, 3)


@example([*zip(TOKENS, COSTS, strict=True)], 2, None)
@given(ITEMS, st.integers(2, 5), st.one_of(st.none(), st.integers(0, 12)))
def test_no_exchange_with_the_cheapest_slot_is_left_that_gains(items, num_slots, spare):
    assume(len(items) >= num_slots)
    tokens, costs = np.array([item[0] for item in items]), np.array([float(item[1]) for item in items])
    cap = None if spare is None else -(-int(tokens.sum()) // num_slots) + spare
    try:
        order, offsets = assign_slots(tokens, costs, num_slots, cap)
    except ValueError:
        assume(False)
    # One call stops after four exchanges a slot; what it leaves, more calls take up.
    for _ in range(20):
        order, offsets = even_out(order, offsets, tokens, costs, cap)
    slots = contents(order, offsets)
    assert max(gains(slots, tokens, costs, cap), default=0) <= 1e-3 * costs.sum() / num_slots


def test_a_cheap_slot_that_cannot_help_does_not_end_it():
    # The cheapest slot is full of tokens; the second cheapest has room.
    tokens, costs = np.array([5, 5, 5, 20, 2]), np.array([10.0, 10.0, 10.0, 1.0, 2.0])
    order, offsets = even_out(np.arange(5), np.array([0, 3, 4, 5]), tokens, costs, 20)
    assert sorted(costs[slot].sum() for slot in contents(order, offsets)) == [1, 12, 20]


def test_many_exchanges_even_out_many_slots():
    random = np.random.default_rng(0)
    costs = random.lognormal(0, 1, 900)
    slot_of = np.minimum(random.geometric(0.08, 900) - 1, 29)
    order = np.argsort(slot_of, kind="stable")
    offsets = np.cumsum([0, *np.bincount(slot_of, minlength=30)])
    loads = [costs[slot].sum() for slot in contents(*even_out(order, offsets, np.ones(900, int), costs))]
    assert max(loads) < 1.5 * costs.sum() / 30 < 2 * costs[slot_of == 0].sum()


def test_what_largest_first_leaves_uneven_becomes_even():
    # The textbook case: 7 5 | 6 5 | 4 4 4 would do, largest first gives 7 4, 6 4, 5 5 and one 4 more.
    costs = np.array([7.0, 6, 5, 5, 4, 4, 4])
    tokens = costs.astype(np.int64)
    dealt = assign_slots(tokens, costs, 3)
    assert max(costs[slot].sum() for slot in contents(*dealt)) == 14
    assert max(costs[slot].sum() for slot in contents(*even_out(*dealt, tokens, costs))) == 12


@pytest.mark.parametrize("num_slots", [1, 4])
def test_one_slot_and_equal_samples_stay_as_they_are(num_slots):
    tokens, costs = np.full(8, 3), np.full(8, 2.0)
    dealt = assign_slots(tokens, costs, num_slots)
    evened = even_out(*dealt, tokens, costs)
    assert contents(*evened) == contents(*dealt)
