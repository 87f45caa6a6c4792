"""What every miniature run stands on: the frozen language model and autoencoder, trained once and cached."""

import multiprocessing
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.miniature.autoencoder import AutoencoderConfig, load_autoencoder_miniature, train_autoencoder
from experiments.miniature.language_model import LanguageModelConfig, load_language_model, train_language_model
from experiments.runs import cached_stage, config_hash, progress
from lensmini.nn import Autoencoder, TextEncoder
from lensmini.parallel import die_with_parent

__all__ = ["Miniature", "MiniatureConfig", "prepare_miniature"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MiniatureConfig:
    """The two frozen parts."""

    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    """Text encoder."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Pictures to latents and back."""
    layers: tuple[int, ...] = (0, 1, 2, 3)
    """Language-model layers whose features are used."""
    max_length: int = 128
    """Most tokens of a prompt, template included."""
    strict: bool = True
    """Whether a failed gate stops the run."""


class Miniature(NamedTuple):
    """The frozen parts, loaded."""

    encoder: TextEncoder
    autoencoder: Autoencoder
    key: str
    """Names both parts' configs: what was encoded with them is cached under it."""
    reused: Mapping[str, bool]
    """Which stages were found rather than trained."""


def prepare_miniature(config: MiniatureConfig, root: Path, *, quiet: bool = False) -> Miniature:
    """Train the missing parts, side by side on two cores, and load both.

    Args:
        config: of both parts.
        root: where stages are cached, ``runs/`` in the scripts.
        quiet: say nothing.

    Returns:
        Text encoder and autoencoder, frozen.

    Raises:
        RuntimeError: if training a part failed or its gate is not passed.
    """
    stages = [
        (
            "language-model",
            config.language_model,
            partial(_train, train_language_model, config.language_model, config.strict),
        ),
        ("autoencoder", config.autoencoder, partial(_train, train_autoencoder, config.autoencoder, config.strict)),
    ]
    missing = [stage for stage in stages if not (root / f"{stage[0]}-{config_hash(stage[1])}").is_dir()]
    if len(missing) == 2:
        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=_make, args=(root, *stage, position, os.getpid()))
            for position, stage in enumerate(missing)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            names = [stage[0] for stage, worker in zip(missing, workers, strict=True) if worker.exitcode]
            raise RuntimeError(f"{' and '.join(names)}: training failed, see the message above")
    reused = {stage[0]: stage not in missing for stage in stages}
    said = quiet or bool(missing)
    paths = [cached_stage(root, name, part, make, quiet=said)[0] for name, part, make in stages]
    model, tokenizer = load_language_model(paths[0])
    encoder = TextEncoder(model, tokenizer, layers=config.layers, max_length=config.max_length)
    key = config_hash([config.language_model, config.autoencoder, config.layers, config.max_length])
    return Miniature(encoder, load_autoencoder_miniature(paths[1]), key, reused)


def _make(root: Path, name: str, part: Any, make: Any, position: int, parent: int) -> None:
    die_with_parent(parent)
    torch.set_num_threads(1)
    make.keywords["progress"] = partial(progress, position=position)
    cached_stage(root, name, part, make)


def _train(train: Any, part: Any, strict: bool, directory: Path, *, progress: Any = progress) -> None:
    train(part, directory, progress=progress, strict=strict)
