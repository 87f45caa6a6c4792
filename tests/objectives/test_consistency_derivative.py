"""Three derivatives of a network: right on known slopes and on the packed transformer, refused where they would be wrong."""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lensmini.nn import LensConfig, LensTransformer
from lensmini.objectives.consistency import check_derivative, directional_derivative
from lensmini.packed import Layout
from lensmini.parallel import make_mesh, run_processes, shard_model
from tests import reference
from tests.oracle import two_components
from tests.strategies import layouts, seeds, tensor

DOUBLE = torch.float64
METHODS = ["forward", "central", "semi"]
CONFIG = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "inner_dim": 16,
    "axes_dims_rope": [2, 2, 4],
    "in_channels": 8,
    "out_channels": 2,
    "patch_size": 2,
    "enc_hidden_dim": 6,
    "selected_layer_index": [1, 3],
}
MODEL = LensTransformer(LensConfig.from_dict(CONFIG))
MODEL.load_state_dict(reference.random_weights(CONFIG, seed=7), strict=True)
MODEL64 = copy.deepcopy(MODEL).double()
LAYOUT = Layout.build([(2, 3), (1, 2), (3, 3)], text_lengths=[2, 0, 3])
MIXTURE = two_components()


def step_of(method, step):
    return None if method == "forward" else step


def inputs(layout, seed=0, dtype=DOUBLE):
    """Tokens, times, text, and a direction of the first two."""
    num = layout.num_image_tokens
    x, direction = tensor((num, 8), seed, dtype), tensor((num, 8), seed + 1, dtype)
    t = 0.1 + 0.8 * torch.rand(layout.batch_size, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    text = tensor((layout.num_text_tokens, 2, 6), seed + 2, dtype)
    t = t.to(torch.promote_types(dtype, torch.float32))
    return x, t, text, direction, 0.5 + t


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.mark.parametrize("method", METHODS)
@given(seed=seeds())
@settings(max_examples=8)
def test_slopes_that_are_known(method, seed):
    # x^2 t + sin(r): 2 x t dx + x^2 dt + cos(r) dr.
    x, dx = tensor((3, 2), seed, DOUBLE), tensor((3, 2), seed + 1, DOUBLE)
    (t, dt), (r, dr) = ((tensor((3,), seed + i, DOUBLE), tensor((3,), seed + i + 1, DOUBLE)) for i in (2, 4))
    value, slope = directional_derivative(
        lambda x, t, r: x**2 * t[:, None] + r[:, None].sin(),
        (x, t, r),
        (dx, dt, dr),
        method=method,
        step=step_of(method, 1e-5),
    )
    torch.testing.assert_close(value, x**2 * t[:, None] + r[:, None].sin())
    expected = 2 * x * t[:, None] * dx + x**2 * dt[:, None] + (r.cos() * dr)[:, None]
    torch.testing.assert_close(slope, expected, rtol=1e-8, atol=1e-8)


def test_a_central_difference_is_of_second_order_and_a_semi_one_only_in_time():
    x, t = torch.tensor([[0.3]], dtype=DOUBLE), torch.tensor([0.4], dtype=DOUBLE)
    one = (torch.ones_like(x), torch.ones_like(t))
    exact = 2 * math.cos(0.6) + 3 * math.cos(1.2)

    def errors(method):
        found = [
            directional_derivative(
                lambda x, t: (2 * x).sin() + (3 * t[:, None]).sin(), (x, t), one, method=method, step=h
            )
            for h in (0.1, 0.05)
        ]
        return [slope.item() - exact for _, slope in found]

    for method, thirds in (("central", 8 * math.cos(0.6) + 27 * math.cos(1.2)), ("semi", 27 * math.cos(1.2))):
        coarse, fine = errors(method)
        assert coarse / fine == pytest.approx(4, abs=0.1)
        assert coarse == pytest.approx(-thirds * 0.1**2 / 6, rel=0.02), "the remainder of Taylor's series"


class TestTransformer:
    def velocity(self, model=MODEL64, layout=LAYOUT, seed=0, dtype=DOUBLE):
        text = inputs(layout, seed, dtype)[2]
        return lambda x, t: model.forward_packed(x, t, text, layout)

    @pytest.mark.parametrize("method", ["central", "semi"])
    def test_packed_forward_mode_equals_differences_in_float64(self, method):
        x, t, _, dx, dt = inputs(LAYOUT)
        value, exact = directional_derivative(self.velocity(), (x, t), (dx, dt))
        other, slope = directional_derivative(self.velocity(), (x, t), (dx, dt), method=method, step=1e-6)
        close(value, other, 1e-12)
        close(slope, exact, 1e-6)

    @given(layout=layouts(max_size=3, max_side=3, max_text=3), seed=seeds())
    @settings(max_examples=6)
    def test_a_mix_of_resolutions_equals_its_samples_alone(self, layout, seed):
        x, t, text, dx, dt = inputs(layout, seed)
        value, slope = directional_derivative(self.velocity(layout=layout, seed=seed), (x, t), (dx, dt))
        pieces = [z.split(layout.image_lengths) for z in (x, dx, value, slope)]
        words = text.split(layout.text_lengths)
        for i, (xi, di, vi, si) in enumerate(zip(*pieces, strict=True)):
            mask = torch.zeros(1, int(layout.text_positions.max()) + 1 if len(text) else 0, dtype=torch.bool)
            mask[0, layout.text_positions[layout.text_samples == i]] = True
            alone = Layout.build([(layout.heights[i], len(xi) // layout.heights[i])], text_mask=mask)
            got = directional_derivative(
                lambda x, t, i=i, alone=alone: MODEL64.forward_packed(x, t, words[i], alone),
                (xi, t[i : i + 1]),
                (di, dt[i : i + 1]),
            )
            close(got[0], vi, 1e-10)
            close(got[1], si, 1e-9)

    @pytest.mark.parametrize("method", METHODS)
    def test_the_value_carries_the_usual_gradient_and_the_derivative_none(self, method):
        x, t, _, dx, dt = inputs(LAYOUT)
        parameters = [p for name, p in MODEL64.named_parameters() if name not in MODEL64.unused_parameters()]
        value, slope = directional_derivative(
            self.velocity(), (x, t), (dx, dt), method=method, step=step_of(method, 1e-6)
        )
        assert not slope.requires_grad
        weight = tensor(value.shape, 9, DOUBLE)
        got = torch.autograd.grad((value * weight).sum(), parameters)
        wanted = torch.autograd.grad((self.velocity()(x, t) * weight).sum(), parameters)
        for a, b in zip(got, wanted, strict=True):
            close(a, b, 1e-9)

    def test_the_self_check_finds_forward_mode_exact_and_steps_too_long_or_too_short(self):
        x, t, text, dx, dt = inputs(LAYOUT)

        def make(dtype):
            model, words = copy.deepcopy(MODEL64).to(dtype), text.to(dtype)
            return lambda x, t: model.forward_packed(x, t, words, LAYOUT)

        rows = check_derivative(
            make,
            (x, t),
            (dx, dt),
            steps=(2**-6, 2**-13, 2**-22),
            dtypes=(DOUBLE, torch.float32, torch.bfloat16),
            reference_step=2**-20,
        )
        found = {(row.method, row.dtype, row.step): row for row in rows}
        assert len(rows) == len(found) == 3 * 7
        assert found["forward", DOUBLE, None].error < 1e-8
        assert found["forward", torch.float32, None].error < 1e-4
        assert found["forward", torch.bfloat16, None].error < 0.05
        for method in ("central", "semi"):
            long, good, short = (found[method, torch.float32, step].error for step in (2**-6, 2**-13, 2**-22))
            assert good < 0.02 and long > 0.3 and short > 5 * good
            refused = found[method, torch.bfloat16, 2**-13]
            assert math.isnan(refused.error) and "bfloat16" in refused.refused
        assert all(row.refused == "" for row in rows if row.dtype != torch.bfloat16 or row.method == "forward")


class TestPrecision:
    """Errors of finite differences on a mixture of Gaussians, against forward mode in float64."""

    X, T = tensor((7, 2), 1, DOUBLE), torch.linspace(0.1, 0.9, 7, dtype=DOUBLE)
    ALONG = (tensor((7, 2), 2, DOUBLE), torch.ones(7, dtype=DOUBLE))

    def exact(self):
        return directional_derivative(MIXTURE.velocity, (self.X, self.T), self.ALONG)[1]

    def by_hand(self, dtype, step):
        ends = [
            MIXTURE.velocity((self.X + s * step * self.ALONG[0]).to(dtype), (self.T + s * step).to(dtype)).double()
            for s in (1, -1)
        ]
        return (ends[0] - ends[1]) / (2 * step)

    def test_float32_has_a_best_step_and_bfloat16_has_none(self):
        exact, steps = self.exact(), [1e-1, 1e-2, 1e-3, 1e-4]
        size = exact.norm()
        errors = {
            dtype: [((self.by_hand(dtype, h) - exact).norm() / size).item() for h in steps]
            for dtype in (torch.float32, torch.bfloat16)
        }
        assert min(errors[torch.float32]) < 5e-5
        assert min(errors[torch.float32][1:3]) == min(errors[torch.float32]), "best between 1e-3 and 1e-2"
        assert min(errors[torch.bfloat16]) > 0.04 and errors[torch.bfloat16][2] > 0.4

    def test_float32_through_the_library_meets_the_bound(self):
        x, t, *along = (z.float() for z in (self.X, self.T, *self.ALONG))
        for method in ("central", "semi"):
            _, slope = directional_derivative(MIXTURE.velocity, (x, t), along, method=method, step=1e-3)
            close(slope, self.exact(), 1e-4)

    def test_forward_mode_in_bfloat16_is_usable(self):
        x, t, *along = (z.bfloat16() for z in (self.X, self.T, *self.ALONG))
        _, slope = directional_derivative(MIXTURE.velocity, (x, t), along)
        close(slope, self.exact(), 0.03)

    @pytest.mark.parametrize("method", ["central", "semi"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_differences_are_refused_wherever_they_hide(self, method, dtype):
        x, t = torch.ones(2, 2), torch.full((2,), 0.5)
        one = (torch.ones(2, 2), torch.ones(2))
        options = {"method": method, "step": 1e-2}
        with pytest.raises(ValueError, match=r"primals\[0\]: expected float32 or float64 for a finite difference"):
            directional_derivative(MIXTURE.velocity, (x.to(dtype), t), (one[0].to(dtype), one[1]), **options)
        with pytest.raises(ValueError, match=r"primals\[1\]: expected float32"):
            directional_derivative(MIXTURE.velocity, (x, t.to(dtype)), (one[0], one[1].to(dtype)), **options)
        with pytest.raises(ValueError, match="function's result: expected float32"):
            directional_derivative(lambda x, t: (x * t[:, None]).to(dtype), (x, t), one, **options)
        with torch.autocast("cpu", dtype=dtype), pytest.raises(ValueError, match="autocast: expected float32"):
            directional_derivative(lambda x, t: x @ x * t[:, None], (x, t), one, **options)


def derivative_of_a_sharded_model(group, folder):
    """On each of two ranks: the same value, derivative and gradient as unsharded, or a refusal that names FSDP."""
    x, t, text, dx, dt = inputs(LAYOUT, dtype=torch.float32)
    plain, sharded = copy.deepcopy(MODEL), copy.deepcopy(MODEL)
    mesh = make_mesh(group.world_size)
    shard_model(sharded, sharded.transformer_blocks, mesh, methods=["forward_packed"])
    found = []
    for model in (plain, sharded):
        try:
            value, slope = directional_derivative(
                lambda x, t, model=model: model.forward_packed(x, t, text, LAYOUT), (x, t), (dx, dt)
            )
        except ValueError as error:
            known = model is sharded and "FSDP" in str(error)
            (folder / f"{group.rank}").write_text("refused" if known else str(error))
            return
        value.sum().backward()
        gradient = model.img_in.weight.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else group.world_size * gradient
        found.append((value.detach(), slope, gradient))
    for one, other in zip(*found, strict=True):
        close(one, other, 1e-5)
    (folder / f"{group.rank}").write_text("right")


@pytest.mark.slow
def test_through_fsdp_forward_mode_is_right_or_refused(tmp_path):
    run_processes(derivative_of_a_sharded_model, 2, tmp_path)
    told = [(tmp_path / f"{rank}").read_text() for rank in range(2)]
    # Right on torch 2.15, refused by torch itself on 2.11 (pytorch issue 182641).
    assert told in (["right"] * 2, ["refused"] * 2)


def test_a_network_with_narrow_weights_is_refused_although_its_result_is_float32():
    x, t, text, dx, dt = inputs(LAYOUT, dtype=torch.float32)
    narrow = copy.deepcopy(MODEL).bfloat16()
    for method in ("central", "semi"):
        with pytest.raises(ValueError, match="function's result: expected float32 .* got torch.bfloat16 numbers in"):
            directional_derivative(
                lambda x, t: narrow.forward_packed(x, t, text.bfloat16(), LAYOUT),
                (x, t),
                (dx, dt),
                method=method,
                step=1e-3,
            )
    # A result of zeros, as of a fresh output layer, is no sign of it.
    zero = directional_derivative(lambda x: 0 * x, (x,), (dx,), method="central", step=1e-3)[1]
    assert not zero.any()


class Sdpa(nn.Module):
    def forward(self, x, t):
        return F.scaled_dot_product_attention(x, x, x) * t


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class TestRefusals:
    X = (torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5))
    ONE = (torch.ones(1, 2, 4, 8), torch.tensor(1.0))

    @pytest.mark.parametrize("method", ["forward", "semi"])
    def test_fused_attention_says_what_to_use(self, method):
        with pytest.raises(ValueError, match=r"without forward-mode derivative.*MATH"):
            directional_derivative(Sdpa(), self.X, self.ONE, method=method, step=step_of(method, 1e-3))
        value, slope = directional_derivative(Sdpa(), self.X, self.ONE, method="central", step=1e-2)
        with sdpa_kernel(SDPBackend.MATH):
            plain, exact = directional_derivative(Sdpa(), self.X, self.ONE)
        close(value, plain, 1e-5)
        close(slope, exact, 1e-3)

    def test_a_hand_written_backward_says_what_to_use(self):
        x = torch.tensor([2.0])
        with pytest.raises(ValueError, match="hand-written autograd function"):
            directional_derivative(Cube.apply, (x,), (torch.ones(1),))
        _, slope = directional_derivative(Cube.apply, (x,), (torch.ones(1),), method="central", step=1e-2)
        assert slope.item() == pytest.approx(12, rel=1e-3)

    def test_other_errors_are_the_functions_own(self):
        def broken(x, t):
            raise RuntimeError("out of cheese")

        with pytest.raises(RuntimeError, match="cheese"):
            directional_derivative(broken, self.X, self.ONE)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"method": "backward"}, "method: expected one of forward, central, semi"),
            ({"step": 1e-3}, "step: expected None with method='forward'"),
            ({"method": "central"}, "step: expected a positive number"),
            ({"method": "semi", "step": -1.0}, "step: expected a positive number"),
            ({"method": "central", "step": math.inf}, "step: expected a positive number"),
            ({"primals": ()}, "tangents: expected one for each"),
            ({"tangents": (torch.ones(2),)}, "tangents: expected one for each"),
            ({"tangents": (torch.ones(2), torch.ones(1))}, r"tangents\[1\]: expected the shape of primals\[1\]"),
            ({"tangents": (torch.ones(2), torch.ones(2).double())}, r"tangents\[1\]: expected the dtype"),
            ({"primals": (torch.ones(2), torch.ones(2).long())}, r"primals\[1\]: expected floating point"),
            ({"primals": (torch.ones(2),), "tangents": (torch.ones(2),), "method": "semi", "step": 0.1}, "two or more"),
        ],
    )
    def test_nonsense_is_refused(self, changes, message):
        arguments = {"primals": (torch.ones(2), torch.ones(2)), "tangents": (torch.ones(2), torch.ones(2)), **changes}
        with pytest.raises(ValueError, match=message):
            directional_derivative(lambda x, t: x * t, **arguments)

    def test_a_check_against_nothing_is_refused(self):
        with pytest.raises(ValueError, match="not zero"):
            check_derivative(lambda dtype: torch.zeros_like, (torch.ones(2),), (torch.ones(2),))


@pytest.mark.parametrize("method", METHODS)
def test_vmap_and_compile(method):
    x, t = tensor((5, 3, 2), 0, DOUBLE), torch.linspace(0.1, 0.9, 5, dtype=DOUBLE)[:, None].expand(5, 3)
    options = {"method": method, "step": step_of(method, 1e-4)}

    def slope(x, t):
        return directional_derivative(lambda x, t: (x * t[:, None]).sin(), (x, t), (x.cos(), t * 2), **options)

    expected = [slope(a, b) for a, b in zip(x, t, strict=True)]
    for got, want in zip(torch.func.vmap(slope)(x, t), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))
    torch._dynamo.reset()
    compiled = torch.compile(slope, backend="eager", fullgraph=True)
    for got, want in zip(compiled(x[0], t[0]), expected[0], strict=True):
        torch.testing.assert_close(got, want)


def test_grad_mode_is_left_as_it_was():
    with contextlib.suppress(ValueError):
        directional_derivative(Sdpa(), TestRefusals.X, TestRefusals.ONE)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        value, _ = directional_derivative(lambda x: x * 2, (torch.ones(1),), (torch.ones(1),))
        assert not torch.is_grad_enabled() and not value.requires_grad
