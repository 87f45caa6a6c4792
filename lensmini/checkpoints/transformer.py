"""Load and save the transformer in the ecosystem's formats: diffusers folders, shards, single files, the Hub.

Only safetensors and JSON are read, strictly: the tensors' names and shapes are compared with the configuration before
anything is allocated, and each tensor goes straight to its device and dtype.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lensmini.checkpoints.export import PREFIXES
from lensmini.checkpoints.files import (
    CheckpointError,
    StoredFile,
    StoredValue,
    list_names,
    parse_json,
    read_header,
    read_json,
)
from lensmini.checkpoints.folders import find_source, inside, read_weights_folder
from lensmini.nn.config import LensConfig
from lensmini.nn.transformer import LensTransformer

__all__ = ["load_transformer"]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CLASSES = ("LensTransformer2DModel", "LensTransformer")
_PARTS = {"img_in", "txt_in", "txt_norm", "time_text_embed", "transformer_blocks", "norm_out", "proj_out"}
# Far above any model, far below where a product of two no longer fits in 64 bits.
_BLOCK_TENSORS = 26
_MAX_WIDTH = 2**20


def load_transformer(
    path_or_repo: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    subfolder: str | None = None,
    config: LensConfig | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> LensTransformer:
    """Load a Lens transformer, released or ours, exactly and strictly.

    A single file may hold the tensors under one of the prefixes ``model.diffusion_model.``, ``diffusion_model.``,
    ``transformer.`` and ``net.``; tensors beside the prefixed ones (an autoencoder, a text encoder) are then passed
    over. At most one tensor at a time is in memory besides the model, and the model does not depend on the files
    afterwards.

    Args:
        path_or_repo: a pipeline folder (its ``transformer`` is used), a transformer folder with ``config.json`` and a
            single file or shards with an index, one safetensors file, or a Hub repository. A path that exists wins.
        dtype: of the parameters; None keeps the stored one of each.
        device: where to put them; on ``"meta"`` everything is checked and nothing is read.
        subfolder: folder inside ``path_or_repo``.
        config: overrides the stored configuration. Without either (metadata of a single file, or a ``config.json``
            beside it) the sizes are taken from the shapes; ``selected_layer_index``, ``axes_dims_rope`` and
            ``patch_size``, which shapes do not tell, are then the released ones if those fit.
        revision: branch, tag or commit of the Hub repository.
        cache_dir: the Hub's cache folder.
        local_files_only: never ask the network, as with the Hub's own ``HF_HUB_OFFLINE``.

    Returns:
        The model in evaluation mode; its parameters require gradients.

    Raises:
        CheckpointError: naming the file, what was expected and what was found; missing, unexpected and mis-shaped
            tensors are listed together.
        ValueError: if an argument is wrong.

    Example:
        >>> import tempfile
        >>> from lensmini.checkpoints import save_transformer
        >>> config = LensConfig(num_layers=1, num_attention_heads=1, enc_hidden_dim=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_transformer(LensTransformer(config), folder)
        ...     load_transformer(folder, dtype=torch.bfloat16).img_in.weight.dtype
        torch.bfloat16
    """
    if dtype is not None and dtype not in _DTYPES.values():
        raise ValueError(f"dtype: expected one of {[str(known) for known in _DTYPES.values()]}, got {dtype}")
    if config is not None and not isinstance(config, LensConfig):
        raise ValueError(f"config: expected a LensConfig, got {type(config).__name__}")
    where = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    source = find_source(path_or_repo, allow_patterns=_patterns(subfolder), **where)
    source = _component(source, subfolder)
    files = read_weights_folder(source) if source.is_dir() else {source: read_header(source)}
    names = _strip_prefix(files, source)
    stored = {name: files[path].values[key] for name, (path, key) in names.items()}
    config, origin = (config, "config") if config else _find_config(source, files, stored)
    model = _empty_model(config, stored, f"{source}: {origin}")
    _check_fit(model, stored, source)
    target = torch.device(device)
    for path in files:
        wanted = {name: key for name, (holder, key) in names.items() if holder == path}
        _read_tensors(model, path, wanted, stored, dtype, target)
    assert target.type == "meta" or not any(parameter.is_meta for parameter in model.parameters())
    return model.eval()


def _patterns(subfolder: str | None) -> list[str]:
    if subfolder is not None:
        return [f"{subfolder}/{name}" for name in ("config.json", "*.safetensors", "*.safetensors.index.json")]
    root = ["model_index.json", "config.json", "diffusion_pytorch_model*.safetensors", "*.safetensors.index.json"]
    # fnmatch's * crosses folders: without this an index anywhere would be fetched, which is small.
    return [*root, *_patterns("transformer")]


def _component(source: Path, subfolder: str | None) -> Path:
    """The folder or file that holds the transformer itself."""
    if subfolder is not None:
        parts = Path(subfolder).parts
        if not parts or Path(subfolder).is_absolute() or ".." in parts:
            raise ValueError(f"subfolder: expected a folder inside path_or_repo, got {subfolder!r}")
        if not (source / subfolder).is_dir():
            raise CheckpointError(f"{source / subfolder}: expected a folder, found none")
        return source / subfolder
    if not source.is_dir():
        return source
    if (source / "model_index.json").exists():
        index = read_json(inside(source, "model_index.json"))
        if not (source / "transformer").is_dir():
            raise CheckpointError(f"{source}: expected a folder transformer beside model_index.json, found none")
        entry = index.get("transformer", ["diffusers", _CLASSES[0]])
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] not in _CLASSES:
            raise CheckpointError(f"{source / 'model_index.json'}: expected {_CLASSES[0]}, found {entry!r}")
        return source / "transformer"
    return (
        source if (source / "config.json").exists() or not (source / "transformer").is_dir() else source / "transformer"
    )


def _strip_prefix(files: Mapping[Path, StoredFile], source: Path) -> dict[str, tuple[Path, str]]:
    """Where each of the transformer's tensors is, by its name without prefix."""
    keys = [(path, key) for path, stored in files.items() for key in stored.values]
    found = {
        prefix: number
        for prefix in PREFIXES
        if (number := sum(k.startswith(prefix) and k[len(prefix) :].partition(".")[0] in _PARTS for _, k in keys))
    }
    if len(found) != 1:
        spelled = ", ".join(repr(prefix) for prefix in PREFIXES)
        what = ", ".join(f"{number} under {prefix!r}" for prefix, number in found.items())
        what = what or f"none among {list_names([key for _, key in keys])}"
        raise CheckpointError(f"{source}: expected a Lens transformer's tensors under one of {spelled}, found {what}")
    (prefix,) = found
    return {key[len(prefix) :]: (path, key) for path, key in keys if key.startswith(prefix)}


def _find_config(
    source: Path, files: Mapping[Path, StoredFile], stored: Mapping[str, StoredValue]
) -> tuple[LensConfig, str]:
    """The stored or inferred configuration and where it is from."""
    if source.is_dir():
        if (source / "config.json").exists():
            return _parse_config(read_json(inside(source, "config.json")), f"{source / 'config.json'}"), "config.json"
    else:
        text = files[source].metadata.get("config")
        if text is not None:
            where = f"{source}: metadata config"
            return _parse_config(parse_json(text, where), where), "metadata config"
        beside = source.parent / "config.json"
        if beside.exists():
            values = read_json(beside)
            # A file among other models' files is not described by their config.json.
            if values.get("_class_name", _CLASSES[0]) in _CLASSES:
                return _parse_config(values, str(beside)), "config.json"
    return _infer_config(stored, source), "shapes"


def _parse_config(values: Mapping[str, Any], where: str) -> LensConfig:
    if (kind := values.get("_class_name", _CLASSES[0])) not in _CLASSES:
        raise CheckpointError(f"{where}: expected {_CLASSES[0]}, found {str(kind)[:200]!r}")
    try:
        return LensConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: expected a Lens configuration, found {str(error)[:500]}") from error


def _infer_config(stored: Mapping[str, StoredValue], source: Path) -> LensConfig:
    def shape(name: str, rank: int) -> tuple[int, ...]:
        value = stored.get(name)
        if value is None or len(value.shape) != rank or 0 in value.shape:
            found = "none" if value is None else list(value.shape)
            raise CheckpointError(f"{source}: expected {name} with {rank} axes to infer sizes from, found {found}")
        return value.shape

    inner, in_channels = shape("img_in.weight", 2)
    (head_dim,) = shape("transformer_blocks.0.attn.norm_q.weight", 1)
    (enc_hidden_dim,) = shape("txt_norm.0.weight", 1)
    (output_dim,) = shape("proj_out.bias", 1)
    blocks = {name.split(".")[1] for name in stored if name.startswith("transformer_blocks.")}
    text_layers = {name.split(".")[1] for name in stored if name.startswith("txt_norm.")}
    released = LensConfig()
    unknown = []
    if head_dim != released.attention_head_dim or inner % head_dim:
        unknown.append("axes_dims_rope")
    if len(text_layers) != released.num_text_layers:
        unknown.append("selected_layer_index")
    if output_dim % released.patch_size**2:
        unknown.append("patch_size")
    if unknown:
        raise CheckpointError(f"{source}: expected config=, a config.json or metadata: shapes do not tell {unknown}")
    return LensConfig(
        num_layers=len(blocks),
        num_attention_heads=inner // head_dim,
        in_channels=in_channels,
        out_channels=output_dim // released.patch_size**2,
        enc_hidden_dim=enc_hidden_dim,
    )


def _empty_model(config: LensConfig, stored: Mapping[str, StoredValue], where: str) -> LensTransformer:
    """A model on the meta device, unless the configuration asks for what the file cannot hold."""
    widths = (config.inner_dim, config.enc_hidden_dim * config.num_text_layers, config.in_channels, config.output_dim)
    if max(widths) > _MAX_WIDTH:
        raise CheckpointError(f"{where}: expected widths of at most {_MAX_WIDTH}, found {max(widths)}")
    if _BLOCK_TENSORS * config.num_layers + config.num_text_layers > 1.25 * len(stored) + 64:
        raise CheckpointError(
            f"{where}: expected sizes that fit the {len(stored)} tensors stored, found {config.num_layers} blocks and "
            f"{config.num_text_layers} text layers"
        )
    with torch.device("meta"):
        return LensTransformer(config)


def _check_fit(model: nn.Module, stored: Mapping[str, StoredValue], source: Path) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    shaped = [
        f"{name}: expected {list(shape)}, found {list(stored[name].shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "mis-shaped": shaped}
    if found := "; ".join(f"{what} {list_names(names)}" for what, names in problems.items() if names):
        raise CheckpointError(f"{source}: expected the {len(expected)} tensors of the configuration, found {found}")
    other = [f"{name}: {value.dtype}" for name, value in stored.items() if value.dtype not in _DTYPES]
    if other:
        raise CheckpointError(f"{source}: expected dtypes {', '.join(_DTYPES)}, found {list_names(other)}")


def _read_tensors(
    model: nn.Module,
    path: Path,
    wanted: Mapping[str, str],
    stored: Mapping[str, StoredValue],
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """Fill the parameters ``wanted`` (name in the model: name in the file) from one file."""
    if device.type == "meta":
        for name in wanted:
            value = stored[name]
            _assign(model, name, torch.empty(value.shape, dtype=dtype or _DTYPES[value.dtype], device=device))
        return
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name, key in wanted.items():
                mapped = file.get_tensor(key)
                if mapped.shape != stored[name].shape or mapped.dtype != _DTYPES[stored[name].dtype]:
                    raise CheckpointError(f"{path}: expected an unchanged file, found another {key} while reading")
                # The file may change or go away later; nothing of the model may still live in it.
                _assign(model, name, mapped.to(device=device, dtype=dtype or mapped.dtype, copy=True))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: expected readable safetensors, found {error}") from error


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
