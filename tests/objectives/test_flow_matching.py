"""Laws of the flow-matching loss: one mean squared error per sample, packed or not, and its minimiser."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lensmini.objectives import flow_matching_loss
from lensmini.packed import Layout, pack
from lensmini.paths import interpolate, velocity_target
from tests.oracle import Gaussian
from tests.strategies import grids, seeds, tensor


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), seeds())
def test_every_sample_gets_its_own_mean_squared_error(shape, seed):
    velocity, target = tensor(shape, seed), tensor(shape, seed + 1)
    expected = torch.stack([F.mse_loss(a, b) for a, b in zip(velocity, target, strict=True)])
    loss = flow_matching_loss(velocity, target)
    assert loss.shape == (shape[0],)
    torch.testing.assert_close(loss, expected)


@given(grids(), seeds())
def test_packed_equals_every_image_alone_whatever_its_size(sizes, seed):
    velocity = [tensor((3, h, w), seed + index) for index, (h, w) in enumerate(sizes)]
    target = [tensor((3, h, w), seed - index) for index, (h, w) in enumerate(sizes)]
    expected = torch.stack([F.mse_loss(a, b) for a, b in zip(velocity, target, strict=True)])
    loss = flow_matching_loss(pack(velocity), pack(target), layout=Layout.build(sizes))
    torch.testing.assert_close(loss, expected)


def test_a_batch_split_into_parts_gives_the_same_losses():
    velocity, target = tensor((6, 4, 3, 3), 0), tensor((6, 4, 3, 3), 1)
    parts = [flow_matching_loss(a, b) for a, b in zip(velocity.split(2), target.split(2), strict=True)]
    assert torch.equal(flow_matching_loss(velocity, target), torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_half_precision_is_compared_in_float32(dtype, packed):
    layout = Layout.build([(8, 8), (8, 8)]) if packed else None
    shape = (128, 4) if packed else (2, 64, 4)
    velocity, target = tensor(shape, 0, dtype), tensor(shape, 1, dtype)
    loss = flow_matching_loss(velocity, target, layout=layout)
    exact = (velocity.double() - target.double()).square().reshape(2, -1).mean(1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    # A mixed pair is not rounded to the narrower type first.
    wide = tensor(shape, 1)
    mixed = flow_matching_loss(velocity, wide, layout=layout)
    torch.testing.assert_close(
        mixed.double(), (velocity.double() - wide.double()).square().reshape(2, -1).mean(1), rtol=1e-6, atol=0
    )


def test_float64_stays_float64_and_gradients_are_right():
    velocity, target = tensor((4, 3), 0, torch.float64).requires_grad_(), tensor((4, 3), 1, torch.float64)
    assert flow_matching_loss(velocity, target).dtype == torch.float64
    layout = Layout.build([(1, 3), (1, 1)])
    assert torch.autograd.gradcheck(lambda x: flow_matching_loss(x, target), velocity)
    assert torch.autograd.gradcheck(lambda x: flow_matching_loss(x, target, layout=layout), velocity)


def test_the_least_loss_of_a_linear_model_is_at_the_closed_form_velocity():
    num, problem, t = 100_000, Gaussian(), torch.full((100_000,), 0.3, dtype=torch.float64)
    x0, noise = problem.mean + problem.std * tensor((num, 1), 0, torch.float64), tensor((num, 1), 1, torch.float64)
    noisy, target = interpolate(x0, noise, t), velocity_target(x0, noise)
    ends = problem.velocity(torch.tensor([[0.0], [1.0]], dtype=torch.float64), 0.3)
    coefficients = torch.stack([ends[0], ends[1] - ends[0]]).requires_grad_()
    flow_matching_loss(coefficients[0] + coefficients[1] * noisy, target).mean().backward()
    # Away from the minimum the gradient is of order 1; there it is only sampling noise of order 1/sqrt(num).
    assert coefficients.grad.abs().max() < 0.02


@pytest.mark.parametrize("other", [(1, 3), (4, 1), (4, 3, 1), (3,), (4, 2)])
def test_shapes_that_differ_are_refused_even_if_they_broadcast(other):
    with pytest.raises(ValueError, match="target: expected the shape of velocity"):
        flow_matching_loss(torch.zeros(4, 3), torch.zeros(other))


def test_a_wrong_layout_scalars_and_integers_are_refused():
    with pytest.raises(ValueError, match="expected shape"):
        flow_matching_loss(torch.zeros(4, 3), torch.zeros(4, 3), layout=Layout.build([(1, 5)]))
    with pytest.raises(ValueError, match="velocity: expected shape"):
        flow_matching_loss(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match="target: expected floating point"):
        flow_matching_loss(torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64))


def test_vmap_and_compile_see_the_same_function_and_inputs_stay():
    velocity, target, layout = tensor((5, 4, 3), 0), tensor((5, 4, 3), 1), Layout.build([(1, 3), (1, 1)])
    copies = velocity.clone(), target.clone()
    expected = torch.stack([flow_matching_loss(a, b) for a, b in zip(velocity, target, strict=True)])
    torch.testing.assert_close(torch.func.vmap(flow_matching_loss)(velocity, target), expected)
    compiled = torch.compile(flow_matching_loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(velocity[0], target[0]), expected[0])
    packed = torch.stack([expected[0, :3].mean(), expected[0, 3]])
    torch.testing.assert_close(compiled(velocity[0], target[0], layout=layout), packed)
    assert torch.equal(velocity, copies[0]) and torch.equal(target, copies[1])
