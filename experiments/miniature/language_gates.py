"""What a language model's features tell an image model: measurements before any picture is painted from them.

Axes: b captions, l tokens, e width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.miniature.captions import HELD_OUT, scene_caption, token_losses, whole_turns
from lensmini.data import COLOURS, SHAPES, describe_scene, sample_scene
from lensmini.data.scene_captions import RELATIONS, SYNONYMS, relations_between
from lensmini.nn.norm import RMSNorm
from lensmini.nn.text_encoder import TextEncoder

__all__ = ["binding_accuracy", "colour_shares", "held_out_loss", "relation_accuracy"]

_PLAIN = {way: word for word, ways in SYNONYMS.items() for way in ways}


@torch.no_grad()
def binding_accuracy(model: Any, tokenizer: Any, *, grid: int = 2, num: int = 512, seed: int = 0) -> float:
    """How well an object's colour, shape, row and column can be read from the full stop of its sentence.

    A linear map (ridge regression on one-hot targets) from all layers' features, each token divided by its root mean
    square, is fitted on two thirds of the captions and scored on the rest.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        grid: cells a side of the scenes.
        num: captions of two to four unlike objects, about three sentences each.
        seed: of the captions.

    Returns:
        The lowest of the four attributes' accuracies; chance is 1/6, 1/4, 1 / grid and 1 / grid.
    """
    encoder = TextEncoder(model, tokenizer, layers=range(model.config.num_hidden_layers))
    first = HELD_OUT + (seed + 1) * 2**30
    inputs, targets = [], []
    for start in range(first, first + num, 64):
        texts = []
        for number in range(start, min(start + 64, first + num)):
            scene = sample_scene(generator=number, grid=grid, num_objects=(2, 4), group_probability=0.0)
            texts.append(describe_scene(scene, generator=number))
        features, _ = encoder(texts)
        joined = torch.cat([_normalised(layer) for layer in features], -1)
        for row, text in enumerate(texts):
            for place, target in _sentence_ends(text, grid):
                inputs.append(joined[row, place])
                targets.append(target)
    x = F.pad(torch.stack(inputs), (0, 1), value=1.0).double()
    labels = torch.tensor(targets)
    cut = 2 * len(x) // 3
    gram = x[:cut].T @ x[:cut] + 0.1 * torch.eye(x.shape[1], dtype=x.dtype)
    accuracies = []
    for column in labels.T:
        wanted = F.one_hot(column).to(x.dtype)
        found = (x[cut:] @ torch.linalg.solve(gram, x[:cut].T @ wanted[:cut])).argmax(1)
        accuracies.append(float((found == column[cut:]).double().mean()))
    return min(accuracies)


def _sentence_ends(caption: str, grid: int) -> list[tuple[int, list[int]]]:
    """Where each sentence about one placed object ends, and its colour, shape, row and column as numbers."""
    ends, said = [], []
    rows, columns = ("top", "middle", "bottom"), ("left", "middle", "right")
    if grid == 2:
        rows, columns = ("top", "bottom"), ("left", "right")
    for place, word in enumerate(caption.split()):
        if word != ".":
            said.append(_PLAIN.get(word, word))
            continue
        found = [[name for name in said if name in names] for names in (COLOURS, SHAPES, rows, columns)]
        if all(len(names) == 1 for names in found):
            (colour,), (shape,), (row,), (column,) = found
            numbers = [list(COLOURS).index(colour), SHAPES.index(shape), rows.index(row), columns.index(column)]
            ends.append((place, numbers))
        said = []
    return ends


def _normalised(features: Tensor) -> Tensor:
    """Features as the image model sees them."""
    return RMSNorm(features.shape[-1], eps=1e-5)(features.float())


@torch.no_grad()
def relation_accuracy(model: Any, tokenizer: Any, *, grid: int = 2, num: int = 256, seed: int = 0) -> float:
    """Share of dense captions of two objects, cut before the relation, that the model continues with a true one.

    The words for the four directions compete; chance is 0.25 for objects in one row or column and 0.5 for others, a
    third together. Sentences that begin with the relation cannot be foretold and are not asked.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        grid: cells a side of the scenes.
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
        *before, last, _ = describe_scene(scene, relation=relation, generator=number).split(".")
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
def colour_shares(model: Any, tokenizer: Any, *, grid: int = 2, num: int = 32, seed: int = 0) -> list[float]:
    """How much of each layer's features tells one colour from another.

    Captions of one object are written in all six colours. At the colour word, the variance over the six (mean over
    captions, sum over channels) is divided by the variance over all kept tokens of all captions, both of the features
    that the image model sees: every token divided by its root mean square.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        grid: cells a side of the scenes.
        num: captions, each in six colours.
        seed: of the captions.

    Returns:
        A share in [0, 1] for every layer.
    """
    texts, places = [], []
    for number in range(num):
        key = HELD_OUT + seed * 2**30 + number
        scene = sample_scene(generator=key, grid=grid, num_objects=(1, 1), pairs="all")
        words = describe_scene(scene, generator=key).split()
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
def held_out_loss(model: Any, tokenizer: Any, *, seed: int, grid: int, dense_share: float, num: int = 256) -> float:
    """Mean next-token loss in nats over captions that training never saw, template included.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        seed: of its training.
        grid: cells a side of the scenes.
        dense_share: share of dense captions.
        num: captions.

    Returns:
        The loss.
    """
    encoder = TextEncoder(model, tokenizer, layers=(0,))
    total, count = 0.0, 0
    for start in range(0, num, 64):
        numbers = range(HELD_OUT + start, HELD_OUT + min(start + 64, num))
        texts = [scene_caption(number, seed=seed, grid=grid, dense_share=dense_share) for number in numbers]
        ids, mask = whole_turns(encoder, texts)
        total += float(token_losses(model, ids, mask).sum())
        count += int(mask[:, 1:].sum())
    return total / count
