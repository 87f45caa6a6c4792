"""CPU attention over packed samples as one operation, opaque to the compiler.

Axes: S joint tokens, r samples of equal length s that follow one another, h heads, d head width.

A loop over samples calls the library's fused CPU kernel. Wrapped as a custom operation it does not depend on the mixture
at trace time, so one compiled graph serves every batch.
"""

import torch
from einops import rearrange
from torch import Tensor

from lensmini.packed import equal_runs

__all__ = ["cpu_attention"]

SHORT_LOW_PRECISION = 256
"""Below this length the fused kernel's bfloat16 backward is slower than plain products (measured, see benchmarks)."""


def cpu_attention(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> Tensor:
    """Attention inside each sample on CPU: ``[S, h, d]`` three times and ``[b + 1]`` offsets to ``[S, h, d]``.

    Example:
        >>> q = torch.randn(3, 1, 4)
        >>> torch.equal(cpu_attention(q, q, q, torch.tensor([0, 1, 3]))[:1], q[:1])
        True
    """
    return _forward(query, key, value, offsets)[0]


@torch.library.custom_op("lensmini::cpu_attention", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    result = torch.empty(query.shape, dtype=query.dtype)
    dtype = torch.promote_types(query.dtype, torch.float32)
    logsumexp = torch.empty(query.shape[:2], dtype=dtype)
    for _, count, _, rows in equal_runs(offsets.diff().tolist()):
        parts = [rearrange(x[rows], "(r s) h d -> r h s d", r=count) for x in (query, key, value)]
        piece, norms = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts)  # noqa: SLF001
        result[rows] = rearrange(piece, "r h s d -> (r s) h d")
        logsumexp[rows] = rearrange(norms, "r h s -> (r s) h")
    return result, logsumexp


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.empty(query.shape, dtype=query.dtype), torch.empty(query.shape[:2], dtype=dtype)


@torch.library.custom_op("lensmini::cpu_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, result: Tensor, logsumexp: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
    for _, count, _, rows in equal_runs(offsets.diff().tolist()):
        parts = [rearrange(x[rows], "(r s) h d -> r h s d", r=count) for x in (grad, query, key, value, result)]
        norms = rearrange(logsumexp[rows], "(r s) h -> r h s", r=count)
        short = parts[0].shape[2] <= SHORT_LOW_PRECISION and query.dtype in (torch.bfloat16, torch.float16)
        pieces = _short_backward(*parts, norms) if short else _fused_backward(*parts, norms)
        for target, piece in zip(grads, pieces, strict=True):
            target[rows] = rearrange(piece, "r h s d -> (r s) h d")
    return grads[0], grads[1], grads[2]


@_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, result: Tensor, logsumexp: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    empty = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
    return empty[0], empty[1], empty[2]


def _fused_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, result: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001
    return backward(grad, query, key, value, result, norms, 0.0, False)


def _short_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, result: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    scale = query.shape[-1] ** -0.5
    scores = query.float() @ key.float().transpose(-1, -2)
    weights = scores.mul_(scale).sub_(norms[..., None]).exp_().to(query.dtype)
    grad_weights = grad @ value.transpose(-1, -2)
    centre = (grad.float() * result.float()).sum(-1, keepdim=True).to(query.dtype)
    grad_scores = grad_weights.sub_(centre).mul_(weights).mul_(scale)
    return grad_scores @ key, grad_scores.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad


def _setup(ctx, inputs, output) -> None:  # noqa: ANN001
    query, key, value, offsets = inputs
    ctx.save_for_backward(query, key, value, *output, offsets)


def _autograd(ctx, grad: Tensor, grad_norms: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # noqa: ANN001
    query, key, value, result, logsumexp, offsets = ctx.saved_tensors
    return *_backward(grad, query, key, value, result, logsumexp, offsets), None


_forward.register_autograd(_autograd, setup_context=_setup)
