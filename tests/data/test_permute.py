"""Laws of the keyed shuffles: bijections, each position alone, and even over all orders."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lensmini.data.permute import derive_key, inverse_permute, permute, permute_windows

KEYS = st.integers(0, 2**64 - 1)
# 0.1 % points of chi-square: a fixed seed either passes for ever or is a finding.
LIMIT = 3.1


def chi_square_is_plausible(counts, cells):
    """Counts over equally likely cells, within 3.1 standard deviations of chi-square's mean on either side."""
    counts = np.asarray(counts, np.float64)
    expected = counts.sum() / cells
    statistic = ((counts - expected) ** 2 / expected).sum() + (cells - len(counts)) * expected
    free = cells - 1
    # Wilson and Hilferty: the cube root of chi-square over its degrees of freedom is nearly normal.
    z = ((statistic / free) ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))
    return abs(z) < LIMIT


@given(st.integers(1, 3000), KEYS)
@example(1, 0)
@example(64, 1)
@example(65, 1)
@example(2048, 2**64 - 1)
def test_every_position_is_hit_once(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(st.integers(1, 2**62), KEYS, st.lists(st.integers(0, 2**62), min_size=1, max_size=20))
@example(2**32, 3, [0, 2**32 - 1])
@example(2**32 + 1, 3, [0, 2**32])
@example(2**53 + 1, 3, [0, 2**53])
def test_the_inverse_undoes_it_in_any_domain(n, key, numbers):
    positions = np.array([number % n for number in numbers])
    there = permute(positions, n, key)
    assert there.dtype == np.int64 and there.min() >= 0 and there.max() < n
    assert np.array_equal(inverse_permute(there, n, key), positions)
    assert np.array_equal(permute(inverse_permute(positions, n, key), n, key), positions)


@given(st.lists(st.tuples(st.integers(1, 2**40), KEYS, st.integers(0, 2**40)), min_size=1, max_size=12))
def test_arrays_of_domains_and_keys_are_the_single_calls(rows):
    n, keys = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], np.uint64)
    i = np.array([row[2] % row[0] for row in rows])
    single = [int(permute(int(a), int(b), int(c))) for a, b, c in zip(i, n, keys, strict=True)]
    assert permute(i, n, keys).tolist() == single
    grid = permute(i[:1, None], n.max(), keys[None])
    assert grid.shape == (1, len(rows))
    assert grid[0].tolist() == [int(permute(int(i[0]), int(n.max()), int(key))) for key in keys]


def test_a_long_call_is_its_pieces():
    n, key = 1_000_003, 11
    positions = np.arange(100_000, 200_000)
    whole = permute(positions, n, key)
    some = np.random.default_rng(0).integers(0, len(positions), 50)
    assert whole[some].tolist() == [int(permute(int(positions[k]), n, key)) for k in some]


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_a_small_domain_are_equally_likely(n):
    orders = permute(np.arange(n)[None], n, derive_key(3, np.arange(24_000))[:, None])
    seen = Counter(map(tuple, orders.tolist()))
    assert chi_square_is_plausible(list(seen.values()), math.factorial(n))


@pytest.mark.parametrize("n", [8, 37, 64, 200])
@pytest.mark.parametrize("pair", [(0, 1), (3, 7), (0, -1)])
def test_a_pair_of_positions_lands_on_all_pairs_alike(n, pair):
    keys = derive_key(5, np.arange(40 * n * (n - 1)))[:100_000]
    first, second = (permute(position % n, n, keys) for position in pair)
    assert chi_square_is_plausible(np.bincount(first, minlength=n), n)
    assert chi_square_is_plausible(np.bincount((first - second) % n, minlength=n)[1:], n - 1)


@pytest.mark.parametrize("n", [20_001, 2**20 + 1, 800_000_000, 2**40])
def test_neighbours_are_spread_over_a_large_domain(n):
    # Few of all, or drawing without replacement would make the counts too even.
    values = permute(np.arange(min(5000, n // 20)), n, derive_key(1, n))
    assert chi_square_is_plausible(np.bincount(values * 50 // n, minlength=50), 50)
    assert chi_square_is_plausible(np.bincount((np.diff(values) % n) * 50 // n, minlength=50), 50)
    # Low digits too: a permutation that only swaps high ones would be even above.
    assert chi_square_is_plausible(np.bincount(values % 16, minlength=16), 16)


def test_keys_are_unrelated():
    orders = [permute(np.arange(1000), 1000, key) for key in range(30)]
    # Two random orders agree at one position of all on average, and in more than 7 once in 10^6.
    assert max((a == b).sum() for index, a in enumerate(orders) for b in orders[:index]) <= 9


@given(st.integers(1, 400), st.integers(1, 500), KEYS)
@example(23, 5, 5)
@example(20, 5, 1)
@example(3, 7, 0)
def test_windows_are_a_bijection_that_finishes_each_window_first(n, window, key):
    order = permute_windows(np.arange(n), n, window, key)
    assert np.array_equal(np.sort(order), np.arange(n))
    visited = order // window
    assert len(set(visited.tolist())) == 1 + int((np.diff(visited) != 0).sum())
    alone = [int(permute_windows(position, n, window, key)) for position in range(min(n, 30))]
    assert order[:30].tolist() == alone
    keys = derive_key(key, np.arange(3))
    together = permute_windows(np.arange(n)[:, None], n, window, keys)
    assert together.T.tolist() == [permute_windows(np.arange(n), n, window, int(one)).tolist() for one in keys]


def test_windows_and_their_insides_are_shuffled_by_keys():
    n, window = 8 * 5 + 3, 5
    orders = np.array([permute_windows(np.arange(n), n, window, int(key)) for key in derive_key(2, np.arange(700))])
    assert chi_square_is_plausible(np.bincount(orders[:, 0] // window, minlength=9), 9)
    whole = orders[:, 0] < 40
    inside = orders[whole, :5] % window
    assert chi_square_is_plausible(np.bincount(inside[:, 0] * 5 + inside[:, 1])[[1, 2, 3, 4, 5, 7, 8]], 7)
    # A window's own order differs from the next one's: equal first offsets only one time in five.
    same = (orders[:, 0] < 40) & (orders[:, 5] < 40) & (orders[:, 0] % 5 == orders[:, 5] % 5)
    share = same.sum() / ((orders[:, 0] < 40) & (orders[:, 5] < 40)).sum()
    assert abs(share - 0.2) < 0.06


def test_keys_derive_from_every_number_in_order():
    keys = [derive_key(0), derive_key(1), derive_key(0, 0), derive_key(0, 1), derive_key(1, 0), derive_key(0, 0, 0)]
    assert len({*keys, derive_key(-1), derive_key(0, -1)}) == 8
    assert derive_key(2**64 + 5, 1) == derive_key(5, 1)
    together = derive_key(np.arange(3)[:, None], 4, np.arange(2))
    assert together.dtype == np.uint64
    assert together.tolist() == [[derive_key(a, 4, b) for b in range(2)] for a in range(3)]


def test_splitmix_is_the_published_one():
    # First outputs of SplitMix64 from seed 1234567, as published with the reference implementation.
    assert derive_key(1234567) == 6457827717110365317


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: permute(5, 5, 0), r"i: expected positions in \[0, n\)"),
        (lambda: permute(-1, 5, 0), "i: expected positions"),
        (lambda: permute([0], 0, 0), "n: expected 1 to"),
        (lambda: permute([0], 2**62 + 1, 0), "n: expected 1 to"),
        (lambda: permute([0.5], 5, 0), "i: expected integers"),
        (lambda: permute([0], 5, 0.5), "key: expected integers"),
        (lambda: permute_windows([0], 5, 0, 1), "window"),
        (lambda: permute_windows([5], 5, 2, 1), "i: expected positions"),
        (lambda: derive_key("a"), "seed: expected integers"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_positions_are_no_error():
    assert permute([], 5, 0).shape == (0,)
    assert permute_windows([], 5, 2, 0).shape == (0,)
