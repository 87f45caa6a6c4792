"""Between an autoencoder's latents and the transformer's: 2x2 patches on channels, normalised per channel.

Axes: b batch, c autoencoder channels, p patch size, h and w latent positions of the transformer, k = c * p * p.
"""

from collections.abc import Iterable, Mapping

import torch
from einops import rearrange
from torch import Tensor, nn

from lensmini.shapes import check_shape

__all__ = ["LatentNormalizer", "patchify", "unpatchify"]


def patchify(latents: Tensor, patch_size: int = 2) -> Tensor:
    """Move every p x p patch of positions to channels, ``k = (channel * p + dy) * p + dx`` (FLUX and Lens order).

    Args:
        latents: ``[b, c, p * h, p * w]``, any dtype.
        patch_size: side p of a patch, at least 1.

    Returns:
        ``[b, c * p * p, h, w]``.

    Raises:
        ValueError: if the rank is not four, or a side is not a multiple of ``patch_size``.

    Example:
        >>> patchify(torch.arange(4).view(1, 1, 2, 2)).flatten()
        tensor([0, 1, 2, 3])
    """
    _check_patch_size(patch_size)
    sizes = check_shape("latents", latents, "b c H W")
    if sizes["H"] % patch_size or sizes["W"] % patch_size:
        raise ValueError(f"latents: expected sides divisible by {patch_size}, got shape {list(latents.shape)}")
    return rearrange(latents, "b c (h dy) (w dx) -> b (c dy dx) h w", dy=patch_size, dx=patch_size)


def unpatchify(latents: Tensor, patch_size: int = 2) -> Tensor:
    """The inverse of :func:`patchify`: ``[b, c * p * p, h, w]`` to ``[b, c, p * h, p * w]``.

    Args:
        latents: ``[b, c * p * p, h, w]``, any dtype.
        patch_size: side p of a patch, at least 1.

    Returns:
        ``[b, c, p * h, p * w]``.

    Raises:
        ValueError: if the rank is not four, or the channels are not a multiple of ``patch_size ** 2``.

    Example:
        >>> unpatchify(torch.zeros(1, 128, 3, 5)).shape
        torch.Size([1, 32, 6, 10])
    """
    _check_patch_size(patch_size)
    sizes = check_shape("latents", latents, "b k h w")
    if sizes["k"] % patch_size**2:
        raise ValueError(f"latents: expected channels divisible by {patch_size**2}, got shape {list(latents.shape)}")
    return rearrange(latents, "b (c dy dx) h w -> b c (h dy) (w dx)", dy=patch_size, dx=patch_size)


class LatentNormalizer(nn.Module):
    """Give every latent channel zero mean and unit variance: ``z = (x - mean) / sqrt(var + eps)``.

    The batch-norm statistics of FLUX.2's autoencoder in evaluation mode, applied to the patchified channels. The
    statistics are buffers and never learn; the arithmetic is float32 or wider, the result has the input's dtype.

    Args:
        mean: ``[k]`` mean of each channel.
        var: ``[k]`` variance of each channel, not negative.
        eps: added to the variance, not negative; ``var + eps`` must be positive. FLUX.2's is 1e-4.

    Raises:
        ValueError: if shapes disagree, or a statistic is not finite or out of range.

    Example:
        >>> normalizer = LatentNormalizer(torch.tensor([1.0]), torch.tensor([4.0]), eps=0.0)
        >>> normalizer.normalize(torch.tensor([[5.0], [1.0]])).flatten()
        tensor([2., 0.])
    """

    mean: Tensor
    var: Tensor

    def __init__(self, mean: Tensor, var: Tensor, *, eps: float = 1e-4) -> None:
        super().__init__()
        sizes = check_shape("mean", mean, "k")
        check_shape("var", var, "k", **sizes)
        for name, statistic in (("mean", mean), ("var", var)):
            if not statistic.is_floating_point():
                raise ValueError(f"{name}: expected floating point, got {statistic.dtype}")
        if not bool(torch.isfinite(mean).all()):
            raise ValueError("mean: expected finite values, got some that are not")
        if not (
            bool(torch.isfinite(var).all()) and bool((var >= 0).all()) and bool((var + eps > 0).all()) and eps >= 0
        ):
            raise ValueError(f"var: expected finite var >= 0, eps >= 0 and var + eps > 0, got eps={eps} and var={var}")
        self.eps = float(eps)
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("var", var.detach().clone())

    def extra_repr(self) -> str:
        """Channels and eps, for ``repr``."""
        return f"{self.mean.shape[0]}, eps={self.eps}"

    @classmethod
    def from_batch_norm(
        cls, batch_norm: nn.Module | Mapping[str, Tensor], *, eps: float | None = None
    ) -> "LatentNormalizer":
        """Take the running statistics of a batch norm.

        Args:
            batch_norm: a module with ``running_mean``, ``running_var`` and ``eps``, or a mapping that has the two
                statistics under those names, or under ``bn.`` and those names as in an autoencoder's checkpoint.
            eps: overrides the module's; 1e-4 for a mapping, which does not store it.

        Returns:
            The normalizer, with copies of the statistics.

        Raises:
            ValueError: if there are no running statistics.

        Example:
            >>> LatentNormalizer.from_batch_norm(nn.BatchNorm2d(16, eps=1e-4, affine=False))
            LatentNormalizer(16, eps=0.0001)
        """
        if isinstance(batch_norm, Mapping):
            state: Mapping[str, Tensor | None] = {name.removeprefix("bn."): value for name, value in batch_norm.items()}
            default = 1e-4
        else:
            state = {name: getattr(batch_norm, name, None) for name in ("running_mean", "running_var")}
            default = getattr(batch_norm, "eps", 1e-4)
        mean, var = state.get("running_mean"), state.get("running_var")
        if mean is None or var is None:
            raise ValueError(f"batch_norm: expected running_mean and running_var, got {sorted(map(str, state))}")
        return cls(mean, var, eps=default if eps is None else eps)

    @classmethod
    def fit(cls, batches: Iterable[Tensor], *, eps: float = 1e-4) -> "LatentNormalizer":
        """Measure mean and population variance per channel in one pass over latents of any sizes.

        Merges the batches' statistics in float64 (Chan, Golub, LeVeque 1979, eq. 2.1), so that neither their number
        nor a mean far from zero costs accuracy.

        Args:
            batches: patchified latents ``[b, k, ...]``; sizes may differ between batches, k may not.
            eps: as in the constructor.

        Returns:
            The normalizer, with float32 statistics.

        Raises:
            ValueError: if there is no value, a batch has another number of channels, or a value is not finite.

        Example:
            >>> LatentNormalizer.fit([torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)], eps=0.0).mean
            tensor([0.5000, 0.5000, 0.5000])
        """
        sizes: dict[str, int] = {}
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        for index, batch in enumerate(batches):
            sizes = {"k": check_shape(f"batches[{index}]", batch, "b k ...", **sizes)["k"]}
            values = batch.detach().to(torch.float64).transpose(0, 1).flatten(1)
            number = values.shape[1]
            if not number:
                continue
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"batches[{index}]: expected finite values, got some that are not")
            batch_mean = values.mean(1)
            batch_squares = (values - batch_mean[:, None]).square().sum(1)
            if not count:
                count, mean, squares = number, batch_mean, batch_squares
                continue
            delta = batch_mean - mean
            total = count + number
            squares = squares + batch_squares + delta.square() * (count * number / total)
            mean = mean + delta * (number / total)
            count = total
        if not count:
            raise ValueError("batches: expected at least one value per channel, got none")
        return cls(mean.float(), (squares / count).float(), eps=eps)

    def normalize(self, latents: Tensor) -> Tensor:
        """``z = (x - mean) / sqrt(var + eps)``.

        Args:
            latents: ``[b, k, ...]`` or tokens ``[N, k]``, floating point.

        Returns:
            The same shape and dtype.

        Raises:
            ValueError: if axis 1 does not have the k channels.
        """
        mean, std = self._statistics(latents)
        return ((latents.to(mean.dtype) - mean) / std).to(latents.dtype)

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse, ``x = z * sqrt(var + eps) + mean``; arguments as in :meth:`normalize`."""
        mean, std = self._statistics(latents)
        return (latents.to(mean.dtype) * std + mean).to(latents.dtype)

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        check_shape("latents", latents, "b k ...", k=self.mean.shape[0])
        if not latents.is_floating_point():
            raise ValueError(f"latents: expected floating point, got {latents.dtype}")
        dtype = torch.promote_types(torch.promote_types(latents.dtype, self.mean.dtype), torch.float32)
        shape = (-1, *[1] * (latents.ndim - 2))
        std = (self.var.to(dtype) + self.eps).sqrt()
        return self.mean.to(dtype).view(shape), std.view(shape)


def _check_patch_size(patch_size: int) -> None:
    if patch_size < 1:
        raise ValueError(f"patch_size: expected at least 1, got {patch_size}")
