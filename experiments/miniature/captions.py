"""What the miniature's language model reads: numbered captions, as whole turns of a conversation, and its loss on them.

Axes: b captions, l tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lensmini.data import describe_scene, sample_scene
from lensmini.nn.text_encoder import TextEncoder

__all__ = ["HELD_OUT", "scene_caption", "token_losses", "whole_turns"]

HELD_OUT = 2**40
"""Number of the first caption that training never reaches."""


def scene_caption(number: int, *, seed: int, grid: int, dense_share: float) -> str:
    """The caption of a number, always the same: dense or brief, of a scene of its own.

    Example:
        >>> scene_caption(0, seed=0, grid=2, dense_share=1.0) == scene_caption(0, seed=0, grid=2, dense_share=0.5)
        True
    """
    key = number + seed * 2**42
    # Multiples of the golden ratio spread the two kinds evenly over any run of numbers.
    dense = number * 0.6180339887498949 % 1.0 < dense_share
    scene = sample_scene(generator=key, grid=grid)
    return describe_scene(scene, density="dense" if dense else "brief", generator=key)


def whole_turns(encoder: TextEncoder, texts: list[str]) -> tuple[Tensor, Tensor]:
    """What the encoder renders of b prompts, and behind each the mark that its conversation is over.

    Returns:
        Token ids and mask (true = real token), both ``[b, l]``.
    """
    ids, mask, _ = encoder.tokenize(texts)
    ids = F.pad(ids, (0, 1), value=encoder.tokenizer.pad_token_id)
    lengths = mask.sum(1)
    ids[torch.arange(len(ids)), lengths] = encoder.tokenizer.eos_token_id
    return ids, torch.arange(ids.shape[1]) <= lengths[:, None]


def token_losses(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Next-token losses ``[b, l - 1]`` in nats, zero at padding."""
    logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return losses * mask[:, 1:]
