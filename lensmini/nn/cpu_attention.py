"""CPU attention over packed samples as one operation, opaque to the compiler.

Axes: S joint tokens, r samples of equal length s that follow one another, h heads, d head width.

A loop over samples calls the library's fused CPU kernel. Wrapped as a custom operation it does not depend on the mixture
at trace time, so one compiled graph serves every batch. In bfloat16 that kernel gains nothing over float32 on machines
with bfloat16 products, so there the product, softmax and product are blocked by hand: about 2.5 times faster, scores
rounded to bfloat16, softmax in float32 inside.
"""

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from lensmini.packed import equal_runs

__all__ = ["cpu_attention"]

BLOCK_ELEMENTS = 2**21
"""Scores held at once by the blocked path: a block and its gradient stay in the second- and third-level caches."""


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
    result, norms = _results(query)
    runs = equal_runs(offsets.diff().tolist())
    for run in runs:
        parts = [rearrange(x[run.rows], "(r s) h d -> r h s d", r=run.count) for x in (query, key, value)]
        if query.dtype == torch.bfloat16:
            piece = _blocked_forward(*(x.flatten(0, 1) for x in parts)).unflatten(0, parts[0].shape[:2])
        else:
            piece, piece_norms = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts)  # noqa: SLF001
            if len(runs) == 1:  # what the kernel made is laid out as we want it: no copy
                return rearrange(piece, "r h s d -> (r s) h d"), rearrange(piece_norms, "r h s -> (r s) h")
            norms[run.rows] = rearrange(piece_norms, "r h s -> (r s) h")
        result[run.rows] = rearrange(piece, "r h s d -> (r s) h d")
    return result, norms


def _results(query: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the log-normalisers that the fused backward wants."""
    num_rows = 0 if query.dtype == torch.bfloat16 else query.shape[0]
    norms_dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.empty(query.shape, dtype=query.dtype), torch.empty(num_rows, query.shape[1], dtype=norms_dtype)


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    result, norms = _results(query)
    return result.to(query.device), norms.to(query.device)


@torch.library.custom_op("lensmini::cpu_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, result: Tensor, norms: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
    runs = equal_runs(offsets.diff().tolist())
    for run in runs:
        parts = [rearrange(x[run.rows], "(r s) h d -> r h s d", r=run.count) for x in (grad, query, key, value)]
        if query.dtype == torch.bfloat16:
            pieces = _blocked_backward(*(x.flatten(0, 1) for x in parts))
            pieces = [piece.unflatten(0, parts[0].shape[:2]) for piece in pieces]
        else:
            out = rearrange(result[run.rows], "(r s) h d -> r h s d", r=run.count)
            out_norms = rearrange(norms[run.rows], "(r s) h -> r h s", r=run.count)
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001
            pieces = fused(*parts, out, out_norms, 0.0, False)
            if len(runs) == 1:
                grad_query, grad_key, grad_value = (rearrange(piece, "r h s d -> (r s) h d") for piece in pieces)
                return grad_query, grad_key, grad_value
        for target, piece in zip(grads, pieces, strict=True):
            target[run.rows] = rearrange(piece, "r h s d -> (r s) h d")
    return grads[0], grads[1], grads[2]


@_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, result: Tensor, norms: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    empty = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    return empty[0], empty[1], empty[2]


def _blocks(heads: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of heads, and of query rows if one head's scores are too many already."""
    heads_step = max(1, BLOCK_ELEMENTS // tokens**2)
    rows_step = max(1, BLOCK_ELEMENTS // tokens)
    for head in range(0, heads, heads_step):
        for row in range(0, tokens, rows_step):
            yield slice(head, head + heads_step), slice(row, row + rows_step)


def _blocked_forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``[heads, s, d]`` three times to ``[heads, s, d]``."""
    query, key, value = (query * query.shape[-1] ** -0.5).contiguous(), key.contiguous(), value.contiguous()
    result = torch.empty_like(query)
    for heads, rows in _blocks(*query.shape[:2]):
        weights = torch.bmm(query[heads, rows], key[heads].transpose(1, 2)).softmax(-1)
        result[heads, rows] = torch.bmm(weights, value[heads])
    return result


def _blocked_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    scale = query.shape[-1] ** -0.5
    grad, query, key, value = grad.contiguous(), (query * scale).contiguous(), key.contiguous(), value.contiguous()
    grad_query = torch.empty_like(query)
    grad_key, grad_value = (torch.zeros(key.shape, dtype=torch.float32) for _ in range(2))
    for heads, rows in _blocks(*query.shape[:2]):
        weights = torch.bmm(query[heads, rows], key[heads].transpose(1, 2)).softmax(-1)
        grad_weights = torch.bmm(grad[heads, rows], value[heads].transpose(1, 2))
        grad_value[heads] += torch.bmm(weights.transpose(1, 2), grad[heads, rows])
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)  # noqa: SLF001
        grad_query[heads, rows] = torch.bmm(grad_scores, key[heads]).mul_(scale)
        grad_key[heads] += torch.bmm(grad_scores.transpose(1, 2), query[heads, rows])
    return [grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)]


def _setup(ctx, inputs, output) -> None:  # noqa: ANN001
    query, key, value, offsets = inputs
    ctx.save_for_backward(query, key, value, *output, offsets)


def _autograd(ctx, grad: Tensor, grad_norms: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # noqa: ANN001
    return *_backward(grad, *ctx.saved_tensors), None


_forward.register_autograd(_autograd, setup_context=_setup)
