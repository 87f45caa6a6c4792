"""What holds for every RL objective: masks, padding, splits, dtypes, derivatives, vmap; and missing rewards end to end."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from lensmini.objectives.policy import (
    clipped_surrogate,
    group_advantages,
    matching_log_ratio,
    nft_loss,
    optimality,
    ram_target,
    velocity_gap,
)
from lensmini.packed import Layout, pack
from lensmini.paths import interpolate, velocity_target
from lensmini.sampling import gaussian_kl, gaussian_log_prob
from tests.strategies import grids, seeds, tensor

DOUBLE = torch.float64
FIELDS = ("velocity", "old", "target")
ROWS = ("r", "advantage", "reward", "std")


def nft(f, **o):
    return nft_loss(f["velocity"], f["old"], f["target"], f["r"], beta=0.7, **o)


def nft_self_normalised(f, **o):
    return nft_loss(f["velocity"], f["old"], f["target"], f["r"], weight="self_normalised", t=f["t"], **o)


def awm(f, mask=None, layout=None):
    ratio = matching_log_ratio(f["velocity"], f["old"], f["target"], f["t"], mask=mask, layout=layout)
    whole = mask
    if mask is not None and len(mask) == len(ratio) and mask.ndim > 1:
        whole = mask.flatten(1).any(1)
    return clipped_surrogate(ratio, f["advantage"], 0.5, 0.5, mask=whole)


def gap(f, **o):
    return velocity_gap(f["velocity"], f["old"], **o)


def ram(f, **o):
    return velocity_gap(f["velocity"], ram_target(f["velocity"], f["old"], f["target"], f["reward"], **o), **o)


def density(f, **o):
    return gaussian_log_prob(f["target"], f["velocity"], f["std"], **o)


def mean_density(f, **o):
    return gaussian_log_prob(f["target"], f["velocity"], f["std"], "mean", **o)


def divergence(f, **o):
    return gaussian_kl(f["velocity"], f["old"], f["std"], **o)


OBJECTIVES = [nft, nft_self_normalised, awm, gap, ram, density, mean_density, divergence]
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.__name__)


def rows(num, seed, dtype=torch.float32):
    unit = torch.rand(4, num, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)
    return {
        "r": unit[0],
        "advantage": 4 * unit[1] - 2,
        "reward": 2 * unit[2] - 1,
        "std": 0.2 + unit[3],
        "t": unit[0].float() if dtype != DOUBLE else unit[0],
    }


def batch(shape, seed, dtype=torch.float32):
    values = {name: tensor(shape, seed + 7 * i, dtype) for i, name in enumerate(FIELDS)}
    return {**values, **rows(shape[0], seed, dtype)}


def value_and_gradient(objective, values, **options):
    values = {**values, "velocity": values["velocity"].detach().clone().requires_grad_()}
    loss = objective(values, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), values["velocity"])
    return loss.detach(), gradient


@every_objective
class TestMasks:
    @given(seeds(), st.lists(st.booleans(), min_size=1, max_size=6), st.sampled_from([math.nan, math.inf, -math.inf]))
    def test_missing_samples_leave_exactly_the_subset(self, objective, seed, kept, poison):
        mask = torch.tensor(kept)
        values = batch((len(kept), 3, 2, 4), seed)
        hidden = {
            k: v if k == "t" else torch.where(mask.reshape(-1, *[1] * (v.ndim - 1)), v, poison)
            for k, v in values.items()
        }
        loss, gradient = value_and_gradient(objective, hidden, mask=mask)
        assert not loss[~mask].any() and not gradient[~mask].any()
        if mask.any():
            alone, expected = value_and_gradient(objective, {k: v[mask] for k, v in values.items()})
            assert torch.equal(loss[mask], alone) and torch.equal(gradient[mask], expected)

    @given(grids(min_size=2), seeds(), st.data())
    def test_packed_missing_samples_leave_exactly_the_subset(self, objective, sizes, seed, data):
        kept = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
        mask, layout = torch.tensor(kept), Layout.build(sizes)
        values = {**batch((layout.num_image_tokens, 3), seed), **rows(len(sizes), seed)}
        tokens = layout.expand(mask)
        hidden = {
            k: v if k == "t" else torch.where(tokens[:, None] if k in FIELDS else mask, v, math.nan)
            for k, v in values.items()
        }
        loss, gradient = value_and_gradient(objective, hidden, mask=mask, layout=layout)
        assert not loss[~mask].any() and not gradient[~tokens].any()
        if mask.any():
            subset = {k: v[tokens] if k in FIELDS else v[mask] for k, v in values.items()}
            smaller = Layout.build([size for size, keep in zip(sizes, kept, strict=True) if keep])
            alone, expected = value_and_gradient(objective, subset, layout=smaller)
            assert torch.equal(loss[mask], alone) and torch.equal(gradient[tokens], expected)

    @given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 3), seeds())
    def test_padding_of_any_size_and_content_changes_nothing(self, objective, lengths, extra, seed):
        num, longest = len(lengths), max(lengths) + extra
        values = batch((num, longest, 3), seed, DOUBLE)
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        hidden = {k: torch.where(mask[..., None], v, math.nan) if k in FIELDS else v for k, v in values.items()}
        loss, gradient = value_and_gradient(objective, hidden, mask=mask)
        assert not gradient[~mask].any()
        for i, length in enumerate(lengths):
            one = {k: v[i : i + 1, :length] if k in FIELDS else v[i : i + 1] for k, v in values.items()}
            alone, expected = value_and_gradient(objective, one)
            torch.testing.assert_close(loss[i : i + 1], alone)
            torch.testing.assert_close(gradient[i : i + 1, :length], expected)


@every_objective
class TestForms:
    @given(grids(), seeds())
    def test_packed_equals_every_image_alone(self, objective, sizes, seed):
        images = {name: [tensor((3, h, w), seed + 11 * i + j, DOUBLE) for j, (h, w) in enumerate(sizes)]
                  for i, name in enumerate(FIELDS)}  # fmt: skip
        scalars, layout = rows(len(sizes), seed, DOUBLE), Layout.build(sizes)
        together = objective({**{k: pack(v) for k, v in images.items()}, **scalars}, layout=layout)
        for i in range(len(sizes)):
            one = {**{k: v[i][None] for k, v in images.items()}, **{k: v[i : i + 1] for k, v in scalars.items()}}
            torch.testing.assert_close(together[i : i + 1], objective(one))

    def test_a_batch_split_into_parts_gives_the_same_losses(self, objective):
        values = batch((6, 3, 2, 2), 0)
        parts = [objective({k: v[start : start + 2] for k, v in values.items()}) for start in (0, 2, 4)]
        assert torch.equal(objective(values), torch.cat(parts))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_float32(self, objective, dtype):
        values = batch((3, 64), 0)
        rounded = {k: v.to(dtype) if k in FIELDS else v for k, v in values.items()}
        loss = objective(rounded)
        exact = objective({k: v.double() for k, v in rounded.items()})
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-4)

    def test_derivatives_are_right_twice(self, objective):
        if objective is nft_self_normalised or objective is ram:
            pytest.skip("detaches a function of its input, which a difference quotient sees; see test_matching")
        values = batch((2, 3), 0, DOUBLE)
        if objective is awm:
            values["advantage"] = torch.tensor([0.01, -0.01], dtype=DOUBLE)
            values["velocity"] = values["old"] + 0.01 * values["velocity"]  # away from the clip's corner

        def function(velocity):
            return objective({**values, "velocity": velocity})

        start = values["velocity"].clone().requires_grad_()
        assert gradcheck(function, start) and gradgradcheck(function, start)

    @pytest.mark.parametrize("masked", [False, True])
    def test_vmap_is_a_loop(self, objective, masked):
        stack = [batch((3, 2, 4), seed) for seed in range(2)]
        options = {"mask": torch.tensor([True, False, True])} if masked else {}
        together = {k: torch.stack([each[k] for each in stack]) for k in stack[0]}
        got = torch.func.vmap(lambda values: objective(values, **options))(together)
        torch.testing.assert_close(got, torch.stack([objective(each, **options) for each in stack]))

    def test_inputs_stay_as_they_are(self, objective):
        values = batch((3, 2, 4), 0)
        copies = {k: v.clone() for k, v in values.items()}
        objective(values, mask=torch.tensor([True, True, False])).sum()
        assert all(torch.equal(values[k], copies[k]) for k in values)


def test_vmap_of_advantages_is_a_loop():
    rewards, group = tensor((4, 6), 0), torch.tensor([0, 1, 0, 1, 1, 5])
    got = torch.func.vmap(lambda r: optimality(group_advantages(r, group, scale="group")))(rewards)
    expected = torch.stack([optimality(group_advantages(r, group, scale="group")) for r in rewards])
    torch.testing.assert_close(got, expected)


class TestMissingRewardsEndToEnd:
    """Rewards with holes, over advantages and losses, to the gradient of a network over images of mixed sizes."""

    SIZES = ((2, 3), (4, 4), (2, 3), (1, 5), (4, 4), (2, 2))
    GROUP = torch.tensor([3, 3, 3, 8, 8, 8])

    def gradients(self, rewards, mask, sizes, group, images, noises, t):
        """Gradient of the mean loss over valid samples, of the network and of each image's velocity."""
        net = torch.nn.Linear(4, 4)
        with torch.no_grad():
            net.weight.copy_(tensor((4, 4), 90) / 4)
            net.bias.copy_(tensor((4,), 91))
        layout = Layout.build(sizes)
        latents, noise = pack(images), pack(noises)
        noisy, target = interpolate(latents, noise, t, layout=layout), velocity_target(latents, noise)
        advantage = group_advantages(rewards, group, mask=mask, scale="batch")
        # One image after the other through the network: its gradient is a sum over images in order.
        pieces = [net(part) for part in noisy.split(layout.image_lengths)]
        velocity = torch.cat(pieces)
        loss = nft_loss(
            velocity, velocity.detach() + 0.1, target, optimality(advantage, mask=mask), mask=mask, layout=layout
        )
        loss = loss + 1e-2 * velocity_gap(velocity, torch.zeros_like(velocity), mask=mask, layout=layout)
        known = len(rewards) if mask is None else int(mask.sum())
        total = loss.sum() / known
        flow = torch.autograd.grad(total, velocity, retain_graph=True)[0]
        return flow.split(layout.image_lengths), torch.autograd.grad(total, list(net.parameters()))

    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    @pytest.mark.parametrize("missing", [[0], [1, 4], [3, 4, 5], [0, 1, 2, 3]])
    def test_the_gradient_is_that_of_the_subset_bit_for_bit(self, missing, poison):
        images = [tensor((4, h, w), i) for i, (h, w) in enumerate(self.SIZES)]
        noises = [tensor((4, h, w), 50 + i) for i, (h, w) in enumerate(self.SIZES)]
        t = torch.linspace(0.1, 0.9, 6)
        rewards = torch.tensor([0.2, 0.9, 0.5, 0.1, 0.1, 0.8])
        rewards[missing] = poison
        mask = rewards.isfinite()
        keep = mask.nonzero()[:, 0].tolist()
        flows, network = self.gradients(rewards, mask, self.SIZES, self.GROUP, images, noises, t)
        chosen = [[values[i] for i in keep] for values in (self.SIZES, images, noises)]
        expected, wanted = self.gradients(
            rewards[keep], None, chosen[0], self.GROUP[keep], chosen[1], chosen[2], t[keep]
        )
        for i in missing:
            assert not flows[i].any()
        for i, flow in zip(keep, expected, strict=True):
            assert torch.equal(flows[i], flow)
        for got, want in zip(network, wanted, strict=True):
            assert torch.equal(got, want)

    def test_a_zero_in_place_of_a_missing_reward_would_be_noticed(self):
        images = [tensor((4, h, w), i) for i, (h, w) in enumerate(self.SIZES)]
        rewards, t = torch.tensor([0.2, 0.9, 0.0, 0.1, 0.1, 0.8]), torch.linspace(0.1, 0.9, 6)
        seen = torch.tensor([True, True, False, True, True, True])
        arguments = (self.SIZES, self.GROUP, images, images, t)
        masked, _ = self.gradients(rewards, seen, *arguments)
        zeroed, _ = self.gradients(rewards, None, *arguments)
        assert not torch.equal(masked[0], zeroed[0])
