"""Activation checkpointing of any module list: what is kept for the backward and what is computed again."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

__all__ = ["KEPT_OPERATIONS", "Recompute", "recompute_blocks"]

Recompute = Literal["none", "selective", "full"]

KEPT_OPERATIONS = (
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "aten::_cudnn_attention_forward",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
)
"""Results that selective recomputation keeps: matrix products of linears, and attention. The rest is cheap to repeat."""


def recompute_blocks(blocks: Iterable[nn.Module], mode: Recompute) -> None:
    """Have each block forget activations in the forward and compute them again in the backward (arXiv 1604.06174).

    ``"full"`` keeps each block's inputs only and repeats its forward: 4/3 of the FLOPs. ``"selective"`` keeps the results
    of :data:`KEPT_OPERATIONS` and repeats norms, modulation, activation functions and products (arXiv 2205.05198, section
    5): hardly any FLOPs. Values and gradients are the same bits in every mode.

    Parameters keep their names: the block's ``forward`` is replaced, no module is wrapped. Call it before compiling and
    sharding (:func:`shard_model` does). Compiled blocks recompute what their compiler decides inside of each.

    Args:
        blocks: modules; each is changed in place.
        mode: which.

    Raises:
        ValueError: if the mode is unknown, or a block recomputes already.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 2), nn.SiLU())
        >>> recompute_blocks([layer], "full")
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> layer[0].weight.grad is not None
        True
    """
    if mode not in ("none", "selective", "full"):
        raise ValueError(f'mode: expected "none", "selective" or "full", got {mode!r}')
    if mode == "none":
        return
    options = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if mode == "selective" else {}
    for block in blocks:
        if isinstance(block.forward, _Recomputed):
            raise ValueError(f"blocks: expected blocks that keep their activations, got {type(block).__name__} twice")
        block.forward = _Recomputed(block.forward, options)


class _Recomputed:
    """A forward that runs under activation checkpointing when gradients are wanted."""

    def __init__(self, forward: Callable[..., Any], options: dict[str, Any]) -> None:
        self.forward, self.options = forward, options

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*arguments, **named)
        # Nothing random happens in a block: the generators' state need not be kept.
        return checkpoint(
            self.forward, *arguments, use_reentrant=False, preserve_rng_state=False, **self.options, **named
        )


def _policy(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    name = operation.name().split(".")[0] if hasattr(operation, "name") else str(operation)
    return CheckpointPolicy.MUST_SAVE if name in KEPT_OPERATIONS else CheckpointPolicy.PREFER_RECOMPUTE
