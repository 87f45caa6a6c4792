"""Frozen image autoencoders behind one plain contract: images in [-1, 1] to normalised, patchified latents and back.

Axes: b batch, H and W pixels, c = autoencoder channels * p * p latent channels (p patch size), h and w latent
positions, ``H = downsample * h``.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lensmini.nn.latents import LatentNormalizer, patchify, unpatchify
from lensmini.shapes import check_shape

__all__ = ["Autoencoder", "from_uint8", "load_autoencoder", "to_uint8"]


class Autoencoder(nn.Module):
    """A frozen autoencoder with the transformer's latents: patchified by p x p, then normalised per channel.

    It stays in evaluation mode and its parameters do not learn, but gradients pass through both directions (a
    reward on decoded images needs them); wrap calls in ``torch.no_grad()`` when they are not wanted.

    Args:
        vae: has ``encode(images).latent_dist`` with ``mean`` and ``logvar``, and ``decode(latents).sample``, as
            diffusers' autoencoders do.
        normalizer: statistics of the patchified latents.
        downsample: pixels per side of one latent position, patch included (16 for Lens).
        patch_size: side p of a patch.

    Attributes:
        channels: c, latent channels after patchifying (128 for Lens).
        downsample: as given.

    Raises:
        ValueError: if the sizes do not fit together.

    Example:
        >>> normalizer = LatentNormalizer(torch.zeros(128), torch.ones(128))
        >>> Autoencoder(nn.Identity(), normalizer, downsample=16).channels
        128
    """

    def __init__(self, vae: nn.Module, normalizer: LatentNormalizer, *, downsample: int, patch_size: int = 2) -> None:
        super().__init__()
        if patch_size < 1 or downsample < 1 or downsample % patch_size:
            raise ValueError(f"downsample: expected a multiple of patch_size={patch_size}, got {downsample}")
        self.channels = normalizer.mean.shape[0]
        if self.channels % patch_size**2:
            raise ValueError(f"normalizer: expected channels divisible by {patch_size**2}, got {self.channels}")
        self.vae: Any = vae.requires_grad_(False)
        self.normalizer = normalizer
        self.downsample = downsample
        self.patch_size = patch_size
        self.eval()

    def train(self, mode: bool = True) -> "Autoencoder":
        """Does nothing: a frozen autoencoder has no training mode."""
        return super().train(False)

    def encode(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Encode images to the mean of the posterior, or to a sample of it.

        Args:
            images: ``[b, 3, H, W]`` in [-1, 1], floating point; H and W multiples of ``downsample``.
            generator: draws a sample, ``mean + std * noise`` with noise in the autoencoder's own layout ``[b, c / p^2,
                p * h, p * w]``; without it the result is the mean.

        Returns:
            ``[b, c, h, w]`` in the dtype of ``images``.

        Raises:
            ValueError: if the shape or dtype is wrong.
        """
        sizes = check_shape("images", images, "b 3 H W")
        _check_floating("images", images)
        if sizes["H"] % self.downsample or sizes["W"] % self.downsample:
            raise ValueError(f"images: expected sides divisible by {self.downsample}, got shape {list(images.shape)}")
        posterior = self.vae.encode(images.to(_dtype(self.vae))).latent_dist
        latents = posterior.mean.to(torch.promote_types(posterior.mean.dtype, torch.float32))
        if generator is not None:
            noise = torch.randn(latents.shape, generator=generator, dtype=latents.dtype, device=generator.device)
            latents = latents + (0.5 * posterior.logvar.to(latents.dtype)).exp() * noise.to(latents.device)
        return self.normalizer.normalize(patchify(latents, self.patch_size)).to(images.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images.

        Args:
            latents: ``[b, c, h, w]`` as :meth:`encode` makes them, floating point.

        Returns:
            ``[b, 3, H, W]`` in the dtype of ``latents``. The range is [-1, 1] up to the decoder's error; values are
            not clamped (:func:`to_uint8` does).

        Raises:
            ValueError: if the shape or dtype is wrong.
        """
        check_shape("latents", latents, "b c h w", c=self.channels)
        _check_floating("latents", latents)
        wide = self.normalizer.denormalize(latents.to(torch.promote_types(latents.dtype, torch.float32)))
        return self.vae.decode(unpatchify(wide, self.patch_size).to(_dtype(self.vae))).sample.to(latents.dtype)

    def compile_decoder(self, **options: Any) -> None:
        """Compile the decoder in place as one graph, anew for each size of picture; keys and weights stay as they are.

        Args:
            options: of ``torch.compile``; ``fullgraph=True`` and ``dynamic=False`` by default.

        Raises:
            ValueError: if the autoencoder has no module ``decoder``.
        """
        decoder = getattr(self.vae, "decoder", None)
        if not isinstance(decoder, nn.Module):
            raise ValueError(
                f"vae: expected a module named decoder to compile, got {type(self.vae).__name__} without one"
            )
        decoder.compile(**{"fullgraph": True, "dynamic": False, **options})


def load_autoencoder(
    path_or_repo: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    patch_size: int = 2,
    subfolder: str | None = None,
    local_files_only: bool = False,
) -> Autoencoder:
    """Load a diffusers ``AutoencoderKLFlux2`` or ``AutoencoderKL`` from a folder or the Hub (safetensors only).

    The first is normalised by the batch-norm statistics in its checkpoint, ``eps`` from its config (FLUX.2, Lens).
    The second by its config, ``(x - shift_factor) * scaling_factor``, with ``latents_mean`` and ``latents_std`` in
    place of the shift where the config has them (FLUX.1, Stable Diffusion), the same for every position of a patch.

    Args:
        path_or_repo: folder with ``config.json`` and weights, or a Hub repository.
        dtype: of the autoencoder's weights and arithmetic; the latent statistics stay float32.
        device: where to put it.
        patch_size: side of the patches of an ``AutoencoderKL``, 2 for FLUX.1 and SD3, 1 for none. An
            ``AutoencoderKLFlux2`` has it in its config, and the two must agree.
        subfolder: folder inside ``path_or_repo``, ``"vae"`` in a pipeline.
        local_files_only: never ask the network.

    Returns:
        The autoencoder, frozen.

    Raises:
        ImportError: without diffusers.
        OSError: if there is nothing to load.
        ValueError: if the folder holds another class, weights that do not fit, or another patch size.

    Example:
        >>> import diffusers, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     diffusers.AutoencoderKL(norm_num_groups=8).save_pretrained(folder)
        ...     load_autoencoder(folder).channels
        16
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("load_autoencoder needs diffusers: pip install lensmini[diffusers]") from error

    where: dict[str, Any] = {"subfolder": subfolder, "local_files_only": local_files_only}
    config: dict[str, Any] = dict(diffusers.AutoencoderKL.load_config(str(path_or_repo), **where))  # pyright: ignore
    kind = config.get("_class_name")
    if kind not in ("AutoencoderKL", "AutoencoderKLFlux2"):
        raise ValueError(f"path_or_repo: expected an AutoencoderKL or AutoencoderKLFlux2, got {kind} in {path_or_repo}")
    vae, report = getattr(diffusers, kind).from_pretrained(
        str(path_or_repo),
        **where,
        torch_dtype=torch.float32,
        use_safetensors=True,
        low_cpu_mem_usage=False,
        output_loading_info=True,
    )
    misfits = {
        name: keys for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if (keys := report.get(name))
    }
    if misfits:
        raise ValueError(f"path_or_repo: expected weights that fit {kind}, got {misfits} in {path_or_repo}")
    if kind == "AutoencoderKLFlux2":
        if list(vae.config.patch_size) != [patch_size, patch_size]:
            raise ValueError(f"patch_size: expected the config's {list(vae.config.patch_size)}, got {patch_size}")
        normalizer = LatentNormalizer.from_batch_norm(vae.bn, eps=vae.config.batch_norm_eps)
    else:
        normalizer = _config_normalizer(vae.config, patch_size)
    downsample = 2 ** (len(vae.config.block_out_channels) - 1) * patch_size
    statistics = copy.deepcopy(getattr(vae, "bn", None))
    vae = vae.to(dtype)
    if statistics is not None:
        vae.bn = statistics  # float32, so that saving again loses nothing
    autoencoder = Autoencoder(vae, normalizer, downsample=downsample, patch_size=patch_size)
    return autoencoder.to(device)


def to_uint8(images: Tensor) -> Tensor:
    """Quantise images as the published pipeline does: clamp to [-1, 1], ``(x + 1) * 127.5``, truncate.

    Args:
        images: any shape, floating point, nominally in [-1, 1].

    Returns:
        uint8, the same shape.

    Raises:
        ValueError: if the dtype is not floating point.

    Example:
        >>> to_uint8(torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0]))
        tensor([  0,   0, 127, 254, 255], dtype=torch.uint8)
    """
    _check_floating("images", images)
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    return ((wide.clamp(-1, 1) + 1) * 127.5).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """Read uint8 images as ``x / 127.5 - 1``, such that :func:`to_uint8` gives back the same bytes.

    Args:
        images: uint8, any shape.

    Returns:
        float32 in [-1, 1], the same shape.

    Raises:
        ValueError: if the dtype is not uint8.

    Example:
        >>> bool((to_uint8(from_uint8(torch.arange(256).to(torch.uint8))) == torch.arange(256)).all())
        True
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images: expected torch.uint8, got {images.dtype}")
    # The nudge is far below a grey level. Without it float32 rounding puts 63 of the 256 values just below the
    # integer they came from, and truncation would then take one off.
    return (images.float() / 127.5 - 1 + 2.0**-22).clamp(max=1)


def _config_normalizer(config: Any, patch_size: int) -> LatentNormalizer:
    scale = float(config.scaling_factor)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std) / scale
    else:
        mean = torch.full((config.latent_channels,), float(config.get("shift_factor") or 0.0))
        std = torch.full((config.latent_channels,), 1 / scale)
    repeats = patch_size**2
    return LatentNormalizer(mean.repeat_interleave(repeats), std.square().repeat_interleave(repeats), eps=0.0)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected floating point, got {tensor.dtype}")
