"""Laws of the clipped surrogate: the published formula, where its gradient vanishes, and no overflow."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lensmini.objectives.policy import clipped_surrogate, guarded_log_ratio
from tests.strategies import seeds, tensor

DOUBLE = torch.float64
LOGS = st.floats(-3, 3, allow_subnormal=False)
CLIPS = st.sampled_from([(0.2, 0.2), (1e-4, 1e-4), (0.1, 0.4), (1.0, 0.0)])


@given(st.lists(st.tuples(LOGS, st.floats(-5, 5)), min_size=1, max_size=8), CLIPS)
@example([(0.0, 1.0), (0.0, -1.0), (0.0, 0.0)], (0.2, 0.2))
def test_it_is_the_published_maximum(pairs, clips):
    log_ratio, advantage = torch.tensor(pairs, dtype=DOUBLE).unbind(1)
    rho = log_ratio.exp()
    expected = torch.maximum(-advantage * rho, -advantage * rho.clamp(1 - clips[0], 1 + clips[1]))
    torch.testing.assert_close(clipped_surrogate(log_ratio, advantage, *clips), expected, rtol=1e-12, atol=1e-12)


@given(LOGS, st.floats(-5, 5), CLIPS)
@example(0.0, 1.0, (1.0, 0.0))  # the gradient of torch.clamp at its own bound
@example(0.0, -1.0, (0.0, 0.2))
def test_its_gradient_is_zero_exactly_where_it_is_clipped(log_value, advantage, clips):
    log_ratio = torch.tensor([log_value], dtype=DOUBLE, requires_grad=True)
    given_advantage = torch.tensor([advantage], dtype=DOUBLE, requires_grad=True)
    loss = clipped_surrogate(log_ratio, given_advantage, *clips)
    gradient, none = torch.autograd.grad(loss.sum(), [log_ratio, given_advantage], allow_unused=True)
    bounds = math.log1p(-clips[0]) if clips[0] < 1 else -math.inf, math.log1p(clips[1])
    clipped = (advantage > 0 and log_value > bounds[1]) or (advantage < 0 and log_value < bounds[0])
    assert none is None
    assert bool(gradient == 0) == (clipped or advantage == 0)
    if not clipped:
        torch.testing.assert_close(gradient, -given_advantage.detach() * log_ratio.detach().exp())


@pytest.mark.parametrize("log_value", [-1e4, -100.0, 100.0, 1e4, math.inf, -math.inf])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_far_from_the_old_policy_nothing_but_the_honest_loss_overflows(log_value, advantage):
    log_ratio = torch.tensor([log_value], requires_grad=True)
    loss = clipped_surrogate(log_ratio, torch.tensor([advantage]), 0.2, 0.2)
    loss.sum().backward()
    if advantage < 0 and log_value > 0:
        assert loss.item() == math.inf
    else:
        assert loss.isfinite() and log_ratio.grad is not None and log_ratio.grad.isfinite().all()


def test_clips_below_float32s_steps_at_one_are_resolved():
    log_ratio = torch.tensor([2e-9, 0.5e-9], requires_grad=True)
    clipped_surrogate(log_ratio, torch.ones(2), 1e-9, 1e-9).sum().backward()
    assert log_ratio.grad is not None and log_ratio.grad.tolist() == [0.0, -1.0]


@given(seeds(), st.sampled_from([math.nan, math.inf]))
def test_masked_samples_give_nothing_whatever_they_hold(seed, poison):
    mask = torch.tensor([True, False, True])
    log_ratio, advantage = tensor((3,), seed), tensor((3,), seed + 1)
    expected = clipped_surrogate(log_ratio[mask], advantage[mask], 0.2, 0.2)
    hidden = torch.where(mask, log_ratio, poison).requires_grad_()
    loss = clipped_surrogate(hidden, torch.where(mask, advantage, poison), 0.2, 0.2, mask=mask)
    loss.sum().backward()
    assert torch.equal(loss[mask], expected) and loss[1] == 0
    assert hidden.grad is not None and hidden.grad[1] == 0 and hidden.grad.isfinite().all()
    kl, std = tensor((3,), seed + 2).abs(), torch.where(mask, 0.5, poison)
    guarded = guarded_log_ratio(hidden, kl, std, mask=mask)
    assert torch.equal(guarded[mask], ((log_ratio + kl) * 0.5)[mask]) and guarded[1] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: clipped_surrogate(x, x, -0.1, 0.2), "clip_low"),
        (lambda x: clipped_surrogate(x, x, 1.1, 0.2), "clip_low"),
        (lambda x: clipped_surrogate(x, x, 0.1, math.inf), "clip_low and clip_high"),
        (lambda x: clipped_surrogate(x * math.nan, x, 0.1, 0.1), "log_ratio: expected numbers"),
        (lambda x: clipped_surrogate(x, x * math.nan, 0.1, 0.1), "advantage: expected numbers"),
        (lambda x: clipped_surrogate(x[:, None], x, 0.1, 0.1), r"log_ratio: expected shape \[b\]"),
        (lambda x: clipped_surrogate(x, x[:1], 0.1, 0.1), r"advantage: expected shape \[b\]"),
        (lambda x: clipped_surrogate(x, x.long(), 0.1, 0.1), "advantage: expected floating"),
        (lambda x: clipped_surrogate(x, x, 0.1, 0.1, mask=x), "mask: expected bool"),
        (lambda x: guarded_log_ratio(x, x, 0 * x), "std: expected positive"),
        (lambda x: guarded_log_ratio(x, x * math.nan, x), "kl: expected numbers"),
    ],
)
def test_nonsense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2))
