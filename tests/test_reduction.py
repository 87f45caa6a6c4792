"""Laws of reductions by sample: slow loops, masks of every accepted shape, and what hidden elements may hold."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensmini.packed import Layout, pack
from lensmini.reduction import (
    align_samples,
    element_mask,
    hide,
    holds,
    known_values,
    per_sample,
    reduce_samples,
)
from tests.strategies import grids, seeds, tensor

DOUBLE = torch.float64


@given(grids(), seeds(), st.sampled_from(["sum", "mean"]), st.booleans())
def test_every_sample_is_reduced_by_itself(sizes, seed, reduction, masked):
    layout = Layout.build(sizes)
    images = [tensor((3, h, w), seed + i, DOUBLE) for i, (h, w) in enumerate(sizes)]
    mask = pack([tensor((3, h, w), seed - i - 1) > 0 for i, (h, w) in enumerate(sizes)]) if masked else None
    kept = hide(pack(images), mask)
    got = reduce_samples(kept, reduction, mask=mask, layout=layout)
    for i, rows in enumerate(pack(images).split(layout.image_lengths)):
        values = rows.flatten().tolist()
        if mask is not None:
            seen = mask.split(layout.image_lengths)[i].flatten().tolist()
            values = [v for v, s in zip(values, seen, strict=True) if s]
        total = math.fsum(values)
        expected = total if reduction == "sum" else total / max(len(values), 1)
        assert got[i].item() == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), seeds())
def test_dense_tensors_of_any_rank(shape, seed):
    x = tensor(shape, seed, DOUBLE)
    torch.testing.assert_close(reduce_samples(x, "sum"), x.reshape(shape[0], -1).sum(1))
    torch.testing.assert_close(reduce_samples(x, "mean"), x.reshape(shape[0], -1).mean(1))
    for axes in range(1, len(shape) + 1):
        mask = tensor(shape[:axes], seed + 1) > 0
        full = element_mask(mask, x)
        assert full is not None and full.ndim == x.ndim
        wide = mask.reshape(*shape[:axes], *[1] * (len(shape) - axes)).expand(shape)
        assert torch.equal(full.expand(shape), wide)
        means = reduce_samples(hide(x, full), "mean", mask=full)
        for i in range(shape[0]):
            chosen = x[i][wide[i]] if x.ndim > 1 else x[i : i + 1][wide[i : i + 1]]
            torch.testing.assert_close(means[i], chosen.mean() if chosen.numel() else x.new_zeros(()))


def test_a_samples_bits_do_not_depend_on_how_many_there_are():
    # One long row alone would be summed in another order by a reduction of the whole tensor.
    x = tensor((5, 100_003), 0)
    whole = reduce_samples(x, "mean")
    for i in range(5):
        assert torch.equal(whole[i : i + 1], reduce_samples(x[i : i + 1], "mean"))
    assert reduce_samples(x[:0], "sum").shape == (0,)


def test_a_mask_of_ones_in_between_repeats():
    x = tensor((2, 3, 4, 5), 0)
    mask = tensor((2, 1, 4, 5), 1) > 0
    expected = (x * mask).flatten(1).sum(1) / (3 * mask.flatten(1).sum(1))
    full = element_mask(mask, x)
    torch.testing.assert_close(reduce_samples(hide(x, full), "mean", mask=full), expected)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_hidden_reaches_neither_value_nor_gradient(poison):
    x = torch.tensor([[1.0, poison], [poison, poison]], requires_grad=True)
    mask = torch.tensor([[True, False], [False, False]])
    loss = reduce_samples(hide(x, mask).square(), "mean", mask=mask)
    loss.sum().backward()
    assert loss.tolist() == [1.0, 0.0]
    assert x.grad is not None and x.grad.tolist() == [[2.0, 0.0], [0.0, 0.0]]


def test_a_packed_mask_may_be_of_samples_or_of_tokens():
    layout, x = Layout.build([(1, 2), (1, 3)]), tensor((5, 2), 0)
    by_sample = element_mask(torch.tensor([True, False]), x, layout=layout)
    by_token = element_mask(torch.tensor([True, True, False, False, False]), x, layout=layout)
    assert by_sample is not None and by_token is not None and torch.equal(by_sample, by_token)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: element_mask(torch.ones(2), x), "mask: expected bool"),
        (lambda x: element_mask(torch.ones(3, dtype=torch.bool), x), "mask: expected one per sample"),
        (lambda x: element_mask(torch.ones(1, 3, dtype=torch.bool), x), "mask: expected one per sample"),
        (lambda x: element_mask(torch.ones((), dtype=torch.bool), x), "mask: expected one per sample"),
        (lambda x: reduce_samples(x, "median"), "reduction"),
        (lambda x: reduce_samples(x, "sum", layout=Layout.build([(1, 5)])), r"values: expected shape \[N"),
        (lambda x: per_sample("r", x, 2, torch.float32), r"r: expected shape \[b\]"),
        (lambda x: per_sample("r", torch.ones(2, dtype=torch.int64), 2, torch.float32), "r: expected floating"),
    ],
)
def test_nonsense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))


def test_a_condition_that_cannot_be_looked_at_holds():
    assert holds(torch.tensor([True])) and not holds(torch.tensor([True, False]))
    assert holds(torch.zeros(2, device="meta") > 1)
    seen = torch.func.vmap(lambda x: x + float(holds(x > 1)))(torch.zeros(3))
    assert seen.tolist() == [1.0, 1.0, 1.0]


def test_aligned_samples_share_a_dtype_and_lose_what_is_hidden():
    a, b = torch.tensor([[1.0], [math.nan]]).bfloat16(), torch.ones(2, 1, dtype=DOUBLE)
    (first, second), mask = align_samples(torch.tensor([True, False]), None, a=a, b=b)
    assert first.dtype == second.dtype == DOUBLE and first.tolist() == second.tolist() == [[1.0], [0.0]]
    assert mask is not None and mask.shape == (2, 1)
    (alone,), none = align_samples(None, None, a=a)
    assert alone.dtype == torch.float32 and none is None
    with pytest.raises(ValueError, match="b: expected the shape of a"):
        align_samples(None, None, a=a, b=b[:1])


def test_a_value_must_be_known_where_any_element_of_its_sample_counts():
    layout, x = Layout.build([(1, 2), (1, 3)]), torch.zeros(5, 2)
    value = torch.tensor([0.5, math.nan])
    for mask in (torch.tensor([True, False]), torch.tensor([True, False, False, False, False])):
        assert known_values("r", value, mask, x, layout).tolist() == [0.5, 0.0]
    with pytest.raises(ValueError, match="r: expected finite"):
        known_values("r", value, torch.tensor([True, False, True, False, False]), x, layout)
    with pytest.raises(ValueError, match="r: expected finite"):
        known_values("r", value, None, x, layout)
