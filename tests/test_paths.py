"""Laws of the straight path: its ends, its derivative, what the velocity predicts, and packed = one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensmini.packed import Layout, pack
from lensmini.paths import (
    check_same_shape,
    check_time_range,
    clean_prediction,
    expand_time,
    interpolate,
    noise_prediction,
    velocity_target,
)
from tests.oracle import Gaussian, two_components
from tests.strategies import grids, seeds, tensor

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)
WITH_TIME = {"interpolate": interpolate, "clean": clean_prediction, "noise": noise_prediction}


def uniform(num, seed, dtype=torch.float64):
    return torch.rand(num, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(SHAPES, seeds(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_time_zero_is_the_data_and_time_one_the_noise_bit_for_bit(shape, seed, dtype):
    x, noise = tensor(shape, seed, dtype), tensor(shape, seed + 1, dtype)
    assert torch.equal(interpolate(x, noise, torch.zeros(shape[0])), x)
    assert torch.equal(interpolate(x, noise, torch.ones(shape[0])), noise)
    assert torch.equal(clean_prediction(x, noise, torch.zeros(shape[0])), x)
    assert torch.equal(noise_prediction(x, noise, torch.ones(shape[0])), x)


@given(SHAPES, seeds())
def test_every_sample_moves_to_its_own_time(shape, seed):
    x, noise, t = tensor(shape, seed, torch.float64), tensor(shape, seed + 1, torch.float64), uniform(shape[0], seed)
    expected = torch.stack([torch.lerp(a, b, time.item()) for a, b, time in zip(x, noise, t, strict=True)])
    torch.testing.assert_close(interpolate(x, noise, t), expected, rtol=1e-13, atol=1e-13)


def test_the_velocity_is_the_derivative_of_the_path_in_time():
    x, noise, t = tensor((3, 2, 2), 0, torch.float64), tensor((3, 2, 2), 1, torch.float64), uniform(3, 2)
    _, tangent = torch.func.jvp(lambda time: interpolate(x, noise, time), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(velocity_target(x, noise), tangent, rtol=1e-13, atol=1e-13)


@given(SHAPES, seeds())
def test_the_velocity_leads_back_to_both_ends_of_the_path(shape, seed):
    x, noise, t = tensor(shape, seed, torch.float64), tensor(shape, seed + 1, torch.float64), uniform(shape[0], seed)
    noisy, velocity = interpolate(x, noise, t), velocity_target(x, noise)
    torch.testing.assert_close(clean_prediction(noisy, velocity, t), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(noise_prediction(noisy, velocity, t), noise, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("problem", [Gaussian(), two_components()], ids=["gaussian", "mixture"])
def test_on_a_known_problem_the_velocity_gives_the_posterior_mean_and_the_score(problem):
    x, t = tensor((64, 2), 0, torch.float64), uniform(64, 1).clamp(0.02, 1)
    velocity = problem.velocity(x, t)
    mean = problem.posterior(x, t)[0] if isinstance(problem, Gaussian) else problem.posterior_mean(x, t)
    torch.testing.assert_close(clean_prediction(x, velocity, t), mean, rtol=1e-11, atol=1e-11)
    score = -noise_prediction(x, velocity, t) / t[:, None]
    torch.testing.assert_close(score, problem.score(x, t), rtol=1e-11, atol=1e-11)


def test_the_score_of_the_mixture_is_the_gradient_of_its_log_density():
    problem, t = two_components(), uniform(16, 1).clamp(0.1, 0.9)
    x = tensor((16, 2), 0, torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(problem.log_density(x, t).sum(), x)
    velocity = problem.velocity(x.detach(), t)
    score = -noise_prediction(x.detach(), velocity, t) / t[:, None]
    torch.testing.assert_close(score, gradient, rtol=1e-10, atol=1e-10)


def test_a_large_sample_of_the_path_has_the_gaussian_problems_velocity():
    # E[velocity_target | x_t] is linear here, so least squares on drawn pairs must find the closed form.
    num, t, problem = 200_000, 0.6, Gaussian()
    x0, noise = problem.mean + problem.std * tensor((num,), 0, torch.float64), tensor((num,), 1, torch.float64)
    noisy = interpolate(x0, noise, torch.full((num,), t, dtype=torch.float64))
    design = torch.stack([torch.ones_like(noisy), noisy], dim=1)
    fitted = torch.linalg.lstsq(design, velocity_target(x0, noise)[:, None]).solution[:, 0]
    ends = problem.velocity(torch.tensor([0.0, 1.0], dtype=torch.float64), t)
    torch.testing.assert_close(fitted, torch.stack([ends[0], ends[1] - ends[0]]), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("name", WITH_TIME)
@given(sizes=grids(), seed=seeds())
def test_packed_equals_every_sample_alone(name, sizes, seed):
    function, layout = WITH_TIME[name], Layout.build(sizes)
    first = [tensor((3, h, w), seed + index) for index, (h, w) in enumerate(sizes)]
    second = [tensor((3, h, w), seed - index) for index, (h, w) in enumerate(sizes)]
    t = uniform(len(sizes), seed, torch.float32)
    alone = [function(a[None], b[None], t[i : i + 1])[0] for i, (a, b) in enumerate(zip(first, second, strict=True))]
    assert torch.equal(function(pack(first), pack(second), t, layout=layout), pack(alone))


@pytest.mark.parametrize("name", WITH_TIME)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once_at_the_end(name, dtype):
    a, b, t = tensor((64, 8), 0, dtype), tensor((64, 8), 1, dtype), uniform(64, 2, torch.float32)
    result = WITH_TIME[name](a, b, t)
    exact = WITH_TIME[name](a.double(), b.double(), t.double())
    assert result.dtype == dtype
    half_ulp = torch.finfo(dtype).eps / 2
    assert ((result.double() - exact).abs() <= 1.01 * half_ulp * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("name", WITH_TIME)
def test_the_first_argument_sets_the_dtype_and_float64_is_kept(name):
    function, t = WITH_TIME[name], torch.full((2,), 1 / 3)
    for first in (torch.float64, torch.float32, torch.bfloat16):
        for second in (torch.float64, torch.bfloat16):
            assert function(tensor((2, 3), 0, first), tensor((2, 3), 1, second), t).dtype == first
    # In float64 the time is not rounded to float32 on the way: 1e-15, not 1e-8.
    wide, third = torch.full((1, 1), 3.0, dtype=torch.float64), torch.tensor([1 / 3], dtype=torch.float64)
    assert clean_prediction(wide, wide, third).item() == pytest.approx(2.0, abs=1e-14)
    assert velocity_target(tensor((2,), 0, torch.bfloat16), tensor((2,), 1)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", WITH_TIME)
def test_gradients_are_right_in_every_argument(name):
    a, b, t = tensor((3, 2), 0, torch.float64), tensor((3, 2), 1, torch.float64), uniform(3, 2).clamp(0.1, 0.9)
    inputs = tuple(x.requires_grad_() for x in (a, b, t))
    assert torch.autograd.gradcheck(WITH_TIME[name], inputs)
    layout = Layout.build([(1, 2), (1, 1)])
    assert torch.autograd.gradcheck(lambda x, y, time: WITH_TIME[name](x, y, time[:2], layout=layout), inputs)


@pytest.mark.parametrize("name", WITH_TIME)
def test_vmap_and_compile_see_the_same_function(name):
    function, layout = WITH_TIME[name], Layout.build([(1, 2), (1, 2)])
    a, b, t = tensor((5, 4, 3), 0), tensor((5, 4, 3), 1), uniform(20, 2, torch.float32).reshape(5, 4)
    expected = torch.stack([function(*row) for row in zip(a, b, t, strict=True)])
    assert torch.equal(torch.func.vmap(function)(a, b, t), expected)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert torch.equal(compiled(a[0], b[0], t[0]), expected[0])
    assert torch.equal(
        compiled(a[0], b[0], t[0, :2], layout=layout), function(a[0], b[0], t[0, :2].repeat_interleave(2))
    )


@pytest.mark.parametrize("name", WITH_TIME)
def test_inputs_stay_as_they_are(name):
    inputs = tensor((3, 2), 0), tensor((3, 2), 1), torch.tensor([0.0, 0.5, 1.0])
    copies = [x.clone() for x in inputs]
    result = WITH_TIME[name](*inputs)
    result.add_(1)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("name", WITH_TIME)
@pytest.mark.parametrize(
    ("a", "b", "t", "message"),
    [
        ((4, 3), (1, 3), torch.zeros(4), "expected the shape of"),
        ((4, 3), (4, 1), torch.zeros(4), "expected the shape of"),
        ((4, 3), (4, 3, 1), torch.zeros(4), "expected the shape of"),
        ((4, 3), (4, 3), torch.zeros(1), r"t: expected shape \[b\] with b=4"),
        ((4, 3), (4, 3), torch.zeros(3), r"t: expected shape \[b\] with b=4"),
        ((4, 3), (4, 3), torch.zeros(4, 1), r"t: expected shape \[b\] with b=4"),
        ((4, 3), (4, 3), torch.tensor(0.5), r"t: expected shape \[b\] with b=4"),
        ((4, 3), (4, 3), torch.zeros(4, dtype=torch.int64), "t: expected floating point times"),
        ((4, 3), (4, 3), torch.full((4,), 500.0), r"t: expected times in \[0, 1\]"),
        ((4, 3), (4, 3), torch.tensor([0, 0, 0, -1e-3]), r"t: expected times in \[0, 1\]"),
        ((4, 3), (4, 3), torch.tensor([0, 0, 0, torch.nan]), r"t: expected times in \[0, 1\]"),
    ],
)
def test_a_wrong_argument_is_named(name, a, b, t, message):
    with pytest.raises(ValueError, match=message):
        WITH_TIME[name](torch.zeros(a), torch.zeros(b), t)


def test_packed_latents_need_their_own_layout():
    tokens, layout = torch.zeros(6, 3), Layout.build([(2, 2), (1, 2)])
    assert interpolate(tokens, tokens, torch.zeros(2), layout=layout).shape == (6, 3)
    with pytest.raises(ValueError, match=r"t: expected shape \[b\] with b=6"):
        interpolate(tokens, tokens, torch.zeros(2))
    with pytest.raises(ValueError, match=r"latents: expected shape"):
        interpolate(tokens[:5], tokens[:5], torch.zeros(2), layout=layout)
    with pytest.raises(ValueError, match=r"t: expected shape \[b\] with b=2"):
        interpolate(tokens, tokens, torch.zeros(6), layout=layout)


def test_integer_images_are_refused_instead_of_truncated():
    image = torch.zeros(2, 3, dtype=torch.uint8)
    for call in (lambda: interpolate(image, torch.zeros(2, 3), torch.zeros(2)), lambda: velocity_target(image, image)):
        with pytest.raises(ValueError, match="expected floating point"):
            call()
    with pytest.raises(ValueError, match="latents: expected floating point"):
        expand_time(torch.zeros(2), image)


def test_the_checks_pass_what_is_right_and_name_what_is_not():
    check_same_shape("a", torch.zeros(2, 3), "b", torch.zeros(2, 3))
    check_time_range("t", torch.tensor([[0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"a: expected the shape of b \[3, 2\], got \[2, 3\]"):
        check_same_shape("a", torch.zeros(2, 3), "b", torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"steps: expected times in \[0, 1\]"):
        check_time_range("steps", torch.tensor([1.0001]))


@pytest.mark.parametrize("trailing", [(), (4,), (4, 8, 8)])
def test_expanded_times_broadcast_over_everything_but_the_sample(trailing):
    t = torch.tensor([0.0, 0.5, 1.0])
    assert expand_time(t, torch.zeros(3, *trailing)).shape == (3, *[1] * len(trailing))
    assert expand_time(t.bfloat16(), torch.zeros(3, *trailing, dtype=torch.bfloat16)).dtype == torch.float32
