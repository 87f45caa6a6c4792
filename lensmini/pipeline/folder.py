"""A pipeline folder or repository of diffusers' layout: its components, read without running anything of it."""

import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from lensmini.checkpoints.files import CheckpointError, read_json
from lensmini.checkpoints.folders import find_source, inside
from lensmini.checkpoints.text_loading import load_text_encoder
from lensmini.checkpoints.transformer import load_transformer
from lensmini.nn import Autoencoder, LensTransformer, TextEncoder, load_autoencoder

__all__ = ["VARIANTS", "Components", "guess_variant", "load_components"]

VARIANTS: dict[str, tuple[int, float]] = {"Lens-Base": (50, 5.0), "Lens": (20, 5.0), "Lens-Turbo": (4, 1.0)}
"""Default steps and guidance scale of each released checkpoint."""


class Components(NamedTuple):
    """The loaded parts of a pipeline."""

    transformer: LensTransformer
    autoencoder: Autoencoder | None
    text_encoder: TextEncoder | None
    variant: str | None


def guess_variant(name: str) -> str | None:
    """The released variant that a repository's or folder's name says, None if it says none.

    Example:
        >>> [guess_variant(name) for name in ("microsoft/Lens-Turbo", "models/lens_base-bf16", "Lens", "lenses", "a/b")]
        ['Lens-Turbo', 'Lens-Base', 'Lens', None, None]
    """
    last = re.split(r"[\\/]", name.rstrip("\\/"))[-1].lower()
    found = re.search(r"(?<![a-z])lens(?:[-_ ]?(turbo|base))?(?![a-z])", last)
    if found is None:
        return None
    return {"turbo": "Lens-Turbo", "base": "Lens-Base", None: "Lens"}[found.group(1)]


def load_components(
    path_or_repo: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    text_encoder: TextEncoder | bool | str | os.PathLike[str] = True,
    autoencoder: Autoencoder | bool | str | os.PathLike[str] = True,
    quantization: Literal["auto", "packed", "dequantize"] = "auto",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Components:
    """Load what a folder with ``model_index.json`` holds, or a Hub repository of that layout.

    Args:
        path_or_repo: the folder or repository; a folder that exists wins.
        dtype: of every component.
        device: where to put them.
        text_encoder: True for the pipeline's own, False for none, or an encoder, its folder or repository.
        autoencoder: likewise.
        quantization: of the text encoder.
        revision: branch, tag or commit.
        cache_dir: the Hub's cache folder.
        local_files_only: never ask the network.

    Returns:
        The parts, and the variant that the index or the name says.

    Raises:
        CheckpointError: naming the file, what was expected and what was found.

    Example:
        >>> load_components("no/such/folder")
        Traceback (most recent call last):
        lensmini.checkpoints.files.CheckpointError: ...
    """
    hub: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    wanted = ["transformer"]
    wanted += ["vae"] if autoencoder is True else []
    wanted += ["text_encoder", "tokenizer"] if text_encoder is True else []
    kinds = ("json", "safetensors", "txt", "jinja", "model")
    patterns = ["model_index.json", *(f"{folder}/*.{kind}" for folder in wanted for kind in kinds)]
    source = find_source(path_or_repo, allow_patterns=patterns, **hub)
    if not source.is_dir():
        raise CheckpointError(
            f"{source}: expected a pipeline folder with model_index.json, found a file; load_transformer reads it, and "
            "LensPipeline(...) takes the parts"
        )
    index = read_json(inside(source, "model_index.json"))
    for name in wanted:
        entry = index.get(name)
        listed = isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
        if (name == "transformer" or entry is not None) and not listed:
            raise CheckpointError(
                f'{source / "model_index.json"}: expected "{name}": [library, class], found {str(entry)[:200]}'
            )
        if name != "tokenizer" and not (source / name).is_dir():
            hint = (
                "" if name == "transformer" else f"; pass {'autoencoder' if name == 'vae' else name}= a path or False"
            )
            raise CheckpointError(f"{source / name}: expected a folder, found none{hint}")
    variant = index.get("lens_variant")
    if variant is not None and variant not in VARIANTS:
        raise CheckpointError(
            f"{source / 'model_index.json'}: expected lens_variant among {[*VARIANTS]}, found {str(variant)[:200]}"
        )
    transformer = load_transformer(source, dtype=dtype, device=device)
    return Components(
        transformer,
        _load_autoencoder(source, autoencoder, dtype=dtype, device=device, hub=hub),
        _load_text_encoder(source, text_encoder, transformer, dtype, device, quantization, hub),
        variant or guess_variant(str(source.resolve() if Path(path_or_repo).is_dir() else path_or_repo)),
    )


def _load_autoencoder(
    source: Path,
    given: Autoencoder | bool | str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    hub: dict[str, Any],
) -> Autoencoder | None:
    if isinstance(given, Autoencoder):
        return given.to(device)
    if given is False:
        return None
    folder = source / "vae"
    if given is not True:
        patterns = ["config.json", "*.safetensors", "vae/*.safetensors", "vae/config.json", "model_index.json"]
        elsewhere = {**hub, "revision": None}
        folder = find_source(given, allow_patterns=patterns, **elsewhere)
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
    read_json(inside(folder, "config.json"))
    try:
        return load_autoencoder(folder, dtype=dtype, device=device, local_files_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # diffusers raise whatever a broken configuration makes them stumble over
        cause = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder}: expected an autoencoder in safetensors, found {cause}") from error


def _load_text_encoder(
    source: Path,
    given: TextEncoder | bool | str | os.PathLike[str],
    transformer: LensTransformer,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: Literal["auto", "packed", "dequantize"],
    hub: dict[str, Any],
) -> TextEncoder | None:
    if isinstance(given, TextEncoder):
        return given.to(device)
    if given is False:
        return None
    layers = transformer.config.selected_layer_index
    options: dict[str, Any] = {"dtype": dtype, "device": device, "quantization": quantization, "layers": layers}
    if given is True:
        offline = bool(hub.get("local_files_only"))
        return load_text_encoder(source, subfolder="text_encoder", local_files_only=offline, **options)
    return load_text_encoder(given, **options, **{**hub, "revision": None})  # pyright: ignore[reportArgumentType]
