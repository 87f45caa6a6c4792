"""Any callable is a model: diffusers' transformers train and sample through our paths, loss and samplers.

Each adapter below closes one of them over its condition and is at most 20 lines; that is all a foreign model needs.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch
from einops import rearrange

from lensmini.objectives import flow_matching_loss, sample_times, training_mu
from lensmini.paths import interpolate, velocity_target
from lensmini.sampling import empirical_mu, guide, initial_noise, sample_ode, time_grid
from tests.strategies import tensor

diffusers = pytest.importorskip("diffusers")

BATCH, CHANNELS, HEIGHT, WIDTH, TEXT, WIDE = 4, 4, 6, 4, 5, 12


def flux(model, text, pooled):
    """2 x 2 patches as tokens, positions as ids; the model multiplies the time by 1000 itself."""

    def velocity(latents, t):
        h, w = latents.shape[2] // 2, latents.shape[3] // 2
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).to(latents)
        tokens = rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        txt_ids = torch.zeros(text.shape[1], 3).to(latents)
        output = model(tokens, text, pooled, timestep=t, img_ids=ids, txt_ids=txt_ids, return_dict=False)[0]
        return rearrange(output, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=2, q=2)

    return velocity


def sd3(model, text, pooled):
    """Latents go in as they are; the time is wanted in 0 ... 1000."""

    def velocity(latents, t):
        return model(latents, text, pooled, timestep=1000 * t, return_dict=False)[0]

    return velocity


def qwen(model, text, pooled):
    """2 x 2 patches as tokens and their grid; the model multiplies the time by 1000 itself."""

    def velocity(latents, t):
        h, w = latents.shape[2] // 2, latents.shape[3] // 2
        tokens = rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        shapes = [[(1, h, w)]] * len(latents)
        output = model(tokens, text, mask, timestep=t, img_shapes=shapes, return_dict=False)[0]
        return rearrange(output, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=2, q=2)

    return velocity


BUILD = {
    flux: lambda: diffusers.FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDE,
        pooled_projection_dim=WIDE,
        axes_dims_rope=(2, 2, 4),
    ),
    sd3: lambda: diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDE,
        caption_projection_dim=16,
        pooled_projection_dim=WIDE,
        pos_embed_max_size=8,
    ),
    qwen: lambda: diffusers.QwenImageTransformer2DModel(
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDE,
        axes_dims_rope=(2, 2, 4),
    ),
}


@pytest.fixture(params=[flux, sd3, qwen], ids=lambda adapter: adapter.__name__)
def case(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BUILD[request.param]()
    text, pooled = tensor((BATCH, TEXT, WIDE), 1), tensor((BATCH, WIDE), 2)
    return SimpleNamespace(adapter=request.param, model=model, velocity=request.param(model, text, pooled))


def test_an_adapter_is_at_most_twenty_lines(case):
    assert len(inspect.getsource(case.adapter).rstrip().splitlines()) <= 20


def test_the_model_embeds_a_thousand_times_our_time(case):
    seen = []
    case.model.time_text_embed.time_proj.register_forward_pre_hook(
        lambda module, inputs: seen.append(getattr(module, "scale", 1) * inputs[0])
    )
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    case.velocity(tensor((BATCH, CHANNELS, HEIGHT, WIDTH), 3), t)
    torch.testing.assert_close(seen[0], 1000 * t)


def test_three_training_steps_lower_the_loss(case):
    latents = tensor((BATCH, CHANNELS, HEIGHT, WIDTH), 3)
    noise = initial_noise(range(BATCH), CHANNELS, (HEIGHT, WIDTH))
    mu = training_mu(HEIGHT * WIDTH // 4)
    t = sample_times(BATCH, mu=mu, generator=torch.Generator().manual_seed(4))
    before = {name: value.detach().clone() for name, value in case.model.named_parameters()}
    optimiser = torch.optim.Adam(case.model.parameters(), lr=3e-3)

    def loss():
        velocity = case.velocity(interpolate(latents, noise, t), t)
        return flow_matching_loss(velocity, velocity_target(latents, noise)).mean()

    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        optimiser.step()
    losses = [value.item() for value in [*losses, loss()]]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.99 * losses[0]
    after = dict(case.model.named_parameters())
    trained = [name for name, value in after.items() if value.grad is not None and value.grad.any()]
    assert len(trained) > len(after) / 2
    assert all(not torch.equal(after[name], before[name]) for name in trained)


@torch.no_grad()
def test_guided_sampling_is_what_diffusers_scheduler_does_with_the_same_model(case):
    numpy = pytest.importorskip("numpy")
    num_steps, num_tokens = 4, HEIGHT * WIDTH // 4
    mu = empirical_mu(num_tokens, num_steps)
    without = case.adapter(case.model, torch.zeros(BATCH, TEXT, WIDE), torch.zeros(BATCH, WIDE))

    def guided(latents, t):
        return guide(case.velocity(latents, t), without(latents, t), 4.0, channel_dim=1)

    noise = initial_noise(range(BATCH), CHANNELS, (HEIGHT, WIDTH))
    result = sample_ode(guided, noise, time_grid(num_steps, mu))

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=numpy.linspace(1, 1 / num_steps, num_steps), mu=mu)
    theirs = noise
    for timestep in scheduler.timesteps:
        output = guided(theirs, (timestep / 1000).expand(BATCH))
        theirs = scheduler.step(output, timestep, theirs, return_dict=False)[0]
    torch.testing.assert_close(result, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(result, sample_ode(case.velocity, noise, time_grid(num_steps, mu)), atol=1e-2)
    assert not torch.allclose(result, noise, atol=1e-2)
