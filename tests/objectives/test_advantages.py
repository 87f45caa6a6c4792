"""Laws of advantages: each group by itself, whatever its order, size and resolutions; missing rewards are not numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensmini.objectives.policy import GroupCounts, count_groups, group_advantages, optimality
from tests.strategies import seeds, tensor

DOUBLE = torch.float64
BASELINES, SCALES = ["mean", "leave_one_out"], ["group", "batch", "none"]
OPTIONS = st.fixed_dictionaries(
    {
        "baseline": st.sampled_from(BASELINES),
        "scale": st.sampled_from(SCALES),
        "correction": st.integers(0, 1),
        "eps": st.sampled_from([0.0, 1e-8, 1e-4]),
    }
)


@st.composite
def batches(draw, max_size=12):
    """Rewards with ties, interleaved groups of any size, and a mask with whole groups missing."""
    num = draw(st.integers(1, max_size))
    levels = draw(st.sampled_from([2, 12, 10**6]))
    rewards = torch.tensor(draw(st.lists(st.integers(0, levels), min_size=num, max_size=num)), dtype=DOUBLE) / 7
    group = torch.tensor(draw(st.lists(st.sampled_from([-5, 0, 3, 2**40]), min_size=num, max_size=num)))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=num, max_size=num)))
    return rewards, group, mask


def slow(rewards, group, mask, *, baseline, scale, correction, eps):
    """The definition, sample by sample, in numpy."""
    values, ids, known = rewards.numpy(), group.numpy(), mask.numpy()
    everyone, out = values[known], np.zeros(len(values))
    for i in range(len(values)):
        mates = [values[j] for j in range(len(values)) if ids[j] == ids[i] and known[j]]
        others = [values[j] for j in range(len(values)) if ids[j] == ids[i] and known[j] and j != i]
        if not known[i] or len(mates) < 2 or max(mates) == min(mates):
            continue
        centre = np.mean(mates) if baseline == "mean" else np.mean(others)
        pool = {"group": mates, "batch": everyone, "none": None}[scale]
        spread = 1.0 if pool is None else np.std(pool, ddof=correction) + eps
        out[i] = (values[i] - centre) / spread
    return torch.tensor(out)


class TestDefinition:
    @given(batches(), OPTIONS)
    def test_it_is_the_definition_sample_by_sample(self, batch, options):
        got = group_advantages(*batch[:2], mask=batch[2], **options)
        torch.testing.assert_close(got, slow(*batch, **options), rtol=1e-9, atol=1e-9)

    def test_the_defaults_are_the_published_ones(self):
        rewards, group = tensor((96,), 0), torch.arange(96) % 4
        centred = torch.stack([rewards[group == k] - rewards[group == k].mean() for k in range(4)])
        expected = torch.empty(96)
        for k in range(4):
            expected[group == k] = centred[k] / (np.std(rewards.numpy()) + 1e-4)
        torch.testing.assert_close(group_advantages(rewards, group), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(("size", "factor"), [(2, 1.414), (4, 1.155), (24, 1.0215)])
    def test_bessels_correction_is_a_factor(self, size, factor):
        rewards, group = tensor((size,), 0, DOUBLE), torch.zeros(size, dtype=torch.int64)
        for scale in ("group", "batch"):
            plain, corrected = (group_advantages(rewards, group, scale=scale, correction=c, eps=0) for c in (0, 1))
            torch.testing.assert_close(plain, corrected * math.sqrt(size / (size - 1)))
            assert (plain / corrected).mean().item() == pytest.approx(factor, abs=5e-4)
        torch.testing.assert_close(plain.std(correction=0), torch.tensor(1.0, dtype=DOUBLE))

    @given(batches(), OPTIONS)
    def test_leaving_oneself_out_is_a_factor(self, batch, options):
        rewards, group, mask = batch
        mean, without = (group_advantages(rewards, group, mask=mask, **{**options, "baseline": b}) for b in BASELINES)
        members = torch.tensor([int(((group == g) & mask).sum()) for g in group]).double()
        factor = torch.where(members > 1, members / (members - 1).clamp_min(1), 1.0)
        torch.testing.assert_close(without, mean * factor, rtol=1e-9, atol=1e-12)

    def test_an_eps_is_added_to_the_deviation(self):
        rewards, group = torch.tensor([0.0, 2.0]), torch.tensor([1, 1])
        assert group_advantages(rewards, group, scale="group", eps=1.0).tolist() == [-0.5, 0.5]


class TestInvariance:
    @given(batches(), OPTIONS)
    def test_valid_advantages_of_a_group_sum_to_zero(self, batch, options):
        rewards, group, mask = batch
        advantages = group_advantages(rewards, group, mask=mask, **options)
        for g in group.unique():
            assert advantages[group == g].sum().abs() < 1e-6 * (1 + advantages.abs().max())

    @given(batches(), OPTIONS, st.floats(-50, 50), st.floats(0.1, 30))
    def test_constants_per_group_do_not_matter_and_with_the_groups_scale_units_neither(
        self, batch, options, add, scale
    ):
        rewards, group, mask = batch
        moved = rewards + add * (1 + (group == 0))
        close = {"rtol": 1e-6, "atol": 1e-6}
        if options["scale"] != "batch":
            before, after = (group_advantages(r, group, mask=mask, **options) for r in (rewards, moved))
            # Rounding may separate equal rewards by an ulp, which eps = 0 would blow up to one.
            steady = before != 0 if options["eps"] else torch.ones_like(mask)
            if options["eps"] == 0 and options["scale"] == "group":
                return
            torch.testing.assert_close(after[steady], before[steady], **close)
        both = rewards + add
        if options["eps"] == 1e-4:
            before, after = (group_advantages(r, group, mask=mask, **options) for r in (rewards, both))
            torch.testing.assert_close(after, before, **close)
        if options["scale"] == "group":
            free = {**options, "eps": 0.0}
            power = 2.0 ** round(math.log2(scale))
            before, after = (group_advantages(r, group, mask=mask, **free) for r in (rewards, rewards * power))
            torch.testing.assert_close(after, before, **close)

    @given(batches(), OPTIONS, seeds())
    def test_order_and_names_of_groups_do_not_matter(self, batch, options, seed):
        rewards, group, mask = batch
        order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
        expected = group_advantages(rewards, group, mask=mask, **options)
        shuffled = group_advantages(rewards[order], group[order], mask=mask[order], **options)
        torch.testing.assert_close(shuffled, expected[order], rtol=1e-9, atol=1e-9)
        renamed = torch.where(group == 0, 99, -group - 7)
        assert torch.equal(group_advantages(rewards, renamed, mask=mask, **options), expected)

    @given(batches(), OPTIONS, st.sampled_from([math.nan, math.inf, -math.inf, 1e300]))
    def test_missing_rewards_change_no_bit_of_the_others(self, batch, options, poison):
        rewards, group, mask = batch
        hidden = torch.where(mask, rewards, poison)
        got = group_advantages(hidden, group, mask=mask, **options)
        assert torch.equal(got[mask], group_advantages(rewards[mask], group[mask], **options))
        assert not got[~mask].any() and got.isfinite().all()

    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("baseline", BASELINES)
    @pytest.mark.parametrize("eps", [0.0, 1e-8])
    def test_groups_without_spread_give_exactly_nothing(self, scale, baseline, eps):
        # Sums of tenths are not exact; the advantage is.
        rewards = torch.tensor([0.1] * 7 + [0.3] + [9.0])
        group = torch.tensor([0] * 7 + [1] + [2])
        mask = torch.tensor([True] * 8 + [False])
        options = {"baseline": baseline, "scale": scale, "eps": eps, "mask": mask}
        assert not group_advantages(rewards, group, **options).any()
        assert not group_advantages(rewards, group, correction=1, **options).any()
        none = torch.zeros(9, dtype=torch.bool)
        assert not group_advantages(rewards, group, baseline=baseline, scale=scale, eps=eps, mask=none).any()

    def test_images_of_different_resolutions_share_their_groups_baseline(self):
        # Nothing here has a shape: an image of 4096 tokens and one of 1024 are two rewards.
        rewards, group = torch.tensor([1.0, 0.0, 0.5, 0.5]), torch.tensor([8, 8, 9, 9])
        assert group_advantages(rewards, group, scale="none").tolist() == [0.5, -0.5, 0.0, 0.0]

    def test_no_gradient_comes_back(self):
        rewards = tensor((4,), 0).requires_grad_()
        assert not group_advantages(rewards, torch.zeros(4, dtype=torch.int64)).requires_grad

    def test_small_rewards_on_a_large_offset_keep_their_digits(self):
        rewards, group = torch.tensor([1e6, 1e6 + 0.25], dtype=torch.float32), torch.tensor([0, 0])
        assert group_advantages(rewards, group, scale="none").tolist() == [-0.125, 0.125]


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rewards": torch.tensor([1.0, math.nan])}, r"rewards: expected finite .* at \[1\]"),
            ({"rewards": torch.tensor([math.inf, 0.0]), "mask": torch.tensor([True, False])}, r"rewards: .* at \[0\]"),
            ({"rewards": torch.tensor([1, 2])}, "rewards: expected floating"),
            ({"rewards": torch.zeros(2, 1)}, r"rewards: expected shape \[b\]"),
            ({"group": torch.zeros(3, dtype=torch.int64)}, r"group: expected shape \[b\]"),
            ({"group": torch.zeros(2)}, "group: expected integer"),
            ({"mask": torch.ones(2)}, "mask: expected bool"),
            ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask: expected shape \[b\]"),
            ({"baseline": "median"}, "baseline"),
            ({"scale": "global"}, "scale"),
            ({"eps": -1e-4}, "eps"),
            ({"eps": math.nan}, "eps"),
            ({"correction": -1}, "correction"),
        ],
    )
    def test_nonsense_is_refused(self, changes, message):
        arguments = {"rewards": torch.zeros(2), "group": torch.zeros(2, dtype=torch.int64)}
        with pytest.raises(ValueError, match=message):
            group_advantages(**{**arguments, **changes})


class TestCounts:
    @given(batches())
    def test_every_group_is_of_one_kind(self, batch):
        rewards, group, mask = batch
        kinds = {"informative": 0, "constant": 0, "single": 0, "empty": 0}
        for g in set(group.tolist()):
            known = {r for r, i, m in zip(rewards.tolist(), group.tolist(), mask.tolist(), strict=True) if i == g and m}
            num = int(((group == g) & mask).sum())
            kind = "empty" if num == 0 else "single" if num == 1 else "constant" if len(known) == 1 else "informative"
            kinds[kind] += 1
        hidden = torch.where(mask, rewards, math.nan)
        expected = GroupCounts(groups=len(set(group.tolist())), missing=int((~mask).sum()), **kinds)
        assert count_groups(hidden, group, mask=mask) == expected

    def test_an_unmasked_nan_is_refused(self):
        with pytest.raises(ValueError, match="rewards: expected finite"):
            count_groups(torch.tensor([math.nan]), torch.tensor([0]))


class TestOptimality:
    @given(st.lists(st.floats(-100, 100), min_size=1, max_size=20), st.floats(0.1, 50))
    def test_it_is_a_probability_odd_around_a_half_and_monotone(self, values, clip):
        advantage = torch.tensor(values, dtype=DOUBLE).sort().values
        r = optimality(advantage, clip)
        assert ((r >= 0) & (r <= 1)).all() and (r.diff() >= 0).all()
        torch.testing.assert_close(optimality(-advantage, clip), 1 - r)
        assert optimality(torch.zeros(1), clip).item() == 0.5
        assert optimality(torch.tensor([clip, 10 * clip, -clip], dtype=DOUBLE), clip).tolist() == [1, 1, 0]
        inside = advantage[advantage.abs() < clip]
        torch.testing.assert_close(optimality(inside, clip), 0.5 + inside / (2 * clip))

    def test_an_unknown_advantage_is_no_half_by_accident(self):
        values = torch.tensor([math.nan, 5.0])
        with pytest.raises(ValueError, match="advantage: expected numbers, got NaN"):
            optimality(values)
        assert optimality(values, mask=torch.tensor([False, True])).tolist() == [0.5, 1.0]
        assert not optimality(torch.zeros(1, requires_grad=True)).requires_grad

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((torch.zeros(1), 0.0), "clip"),
            ((torch.zeros(1), math.nan), "clip"),
            ((torch.zeros(1, dtype=torch.int64),), "advantage"),
        ],
    )
    def test_nonsense_is_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            optimality(*arguments)
        with pytest.raises(ValueError, match="mask"):
            optimality(torch.zeros(2), mask=torch.ones(3, dtype=torch.bool))
