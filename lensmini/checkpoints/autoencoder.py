"""Load an autoencoder of a folder that nobody has to trust: diffusers see it only once it has been checked."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lensmini.checkpoints.files import CheckpointError, StoredValue, list_names, read_json
from lensmini.checkpoints.folders import find_source, inside, read_weights_folder
from lensmini.nn import Autoencoder, load_autoencoder

__all__ = ["AUTOENCODER_FILES", "load_checked_autoencoder"]

AUTOENCODER_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "vae/*.json", "vae/*.safetensors")
"""What a repository of an autoencoder, or of a pipeline with one, may hold of it."""
_KINDS = ("AutoencoderKL", "AutoencoderKLFlux2")
# Above any model's widths; a product of two such numbers is still far from the end of 64 bits.
_MAX_NUMBER = 2**20


def load_checked_autoencoder(
    path_or_repo: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Autoencoder:
    """Load an autoencoder as :func:`lensmini.nn.load_autoencoder` does, after checking all that is read.

    The configuration is built without memory and compared with the sizes in the files, so that neither can make the
    process allocate what the files do not hold.

    Args:
        path_or_repo: folder of an autoencoder or of a pipeline (its ``vae`` is used), or Hub repository.
        dtype: of the weights.
        device: where to put it.
        revision: branch, tag or commit of the repository.
        cache_dir: the Hub's cache folder.
        local_files_only: never ask the network.

    Returns:
        The autoencoder, frozen.

    Raises:
        CheckpointError: naming the file, what was expected and what was found.
        ImportError: without diffusers.

    Example:
        >>> import diffusers, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     diffusers.AutoencoderKL(norm_num_groups=8).save_pretrained(folder)
        ...     load_checked_autoencoder(folder).channels
        16
    """
    hub: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    folder = find_source(path_or_repo, allow_patterns=AUTOENCODER_FILES, **hub)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder with config.json and safetensors, found a file")
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    config = read_json(inside(folder, "config.json"))
    files = read_weights_folder(folder)
    stored = {name: value for file in files.values() for name, value in file.values.items()}
    _check_config(config, stored, folder)
    try:
        return load_autoencoder(folder, dtype=dtype, device=device, local_files_only=True)
    except (CheckpointError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # diffusers raise whatever a broken configuration makes them stumble over
        raise CheckpointError(
            f"{folder}: expected an autoencoder in safetensors, found {_first_line(error)}"
        ) from error


def _check_config(config: Mapping[str, Any], stored: Mapping[str, StoredValue], folder: Path) -> None:
    """Refuse a configuration of another model than the one in the files."""
    where = folder / "config.json"
    kind = config.get("_class_name")
    if kind not in _KINDS:
        raise CheckpointError(f"{where}: expected {' or '.join(_KINDS)}, found {str(kind)[:200]!r}")
    for key, value in config.items():
        large = next((number for number in _numbers(value) if abs(number) > _MAX_NUMBER), None)
        if large is not None:
            raise CheckpointError(f"{where}: expected numbers of at most {_MAX_NUMBER}, found {large} in {key[:120]}")
        # Blocks and the layers of each: building them takes time even without memory.
        if (isinstance(value, list) and len(value) > len(stored)) or (
            "per_block" in key and any(number > len(stored) for number in _numbers(value))
        ):
            raise CheckpointError(f"{where}: expected sizes that fit the {len(stored)} tensors stored, found {key}")
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("autoencoders need diffusers: pip install lensmini[diffusers]") from error
    try:
        with torch.device("meta"):
            model = getattr(diffusers, kind).from_config(dict(config))
    except Exception as error:
        raise CheckpointError(f"{where}: expected a configuration of {kind}, found {_first_line(error)}") from error
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shaped = [
        f"{name}: expected {list(shape)}, found {list(stored[name].shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    if shaped:
        raise CheckpointError(f"{folder}: expected tensors that fit config.json, found mis-shaped {list_names(shaped)}")
    # Names may be those of before diffusers renamed the layers of attention, sizes may not.
    wanted = sum(value.numel() for value in model.parameters())
    found = sum(_numel(value) for value in stored.values())
    if wanted > found:
        raise CheckpointError(f"{folder}: expected the {wanted} numbers that config.json asks for, found {found}")


def _numel(value: StoredValue) -> int:
    return math.prod(value.shape)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(inner)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
