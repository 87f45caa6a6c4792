"""The miniature's rewriter: its language model, fine-tuned to turn a request into the dense caption of a scene for it.

The transformer was trained on dense captions, so a bare request ("a red circle") is strange to it. The rewriter invents what
the request leaves open, in the words of the captions. Requests are direct (as the suites ask them) or indirect (another
sentence form, other synonyms, the same words). Whether a request's text is ever trained on is decided by its hash, so
that an evaluation on the other ones is on texts that no step has seen.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.miniature.caption_reader import read_caption
from experiments.miniature.captions import Turn, conversations, token_losses
from experiments.miniature.language_model import build_optimisers
from experiments.miniature.schedule import warmup_flat_decay
from experiments.runs import append_jsonl, progress, write_json
from lensmini.data import ScenePrompt, build_scene_prompts, describe_scene
from lensmini.data.scene_captions import PLURALS, SYNONYMS, Wording, place_name
from lensmini.data.scene_verifier import AskRelation
from lensmini.data.scenes import SceneObject, as_random, pick
from lensmini.nn.text_encoder import TextEncoder

__all__ = ["RewriterConfig", "indirect_request", "is_held_out", "request_pairs", "train_rewriter"]

_NUMBERS = ("no", "one", "two", "three", "four")
_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RewriterConfig:
    """Fine-tuning of a copy of the language model."""

    steps: int = 350
    """Optimiser steps."""
    batch_size: int = 32
    """Pairs of a step."""
    group: int = 10
    """Batches drawn at once and sorted by length; divides steps."""
    learning_rate: float = 2e-3
    """Peak of AdamW's rate: embedding, head, routers, norms and biases."""
    muon_rate: float = 5e-3
    """Peak of Muon's rate: attention and expert matrices."""
    warmup: int = 20
    """Steps of linear warm-up."""
    decay_share: float = 0.6
    """Share of the steps, at the end, in which the rate falls to zero."""
    indirect_share: float = 0.5
    """Share of indirect requests."""
    wording: Wording = "synonyms"
    """Of the dense captions, the transformer's training captions'."""
    seed: int = 0
    """Of the pairs."""
    version: int = 1
    """Of the code: a change that gives other weights raises it."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.group < 1 or self.steps % self.group:
            raise ValueError(
                f"steps, batch_size, group: expected positive numbers, steps divisible by group, got {self.steps}, "
                f"{self.batch_size}, {self.group}"
            )
        if not 0 <= self.indirect_share <= 1:
            raise ValueError(f"indirect_share: expected a share in [0, 1], got {self.indirect_share}")


def is_held_out(prompt: ScenePrompt) -> bool:
    """Whether a short-form prompt is kept for evaluation: a quarter of all request texts, chosen by hash.

    Example:
        >>> prompts = build_scene_prompts(100, 0, form="short")
        >>> 0.1 < sum(map(is_held_out, prompts)) / len(prompts) < 0.4
        True
    """
    return hashlib.sha256(f"request/{prompt.text}".encode()).digest()[0] % 4 == 0


def indirect_request(prompt: ScenePrompt, seed: int) -> str:
    """The same request said another way, with other synonyms.

    Args:
        prompt: in its short form.
        seed: of the choice of words.

    Returns:
        Words of the scenes' vocabulary.

    Example:
        >>> indirect_request(build_scene_prompts(1, 0, form="short", kinds=["single"])[0], 0)
        'there is a square in the picture and the square is green .'
    """
    stream = as_random(seed, "indirect")

    def say(word: str) -> str:
        return pick(stream, SYNONYMS[word])

    def place(thing: SceneObject) -> str:
        row, *col = place_name(thing.cell, prompt.scene.grid).split()
        return " ".join([say(row), *col])

    one, other = prompt.scene.objects[0], prompt.scene.objects[-1]
    first, second = say(one.shape), say(other.shape)
    if prompt.kind == "single":
        return f"there is a {first} in the picture and the {first} is {one.colour} ."
    if prompt.kind == "two":
        return f"the {first} is {one.colour} and the {second} is {other.colour} : two {say('objects')} in the picture ."
    if prompt.kind == "count":
        number = _NUMBERS[len(prompt.scene.objects)]
        return f"there are some {PLURALS[first]} : {number} of the {say('objects')} , {one.colour} ."
    if prompt.kind == "position":
        return f"at the {place(one)} of the picture is a {first} and the {first} is {one.colour} ."
    if prompt.kind == "relation":
        relation = next(question.relation for question in prompt.questions if isinstance(question, AskRelation))
        landmark = f"there is a {other.colour} {second}"
        return f"{landmark} , and the {second} is {say(_INVERSE[relation])} a {one.colour} {first} ."
    things = " . ".join(f"the {place(thing)} is a {thing.colour} {say(thing.shape)}" for thing in prompt.scene.objects)
    return f"the {say('background')} is {prompt.scene.background} . {things} ."


def request_pairs(number: int, config: RewriterConfig) -> list[Turn]:
    """The pairs of a run of one request of each kind: request, dense caption; those held out are left out.

    Args:
        number: of the run.
        config: seed, wording and share of indirect requests.

    Returns:
        At most as many as there are kinds.
    """
    seed = (config.seed + 1) * 1_000_003 + number
    prompts = build_scene_prompts(1, seed, form="short")
    # What has most to copy is asked for twice as often.
    prompts += build_scene_prompts(1, -seed, form="short", kinds=("relation", "whole"))
    pairs = []
    for index, prompt in enumerate(prompts):
        indirect = (number * len(prompts) + index) * 0.6180339887498949 % 1.0 < config.indirect_share
        if not is_held_out(prompt):
            request = indirect_request(prompt, seed) if indirect else prompt.text
            pairs.append(Turn(request, _caption_in_order(prompt, config.wording, seed)))
    return pairs


def _caption_in_order(prompt: ScenePrompt, wording: Wording, seed: int) -> str:
    """Of the scene's captions one that names the objects in the request's order, so that to rewrite is to copy and add."""
    asked = [thing.pair for thing in prompt.scene.objects]
    relation = next((question.relation for question in prompt.questions if isinstance(question, AskRelation)), None)
    caption = ""
    for attempt in range(100):
        caption = describe_scene(prompt.scene, wording=wording, relation=relation, generator=seed * 100 + attempt)
        scene = read_caption(caption)
        if scene is not None and [thing.pair for thing in scene.objects] == asked:
            break
    return caption


def train_rewriter(
    config: RewriterConfig, model: Any, tokenizer: Any, directory: Path, *, progress: Callable[..., Any] = progress
) -> None:
    """Fine-tune a copy of the language model and save it as transformers does.

    Args:
        config: of the fine-tuning.
        model: the miniature's language model, which stays as it is.
        tokenizer: its tokenizer.
        directory: gets weights, tokenizer, ``metrics.jsonl`` and ``rewriter.json``.
        progress: makes the bar, as :func:`experiments.runs.progress`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tuned = deepcopy(model)
    optimisers = build_optimisers(tuned, config.learning_rate, config.muon_rate)
    with progress(config.steps, 0, "rewriter") as bar:
        for step, (ids, mask, weight) in enumerate(_batches(config, tuned, tokenizer), start=1):
            factor = warmup_flat_decay(step, config.steps, config.warmup, config.decay_share)
            losses = token_losses(tuned, ids, mask) * weight
            loss = losses.sum() / weight.sum()
            loss.backward()
            nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
            for optimiser, peak in optimisers:
                optimiser.param_groups[0]["lr"] = peak * factor
                optimiser.step()
                optimiser.zero_grad()
            if step % 10 == 0 or step == config.steps:
                append_jsonl(directory / "metrics.jsonl", {"step": step, "loss": loss.item()})
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    tuned.requires_grad_(False).eval()
    tuned.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    write_json(directory / "rewriter.json", {"config": config})


def _batches(config: RewriterConfig, model: Any, tokenizer: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Token ids, mask, and which tokens are of an answer; batches of a group hold pairs of similar length."""
    encoder = TextEncoder(model, tokenizer, layers=(0,))
    model.requires_grad_(True)  # the encoder froze it
    generator = torch.Generator().manual_seed(config.seed)
    drawn, number = [], 0
    for _ in range(config.steps // config.group):
        while len(drawn) < config.group * config.batch_size:
            drawn += request_pairs(number, config)
            number += 1
        turns, drawn = drawn[: config.group * config.batch_size], drawn[config.group * config.batch_size :]
        turns.sort(key=lambda turn: turn.caption.count(" ") + turn.answer.count(" "))
        parts: Sequence[int] = torch.randperm(config.group, generator=generator).tolist()
        for part in parts:
            ids, mask, lengths = conversations(
                encoder, turns[part * config.batch_size : (part + 1) * config.batch_size]
            )
            answered = torch.arange(1, ids.shape[1]) >= lengths[:, None]
            yield ids, mask, (mask[:, 1:] & answered).float()
