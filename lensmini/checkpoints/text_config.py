"""What a language model's configuration may ask for, checked before transformers build anything from it."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lensmini.checkpoints.files import CheckpointError, read_header
from lensmini.checkpoints.folders import inside

__all__ = ["check_raw", "check_size"]

# Far above any real model: building this many layers takes memory and minutes before the first weight is looked at.
MAX_LAYERS = 1024
MAX_EXPERTS = 4096
MAX_BUFFERS = 2**26


def check_raw(raw: Mapping[str, Any], name: str, layers: Sequence[int]) -> None:
    """What must hold before transformers build anything from a configuration.

    Args:
        raw: what ``config.json`` says.
        name: of the checkpoint, for messages.
        layers: that are wanted.

    Raises:
        CheckpointError: naming the entry.

    Example:
        >>> check_raw({"num_hidden_layers": 10**9}, "model", [0])
        Traceback (most recent call last):
        lensmini.checkpoints.files.CheckpointError: model: expected num_hidden_layers in 1..1024, found 1000000000
    """
    text = raw.get("text_config", raw)
    count = text.get("num_hidden_layers", max([1, *layers])) if isinstance(text, dict) else None
    if type(count) is not int or not 0 < count <= MAX_LAYERS:
        raise CheckpointError(f"{name}: expected num_hidden_layers in 1..{MAX_LAYERS}, found {count!r}")
    for key, value in _experts(raw):
        if isinstance(value, int) and value > MAX_EXPERTS:
            raise CheckpointError(f"{name}: expected {key} of at most {MAX_EXPERTS}, found {value}")
    for key, value in _implementations(raw):
        # A repository's name here would make transformers fetch compiled code.
        if not (value is None or (isinstance(value, str) and value.isidentifier())):
            raise CheckpointError(f"{name}: expected {key} to be a plain name, found {str(value)[:200]!r}")
    if "transformers_weights" in raw:
        raise CheckpointError(
            f"{name}: expected the usual weight files, found transformers_weights in the configuration"
        )


def check_size(folder: Path, config: Any, name: str) -> None:
    """Refuse a configuration that asks for more numbers than the files hold, before memory is taken for them.

    Args:
        folder: with safetensors.
        config: of transformers; the model is built on the meta device.
        name: of the checkpoint, for messages.

    Raises:
        CheckpointError: with both numbers.

    Example:
        >>> import tempfile, transformers
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     check_size(Path(folder), transformers.LlamaConfig(num_hidden_layers=1), "model")
        Traceback (most recent call last):
        lensmini.checkpoints.files.CheckpointError: model: expected weights that fit the ... numbers ..., found 0
    """
    from transformers import AutoModel

    headers = [read_header(inside(folder, file.name)) for file in folder.glob("*.safetensors")]
    # A byte of packed experts holds two numbers.
    stored = sum(
        math.prod(value.shape) * (2 if value.dtype == "U8" else 1)
        for header in headers
        for value in header.values.values()
    )
    with torch.device("meta"):
        model = AutoModel.from_config(copy.deepcopy(config), trust_remote_code=False)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted > stored:
        raise CheckpointError(
            f"{name}: expected weights that fit the {wanted} numbers that config.json asks for, found {stored}"
        )
    buffers = sum(buffer.numel() for buffer in model.buffers())
    if buffers > MAX_BUFFERS:
        raise CheckpointError(f"{name}: expected at most {MAX_BUFFERS} numbers in tables, found {buffers}")


def _experts(raw: Any) -> Iterator[tuple[str, Any]]:
    for key, value in raw.items() if isinstance(raw, Mapping) else ():
        if isinstance(value, Mapping):
            yield from _experts(value)
        elif "expert" in key:
            yield key, value


def _implementations(raw: Any) -> Iterator[tuple[str, Any]]:
    """Every setting, at any depth, that names an implementation of attention or experts."""
    for key, value in raw.items() if isinstance(raw, Mapping) else ():
        if "implementation" in key and not isinstance(value, Mapping):
            yield key, value
        elif "implementation" in key:
            yield from ((f"{key}.{part}", inner) for part, inner in value.items())
        else:
            yield from _implementations(value)
