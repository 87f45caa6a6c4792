"""What the miniature's language model reads: numbered captions, as conversations, and its loss on them.

To every dense caption it learns an answer: what stands where, cell by cell. Predicting the next word of a caption asks for
little more than grammar; to answer it has to know which colour and shape belong to which place, which is what an image
model needs to find in its features.

Axes: b captions, l tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lensmini.data import Scene, describe_scene, sample_scene
from lensmini.data.scene_captions import Wording, place_name
from lensmini.nn.text_encoder import TextEncoder

__all__ = ["HELD_OUT", "Turn", "conversations", "list_scene", "scene_turn", "token_losses"]

HELD_OUT = 2**40
"""Number of the first caption that training never reaches."""


class Turn(NamedTuple):
    """A caption and its answer."""

    caption: str
    answer: str
    """Empty behind a brief caption, which does not say where anything stands."""


def list_scene(scene: Scene) -> str:
    """The answer to a dense caption: the background, then every object in reading order, always in the plain words.

    Example:
        >>> list_scene(sample_scene(generator=0))
        'black . bottom left large cyan cross .'
    """
    objects = sorted(scene.objects, key=lambda thing: thing.cell)
    said = [f"{place_name(thing.cell, scene.grid)} {thing.size} {thing.colour} {thing.shape}" for thing in objects]
    return " . ".join([scene.background, *said]) + " ."


def scene_turn(
    number: int, *, seed: int, grid: int, dense_share: float, unlike_share: float = 0.0, wording: Wording
) -> Turn:
    """The caption of a number, always the same, with its answer: dense or brief, of a scene of its own.

    Args:
        number: of the caption.
        seed: of all captions.
        grid: cells a side of the scene.
        dense_share: share of dense captions; only they have an answer.
        unlike_share: share of scenes that are sure to hold two to four unlike objects, which is where there is most to
            tell apart; the rest are any.
        wording: of the caption.

    Returns:
        Caption and answer.

    Example:
        >>> options = {"seed": 0, "grid": 2, "wording": "plain"}
        >>> scene_turn(0, dense_share=1.0, **options) == scene_turn(0, dense_share=0.5, **options)
        True
    """
    key = number + seed * 2**42
    # Multiples of two irrational numbers spread the kinds evenly, and apart from each other, over any run of numbers.
    dense = number * 0.6180339887498949 % 1.0 < dense_share
    if number * 0.4142135623730951 % 1.0 < unlike_share:
        scene = sample_scene(generator=key, grid=grid, num_objects=(2, 4), group_probability=0.0)
    else:
        scene = sample_scene(generator=key, grid=grid)
    caption = describe_scene(scene, density="dense" if dense else "brief", wording=wording, generator=key)
    return Turn(caption, list_scene(scene) if dense else "")


def conversations(encoder: TextEncoder, turns: Sequence[Turn]) -> tuple[Tensor, Tensor, Tensor]:
    """What the encoder renders of b captions, behind each its answer and the mark that the conversation is over.

    Returns:
        Token ids and mask (true = real token), both ``[b, l]``, and the lengths ``[b]`` of the rendered captions, where
        the answers begin.
    """
    ids, mask, _ = encoder.tokenize([turn.caption for turn in turns])
    lengths, tokenizer = mask.sum(1), encoder.tokenizer
    answers = [
        [*tokenizer(turn.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for turn in turns
    ]
    rows = [
        torch.cat([row[:length], torch.tensor(answer)])
        for row, length, answer in zip(ids, lengths.tolist(), answers, strict=True)
    ]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    ends = torch.tensor([len(row) for row in rows])
    return padded, torch.arange(padded.shape[1]) < ends[:, None], lengths


def token_losses(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Next-token losses ``[b, l - 1]`` in nats, zero at padding."""
    logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return losses * mask[:, 1:]
