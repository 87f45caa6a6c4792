"""A decoder in strips paints the whole decoder's picture, in less memory, and refuses what it does not know."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensmini.nn import Autoencoder, LatentNormalizer, decode_in_strips
from lensmini.nn.strips import check_decodes_in_strips, decodes_in_strips
from tests.live_memory import LiveMemory
from tests.strategies import seeds

diffusers = pytest.importorskip("diffusers")


def decoder(kind="AutoencoderKLFlux2", channels=(8, 16, 32), seed=0, **options):
    """A small autoencoder whose norms have weights and biases of their own, as trained ones have."""
    torch.manual_seed(seed)
    blocks = {f"{way}_block_types": (f"{word}Block2D",) * len(channels) for way, word in WAYS.items()}
    vae = getattr(diffusers, kind)(block_out_channels=channels, norm_num_groups=4, **blocks, **options).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in vae.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return vae.requires_grad_(False)


WAYS = {"down": "DownEncoder", "up": "UpDecoder"}


@pytest.fixture(scope="module")
def flux2():
    return decoder()


@given(rows=st.integers(1, 40), height=st.integers(1, 7), width=st.integers(1, 6), num=st.integers(1, 2), seed=seeds())
def test_any_height_of_strips_gives_the_whole_picture(flux2, rows, height, width, num, seed):
    latents = torch.randn(num, 32, height, width, generator=torch.Generator().manual_seed(seed))
    whole = flux2.decode(latents).sample
    strips = decode_in_strips(flux2, latents, rows=rows)
    # As near to the exact picture as the plain float32 one is, give or take a factor.
    exact = copy.deepcopy(flux2).double().decode(latents.double()).sample
    limit = max(1e-5 * exact.abs().max().item(), 3 * (whole - exact).abs().max().item())
    assert strips.shape == whole.shape and (strips - exact).abs().max() <= limit


@pytest.mark.parametrize(
    "vae",
    [
        {"kind": "AutoencoderKL", "channels": (8, 8, 16), "latent_channels": 4},
        {"kind": "AutoencoderKL", "channels": (12, 16), "latent_channels": 3},  # less than halved: no room in place
        {"channels": (16, 16), "layers_per_block": 1},
    ],
    ids=["kl", "narrowing", "one layer"],
)
def test_other_shapes_of_decoders_in_float64_are_exact(vae):
    model = decoder(**vae).double()
    latents = torch.randn(1, model.config.latent_channels, 5, 4, dtype=torch.float64)
    for rows in (1, 3, 8, 100):
        error = (decode_in_strips(model, latents, rows=rows) - model.decode(latents).sample).abs().max()
        assert error <= 1e-9


def test_low_precision_is_as_near_as_the_whole_decoder(flux2):
    latents = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(3))
    exact, low = flux2.decode(latents).sample, copy.deepcopy(flux2).bfloat16()
    whole = (low.decode(latents.bfloat16()).sample.float() - exact).square().mean().sqrt()
    strips = (decode_in_strips(low, latents.bfloat16(), rows=5).float() - exact).square().mean().sqrt()
    assert strips <= 1.1 * whole


def test_the_latents_are_not_touched(flux2):
    latents = torch.randn(1, 32, 4, 4)
    before = latents.clone()
    decode_in_strips(flux2, latents, rows=2)
    assert torch.equal(latents, before)


def test_memory_is_less_than_half():
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLFlux2(mid_block_add_attention=False).bfloat16()
    latents = torch.empty(1, 32, 128, 128, dtype=torch.bfloat16, device="meta")
    found = []
    for decode in (lambda: vae.decode(latents).sample, lambda: decode_in_strips(vae, latents)):
        with torch.no_grad(), LiveMemory(vae) as live:
            decode()
        found.append(live.peak)
    assert found[1] < 0.47 * found[0]


def test_what_it_does_not_know_is_refused():
    with pytest.raises(ValueError, match="Linear without decoder"):
        check_decodes_in_strips(torch.nn.Linear(1, 1))
    strange = decoder()
    strange.decoder.up_blocks[1].resnets[0].norm2 = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"norms GroupNorm, Identity in up_blocks\.1"):
        decode_in_strips(strange, torch.zeros(1, 32, 2, 2))
    wide = decoder()
    wide.decoder.up_blocks[0].resnets[1].conv1 = torch.nn.Conv2d(32, 32, 5, padding=2)
    attending = decoder()
    attending.decoder.up_blocks[0].attentions = torch.nn.ModuleList([torch.nn.Identity()])
    circular = decoder()
    circular.decoder.conv_out.padding_mode = "circular"
    assert decodes_in_strips(decoder()) and not any(map(decodes_in_strips, (strange, wide, attending, circular)))
    with pytest.raises(ValueError, match="rows: expected at least 1, got 0"):
        decode_in_strips(decoder(), torch.zeros(1, 32, 2, 2), rows=0)
    with pytest.raises(ValueError, match="latents"):
        decode_in_strips(decoder(), torch.zeros(32, 2, 2))


def test_a_compiled_decoder_paints_the_same_as_one_graph_of_unchanged_weights(flux2):
    vae = copy.deepcopy(flux2)
    autoencoder = Autoencoder(vae, LatentNormalizer(torch.zeros(128), torch.ones(128)), downsample=8)
    latents = torch.randn(1, 128, 3, 4, generator=torch.Generator().manual_seed(1))
    plain, keys = autoencoder.decode(latents), list(autoencoder.state_dict())
    autoencoder.compile_decoder(backend="eager")
    assert torch.equal(autoencoder.decode(latents), plain) and list(autoencoder.state_dict()) == keys
    assert vae.decoder._compiled_call_impl is not None
    bare = Autoencoder(torch.nn.Linear(1, 1), LatentNormalizer(torch.zeros(4), torch.ones(4)), downsample=2)
    with pytest.raises(ValueError, match="module named decoder"):
        bare.compile_decoder()
