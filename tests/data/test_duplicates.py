"""Laws of near-duplicates: equal to a double loop, whatever the blocks, the index and the order of arrival."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lensmini.data.filters import find_duplicates
from tests.strategies import seeds

INDEXES = ["exact", "faiss"]


def crowd(num, seed, width=6):
    """Directions in a few tight groups, so that many pairs are on either side of the limit."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(1, num // 4), width, generator=generator)
    rows = centres[torch.randint(0, len(centres), (num,), generator=generator)]
    return rows + 0.15 * torch.randn(num, width, generator=generator)


def slow(rows, limit, priority, against):
    rows = torch.nn.functional.normalize(rows.double(), dim=1)
    others = torch.nn.functional.normalize(against.double(), dim=1)
    kept, found = [], [-1] * len(rows)
    for index in sorted(range(len(rows)), key=lambda index: (-priority[index].item(), index)):
        candidates = {len(rows) + j: (rows[index] @ other).item() for j, other in enumerate(others)}
        candidates |= {other: (rows[index] @ rows[other]).item() for other in kept}
        close = {other: cosine for other, cosine in candidates.items() if cosine > limit}
        # Rounding decides between cosines this close to the limit: such cases are not for a law.
        if any(abs(cosine - limit) < 1e-6 for cosine in candidates.values()):
            return None
        if close:
            found[index] = max(close, key=lambda other: close[other])
        else:
            kept.append(index)
    return found


@pytest.mark.parametrize("index", INDEXES)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(0, 8), seeds(), st.sampled_from([1, 3, 7, 64]), st.floats(0.7, 0.99))
def test_it_is_the_double_loop(index, num, others, seed, chunk, limit):
    if index == "faiss":
        pytest.importorskip("faiss")
    rows, against = crowd(num, seed), crowd(others, seed + 1)
    priority = torch.randint(0, 4, (num,), generator=torch.Generator().manual_seed(seed)).float()
    expected = slow(rows, limit, priority, against)
    if expected is None:
        return
    found = find_duplicates(rows, max_cosine=limit, priority=priority, against=against, index=index, chunk=chunk)
    everything = torch.nn.functional.normalize(torch.cat([rows, against]), dim=1)
    for row, (mine, theirs) in enumerate(zip(found.duplicate_of.tolist(), expected, strict=True)):
        assert (mine < 0) == (theirs < 0)
        if mine >= 0:
            # Two keepers may be equally close but for rounding.
            cosines = everything[row] @ everything[[mine, theirs]].T
            assert (cosines[0] - cosines[1]).abs() < 1e-5 and (found.cosine[row] - cosines[1]).abs() < 1e-5
    assert found.keep.equal(found.duplicate_of < 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), seeds(), st.floats(0.8, 0.99))
def test_kept_ones_are_apart_and_each_other_is_close_to_a_kept_one(num, seed, limit):
    rows = crowd(num, seed)
    found = find_duplicates(rows, max_cosine=limit, chunk=8)
    unit = torch.nn.functional.normalize(rows, dim=1)
    kept = unit[found.keep]
    cosines = kept @ kept.T - 2 * torch.eye(len(kept))
    assert cosines.max() <= limit + 1e-6
    for row in (~found.keep).nonzero().flatten().tolist():
        keeper = int(found.duplicate_of[row])
        assert found.keep[keeper] and unit[row] @ unit[keeper] > limit - 1e-6


def test_planted_copies_go_and_the_best_of_each_stays():
    base = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([base, 3.0 * base, base + 0.001])
    priority = torch.cat([torch.zeros(50), torch.ones(50), torch.zeros(50)])
    found = find_duplicates(rows, priority=priority, chunk=16)
    assert found.keep.nonzero().flatten().tolist() == list(range(50, 100))
    assert found.duplicate_of[:50].tolist() == found.duplicate_of[100:].tolist() == list(range(50, 100))


def test_a_chain_of_small_steps_does_not_swallow_its_ends():
    angles = torch.arange(0, 90, 5) * torch.pi / 180
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    limit = float(torch.tensor(7 * torch.pi / 180).cos())
    # Every other one is 10 degrees from the next: all those stay.
    assert find_duplicates(rows, max_cosine=limit).keep.tolist() == [index % 2 == 0 for index in range(18)]


def test_finding_in_parts_is_finding_at_once():
    rows = crowd(120, 3)
    whole = find_duplicates(rows, max_cosine=0.95)
    first = find_duplicates(rows[:70], max_cosine=0.95)
    second = find_duplicates(rows[70:], max_cosine=0.95, against=rows[:70][first.keep])
    assert torch.cat([first.keep, second.keep]).equal(whole.keep)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_rows_without_a_direction_are_named(bad):
    rows = torch.ones(4, 3)
    rows[2] = bad
    with pytest.raises(ValueError, match=r"embeddings: .*rows \[2\]"):
        find_duplicates(rows)
    with pytest.raises(ValueError, match=r"against: .*rows \[2\]"):
        find_duplicates(torch.ones(2, 3), against=rows)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_cosine": 1.5}, "max_cosine"),
        ({"chunk": 0}, "chunk"),
        ({"index": "annoy"}, "index"),
        ({"priority": torch.zeros(3)}, "priority"),
        ({"priority": torch.full((4,), float("nan"))}, "priority"),
        ({"against": torch.ones(2, 5)}, "against"),
    ],
)
def test_arguments_are_checked(options, name):
    with pytest.raises(ValueError, match=name):
        find_duplicates(torch.ones(4, 3), **options)


@pytest.mark.slow
def test_twenty_thousand_take_little_memory():
    import resource

    rows = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    rows[10_000:] = rows[:10_000]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert find_duplicates(rows).keep.sum() == 10_000
    # All cosines at once would be 1.6 GB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000
