"""A pipeline folder or repository of diffusers' layout: its components, read without running anything of it."""

import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from lensmini.checkpoints.autoencoder import load_checked_autoencoder
from lensmini.checkpoints.files import CheckpointError, read_json
from lensmini.checkpoints.folders import find_source, inside
from lensmini.checkpoints.text_loading import load_text_encoder, packed_obstacle
from lensmini.checkpoints.transformer import load_transformer
from lensmini.nn import Autoencoder, LensTransformer, TextEncoder

__all__ = ["VARIANTS", "Components", "default_sampling", "find_pipeline", "guess_variant", "load_components"]

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
        >>> guess_variant("hub/models--microsoft--Lens-Turbo/snapshots/0123abc")
        'Lens-Turbo'
    """
    parts = re.split(r"[\\/]", name.rstrip("\\/"))
    cached = len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--")
    last = parts[-3].rpartition("--")[2] if cached else parts[-1]
    found = re.search(r"(?<![a-z])lens(?:[-_ ]?(turbo|base))?(?![a-z])", last.lower())
    if found is None:
        return None
    return {"turbo": "Lens-Turbo", "base": "Lens-Base", None: "Lens"}[found.group(1)]


def default_sampling(variant: str | None) -> tuple[int, float]:
    """Steps and guidance scale of a variant; of an unknown one those that suit most undistilled models.

    Example:
        >>> default_sampling("Lens-Turbo"), default_sampling(None)
        ((4, 1.0), (50, 4.0))
    """
    return (50, 4.0) if variant is None else VARIANTS[variant]


def find_pipeline(
    path_or_repo: str | os.PathLike[str],
    *,
    text_encoder: bool = True,
    autoencoder: bool = True,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> tuple[Path, str | None]:
    """The local folder of a pipeline, fetched if it is a repository, and its variant; no weights are loaded.

    Args:
        path_or_repo: folder with ``model_index.json`` and a folder per component, or Hub repository.
        text_encoder: whether its own text encoder and tokenizer are wanted.
        autoencoder: whether its own autoencoder is wanted.
        revision: branch, tag or commit.
        cache_dir: the Hub's cache folder.
        local_files_only: never ask the network.

    Returns:
        The folder, and the variant that the index or the name says.

    Raises:
        CheckpointError: naming the file, what was expected and what was found.

    Example:
        >>> find_pipeline("no/such/folder")
        Traceback (most recent call last):
        lensmini.checkpoints.files.CheckpointError: ...
    """
    wanted = ["transformer"]
    wanted += ["vae"] if autoencoder else []
    wanted += ["text_encoder", "tokenizer"] if text_encoder else []
    kinds = ("json", "safetensors", "txt", "jinja", "model")
    patterns = ["model_index.json", *(f"{folder}/*.{kind}" for folder in wanted for kind in kinds)]
    hub: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
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
    return source, variant or guess_variant(str(source.resolve() if Path(path_or_repo).is_dir() else path_or_repo))


def load_components(
    path_or_repo: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    text_device: torch.device | str | None = None,
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
        text_device: where a text encoder is put whose experts can stay packed there; ``device`` by default.
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
    own = {"text_encoder": text_encoder is True, "autoencoder": autoencoder is True}
    source, variant = find_pipeline(path_or_repo, **own, **hub)
    transformer = load_transformer(source, dtype=dtype, device=device)
    packs = text_device is not None and quantization != "dequantize"
    packs = packs and packed_obstacle(torch.device(text_device or device), offline=local_files_only) is None
    text_device = text_device if packs and text_device is not None else device
    return Components(
        transformer,
        _load_autoencoder(source, autoencoder, dtype=dtype, device=device, hub=hub),
        _load_text_encoder(source, text_encoder, transformer, dtype, text_device, quantization, hub),
        variant,
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
    if given is not True:
        return load_checked_autoencoder(given, dtype=dtype, device=device, **{**hub, "revision": None})
    return load_checked_autoencoder(source / "vae", dtype=dtype, device=device)


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
