"""Autoencoders through save and load: the published FLUX.2 kind, and diffusers' own arithmetic for the older kind."""

import json

import pytest
import torch

from lensmini.nn.autoencoder import Autoencoder, from_uint8, load_autoencoder, to_uint8
from lensmini.nn.latents import LatentNormalizer, unpatchify
from tests.golden_cases import golden
from tests.strategies import tensor

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")


def error(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def flux2_folder(tmp_path_factory):
    tensors, meta = golden("vae_a")
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in meta["model_config"].items()}
    vae = diffusers.AutoencoderKLFlux2(**config)
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    # Statistics far from zero and one, so that forgetting or doubling them shows.
    weights["bn.running_mean"] = tensor([16], 0)
    weights["bn.running_var"] = tensor([16], 1).square() + 0.1
    vae.load_state_dict(weights, strict=True)
    folder = tmp_path_factory.mktemp("flux2")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flux2(flux2_folder):
    return load_autoencoder(flux2_folder)


@pytest.fixture(scope="module")
def statistics():
    mean, var = tensor([16], 0), tensor([16], 1).square() + 0.1
    return mean.view(1, -1, 1, 1), (var + 1e-4).sqrt().view(1, -1, 1, 1)


def small_kl(**kwargs):
    torch.manual_seed(0)
    blocks = ("DownEncoderBlock2D", "DownEncoderBlock2D"), ("UpDecoderBlock2D", "UpDecoderBlock2D")
    return diffusers.AutoencoderKL(
        down_block_types=blocks[0],
        up_block_types=blocks[1],
        block_out_channels=(4, 8),
        latent_channels=3,
        norm_num_groups=2,
        **kwargs,
    ).eval()


def test_the_published_encoder_comes_back_from_its_folder(flux2, statistics):
    tensors, _ = golden("vae_a")
    mean, std = statistics
    latents = flux2.encode(tensors["encode.image"])
    assert latents.shape == (1, 16, 4, 3) and flux2.channels == 16 and flux2.downsample == 8
    assert error(unpatchify(latents * std + mean), tensors["encode.mean"]) <= 1e-4


def test_the_published_decoder_comes_back_from_its_folder(flux2, statistics):
    tensors, _ = golden("vae_a")
    mean, std = statistics
    raw = tensors["decode.latent"]
    patches = torch.stack([raw[:, c, dy::2, dx::2] for c in range(4) for dy in range(2) for dx in range(2)], dim=1)
    assert error(flux2.decode((patches - mean) / std), tensors["decode.image"]) <= 1e-4


def test_a_sample_is_diffusers_own_draw(flux2, statistics):
    images = tensor([2, 3, 16, 24], 3)
    mean, std = statistics
    sample = unpatchify(flux2.encode(images, generator=torch.Generator().manual_seed(7)) * std + mean)
    expected = flux2.vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(7))
    assert error(sample, expected) <= 1e-5
    assert error(unpatchify(flux2.encode(images) * std + mean), expected) > 1e-2


@pytest.mark.parametrize("kwargs", [{"scaling_factor": 0.3611, "shift_factor": 0.1159}, {"scaling_factor": 0.13025}])
def test_the_older_kind_is_scaled_and_packed_as_flux_1_does(tmp_path, kwargs):
    vae = small_kl(**kwargs)
    vae.save_pretrained(tmp_path / "vae")
    autoencoder = load_autoencoder(tmp_path, subfolder="vae", local_files_only=True)
    images = tensor([2, 3, 8, 12], 4)
    with torch.no_grad():
        raw = vae.encode(images).latent_dist.mean
        scaled = (raw - kwargs.get("shift_factor", 0.0)) * kwargs["scaling_factor"]
        packed = diffusers.FluxPipeline._pack_latents(scaled, 2, 3, 4, 6)
        latents = autoencoder.encode(images)
        assert autoencoder.channels == 12 and autoencoder.downsample == 4
        assert error(latents.movedim(1, -1).flatten(1, 2), packed) <= 1e-5
        assert error(autoencoder.decode(latents), vae.decode(raw).sample) <= 1e-4


def test_the_older_kind_may_have_statistics_per_channel_and_no_patches(tmp_path):
    mean, std = [0.5, -1.0, 2.0], [1.5, 2.5, 0.5]
    vae = small_kl(scaling_factor=0.5, latents_mean=mean, latents_std=std)
    vae.save_pretrained(tmp_path)
    autoencoder = load_autoencoder(tmp_path, patch_size=1)
    images = tensor([1, 3, 6, 4], 5)
    raw = vae.encode(images).latent_dist.mean
    expected = torch.stack([(raw[:, i] - mean[i]) * 0.5 / std[i] for i in range(3)], dim=1)
    assert autoencoder.channels == 3 and autoencoder.downsample == 2
    assert error(autoencoder.encode(images), expected) <= 1e-5


def test_half_precision_arithmetic_keeps_the_callers_dtype_and_float32_statistics(flux2_folder, flux2):
    half = load_autoencoder(flux2_folder, dtype=torch.bfloat16)
    # Saved again, the statistics are what they were.
    stored = load_autoencoder(flux2_folder).vae.bn
    assert torch.equal(half.vae.bn.running_var, stored.running_var) and half.vae.bn.running_mean.dtype == torch.float32
    assert next(half.vae.parameters()).dtype == torch.bfloat16
    assert half.normalizer.mean.dtype == half.normalizer.var.dtype == torch.float32
    images = tensor([1, 3, 16, 16], 6)
    latents = half.encode(images)
    assert latents.dtype == torch.float32 and half.decode(latents).dtype == torch.float32
    assert half.encode(images.bfloat16()).dtype == torch.bfloat16
    assert error(latents, flux2.encode(images)) < 0.1


def test_frozen_but_gradients_pass_through(flux2):
    flux2.train()
    assert not any(module.training for module in flux2.modules())
    assert not any(parameter.requires_grad for parameter in flux2.parameters())
    images = tensor([1, 3, 16, 16], 7).requires_grad_()
    flux2.decode(flux2.encode(images)).sum().backward()
    assert images.grad is not None and images.grad.abs().max() > 0


def test_images_do_not_depend_on_their_batch_mates(flux2):
    images = tensor([2, 3, 16, 16], 8)
    both = flux2.encode(images)
    torch.testing.assert_close(both[1:], flux2.encode(images[1:]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(flux2.decode(both)[1:], flux2.decode(both[1:]), rtol=1e-5, atol=1e-5)


def test_every_grey_level_survives_the_round_trip_and_is_where_it_should_be():
    levels = torch.arange(256).to(torch.uint8)
    images = from_uint8(levels)
    assert images.dtype == torch.float32 and images.min() >= -1 and images.max() == 1
    torch.testing.assert_close(images.double(), torch.linspace(-1, 1, 256, dtype=torch.float64), rtol=0, atol=4e-7)
    assert torch.equal(to_uint8(images), levels)


def test_quantising_truncates_and_clamps():
    halves = (torch.arange(255) + 0.75) / 127.5 - 1
    assert torch.equal(to_uint8(halves), torch.arange(255).to(torch.uint8))
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
    assert to_uint8(torch.tensor([0.5], dtype=torch.bfloat16)).tolist() == [191]


def test_wrong_folders_are_refused(tmp_path, flux2_folder):
    with pytest.raises(ValueError, match=r"patch_size: expected the config's \[2, 2\], got 1"):
        load_autoencoder(flux2_folder, patch_size=1)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderDC"}))
    with pytest.raises(ValueError, match="expected an AutoencoderKL or AutoencoderKLFlux2, got AutoencoderDC"):
        load_autoencoder(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        load_autoencoder(tmp_path / "nowhere", local_files_only=True)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    small_kl(use_quant_conv=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "use_quant_conv": True}))
    with pytest.raises(ValueError, match="missing_keys.*quant_conv"):
        load_autoencoder(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    small_kl().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        load_autoencoder(tmp_path)


def test_wrong_arguments_are_named(flux2):
    with pytest.raises(ValueError, match=r"images: expected sides divisible by 8, got shape \[1, 3, 16, 12\]"):
        flux2.encode(torch.zeros(1, 3, 16, 12))
    with pytest.raises(ValueError, match=r"images: expected shape \[b 3 H W\], got \[1, 4, 16, 16\]"):
        flux2.encode(torch.zeros(1, 4, 16, 16))
    with pytest.raises(ValueError, match=r"images: expected floating point, got torch.uint8"):
        flux2.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"latents: expected shape \[b c h w\] with c=16, got \[1, 4, 8, 8\]"):
        flux2.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"images: expected floating point, got torch.int64"):
        to_uint8(torch.zeros(1).long())
    with pytest.raises(ValueError, match=r"images: expected torch.uint8, got torch.float32"):
        from_uint8(torch.zeros(1))
    normalizer = LatentNormalizer(torch.zeros(6), torch.ones(6))
    with pytest.raises(ValueError, match=r"downsample: expected a multiple of patch_size=2, got 3"):
        Autoencoder(torch.nn.Identity(), normalizer, downsample=3)
    with pytest.raises(ValueError, match=r"normalizer: expected channels divisible by 4, got 6"):
        Autoencoder(torch.nn.Identity(), normalizer, downsample=2)
