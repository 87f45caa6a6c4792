"""Laws of sampling: the published schedule and guidance, solver orders on known flows, seeds, packed = one by one."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensmini.packed import Layout, pack, unpack
from lensmini.sampling import (
    dpm2,
    empirical_mu,
    euler_step,
    guide,
    heun_step,
    initial_noise,
    sample_ode,
    time_grid,
)
from tests.golden_cases import golden
from tests.oracle import Gaussian, rk4, two_components
from tests.strategies import grids, seeds, tensor

STEPS = ["euler", "heun", "dpm2"]
SCHEDULES = golden("scheduler_a")[1]["entries"]
SCALES = golden("cfg_a")[1]["guidance_scales"]


def line(num_steps, start=1.0, stop=0.0):
    return torch.linspace(start, stop, num_steps + 1, dtype=torch.float64)


def even_in_log_snr(num_steps, start=0.98, stop=0.02):
    ends = torch.tensor([start, stop], dtype=torch.float64).logit()
    return torch.lerp(ends[0], ends[1], line(num_steps, 0.0, 1.0)).sigmoid()


def orders(problem, reference, step, grid, counts):
    """log2 of successive errors' ratios; counts double, so the limit is the order of the solver."""
    x = tensor((16, 2), 0, torch.float64)
    expected = reference(x)
    errors = [(sample_ode(problem.velocity, x, grid(n), step=step) - expected).abs().max().item() for n in counts]
    return [math.log2(a / b) for a, b in pairwise(errors)]


class TestSchedule:
    @pytest.mark.parametrize("entry", SCHEDULES, ids=lambda entry: entry["key"])
    def test_the_released_schedule_is_matched(self, entry):
        tensors, key = golden("scheduler_a")[0], entry["key"]
        mu = empirical_mu(entry["image_tokens"], entry["steps"])
        assert mu == pytest.approx(entry["mu"], abs=1e-9)
        times = time_grid(entry["steps"], mu)
        assert times.dtype == torch.float32
        torch.testing.assert_close(times, tensors[f"{key}.sigmas"], rtol=0, atol=1e-6)
        torch.testing.assert_close(1000 * times[:-1], tensors[f"{key}.timesteps"], rtol=0, atol=1e-3)
        torch.testing.assert_close(times[:-1], tensors[f"{key}.timestep_fp32_input"], rtol=0, atol=1e-6)

    def test_the_shift_is_continuous_in_steps_and_jumps_only_at_4300_tokens(self):
        assert empirical_mu(4096, 200) == pytest.approx(0.00016927 * 4096 + 0.45666666, abs=1e-12)
        assert empirical_mu(4096, 10) == pytest.approx(8.73809524e-05 * 4096 + 1.89833333, abs=1e-12)
        assert empirical_mu(4300, 4) != empirical_mu(4300, 50)
        assert empirical_mu(4301, 4) == empirical_mu(4301, 50)

    @given(st.integers(1, 100), st.floats(-5, 5))
    def test_a_grid_falls_from_one_to_zero_and_the_shift_is_a_logit_offset(self, num_steps, mu):
        times, plain = time_grid(num_steps, mu), time_grid(num_steps)
        assert times.shape == (num_steps + 1,) and times[0] == 1 and times[-1] == 0
        assert (times.diff() < 0).all()
        shifted = torch.sigmoid(plain[1:-1].double().logit() + mu)
        torch.testing.assert_close(times[1:-1].double(), shifted, rtol=0, atol=1e-6)

    @given(st.integers(1, 100))
    def test_no_shift_is_equal_steps(self, num_steps):
        expected = torch.linspace(1, 0, num_steps + 1)
        for mu in (None, 0, 0.0):
            torch.testing.assert_close(time_grid(num_steps, mu), expected, rtol=0, atol=1e-7)

    def test_several_shifts_give_every_sample_its_own_grid(self):
        mus = [empirical_mu(n, 7) for n in (1024, 4096, 8100)]
        expected = torch.stack([time_grid(7, mu) for mu in mus])
        assert torch.equal(time_grid(7, mus), expected)
        assert torch.equal(time_grid(7, torch.tensor(mus, dtype=torch.float64), device="cpu"), expected)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: time_grid(0), "num_steps"),
            (lambda: time_grid(4, math.nan), "mu: expected"),
            (lambda: time_grid(4, torch.zeros(2, 2)), "mu: expected"),
            (lambda: empirical_mu(0, 4), "num_tokens"),
            (lambda: empirical_mu(4, 0), "num_steps"),
        ],
    )
    def test_a_wrong_argument_is_named(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


class TestGuidance:
    @pytest.mark.parametrize("scale", SCALES)
    def test_the_released_combination_is_matched(self, scale):
        tensors, _ = golden("cfg_a")
        result = guide(tensors["inputs.cond"], tensors["inputs.uncond"], scale, channel_dim=-1)
        expected = tensors[f"outputs.g{scale}"]
        assert (result - expected).abs().max() <= 2e-6 * expected.abs().max()

    @given(seeds(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.booleans())
    def test_scale_one_is_the_conditional_output_bit_for_bit(self, seed, dtype, rescale):
        cond, uncond = tensor((2, 5, 4), seed, dtype), tensor((2, 5, 4), seed + 1, dtype)
        uncond[0, 0, 0] = torch.nan
        result = guide(cond, uncond, 1.0, channel_dim=-1, rescale=rescale)
        assert torch.equal(result, cond) and result.data_ptr() != cond.data_ptr()

    @given(seeds(), st.floats(-3, 10).filter(lambda scale: scale != 1))
    def test_every_token_keeps_the_norm_of_the_conditional_output(self, seed, scale):
        cond, uncond = tensor((2, 4, 3, 3), seed, torch.float64), tensor((2, 4, 3, 3), seed + 1, torch.float64)
        result = guide(cond, uncond, scale, channel_dim=1)
        torch.testing.assert_close(result.norm(dim=1), cond.norm(dim=1), rtol=1e-10, atol=0)
        # The direction is that of the plain combination.
        plain = guide(cond, uncond, scale, channel_dim=1, rescale=False)
        cosine = torch.cosine_similarity(result, plain, dim=1)
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-10)

    @given(seeds(), st.floats(-3, 10))
    def test_without_rescaling_it_extrapolates_linearly(self, seed, scale):
        cond, uncond = tensor((3, 4), seed, torch.float64), tensor((3, 4), seed + 1, torch.float64)
        expected = torch.lerp(uncond, cond, scale)
        result = guide(cond, uncond, scale, channel_dim=1, rescale=False)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(guide(cond, uncond, 0.0, channel_dim=1, rescale=False), uncond)

    @given(seeds(), st.floats(-3, 10))
    def test_equal_halves_are_left_alone(self, seed, scale):
        cond = tensor((3, 4), seed, torch.float64)
        torch.testing.assert_close(guide(cond, cond, scale, channel_dim=1), cond, rtol=1e-14, atol=0)

    @given(seeds(), st.floats(0.01, 100), st.floats(1.5, 8))
    def test_scaling_both_halves_scales_the_result(self, seed, factor, scale):
        cond, uncond = tensor((3, 4), seed, torch.float64), tensor((3, 4), seed + 1, torch.float64)
        scaled = guide(factor * cond, factor * uncond, scale, channel_dim=1)
        torch.testing.assert_close(scaled, factor * guide(cond, uncond, scale, channel_dim=1), rtol=1e-10, atol=0)

    def test_zero_vectors_stay_zero_and_have_finite_gradients(self):
        cond = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1e30, 0.0]], requires_grad=True)
        uncond = torch.tensor([[0.0, 0.0], [2.0, 2.0], [1.0, 0.0], [2e30, 0.0]], requires_grad=True)
        result = guide(cond, uncond, 2.0, channel_dim=1)
        assert not result[:3].any()
        assert not result[3].any()
        result.sum().backward()
        assert cond.grad.isfinite().all() and uncond.grad.isfinite().all()

    def test_the_channel_axis_and_the_batch_do_not_matter(self):
        cond, uncond = tensor((3, 4, 2, 5), 0), tensor((3, 4, 2, 5), 1)
        tokens = guide(pack(cond), pack(uncond), 4.0, channel_dim=-1)
        images = guide(cond, uncond, 4.0, channel_dim=1)
        torch.testing.assert_close(tokens, pack(images))
        torch.testing.assert_close(guide(cond[1:2], uncond[1:2], 4.0, channel_dim=1), images[1:2])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_combined_in_float32(self, dtype):
        cond, uncond = tensor((64, 16), 0, dtype), tensor((64, 16), 1, dtype)
        exact = guide(cond.double(), uncond.double(), 5.0, channel_dim=1)
        result = guide(cond, uncond, 5.0, channel_dim=1)
        assert result.dtype == dtype
        assert ((result.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-5).all()

    def test_gradients_vmap_compile_and_untouched_inputs(self):
        cond, uncond = tensor((3, 4), 0, torch.float64), tensor((3, 4), 1, torch.float64)
        copies = cond.clone(), uncond.clone()

        def guided(a, b):
            return guide(a, b, 3.0, channel_dim=-1)

        expected = guided(cond, uncond)
        assert torch.equal(torch.compile(guided, backend="eager", fullgraph=True)(cond, uncond), expected)
        torch.testing.assert_close(torch.func.vmap(guided)(cond, uncond), expected, rtol=1e-14, atol=1e-14)
        assert torch.equal(cond, copies[0]) and torch.equal(uncond, copies[1])
        assert torch.autograd.gradcheck(guided, (cond.requires_grad_(), uncond.requires_grad_()))

    @pytest.mark.parametrize(
        ("shape", "scale", "channel_dim", "message"),
        [
            ((1, 3), 2.0, 1, "uncond: expected the shape of cond"),
            ((4, 3), math.inf, 1, "scale"),
            ((4, 3), 2.0, 2, "channel_dim"),
            ((4, 3), 2.0, -3, "channel_dim"),
        ],
    )
    def test_a_wrong_argument_is_named(self, shape, scale, channel_dim, message):
        with pytest.raises(ValueError, match=message):
            guide(torch.zeros(4, 3), torch.zeros(shape), scale, channel_dim=channel_dim)


class TestGoldenLoops:
    def test_euler_steps_of_the_released_schedule(self):
        tensors, meta = golden("scheduler_a")
        sigmas = tensors[f"{meta['euler']['entry']}.sigmas"]
        for i in range(len(sigmas) - 1):
            x, v = tensors[f"euler_fp32.x.{i}"], tensors[f"euler_fp32.v.{i}"]
            result = euler_step(x, v, sigmas[i : i + 1], sigmas[i + 1 : i + 2])
            torch.testing.assert_close(result, tensors[f"euler_fp32.x.{i + 1}"], rtol=1e-6, atol=1e-6)

    def test_the_released_sampling_loop_with_its_recorded_model_outputs(self):
        tensors, meta = golden("denoise_loop_a")
        steps, tokens = meta["steps"], tensors["inputs.latents"].shape[1]
        seen = []

        def velocity(x, t):
            i = len(seen)
            seen.append(t)
            cond, uncond = tensors[f"outputs.model_output.{i}"].chunk(2)
            guided = guide(cond, uncond, meta["guidance_scale"], channel_dim=-1)
            torch.testing.assert_close(guided, tensors[f"outputs.guided.{i}"], rtol=1e-5, atol=1e-5)
            return guided

        def check(i, x):
            torch.testing.assert_close(x, tensors[f"outputs.latents.{i + 1}"], rtol=1e-5, atol=1e-5)

        times = time_grid(steps, empirical_mu(tokens, steps))
        result = sample_ode(velocity, tensors["inputs.latents"], times, callback=check)
        torch.testing.assert_close(torch.stack(seen), tensors["inputs_seen.timestep"][:, :1], rtol=0, atol=1e-6)
        torch.testing.assert_close(result, tensors["outputs.final_latents"], rtol=1e-5, atol=1e-5)


class TestOrder:
    def test_the_closed_flow_solves_the_equation(self):
        problem, x = Gaussian(), tensor((16, 2), 0, torch.float64)
        for start, stop in ((1.0, 0.0), (0.9, 0.2), (0.0, 1.0)):
            torch.testing.assert_close(
                rk4(problem.velocity, x, start, stop), problem.flow(x, start, stop), rtol=0, atol=1e-9
            )

    def test_the_measured_orders_on_the_gaussian_are_the_known_ones(self):
        problem, counts = Gaussian(), [8, 16, 32, 64, 128]
        euler = orders(problem, lambda x: problem.flow(x, 1.0, 0.0), "euler", line, counts)
        heun = orders(problem, lambda x: problem.flow(x, 1.0, 0.0), "heun", line, counts)
        assert euler[0] == pytest.approx(0.946, abs=2e-3) and 0.9 <= euler[-1] <= 1.1
        assert heun[0] == pytest.approx(1.59, abs=5e-3) and 1.8 <= heun[-1] <= 2.2

    @pytest.mark.parametrize(("step", "low", "high"), [("euler", 0.9, 1.1), ("heun", 1.8, 2.2)])
    def test_the_orders_hold_on_a_mixture(self, step, low, high):
        problem = two_components()
        measured = orders(problem, lambda x: rk4(problem.velocity, x, 1.0, 0.0, 500), step, line, [32, 64, 128, 256])
        assert low <= measured[-1] <= high

    @pytest.mark.parametrize("problem", [Gaussian(), two_components()], ids=["gaussian", "mixture"])
    def test_dpm2_has_order_two_and_nearly_so_up_to_the_ends(self, problem):
        # Where log((1 - t) / t) is finite the order is 2; a grid that reaches its infinite ends adds a logarithm.
        def inside(x):
            return rk4(problem.velocity, x, 0.98, 0.02, 500)

        assert 1.8 <= orders(problem, inside, "dpm2", even_in_log_snr, [32, 64, 128])[-1] <= 2.2
        assert (
            orders(problem, lambda x: rk4(problem.velocity, x, 1.0, 0.0, 500), "dpm2", line, [128, 256, 512])[-1] > 1.7
        )

    @pytest.mark.parametrize("step", STEPS)
    def test_a_point_mass_is_reached_exactly(self, step):
        problem, x = Gaussian(mean=0.7, std=0.0), tensor((4, 3), 0, torch.float64)
        result = sample_ode(problem.velocity, x, line(5)[:-1], step=step)
        torch.testing.assert_close(result, problem.flow(x, 1.0, 0.2), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("step", ["euler", "dpm2"])
    def test_the_last_step_to_zero_lands_on_the_clean_prediction(self, step):
        problem, x = Gaussian(), tensor((4, 3), 0, torch.float64)
        before = sample_ode(problem.velocity, x, line(6)[:-1], step=step)
        expected, _ = problem.posterior(before, line(6)[-2])
        torch.testing.assert_close(sample_ode(problem.velocity, x, line(6), step=step), expected)

    def test_heun_is_the_trapezoidal_corrector_of_euler(self):
        problem, x = Gaussian(), tensor((4, 3), 0, torch.float64)
        t, r = torch.full((4,), 0.8, dtype=torch.float64), torch.full((4,), 0.5, dtype=torch.float64)
        slope = problem.velocity(x, t)
        expected = x - 0.15 * slope - 0.15 * problem.velocity(x - 0.3 * slope, r)
        torch.testing.assert_close(heun_step(problem.velocity, x, t, r), expected, rtol=1e-12, atol=1e-12)

    def test_dpm2_is_the_papers_multistep_update(self):
        # arXiv 2211.01095 algorithm 2 in its own variables: alpha, sigma, lambda and data predictions.
        x, clean, before = (tensor((4, 3), seed, torch.float64) for seed in (0, 1, 2))
        t0, t1, t2 = 0.9, 0.7, 0.4
        lam = [math.log((1 - t) / t) for t in (t0, t1, t2)]
        h, r = lam[2] - lam[1], (lam[1] - lam[0]) / (lam[2] - lam[1])
        data = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * before
        expected = t2 / t1 * x - (1 - t2) * math.expm1(-h) * data
        times = [torch.full((4,), t, dtype=torch.float64) for t in (t0, t1, t2)]
        result = dpm2(x, (x - clean) / t1, times[1], times[2], previous=(before, times[0]))
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("num_steps", [1, 2, 5, 10])
    def test_dpm2_is_diffusers_multistep_solver_on_the_released_grid(self, num_steps):
        diffusers = pytest.importorskip("diffusers")
        problem, x = two_components(), tensor((8, 2), 0, torch.float64)
        times = time_grid(num_steps, 1.9).double()
        scheduler = diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0, final_sigmas_type="zero"
        )
        scheduler.set_timesteps(num_steps)
        scheduler.sigmas, scheduler.timesteps = times, 1000 * times[:-1]
        theirs = x
        for i in range(num_steps):
            output = problem.velocity(theirs, times[i]).to(torch.float64)
            theirs = scheduler.step(output, scheduler.timesteps[i], theirs).prev_sample
        # diffusers keeps its state in float32 from step to step.
        result = sample_ode(problem.velocity, x, times, step="dpm2")
        torch.testing.assert_close(result, theirs.double(), rtol=0, atol=2e-5)


class TestTrajectory:
    @pytest.mark.parametrize("step", STEPS)
    @given(seed=seeds(), num_steps=st.integers(1, 6))
    def test_no_velocity_no_change(self, step, seed, num_steps):
        x = tensor((3, 2, 2), seed)
        copy = x.clone()
        assert torch.equal(sample_ode(lambda x, t: torch.zeros_like(x), x, time_grid(num_steps), step=step), copy)
        assert torch.equal(x, copy)

    @pytest.mark.parametrize("step", STEPS)
    def test_a_constant_velocity_is_exact_in_one_step_and_in_many(self, step):
        x, v = tensor((3, 2), 0, torch.float64), tensor((3, 2), 1, torch.float64)
        assert torch.equal(sample_ode(lambda x, t: v, x, torch.tensor([1.0, 0.0]), step=step), x - v)
        many = sample_ode(lambda x, t: v, x, time_grid(9, 1.0), step=step)
        torch.testing.assert_close(many, x - v, rtol=0, atol=1e-7 if step == "dpm2" else 1e-13)

    def test_forward_and_back_returns_to_the_start_with_second_order(self):
        problem, x = two_components(), tensor((16, 2), 0, torch.float64)
        errors = []
        for num_steps in (20, 40):
            ahead = sample_ode(problem.velocity, x, line(num_steps), step="heun")
            back = sample_ode(problem.velocity, ahead, line(num_steps).flip(0), step="heun")
            errors.append((back - x).abs().max().item())
        assert errors[0] < 0.1 and math.log2(errors[0] / errors[1]) > 1.8

    @pytest.mark.parametrize("step", STEPS)
    @given(seed=seeds())
    def test_a_sample_does_not_depend_on_its_batch_mates(self, step, seed):
        problem, x = two_components(), tensor((6, 2), seed)
        times = time_grid(4, [0.1 * i for i in range(6)])

        def run(rows):
            return sample_ode(problem.velocity, x[rows], times[rows], step=step)

        whole, order = run(torch.arange(6)), torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(run(order), whole[order], rtol=1e-6, atol=1e-6)
        parts = torch.cat([run(torch.arange(6)[i : i + 2]) for i in (0, 2, 4)])
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("step", STEPS)
    def test_a_shared_grid_is_the_same_grid_for_everyone(self, step):
        problem, x, times = Gaussian(), tensor((3, 2), 0), time_grid(5, 1.0)
        shared = sample_ode(problem.velocity, x, times, step=step)
        assert torch.equal(sample_ode(problem.velocity, x, times.repeat(3, 1), step=step), shared)

    @pytest.mark.parametrize("step", STEPS)
    @given(sizes=grids(), seed=seeds())
    def test_packed_equals_every_image_alone_on_its_own_grid(self, step, sizes, seed):
        problem, layout = Gaussian(), Layout.build(sizes)
        images = [tensor((3, h, w), seed + i) for i, (h, w) in enumerate(sizes)]
        mus = [empirical_mu(h * w, 3) for h, w in sizes]

        def velocity(tokens, t):
            assert t.shape == (len(sizes),) and t.dtype == torch.float32
            return problem.velocity(tokens, t.repeat_interleave(torch.tensor(layout.image_lengths)))

        result = sample_ode(velocity, pack(images), time_grid(3, mus), step=step, layout=layout)
        alone = [
            sample_ode(problem.velocity, x[None], time_grid(3, mu), step=step)[0]
            for x, mu in zip(images, mus, strict=True)
        ]
        torch.testing.assert_close(result, pack(alone), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("step", STEPS)
    def test_the_model_sees_every_time_once_and_the_callback_every_state(self, step):
        times, seen, states = time_grid(4, 1.0), [], []

        def velocity(x, t):
            seen.append(t)
            return x

        x = tensor((2, 3), 0, torch.bfloat16)
        result = sample_ode(velocity, x, times, step=step, callback=lambda i, state: states.append((i, state)))
        assert all(t.dtype == torch.float32 and t.shape == (2,) and t.is_contiguous() for t in seen)
        first = torch.stack(seen)[:: 2 if step == "heun" else 1]
        assert torch.equal(first, times[:-1, None].expand(4, 2))
        if step == "heun":
            assert torch.equal(torch.stack(seen)[1::2], times[1:, None].expand(4, 2))
        assert [i for i, _ in states] == [0, 1, 2, 3] and states[-1][1] is result
        assert result.dtype == torch.bfloat16

    @pytest.mark.parametrize("step", STEPS)
    def test_half_precision_states_with_a_float32_model_and_the_reverse(self, step):
        problem, x = Gaussian(), tensor((4, 8), 0)
        exact = sample_ode(problem.velocity, x, time_grid(6, 1.0), step=step)

        def half(state, t):
            return problem.velocity(state.float(), t).bfloat16()

        kept = sample_ode(half, x, time_grid(6, 1.0), step=step)
        rounded = sample_ode(
            lambda state, t: problem.velocity(state.float(), t), x.bfloat16(), time_grid(6, 1.0), step=step
        )
        assert kept.dtype == torch.float32 and rounded.dtype == torch.bfloat16
        torch.testing.assert_close(kept, exact, rtol=0, atol=0.02)
        torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.04)

    @pytest.mark.parametrize("step", STEPS)
    def test_gradients_flow_through_the_trajectory_unless_switched_off(self, step):
        x = tensor((2, 3), 0, torch.float64).requires_grad_()
        gain = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

        def run(x, gain):
            return sample_ode(lambda state, t: gain * state.sin(), x, line(3), step=step)

        assert torch.autograd.gradcheck(run, (x, gain))
        with torch.no_grad():
            assert not run(x, gain).requires_grad

    @pytest.mark.parametrize("step", STEPS)
    def test_one_graph_and_vmap(self, step):
        problem, x, times = Gaussian(), tensor((3, 2), 0), time_grid(3, 1.0)

        def run(x):
            return sample_ode(problem.velocity, x, times, step=step)

        torch.testing.assert_close(torch.compile(run, backend="eager", fullgraph=True)(x), run(x))
        stacked = tensor((4, 3, 2), 1)
        torch.testing.assert_close(torch.func.vmap(run)(stacked), torch.stack([run(row) for row in stacked]))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"step": "rk4"}, "step: expected 'euler', 'heun' or 'dpm2', got 'rk4'"),
            ({"times": torch.ones(1)}, "times: expected at least two"),
            ({"times": torch.ones(3, 4)}, r"times: expected shape \[b k\] with b=2"),
            ({"times": torch.ones(2, 2, 2)}, r"times: expected shape \[b k\]"),
            ({"times": torch.tensor([1, 0])}, "times: expected floating point"),
            ({"times": torch.tensor([1000.0, 0.0])}, r"times: expected times in \[0, 1\]"),
            ({"velocity": lambda x, t: x[:, :1]}, "velocity: expected the shape of noisy"),
            ({"layout": Layout.build([(1, 3)])}, "expected shape"),
        ],
    )
    @pytest.mark.parametrize("step", STEPS)
    def test_a_wrong_argument_is_named(self, step, changes, message):
        arguments = {"velocity": lambda x, t: x, "noise": torch.zeros(2, 3), "times": time_grid(2), "step": step}
        with pytest.raises(ValueError, match=message):
            sample_ode(**{**arguments, **changes})

    def test_steps_name_what_is_wrong(self):
        x, t = torch.zeros(2, 3), torch.tensor([1.0, 1.0])
        with pytest.raises(ValueError, match="velocity: expected the shape of noisy"):
            euler_step(x, x[:1], t, t)
        with pytest.raises(ValueError, match="t_next: expected shape"):
            euler_step(x, x, t, t[:1])
        with pytest.raises(ValueError, match=r"previous\[0\]: expected the shape of noisy"):
            dpm2(x, x, t, t, previous=(x[:1], t))
        with pytest.raises(ValueError, match=r"previous\[1\]: expected shape"):
            dpm2(x, x, t, t, previous=(x, t[:1]))


class TestInitialNoise:
    @given(grids(), seeds())
    def test_a_seed_gives_the_same_noise_alone_in_a_batch_dense_and_packed(self, sizes, seed):
        numbers, layout = [seed + 3 * i for i in range(len(sizes))], Layout.build(sizes)
        packed = initial_noise(numbers, 5, layout)
        for image, number, size in zip(unpack(packed, layout), numbers, sizes, strict=True):
            alone = initial_noise([number], 5, size)
            assert torch.equal(alone[0], image)
            assert torch.equal(initial_noise([number + 1, number], 5, size)[1], image)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_is_drawn_in_token_order(self, dtype):
        noise = initial_noise([7], 16, (4, 6), dtype=dtype)
        drawn = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(7), dtype=dtype)
        assert noise.dtype == dtype and noise.is_contiguous()
        for row in range(4):
            for column in range(6):
                assert torch.equal(noise[0, :, row, column], drawn[0, row * 6 + column])

    def test_it_is_standard_normal_and_leaves_the_global_generator_alone(self):
        state = torch.get_rng_state()
        noise = initial_noise(range(8), 16, (32, 32))
        assert torch.equal(torch.get_rng_state(), state)
        assert abs(noise.mean().item()) < 0.02 and abs(noise.std().item() - 1) < 0.02
        assert abs(torch.corrcoef(noise.flatten(1)).fill_diagonal_(0)).max() < 0.04

    @pytest.mark.parametrize(
        ("numbers", "channels", "grid", "message"),
        [
            ([], 4, (2, 2), "seeds"),
            ([1], 4, Layout.build([(2, 2), (1, 1)]), "seeds"),
            ([1], 0, (2, 2), "channels and grid"),
            ([1], 4, (2, 0), "channels and grid"),
            ([1], 4, (-2, -2), "channels and grid"),
        ],
    )
    def test_a_wrong_argument_is_named(self, numbers, channels, grid, message):
        with pytest.raises(ValueError, match=message):
            initial_noise(numbers, channels, grid)
