import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lensmini.packed import Layout
from lensmini.segments import _member_sum, expand_rows, segment_sum
from tests.strategies import grids, layouts, seeds, tensor

# Two routes to a segment sum: the loop of the CPU, and the product that other devices take.
ROUTES = [segment_sum, lambda values, samples, offsets: _member_sum(values, samples, len(offsets) - 1)]
ROUNDING = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-6, "atol": 1e-6},
    # Rounded once, from a wider sum: 2^-8 of the result, not of its terms.
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-6},
}
STREAMS = st.sampled_from(["image", "text"])
DTYPES = st.sampled_from([*ROUNDING])
TRAILING = st.lists(st.integers(1, 3), max_size=2)


@given(layouts(), STREAMS, TRAILING, seeds(), DTYPES)
@example(Layout.build([(1, 2), (2, 1)], text_lengths=[0, 0]), "text", [2], 0, torch.float32)
@example(Layout.build([(1, 2), (2, 1)], text_lengths=[0, 3]), "text", [], 0, torch.float32)
def test_expanded_rows_and_their_gradient_are_those_of_a_gather(layout, stream, trailing, seed, dtype):
    samples, offsets = getattr(layout, f"{stream}_samples"), getattr(layout, f"{stream}_offsets")
    values = tensor((layout.batch_size, *trailing), seed, dtype).requires_grad_()
    expanded = expand_rows(values, samples, offsets)
    gathered = values[samples]
    assert torch.equal(expanded, gathered)
    weight = tensor(gathered.shape, seed + 1, dtype)
    (gradient,) = torch.autograd.grad(expanded, values, weight)
    (expected,) = torch.autograd.grad(values.double()[samples], values, weight.double())
    assert gradient.shape == values.shape
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), expected.double(), **ROUNDING[dtype])


@pytest.mark.parametrize("route", ROUTES, ids=["loop", "product"])
@given(layouts(), STREAMS, st.integers(1, 3), seeds(), DTYPES)
def test_segment_sums_are_those_of_a_scatter(route, layout, stream, width, seed, dtype):
    samples, offsets = getattr(layout, f"{stream}_samples"), getattr(layout, f"{stream}_offsets")
    values = tensor((len(samples), width), seed, dtype)
    expected = torch.zeros(layout.batch_size, width, dtype=torch.float64).index_add_(0, samples, values.double())
    sums = route(values, samples, offsets)
    assert sums.dtype == dtype
    torch.testing.assert_close(sums.double(), expected, **ROUNDING[dtype])


@pytest.mark.parametrize("route", ROUTES, ids=["loop", "product"])
@given(grids(min_size=2), seeds(), st.data())
def test_what_is_not_finite_stays_in_its_sample(route, pairs, seed, data):
    bad = data.draw(st.integers(0, len(pairs) - 1))
    layout = Layout.build(pairs)
    values = tensor((layout.num_image_tokens, 2), seed)
    before = route(values, layout.image_samples, layout.image_offsets)
    values[layout.image_offsets[bad], 0] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    after = route(values, layout.image_samples, layout.image_offsets)
    clean = [i for i in range(len(pairs)) if i != bad]
    torch.testing.assert_close(after[clean], before[clean], rtol=0, atol=0)
    assert not after[bad, 0].isfinite()


@pytest.mark.parametrize("stream", ["image", "text"])
@pytest.mark.parametrize("mask", [[[True, False], [False, False], [True, True]], [[False], [False], [False]]])
def test_custom_operators_have_exact_first_and_second_derivatives(stream, mask):
    layout = Layout.build([(1, 2), (2, 2), (1, 1)], text_mask=torch.tensor(mask))
    samples, offsets = getattr(layout, f"{stream}_samples"), getattr(layout, f"{stream}_offsets")
    tokens = tensor((len(samples), 2), 0, torch.float64).requires_grad_()
    for shape in [(3,), (3, 2), (3, 2, 2)]:
        rows = tensor(shape, 1, torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: expand_rows(x, samples, offsets).square(), rows)
        assert torch.autograd.gradgradcheck(lambda x: expand_rows(x, samples, offsets).square(), rows)
    assert torch.autograd.gradcheck(lambda x: segment_sum(x, samples, offsets).square(), tokens)
    assert torch.autograd.gradgradcheck(lambda x: segment_sum(x, samples, offsets).square(), tokens)


def test_segment_sum_keeps_the_promises_of_a_custom_operator():
    layout = Layout.build([(1, 2), (2, 2)])
    for dtype in (torch.float32, torch.bfloat16):
        values = tensor((6, 3), 0, dtype).requires_grad_()
        torch.library.opcheck(
            torch.ops.lensmini.segment_sum.default, (values, layout.image_samples, layout.image_offsets)
        )


@given(layouts(), seeds())
def test_inputs_are_not_modified(layout, seed):
    values = tensor((layout.num_image_tokens, 2), seed)
    before = values.clone()
    for route in ROUTES:
        route(values, layout.image_samples, layout.image_offsets)
    assert torch.equal(values, before)


def test_a_wrong_number_of_rows_is_refused_by_name():
    layout = Layout.build([(1, 2), (2, 2)])
    with pytest.raises(ValueError, match="values.*N=6"):
        segment_sum(torch.zeros(5, 2), layout.image_samples, layout.image_offsets)
    with pytest.raises(ValueError, match="values.*b=2"):
        expand_rows(torch.zeros(3, 2), layout.image_samples, layout.image_offsets)
