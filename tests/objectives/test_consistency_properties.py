"""What holds for every function of the consistency family: masks, packing, splits, dtypes, derivatives, vmap."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from lensmini.objectives import velocity_gap
from lensmini.objectives.consistency import (
    consistency_loss,
    consistency_target,
    mean_velocity_loss,
    mean_velocity_target,
    normalise_tangent,
    rf_to_trig,
    teacher_step,
    trig_prediction,
    trig_to_rf,
    trigflow_direction,
    trigflow_tangent,
)
from lensmini.packed import Layout, pack
from tests.strategies import grids, seeds, tensor

DOUBLE = torch.float64


def distance(metric, weighed=False):
    def loss(f, **o):
        return consistency_loss(f["mine"], f["goal"], metric=metric, c=0.05, weight=f["w"] if weighed else None, **o)

    loss.__name__ = metric + "_weighed" * weighed
    return loss


def improved_meanflow(f, **o):
    return mean_velocity_loss(f["mine"], f["slope"], f["goal"], f["t"], f["r"], **o)


def meanflow(f, **o):
    return velocity_gap(f["mine"], mean_velocity_target(f["goal"], f["slope"], f["t"], f["r"], **o), **o)


def continuous(variant, reduction):
    def loss(f, **o):
        g = trigflow_tangent(f["mine"], f["goal"], f["x"], f["slope"], f["t"], warmup=0.4, variant=variant, **o)
        return velocity_gap(f["mine"], f["mine"].detach() + normalise_tangent(g, reduction=reduction, **o), **o)

    loss.__name__ = variant
    return loss


LOSSES = [
    distance("squared"),
    distance("pseudo_huber", weighed=True),
    distance("pseudo_huber_norm", weighed=True),
    improved_meanflow,
    meanflow,
    continuous("scm", "rms"),
    continuous("rcm", "l2"),
]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
FIELDS = ("mine", "goal", "slope", "x")
TIMES = ("t", "r")


def rows(num, seed, dtype=torch.float32):
    unit = torch.rand(3, num, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    time = torch.promote_types(dtype, torch.float32)
    return {"t": unit[0].to(time), "r": (unit[0] * unit[1]).to(time), "w": (0.5 + unit[2]).to(dtype)}


def batch(shape, num, seed, dtype=torch.float32):
    return {**{name: tensor(shape, seed + 7 * i, dtype) for i, name in enumerate(FIELDS)}, **rows(num, seed, dtype)}


def value_and_gradient(loss, values, **options):
    values = {**values, "mine": values["mine"].detach().clone().requires_grad_()}
    result = loss(values, **options)
    (gradient,) = torch.autograd.grad(result.sum(), values["mine"])
    return result.detach(), gradient


@every_loss
class TestMasks:
    @given(seeds(), st.lists(st.booleans(), min_size=1, max_size=5), st.sampled_from([math.nan, math.inf, -math.inf]))
    def test_missing_samples_leave_exactly_the_subset(self, loss, seed, kept, poison):
        mask, values = torch.tensor(kept), batch((len(kept), 3, 2, 2), len(kept), seed)
        hidden = {
            k: v if k in TIMES else torch.where(mask.reshape(-1, *[1] * (v.ndim - 1)), v, poison)
            for k, v in values.items()
        }
        result, gradient = value_and_gradient(loss, hidden, mask=mask)
        assert not result[~mask].any() and not gradient[~mask].any()
        if mask.any():
            alone, expected = value_and_gradient(loss, {k: v[mask] for k, v in values.items()})
            assert torch.equal(result[mask], alone) and torch.equal(gradient[mask], expected)

    @given(seeds(), st.integers(0, 3))
    def test_hidden_positions_are_as_good_as_not_there(self, loss, seed, padding):
        values = batch((2, 3, 4), 2, seed, DOUBLE)
        mask = torch.zeros(2, 1, 4 + padding, dtype=torch.bool)
        mask[..., :4] = True
        wide = {
            k: torch.nn.functional.pad(v, (0, padding), value=math.nan) if k in FIELDS else v for k, v in values.items()
        }
        result, gradient = value_and_gradient(loss, wide, mask=mask)
        expected, wanted = value_and_gradient(loss, values)
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(gradient[..., :4], wanted)
        assert not gradient[..., 4:].any()

    @given(grids(min_size=2, max_side=3), seeds(), st.data())
    def test_packed_missing_samples_leave_exactly_the_subset(self, loss, sizes, seed, data):
        mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes))))
        layout = Layout.build(sizes)
        values, tokens = batch((layout.num_image_tokens, 3), len(sizes), seed), layout.expand(mask)
        hidden = {
            k: v if k in TIMES else torch.where(tokens[:, None] if k in FIELDS else mask, v, math.nan)
            for k, v in values.items()
        }
        result, gradient = value_and_gradient(loss, hidden, mask=mask, layout=layout)
        assert not result[~mask].any() and not gradient[~tokens].any()
        if mask.any():
            subset = {k: v[tokens] if k in FIELDS else v[mask] for k, v in values.items()}
            smaller = Layout.build([size for size, keep in zip(sizes, mask, strict=True) if keep])
            alone, expected = value_and_gradient(loss, subset, layout=smaller)
            assert torch.equal(result[mask], alone) and torch.equal(gradient[tokens], expected)


@every_loss
class TestEveryLoss:
    @given(grids(max_side=3), seeds())
    def test_packed_equals_dense_one_by_one(self, loss, sizes, seed):
        layout = Layout.build(sizes)
        images = [
            {name: tensor((1, 3, h, w), seed + 100 * i + j, DOUBLE) for j, name in enumerate(FIELDS)}
            for i, (h, w) in enumerate(sizes)
        ]
        per_sample = rows(len(sizes), seed, DOUBLE)
        together = {name: pack([image[name][0] for image in images]) for name in FIELDS}
        packed = loss({**together, **per_sample}, layout=layout)
        alone = [loss({**image, **{k: v[i : i + 1] for k, v in per_sample.items()}}) for i, image in enumerate(images)]
        torch.testing.assert_close(packed, torch.cat(alone))

    @given(seeds())
    def test_a_batch_may_be_split_and_ordered_at_will(self, loss, seed):
        values = batch((5, 3, 4), 5, seed)
        whole = value_and_gradient(loss, values)
        order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
        shuffled = value_and_gradient(loss, {k: v[order] for k, v in values.items()})
        parts = [value_and_gradient(loss, {k: v[part] for k, v in values.items()}) for part in ([0, 1], [2], [3, 4])]
        for i in range(2):
            assert torch.equal(shuffled[i], whole[i][order])
            assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])

    def test_low_precision_is_computed_in_float32(self, loss):
        values = batch((3, 4, 5), 3, 0, torch.bfloat16)
        result = loss(values)
        assert result.dtype == torch.float32
        exact = loss({k: v.double() for k, v in values.items()})
        assert exact.dtype == DOUBLE
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-6)

    def test_vmap_equals_a_loop(self, loss):
        stacks = [batch((3, 4), 3, seed, DOUBLE) for seed in range(4)]
        values = {name: torch.stack([stack[name] for stack in stacks]) for name in stacks[0]}
        together = torch.func.vmap(lambda f: loss(f))(values)
        torch.testing.assert_close(together, torch.stack([loss(stack) for stack in stacks]))


SMOOTH = [loss for loss in LOSSES if loss.__name__ not in ("scm", "rcm")]


@pytest.mark.parametrize("loss", SMOOTH, ids=lambda loss: loss.__name__)
def test_first_and_second_derivatives(loss):
    # The tangents' losses are left out: their target moves with the prediction, and is detached.
    values = batch((2, 3), 2, 0, DOUBLE)
    mask = torch.tensor([[True, True, False], [True, False, True]])

    def function(mine):
        return loss({**values, "mine": mine}, mask=mask)

    mine = values["mine"].clone().requires_grad_()
    assert gradcheck(function, (mine,)) and gradgradcheck(function, (mine,))


def test_the_change_of_coordinates_is_differentiable():
    x, v = (tensor((2, 3), i, DOUBLE).requires_grad_() for i in range(2))
    t = torch.tensor([0.2, 0.9], dtype=DOUBLE, requires_grad=True)
    assert gradcheck(rf_to_trig, (x, v, t)) and gradcheck(trig_to_rf, (x, v, t))
    assert gradcheck(lambda x, a: trig_prediction(lambda x, t: x.sin() * t[:, None], x, a), (x, t))


@given(grids(max_side=3), seeds())
@settings(max_examples=15)
def test_steps_targets_and_coordinates_of_a_mix_are_those_of_its_samples(sizes, seed):
    layout = Layout.build(sizes)
    images = [[tensor((1, 3, h, w), seed + 10 * i + j, DOUBLE) for j in range(2)] for i, (h, w) in enumerate(sizes)]
    x, v = (pack([image[j][0] for image in images]) for j in range(2))
    t, s = rows(len(sizes), seed, DOUBLE)["t"], rows(len(sizes), seed, DOUBLE)["r"]

    def model(layout=None):
        def velocity(x, t):
            time = t if layout is None else layout.expand(t)
            return (x * 2).sin() + time.reshape(-1, *[1] * (x.ndim - 1))

        return velocity

    def everything(x, v, t, s, layout=None):
        return [
            teacher_step(model(layout), x, t, s, solver="heun", layout=layout),
            teacher_step(model(layout), x, t, s, layout=layout),
            consistency_target(model(layout), x, t, layout=layout),
            *rf_to_trig(x, v, t, layout=layout)[:2],
            *trig_to_rf(x, v, t, layout=layout)[:2],
            trig_prediction(model(layout), x, t, layout=layout),
            trigflow_direction(v, t, layout=layout)[0],
        ]

    packed = everything(x, v, t, s, layout)
    alone = [everything(*image, t[i : i + 1], s[i : i + 1]) for i, image in enumerate(images)]
    for index, result in enumerate(packed):
        torch.testing.assert_close(result, pack([parts[index][0] for parts in alone]))
