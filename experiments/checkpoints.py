"""Checkpoints that the miniature's runs wrote: found, loaded and asked which words they know."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from experiments.miniature.autoencoder import AutoencoderConfig
from experiments.miniature.language_model import LanguageModelConfig
from experiments.miniature.world import Miniature, MiniatureConfig, prepare_miniature
from experiments.runs import latest_checkpoint
from experiments.training import read_run
from lensmini.nn import LensConfig, LensTransformer

__all__ = ["BUNDLE", "EXAMPLE", "find_checkpoint", "find_stages", "load_checkpoint", "unknown_words"]

BUNDLE = Path(__file__).parent / "miniature" / "pretrained"
"""A trained miniature in the repository, see ``experiments.miniature.bundle``."""
EXAMPLE = (
    "two shapes on a gray background . a big red circle at the upper left . a small blue square at the lower right ."
)
"""A prompt in the form of the miniature's dense captions: number and background, then each object with size and place."""
_RUNS = (Path("runs/quickstart"), Path("runs/mini"))


def find_checkpoint(path: Path | None) -> Path:
    """The ``step-N`` directory that a path means.

    Args:
        path: such a directory, or a run, whose newest one is taken; None looks into the runs that make one, then into the
            repository's own.

    Returns:
        The directory.

    Raises:
        FileNotFoundError: if there is none; the message names the command that makes one.
    """
    for run in (*_RUNS, BUNDLE / "quickstart") if path is None else (path,):
        if (run / "run.json").is_file():
            return run
        found = latest_checkpoint(run)
        if found is not None:
            return found[0]
    if path is not None and not path.exists():
        raise FileNotFoundError(f"checkpoint: expected a run, a folder, a file or a Hub repository, found no {path}")
    where = path if path is not None else " or ".join(run.as_posix() for run in _RUNS)
    raise FileNotFoundError(
        f"no checkpoint in {where}: train one with `python -m experiments.quickstart` (about 8 minutes on two cores)"
        " or name one with --checkpoint"
    )


def find_stages(path: Path) -> tuple[dict[str, Any], Path]:
    """What a ``step-N`` directory's language model and autoencoder are: settings, and the directory that caches them.

    A run of reinforcement learning or distillation has those of the run that it began from, as long as that is there.
    """
    config = read_run(path)["config"]
    own, start = config.get("miniature"), config.get("base") or config.get("teacher")
    if start is not None:
        try:
            return find_stages(find_checkpoint(Path(start)))
        except FileNotFoundError:
            if own is None:
                raise
    if own is None:
        raise ValueError(f"checkpoint: expected a run of the miniature, got {path}")
    return own, path.resolve().parent.parent


def load_checkpoint(path: Path, weights: str = "ema", *, quiet: bool = False) -> tuple[LensTransformer, Miniature]:
    """Load a ``step-N`` directory.

    Args:
        path: the directory.
        weights: "ema" or "model".
        quiet: say nothing about the stages beneath.

    Returns:
        The transformer, frozen, in the dtype that it was trained in, and the parts beneath, found beside the run (or
        trained again if they are gone).
    """
    if weights not in ("ema", "model"):
        raise ValueError(f'weights: expected "ema" or "model", got {weights!r}')
    beneath, place = find_stages(path)
    canvases = tuple(map(tuple, beneath["autoencoder"]["canvases"]))
    world = MiniatureConfig(
        language_model=LanguageModelConfig(**beneath["language_model"]),
        autoencoder=AutoencoderConfig(**{**beneath["autoencoder"], "canvases": canvases}),
        layers=tuple(beneath["layers"]),
        max_length=beneath["max_length"],
        strict=beneath["strict"],
    )
    model = LensTransformer(LensConfig.from_dict(json.loads((path / "config.json").read_text())))
    model.load_state_dict(load_file(path / f"{weights}.safetensors"), strict=True)
    model = model.to(getattr(torch, read_run(path)["config"]["optim"]["dtype"])).requires_grad_(False).eval()
    return model, prepare_miniature(world, place, quiet=quiet)


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """The words of a prompt that the tokenizer maps to its token for unknown ones, each once.

    Example:
        >>> from experiments.miniature.tokenizer import build_tokenizer
        >>> unknown_words(build_tokenizer(), "a Mauve circle near a hexagon")
        ['Mauve', 'near', 'hexagon']
    """
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return list(dict.fromkeys(prompt[start:end] for token, (start, end) in pairs if token == tokenizer.unk_token_id))
