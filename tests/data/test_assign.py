"""Laws of dealing samples to slots: nothing lost, never over the cap, nearly even."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lensmini.data.assign import always_fits, assign_slots


def slow_assign(tokens, costs, num_slots, cap):
    """Largest first, a plain loop over all slots."""
    slots = [[] for _ in range(num_slots)]
    for item in sorted(range(len(tokens)), key=lambda i: (-tokens[i], -costs[i], i)):
        room = [s for s in range(num_slots) if cap is None or sum(tokens[i] for i in slots[s]) + tokens[item] <= cap]
        if not room:
            return None
        slots[min(room, key=lambda s: (sum(costs[i] for i in slots[s]), s))].append(item)
    return slots


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50)), min_size=1, max_size=40),
    st.integers(1, 6),
    st.one_of(st.none(), st.integers(0, 12)),
)
@example([(9, 1), (8, 50), (3, 1), (1, 1)], 2, 0)
@example([(2, 1), (2, 5), (2, 3), (2, 4)], 2, None)
def test_dealing_is_the_slow_reference(items, num_slots, spare):
    # Integer costs, so that sums do not depend on their order; unrelated to the tokens.
    tokens, costs = [item[0] for item in items], [item[1] for item in items]
    # From a cap that just holds all to a loose one, where slots are full for some samples and not for others.
    cap = None if spare is None else -(-sum(tokens) // num_slots) + spare
    expected = slow_assign(tokens, costs, num_slots, cap)
    arguments = (np.array(tokens), np.array(costs, np.float64), num_slots, cap)
    if expected is None:
        with pytest.raises(ValueError, match="max_tokens: no slot of"):
            assign_slots(*arguments)
        return
    order, offsets = assign_slots(*arguments)
    assert [order[a:b].tolist() for a, b in pairwise(offsets)] == expected


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 8))
def test_no_slot_takes_more_than_grahams_bound(costs, num_slots):
    order, offsets = assign_slots(np.array(costs), np.array(costs, np.float64), num_slots)
    for start, end in pairwise(offsets.tolist()):
        if end - start > 1:
            # The last one came to the lightest slot, which had no more than the mean of what was dealt.
            last = min(costs[i] for i in order[start:end])
            assert sum(costs[i] for i in order[start:end]) - last <= (sum(costs) - last) / num_slots
    assert len(costs) < num_slots or min(np.diff(offsets)) > 0


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=5),
    st.integers(1, 5),
    st.integers(1, 60),
    st.integers(0, 2**32 - 1),
)
def test_what_always_fits_does_fit(kinds, num_slots, cap, seed):
    tokens, least = [kind[0] for kind in kinds], [kind[1] for kind in kinds]
    most = [low + kind[2] for low, kind in zip(least, kinds, strict=True)]
    random = np.random.default_rng(seed)
    counts = [int(random.integers(low, high + 1)) for low, high in zip(least, most, strict=True)]
    if not always_fits(tokens, least, most, sum(counts), num_slots, cap):
        return
    # Samples may also be smaller than the most that their kind allows.
    sizes = np.repeat(tokens, counts)
    for items in (sizes, np.maximum(1, sizes - random.integers(0, 5, len(sizes)))):
        order, offsets = assign_slots(items, random.random(len(items)) + 0.1, num_slots, cap)
        assert all(items[order[a:b]].sum() <= cap for a, b in pairwise(offsets))


def test_always_fits_is_no_more_pessimistic_than_it_says():
    # Exactly full slots of one size, and many small ones up to the last token.
    assert always_fits([6], [0], [12], 12, num_slots=4, max_tokens=18)
    assert not always_fits([6], [0], [13], 13, num_slots=4, max_tokens=18)
    assert always_fits([1], [0], [100], 100, num_slots=4, max_tokens=25)
    assert not always_fits([30], [1], [1], 1, num_slots=4, max_tokens=29)
    # Of 8 samples at most 2 are large: the rest leave room.
    assert always_fits([10, 1], [0, 6], [8, 8], 8, num_slots=2, max_tokens=13)
