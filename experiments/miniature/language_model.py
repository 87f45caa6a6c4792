"""The miniature's language model: a stock GPT-OSS of about a million parameters, trained on scene captions.

An image model can only follow what its text features tell apart, and a language model keeps no more than predicting
the next word needs. It starts from embeddings of standard deviation 1, which keep words apart. The gates measure what
is left after training: which colour it was, and which attributes belong to one object.

Axes: b captions, l tokens, e width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.miniature.captions import scene_caption, token_losses, whole_turns
from experiments.miniature.gates import GateReport, require
from experiments.miniature.language_gates import binding_accuracy, colour_shares, held_out_loss, relation_accuracy
from experiments.miniature.schedule import warmup_flat_decay
from experiments.miniature.tokenizer import build_tokenizer
from experiments.runs import append_jsonl, progress, write_json
from lensmini.nn.text_encoder import TextEncoder

__all__ = [
    "LanguageModelConfig",
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
    window: int = 32
    """Tokens that a sliding-window layer sees."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    embedding_std: float = 1.0
    """Initial standard deviation of the word embedding."""
    matrix_std: float = 0.08
    """Initial standard deviation of all other matrices."""
    grid: int = 2
    """Cells a side of the scenes."""
    dense_share: float = 0.75
    """Share of dense captions; the rest are brief."""
    steps: int = 400
    """Optimiser steps."""
    batch_size: int = 32
    """Captions of a step."""
    group: int = 10
    """Batches that are drawn at once and sorted by length, so that little is spent on padding; divides steps."""
    learning_rate: float = 3e-3
    """Peak of AdamW's rate."""
    warmup: int = 20
    """Steps of linear warm-up."""
    decay_share: float = 0.4
    """Share of the steps, at the end, in which the rate falls to zero."""
    seed: int = 0
    """Of the initialisation and of the captions."""
    num_checked: int = 256
    """Held-out captions of the gates."""
    min_relation_accuracy: float = 0.95
    """Share of relations told right that is wanted."""
    relation_required: bool = False
    """Whether fewer right relations stop the run or are only said. A minute of training on these captions does not get
    off chance (about a third), see :func:`relation_accuracy`; a longer run may ask for it."""
    min_colour_share: float = 0.05
    """Gate: share of the features' variance that tells colours apart, in the weakest layer."""
    version: int = 1
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
        min_relation_accuracy=0.0,
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
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    with progress(config.steps, 0, "language model") as bar:
        for step, (ids, mask, scale) in enumerate(_batches(config, model, tokenizer), start=1):
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * warmup_flat_decay(
                    step, config.steps, config.warmup, config.decay_share
                )
            losses = token_losses(model, ids, mask)
            loss = losses.sum() * scale
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
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
        ``binding_accuracy``, ``relation_accuracy``, ``colour_share`` (the weakest layer's) and ``held_out_loss``, with what
        falls short.
    """
    num = config.num_checked
    shares = colour_shares(model, tokenizer, grid=config.grid, num=max(2, num // 8))
    numbers = {
        "binding_accuracy": binding_accuracy(model, tokenizer, grid=config.grid, num=2 * num),
        "relation_accuracy": relation_accuracy(model, tokenizer, grid=config.grid, num=num),
        "colour_share": min(shares),
        **{f"colour_share_layer_{layer}": share for layer, share in enumerate(shares)},
        "held_out_loss": held_out_loss(
            model, tokenizer, seed=config.seed, grid=config.grid, dense_share=config.dense_share, num=num
        ),
    }
    least = {"colour_share": config.min_colour_share}
    relation = {"relation_accuracy": config.min_relation_accuracy}
    if config.relation_required:
        return GateReport.judge("language model", numbers, {**least, **relation})
    return GateReport.judge("language model", numbers, least, wanted=relation)


def _batches(config: LanguageModelConfig, model: Any, tokenizer: Any) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Token ids, mask and loss scale for every step; batches of a group hold captions of similar length."""
    encoder = TextEncoder(model, tokenizer, layers=(0,))
    model.requires_grad_(True)  # the encoder froze it
    generator = torch.Generator().manual_seed(config.seed)
    size = config.group * config.batch_size
    for first in range(0, config.steps * config.batch_size, size):
        texts = [
            scene_caption(number, seed=config.seed, grid=config.grid, dense_share=config.dense_share)
            for number in range(first, first + size)
        ]
        texts.sort(key=lambda text: text.count(" "))
        batches = []
        for start in range(0, size, config.batch_size):
            batches.append(whole_turns(encoder, texts[start : start + config.batch_size]))
        # One scale for the whole group: every token of it weighs the same, in short captions or long.
        scale = config.group / float(sum(mask[:, 1:].sum() for _, mask in batches))
        for index in torch.randperm(config.group, generator=generator).tolist():
            yield *batches[index], scale
