"""The miniature's language model: a stock GPT-OSS of about a million parameters, trained on scene captions.

An image model can only follow what its text features tell apart, and a language model keeps no more than predicting
the next word needs. So it starts from embeddings of standard deviation 1, which keep words apart, sees few words at a time
in every other layer, and learns to answer captions (:mod:`experiments.miniature.captions`), which binds an object's words
to its place. The gates measure what came of it.

Axes: b captions, l tokens, e width.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from experiments.miniature.captions import conversations, scene_turn, token_losses
from experiments.miniature.gates import GateReport, require
from experiments.miniature.language_gates import answer_accuracy, colour_shares, held_out_losses, relation_accuracy
from experiments.miniature.schedule import warmup_flat_decay
from experiments.miniature.tokenizer import build_tokenizer
from experiments.muon import Muon
from experiments.precision import fast_dtype
from experiments.runs import append_jsonl, progress, write_json
from lensmini.data.scene_captions import Wording
from lensmini.nn.text_encoder import TextEncoder

__all__ = [
    "LanguageModelConfig",
    "build_optimisers",
    "check_language_model",
    "load_language_model",
    "smallest_language_model",
    "train_language_model",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModelConfig:
    """A GPT-OSS small enough for a minute on one core."""

    num_layers: int = 4
    """Decoder layers; even ones see the last ``window`` tokens, odd ones all before."""
    hidden_size: int = 128
    """Width e."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 2
    """Key and value heads."""
    head_dim: int = 32
    """Width of a head."""
    num_experts: int = 4
    """Experts of each layer."""
    num_active_experts: int = 2
    """Experts that each token uses."""
    expert_dim: int = 128
    """Hidden width of an expert."""
    window: int = 8
    """Tokens that a sliding-window layer sees: about those that name one object."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    embedding_std: float = 1.0
    """Initial standard deviation of the word embedding."""
    matrix_std: float = 0.08
    """Initial standard deviation of all other matrices."""
    grid: int = 2
    """Cells a side of the scenes."""
    dense_share: float = 0.75
    """Share of dense captions, which are answered; the rest are brief and are not."""
    wording: Wording = "synonyms"
    """How captions vary: "plain", "synonyms" or "varied" (other sentence forms too)."""
    unlike_share: float = 0.75
    """Share of scenes that are sure to hold several unlike objects."""
    answer_weight: float = 4.0
    """Weight of an answer's tokens in the loss; a caption's have 1."""
    steps: int = 300
    """Optimiser steps."""
    batch_size: int = 32
    """Captions of a step."""
    group: int = 10
    """Batches that are drawn at once and sorted by length, so that little is spent on padding; divides steps."""
    learning_rate: float = 3e-3
    """Peak of AdamW's rate: embedding, head, routers, norms and biases."""
    muon_rate: float = 7e-3
    """Peak of Muon's rate: attention and expert matrices."""
    dtype: Literal["float32", "bfloat16"] = field(default_factory=fast_dtype)
    """Arithmetic of training, by default the faster one on this CPU; weights and moments are float32."""
    warmup: int = 20
    """Steps of linear warm-up."""
    decay_share: float = 0.4
    """Share of the steps, at the end, in which the rate falls to zero."""
    seed: int = 0
    """Of the initialisation and of the captions."""
    num_checked: int = 256
    """Held-out captions of the gates."""
    min_answer_accuracy: float = 0.5
    """Gate: share of objects of which every word of the answer is right, see :func:`answer_accuracy`."""
    min_colour_share: float = 0.05
    """Gate: share of the features' variance that tells colours apart, in the weakest layer."""
    version: int = 2
    """Of the training code: a change that gives other weights raises it, so that cached ones are not taken."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.group < 1 or self.steps % self.group:
            raise ValueError(
                f"steps, batch_size, group: expected positive numbers, steps divisible by group, got {self.steps}, "
                f"{self.batch_size}, {self.group}"
            )
        if not 0 <= self.dense_share <= 1 or not 0 <= self.decay_share <= 1:
            raise ValueError(
                f"dense_share, decay_share: expected shares in [0, 1], got {self.dense_share}, {self.decay_share}"
            )


def smallest_language_model() -> LanguageModelConfig:
    """A model that trains in a second and passes no gate: for tests."""
    return LanguageModelConfig(
        num_layers=2,
        hidden_size=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        expert_dim=16,
        steps=4,
        batch_size=4,
        group=2,
        warmup=1,
        num_checked=16,
        min_answer_accuracy=0.0,
        min_colour_share=0.0,
    )


def train_language_model(
    config: LanguageModelConfig, directory: Path, *, progress: Callable[..., Any] = progress, strict: bool = True
) -> GateReport:
    """Train, save and check a language model; the same config gives the same weights on one thread.

    Args:
        config: the model and its training.
        directory: gets the weights and tokenizer as transformers saves them, ``metrics.jsonl``, and
            ``language_model.json`` with config and gates.
        progress: makes the bar, as :func:`experiments.runs.progress`.
        strict: whether a failed gate raises; the files are written before.

    Returns:
        The gates.

    Raises:
        GateError: if a gate fails and ``strict``.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_language_model(config, len(tokenizer))
    compute = deepcopy(model).to(getattr(torch, config.dtype))
    masters, copies = list(model.parameters()), list(compute.parameters())
    optimisers = build_optimisers(model, config.learning_rate, config.muon_rate)
    with progress(config.steps, 0, "language model") as bar:
        for step, (ids, mask, weight) in enumerate(_batches(config, compute, tokenizer), start=1):
            factor = warmup_flat_decay(step, config.steps, config.warmup, config.decay_share)
            losses = token_losses(compute, ids, mask)
            (losses * weight).sum().backward()
            for master, copy in zip(masters, copies, strict=True):
                master.grad = None if copy.grad is None else copy.grad.float()
                copy.grad = None
            nn.utils.clip_grad_norm_(masters, 1.0)
            for optimiser, peak in optimisers:
                optimiser.param_groups[0]["lr"] = peak * factor
                optimiser.step()
            with torch.no_grad():
                torch._foreach_copy_(copies, masters)  # pyright: ignore[reportPrivateImportUsage]
            if step % 10 == 0 or step == config.steps:
                mean = float(losses.detach().sum() / mask[:, 1:].sum())
                append_jsonl(directory / "metrics.jsonl", {"step": step, "loss": mean})
                bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            bar.update()
    model.requires_grad_(False).eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    report = check_language_model(model, tokenizer, config)
    write_json(directory / "language_model.json", {"config": config, "gates": report})
    return require(report) if strict else report


def load_language_model(directory: Path) -> tuple[Any, Any]:
    """Load what :func:`train_language_model` saved.

    Returns:
        The model, frozen and in evaluation mode, and its tokenizer; both as a TextEncoder wants them.
    """
    from transformers import AutoTokenizer, GptOssForCausalLM

    model: Any = GptOssForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    return model.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(directory)


def build_language_model(config: LanguageModelConfig, vocab_size: int) -> Any:
    """The untrained model, initialised from the config's seed."""
    from transformers import GptOssConfig, GptOssForCausalLM

    settings = GptOssConfig(
        vocab_size=vocab_size,
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.num_active_experts,
        intermediate_size=config.expert_dim,
        sliding_window=config.window,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        pad_token_id=0,
        eos_token_id=1,
    )
    # On a CPU the plain loop over experts is the fastest of the implementations that transformers offers.
    settings._experts_implementation = "eager"  # noqa: SLF001
    with torch.random.fork_rng(devices=[]):  # its own initialisation, which is replaced below, draws numbers
        model: Any = GptOssForCausalLM._from_config(settings, attn_implementation="eager")  # noqa: SLF001
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                parameter.normal_(std=config.embedding_std, generator=generator)
            elif parameter.ndim >= 2 and not name.endswith("bias"):
                parameter.normal_(std=config.matrix_std, generator=generator)
            elif not name.endswith("norm.weight"):
                parameter.zero_()
    return model


def check_language_model(model: Any, tokenizer: Any, config: LanguageModelConfig) -> GateReport:
    """Measure whether features of this model can tell an image model what to paint.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        config: its config, for the thresholds and the number of captions.

    Returns:
        ``answer_accuracy``, ``relation_accuracy``, ``colour_share`` (the weakest layer's), ``caption_loss`` and
        ``answer_loss`` (held-out, a token), with what falls short.
    """
    num = config.num_checked
    world = {"grid": config.grid, "wording": config.wording}
    shares = colour_shares(model, tokenizer, num=max(2, num // 8), **world)
    numbers = {
        "answer_accuracy": answer_accuracy(model, tokenizer, num=num, **world),
        "relation_accuracy": relation_accuracy(model, tokenizer, num=num, **world),
        "colour_share": min(shares),
        **{f"colour_share_layer_{layer}": share for layer, share in enumerate(shares)},
        **held_out_losses(model, tokenizer, seed=config.seed, dense_share=config.dense_share, num=num, **world),
    }
    least = {"answer_accuracy": config.min_answer_accuracy, "colour_share": config.min_colour_share}
    return GateReport.judge("language model", numbers, least)


def build_optimisers(model: Any, learning_rate: float, muon_rate: float) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices of attention and experts, AdamW for the rest, each with its peak rate."""
    hidden = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and name.endswith(("_proj.weight", "_proj"))
    }
    rest = [parameter for name, parameter in model.named_parameters() if name not in hidden]
    adam = torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    return [(adam, learning_rate), (Muon(hidden, lr=muon_rate), muon_rate)]


def _batches(config: LanguageModelConfig, model: Any, tokenizer: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Token ids, mask and the losses' weights for every step; batches of a group hold turns of similar length."""
    encoder = TextEncoder(model, tokenizer, layers=(0,))
    model.requires_grad_(True)  # the encoder froze it
    generator = torch.Generator().manual_seed(config.seed)
    names = ("seed", "grid", "dense_share", "unlike_share", "wording")
    options = {name: getattr(config, name) for name in names}
    size = config.group * config.batch_size
    for first in range(0, config.steps * config.batch_size, size):
        turns = [scene_turn(number, **options) for number in range(first, first + size)]
        turns.sort(key=lambda turn: turn.caption.count(" ") + turn.answer.count(" "))
        batches = []
        for start in range(0, size, config.batch_size):
            ids, mask, lengths = conversations(encoder, turns[start : start + config.batch_size])
            answered = torch.arange(1, ids.shape[1]) >= lengths[:, None]
            batches.append((ids, mask, mask[:, 1:] * torch.where(answered, config.answer_weight, 1.0)))
        # One scale for the whole group: a token weighs the same in short turns and in long ones.
        scale = config.group / float(sum(weight.sum() for _, _, weight in batches))
        for index in torch.randperm(config.group, generator=generator).tolist():
            ids, mask, weight = batches[index]
            yield ids, mask, weight * scale
