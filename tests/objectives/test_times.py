"""Laws of the training times: the published centre, the logit-normal law, the open interval and private randomness."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, SigmoidTransform, TransformedDistribution

from lensmini.objectives import sample_times, training_mu
from tests.strategies import seeds


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("num_tokens", "mu"), [(256, 1.0), (1024, 1.06), (2304, 1.16), (4096, 1.3)])
def test_the_published_centres(num_tokens, mu):
    assert training_mu(num_tokens) == pytest.approx(mu, abs=1e-12)
    both = training_mu(torch.tensor([[num_tokens], [num_tokens]]))
    assert both.dtype == torch.float32 and both.shape == (2, 1)
    torch.testing.assert_close(both, torch.full((2, 1), mu), rtol=0, atol=1e-6)


def test_the_line_goes_on_outside_the_published_range():
    assert training_mu(256 + 2 * 3840) == pytest.approx(1.6, abs=1e-12)
    assert training_mu(1) == pytest.approx(1.0 - 0.3 * 255 / 3840, abs=1e-12)
    torch.testing.assert_close(training_mu(torch.tensor([16])), torch.tensor([1.0 - 0.3 / 16]))


@pytest.mark.parametrize("num_tokens", [0, -4, torch.tensor([1.5]), torch.tensor([True])])
def test_a_count_that_is_none_is_refused(num_tokens):
    with pytest.raises(ValueError, match="num_tokens"):
        training_mu(num_tokens)


@pytest.mark.parametrize(("mu", "std"), [(0.0, 1.0), (1.06, 1.0), (1.3, 0.5), (-0.7, 2.0)])
def test_the_law_is_logit_normal(mu, std):
    num = 20_000
    times = sample_times(num, mu=mu, std=std, generator=generator()).double().sort().values
    law = TransformedDistribution(Normal(torch.tensor(mu).double(), std), [SigmoidTransform()])
    steps = torch.arange(num + 1, dtype=torch.float64) / num
    cdf = law.cdf(times)
    distance = torch.maximum((steps[1:] - cdf).abs(), (cdf - steps[:-1]).abs()).max()
    assert distance < 1.63 / math.sqrt(num)  # Kolmogorov-Smirnov at the 1 % level
    assert times.median().item() == pytest.approx(1 / (1 + math.exp(-mu)), abs=0.01 * std)


def test_the_median_of_the_first_stage_is_the_papers():
    assert sample_times(40_000, mu=1.06, generator=generator()).median().item() == pytest.approx(0.743, abs=0.004)


def test_every_sample_has_its_own_centre():
    mu = torch.tensor([-2.0, 0.0, 2.0]).repeat_interleave(5000)
    times = sample_times(15_000, mu=mu, generator=generator(1)).reshape(3, 5000)
    torch.testing.assert_close(times.logit().mean(1), torch.tensor([-2.0, 0.0, 2.0]), rtol=0, atol=0.05)
    one = sample_times(15_000, mu=mu.double(), std=0, generator=generator(1))
    torch.testing.assert_close(one, torch.sigmoid(mu))


@given(seeds(), st.floats(-300, 300), st.floats(0, 100))
def test_no_time_is_zero_or_one(seed, mu, std):
    times = sample_times(64, mu=mu, std=std, generator=generator(seed))
    assert times.dtype == torch.float32 and times.shape == (64,)
    assert ((times > 0) & (times < 1)).all()


@given(seeds())
def test_equal_generators_give_equal_times_and_the_global_one_is_not_used(seed):
    state = torch.get_rng_state()
    first, again = (sample_times(8, mu=1.0, generator=generator(seed), device=device) for device in (None, "cpu"))
    assert torch.equal(first, again)
    shared = generator(seed)
    assert torch.equal(sample_times(8, mu=1.0, generator=shared), first)
    assert not torch.equal(sample_times(8, mu=1.0, generator=shared), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("num", "kwargs", "message"),
    [
        (0, {"mu": 1.0}, "num: expected a positive"),
        (2, {"mu": 1.0, "std": -1.0}, "std: expected"),
        (2, {"mu": 1.0, "std": float("nan")}, "std: expected"),
        (2, {"mu": torch.zeros(3)}, r"mu: expected shape \[num\] with num=2"),
        (2, {"mu": torch.zeros(1)}, r"mu: expected shape \[num\] with num=2"),
    ],
)
def test_a_wrong_argument_is_named(num, kwargs, message):
    with pytest.raises(ValueError, match=message):
        sample_times(num, generator=generator(), **kwargs)


def test_the_generator_is_an_argument_that_cannot_be_left_out():
    with pytest.raises(TypeError, match="generator"):
        sample_times(2, mu=1.0)
