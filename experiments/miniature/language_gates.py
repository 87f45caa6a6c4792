"""What a language model's features tell an image model: measurements before any picture is painted from them.

Axes: b captions, l tokens, e width.
"""

from typing import Any

import torch
from torch import Tensor

from experiments.miniature.captions import HELD_OUT, Turn, conversations, list_scene, scene_turn, token_losses
from lensmini.data import COLOURS, describe_scene, sample_scene
from lensmini.data.scene_captions import RELATIONS, SYNONYMS, Wording, relations_between
from lensmini.nn.norm import RMSNorm
from lensmini.nn.text_encoder import TextEncoder

__all__ = ["answer_accuracy", "colour_shares", "held_out_losses", "relation_accuracy"]


@torch.no_grad()
def answer_accuracy(
    model: Any, tokenizer: Any, *, grid: int = 2, wording: Wording = "synonyms", num: int = 256, seed: int = 0
) -> float:
    """Share of objects that the model, asked what stands in their place, answers with the right size, colour and shape.

    The answer is the true one up to each word, so that an early mistake does not spoil the rest.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        grid: cells a side of the scenes.
        wording: of the captions.
        num: captions of two to four unlike objects.
        seed: of the captions.

    Returns:
        Share in [0, 1]; guessing gets 1/48 right, and naming any object of the caption about a third.
    """
    encoder = TextEncoder(model, tokenizer, layers=(0,))
    full_stop = tokenizer.convert_tokens_to_ids(".")
    first, right = HELD_OUT + (seed + 1) * 2**30, []
    for start in range(first, first + num, 64):
        turns = []
        for number in range(start, min(start + 64, first + num)):
            scene = sample_scene(generator=number, grid=grid, num_objects=(2, 4), group_probability=0.0)
            turns.append(Turn(describe_scene(scene, wording=wording, generator=number), list_scene(scene)))
        ids, mask, lengths = conversations(encoder, turns)
        guesses = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits.argmax(-1)
        for row, length in enumerate(lengths.tolist()):
            ends = (ids[row, length:] == full_stop).nonzero().flatten() + length
            for end in ends[1:].tolist():  # the first sentence is the background
                right.append(bool((guesses[row, end - 4 : end - 1] == ids[row, end - 3 : end]).all()))
    return sum(right) / len(right)


def _normalised(features: Tensor) -> Tensor:
    """Features as the image model sees them."""
    return RMSNorm(features.shape[-1], eps=1e-5)(features.float())


@torch.no_grad()
def relation_accuracy(
    model: Any, tokenizer: Any, *, grid: int = 2, wording: Wording = "synonyms", num: int = 256, seed: int = 0
) -> float:
    """Share of dense captions of two objects, cut before the relation, that the model continues with a true one.

    The words for the four directions compete; chance is 0.25 for objects in one row or column and 0.5 for others, a
    third together. Sentences that begin with the relation cannot be foretold and are not asked.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        grid: cells a side of the scenes.
        wording: of the captions.
        num: captions.
        seed: of the captions.

    Returns:
        Share in [0, 1].
    """
    ways = [[way.split()[0] for way in SYNONYMS[relation] if not way.startswith("to ")] for relation in RELATIONS]
    directions = [tokenizer.convert_tokens_to_ids(words) for words in ways]
    texts, truths, number = [], [], HELD_OUT + seed * 2**30
    while len(texts) < num:
        number += 1
        scene = sample_scene(generator=number, grid=grid, num_objects=(2, 2), group_probability=0.0)
        relation = relations_between(*scene.objects)[0]
        *before, last, _ = describe_scene(scene, wording=wording, relation=relation, generator=number).split(".")
        if last.split()[0] == "the":
            subject = last.split(" is ")[0]
            texts.append(".".join([*before, f"{subject} is"]))
            truths.append([relation in relations_between(*scene.objects) for relation in RELATIONS])
    encoder = TextEncoder(model, tokenizer, layers=(0,))
    right = 0
    for start in range(0, num, 64):
        prompts = encoder.tokenize(texts[start : start + 64])
        mask = prompts.attention_mask
        logits = model(input_ids=prompts.input_ids, attention_mask=mask.long(), use_cache=False).logits
        # The relation follows the last word, which the tail of the template hides from nobody in a causal model.
        tail = len(tokenizer(encoder.render(""), add_special_tokens=False)["input_ids"]) - encoder.num_prefix_tokens
        last_word = mask.sum(1) - tail - 1
        chosen = logits[torch.arange(len(last_word)), last_word].softmax(-1)
        masses = torch.stack([chosen[:, ids].sum(1) for ids in directions], 1)
        right += sum(truths[start + row][best] for row, best in enumerate(masses.argmax(1).tolist()))
    return right / num


@torch.no_grad()
def colour_shares(
    model: Any, tokenizer: Any, *, grid: int = 2, wording: Wording = "synonyms", num: int = 32, seed: int = 0
) -> list[float]:
    """How much of each layer's features tells one colour from another.

    Captions of one object are written in all six colours. At the colour word, the variance over the six (mean over
    captions, sum over channels) is divided by the variance over all kept tokens of all captions, both of the features
    that the image model sees: every token divided by its root mean square.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        grid: cells a side of the scenes.
        wording: of the captions.
        num: captions, each in six colours.
        seed: of the captions.

    Returns:
        A share in [0, 1] for every layer.
    """
    texts, places = [], []
    for number in range(num):
        key = HELD_OUT + seed * 2**30 + number
        scene = sample_scene(generator=key, grid=grid, num_objects=(1, 1), pairs="all")
        words = describe_scene(scene, wording=wording, generator=key).split()
        places.append(words.index(scene.objects[0].colour))
        texts += [" ".join([*words[: places[-1]], colour, *words[places[-1] + 1 :]]) for colour in COLOURS]
    layers = range(model.config.num_hidden_layers)
    features, mask = TextEncoder(model, tokenizer, layers=layers)(texts)
    rows, columns = torch.arange(len(texts)), torch.tensor(places).repeat_interleave(len(COLOURS))
    shares = []
    for layer in features:
        normalised = _normalised(layer)
        at_colour = normalised[rows, columns].unflatten(0, (num, len(COLOURS)))
        between = at_colour.var(1, unbiased=False).mean(0).sum()
        shares.append(float(between / normalised[mask].var(0, unbiased=False).sum()))
    return shares


@torch.no_grad()
def held_out_losses(
    model: Any,
    tokenizer: Any,
    *,
    seed: int,
    grid: int,
    dense_share: float,
    wording: Wording = "synonyms",
    num: int = 256,
) -> dict[str, float]:
    """Mean next-token losses in nats over conversations that training never saw.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        seed: of its training.
        grid: cells a side of the scenes.
        dense_share: share of dense captions.
        wording: of the captions.
        num: captions.

    Returns:
        ``caption_loss``, template included, and ``answer_loss``, end marks included.
    """
    encoder = TextEncoder(model, tokenizer, layers=(0,))
    totals, counts = torch.zeros(2), torch.zeros(2)
    for start in range(0, num, 64):
        numbers = range(HELD_OUT + start, HELD_OUT + min(start + 64, num))
        turns = [
            scene_turn(number, seed=seed, grid=grid, dense_share=dense_share, wording=wording) for number in numbers
        ]
        ids, mask, lengths = conversations(encoder, turns)
        losses, answered = token_losses(model, ids, mask), torch.arange(1, ids.shape[1]) >= lengths[:, None]
        for index, part in enumerate((mask[:, 1:] & ~answered, mask[:, 1:] & answered)):
            totals[index] += losses[part].sum()
            counts[index] += part.sum()
    caption, answer = (totals / counts).tolist()
    return {"caption_loss": caption, "answer_loss": answer}
