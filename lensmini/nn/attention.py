"""Attention inside each sample of a packed batch: one function, several kernels.

Axes: S joint tokens of the whole batch, b samples, h heads, d head width.

| backend  | runs on                          | gradients | note                                                        |
| -------- | -------------------------------- | --------- | ----------------------------------------------------------- |
| loop     | anywhere                         | yes       | maskless SDPA per run of equal lengths; the CPU default     |
| varlen   | CUDA, fp16/bf16                  | yes       | ``torch.nn.attention.varlen``; the default for ragged CUDA  |
| flex     | CUDA; CPU without gradients      | CUDA      | compiled ``flex_attention`` with a document mask            |
| xformers | CUDA, extra ``xformers``         | yes       | ``BlockDiagonalMask``; beside torch 2.15 its own kernels do |
|          |                                  |           | not load and its torch-flash path runs                      |
| padded   | anywhere                         | yes       | SDPA on padded samples; a mask only if lengths differ       |
| math     | anywhere                         | any order | plain matmul and softmax; forward-mode AD                   |
"""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lensmini.nn.cpu_attention import cpu_attention
from lensmini.nn.tracing import needs_plain_ops
from lensmini.packed import equal_runs
from lensmini.shapes import check_shape

__all__ = ["AttentionBackend", "packed_attention"]

AttentionBackend = Literal["auto", "loop", "varlen", "flex", "xformers", "padded", "math"]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    *,
    lengths: Sequence[int] | None = None,
    backend: AttentionBackend = "auto",
) -> Tensor:
    """Softmax attention of every token over the tokens of its own sample.

    ``softmax(Q_i K_i^T / sqrt(d)) V_i`` for each sample i (arXiv 1706.03762, eq. 1).

    Args:
        query: ``[S, h, d]``, samples laid end to end.
        key: ``[S, h, d]``.
        value: ``[S, h, d]``.
        offsets: ``[b + 1]`` int32 with ``offsets[0] = 0``, ``offsets[b] = S``: where each sample begins.
        lengths: the b differences of ``offsets`` on the host; saves a device synchronisation on CUDA.
        backend: see the table above; ``"auto"`` picks, and never routes samples of equal length through a mask.

    Returns:
        ``[S, h, d]``.

    Raises:
        ValueError: if shapes or dtypes disagree, offsets do not cover the tokens, or an explicitly chosen backend cannot
            run here; the message says why.

    Example:
        >>> q = k = v = torch.randn(5, 2, 8)
        >>> packed_attention(q, k, v, torch.tensor([0, 2, 5], dtype=torch.int32)).shape
        torch.Size([5, 2, 8])
    """
    sizes = check_shape("query", query, "S h d")
    check_shape("key", key, "S h d", **sizes)
    check_shape("value", value, "S h d", **sizes)
    check_shape("offsets", offsets, "samples_plus_one")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key, value: expected one dtype, got {query.dtype}, {key.dtype}, {value.dtype}")
    if backend not in get_args(AttentionBackend):
        raise ValueError(f"backend: expected one of {', '.join(get_args(AttentionBackend))}, got {backend!r}")
    if not torch.compiler.is_compiling():
        lengths = tuple(offsets.diff().tolist()) if lengths is None else tuple(lengths)
        if len(lengths) != len(offsets) - 1 or sum(lengths) != sizes["S"] or min(lengths, default=0) < 0:
            raise ValueError(
                f"offsets: expected ascending starts of samples that cover {sizes['S']} tokens, got {lengths}"
            )
    if backend == "auto":
        backend = _choose(query, lengths)
    if backend == "loop" and query.device.type == "cpu":
        if needs_plain_ops() and not torch.compiler.is_compiling():
            raise ValueError('backend: "loop" has no forward-mode or torch.func derivative; use "math"')
        return cpu_attention(query, key, value, offsets)
    if backend == "varlen":
        return _varlen(query, key, value, offsets, lengths)
    if backend == "flex":
        return _flex(query, key, value, offsets)
    if lengths is None:
        lengths = tuple(offsets.diff().tolist())
    if backend == "xformers":
        return _xformers(query, key, value, lengths)
    if backend == "padded":
        return _padded(query, key, value, lengths)
    attend = _math if backend == "math" else F.scaled_dot_product_attention
    pieces = []
    for run in equal_runs(lengths):
        q, k, v = (rearrange(x[run.rows], "(r s) h d -> r h s d", r=run.count) for x in (query, key, value))
        pieces.append(rearrange(attend(q, k, v), "r h s d -> (r s) h d"))
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _choose(query: Tensor, lengths: Sequence[int] | None) -> AttentionBackend:
    if needs_plain_ops() and not torch.compiler.is_compiling():
        return "math"
    ragged = lengths is None or len(set(lengths)) > 1
    if query.device.type == "cuda" and ragged and _varlen_obstacle(query) is None:
        return "varlen"
    return "loop"


def _varlen_obstacle(query: Tensor) -> str | None:
    if query.device.type != "cuda":
        return f"torch.nn.attention.varlen has CUDA kernels only, and query is on {query.device}"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"its kernels take float16 and bfloat16, and query is {query.dtype}"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return None


def _varlen(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, lengths: Sequence[int] | None) -> Tensor:
    obstacle = _varlen_obstacle(query)
    if obstacle is not None:
        raise ValueError(f'backend: "varlen" cannot run here: {obstacle}')
    from torch.nn.attention.varlen import varlen_attn

    # An upper bound is enough for the kernel's grid, and the token count is a traceable size where lengths are not.
    longest = max(lengths) if lengths is not None else query.shape[0]
    # The eighth positional argument changed its meaning between torch versions: pass seven.
    return varlen_attn(query, key, value, offsets, offsets, longest, longest)  # pyright: ignore[reportReturnType]


@functools.cache
def _compiled_flex():  # noqa: ANN202
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> Tensor:
    if query.device.type != "cuda" and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise ValueError(f'backend: "flex" cannot run here: flex_attention has no backward on {query.device.type}')
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    num_tokens = query.shape[0]
    samples = torch.searchsorted(
        offsets, torch.arange(num_tokens, device=query.device, dtype=offsets.dtype), right=True
    )

    def same_sample(batch: Tensor, head: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return samples[q_index] == samples[k_index]

    mask = create_block_mask(same_sample, None, None, num_tokens, num_tokens, device=str(query.device))
    attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    q, k, v = (rearrange(x, "s h d -> 1 h s d") for x in (query, key, value))
    result: Tensor = attend(q, k, v, block_mask=mask)  # pyright: ignore[reportAssignmentType]
    return rearrange(result, "1 h s d -> s h d")


def _xformers(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    if query.device.type != "cuda":
        raise ValueError(
            f'backend: "xformers" cannot run here: its kernels are CUDA only, and query is on {query.device}'
        )
    try:
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask
    except ImportError as error:
        raise ValueError('backend: "xformers" is not installed: pip install "lensmini[xformers]"') from error
    bias = BlockDiagonalMask.from_seqlens([length for length in lengths if length], device=query.device)
    return memory_efficient_attention(query[None], key[None], value[None], attn_bias=bias)[0]


def _padded(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    longest, ragged = max(lengths), len(set(lengths)) > 1
    count = torch.tensor(lengths, device=query.device)
    valid = torch.arange(longest, device=query.device) < count[:, None]
    rows = valid.flatten().nonzero()[:, 0]

    def pad(x: Tensor) -> Tensor:
        if not ragged:
            return rearrange(x, "(b s) h d -> b h s d", s=longest)
        padded = x.new_zeros(len(lengths) * longest, *x.shape[1:]).index_copy(0, rows, x)
        return rearrange(padded, "(b s) h d -> b h s d", s=longest)

    # A sample without tokens would have no key at all, and its rows are dropped: let it see the zero padding.
    mask = (valid | (count == 0)[:, None])[:, None, None] if ragged else None
    result = F.scaled_dot_product_attention(pad(query), pad(key), pad(value), attn_mask=mask)
    result = rearrange(result, "b h s d -> (b s) h d")
    return result.index_select(0, rows) if ragged else result


def _math(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(dtype) @ key.to(dtype).transpose(-1, -2)) * query.shape[-1] ** -0.5
    return (scores.softmax(-1) @ value.to(dtype)).to(query.dtype)
