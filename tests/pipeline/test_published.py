"""The published bf16 roundings, exactly; and that exact arithmetic differs from them."""

import pytest
import torch

from lensmini.pipeline.published import published_denormalize, published_euler_step, published_guide, published_timestep
from lensmini.sampling import guide
from tests.golden_cases import golden
from tests.strategies import tensor

BF16 = torch.bfloat16


def test_the_published_timestep_in_bf16_and_in_float32():
    tensors, meta = golden("scheduler_a")
    for entry in meta["entries"]:
        sigmas = tensors[f"{entry['key']}.sigmas"][:-1]
        rounded = published_timestep(sigmas)
        assert rounded.dtype == BF16
        assert rounded.float().equal(tensors[f"{entry['key']}.timestep_bf16_input"])
        exact = published_timestep(sigmas, dtype=torch.float32)
        assert exact.equal(tensors[f"{entry['key']}.timestep_fp32_input"])
    tensors, _ = golden("timestep_a")
    assert published_timestep(tensors["inputs.timestep"]).float().equal(tensors["bf16.timestep_seen"])


def test_published_guidance_in_bf16_is_exact_and_not_that_of_float32():
    tensors, _ = golden("cfg_a")
    cond, uncond = tensors["inputs.cond"].to(BF16), tensors["inputs.uncond"].to(BF16)
    expected = tensors["outputs_bf16.g5.0"]
    assert published_guide(cond, uncond, 5.0, channel_dim=-1).float().equal(expected)
    assert not guide(cond, uncond, 5.0, channel_dim=-1).float().equal(expected)


@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0, 5.0])
def test_published_guidance_in_float32(scale):
    tensors, _ = golden("cfg_a")
    expected = tensors[f"outputs.g{scale}"]
    result = published_guide(tensors["inputs.cond"], tensors["inputs.uncond"], scale, channel_dim=-1)
    assert (result - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_published_euler_steps_exactly(kind):
    tensors, meta = golden("scheduler_a")
    sigmas = tensors[f"{meta['euler']['entry']}.sigmas"]
    dtype = BF16 if kind == "bf16" else torch.float32
    for i in range(len(sigmas) - 1):
        noisy, velocity = (tensors[f"euler_{kind}.{name}.{i}"].to(dtype) for name in "xv")
        result = published_euler_step(noisy, velocity, sigmas[i : i + 1], sigmas[i + 1 : i + 2])
        assert result.dtype == dtype
        assert result.float().equal(tensors[f"euler_{kind}.x.{i + 1}"])


def test_published_statistics_are_rounded_before_they_are_used():
    latents, mean, var = tensor((2, 4, 3, 3), 0, BF16), tensor((4,), 1), tensor((4,), 2).square() + 0.1
    result = published_denormalize(latents, mean, var)
    expected = torch.empty_like(latents)
    for c in range(4):
        std = torch.sqrt(var[c].to(BF16) + torch.tensor(1e-4, dtype=torch.float32).item())
        assert std.dtype == BF16
        expected[:, c] = latents[:, c] * std + mean[c].to(BF16)
    assert result.equal(expected)
    wide = published_denormalize(latents.double(), mean.double(), var.double())
    exact = latents.double() * (var.double() + 1e-4).sqrt().view(-1, 1, 1) + mean.double().view(-1, 1, 1)
    assert (wide - exact).abs().max() < 1e-12
    assert 1e-4 < (result.double() - exact).abs().max() < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: published_timestep(x.long()), "floating"),
        (lambda x: published_guide(x, x[:1], 2.0, channel_dim=-1), "uncond"),
        (lambda x: published_guide(x, x.double(), 2.0, channel_dim=-1), "dtype"),
        (lambda x: published_guide(x, x, float("inf"), channel_dim=-1), "scale"),
        (lambda x: published_guide(x, x, 2.0, channel_dim=2), "channel_dim"),
        (lambda x: published_euler_step(x, x[:1], x[:, 0] * 0, x[:, 0] * 0), "velocity"),
        (lambda x: published_denormalize(x, torch.zeros(4), torch.ones(4)), "mean and var"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3))
