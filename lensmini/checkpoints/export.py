"""Write the transformer, or a whole pipeline, in the layout that diffusers reads: whole or not at all."""

import importlib.metadata
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lensmini.checkpoints.files import CheckpointError, list_names, read_json
from lensmini.checkpoints.folders import INDEX_SUFFIX, WEIGHTS_NAME
from lensmini.nn.transformer import LensTransformer

__all__ = ["export_diffusers", "save_single_file", "save_transformer"]

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "net.", "")
_CLASS = "LensTransformer2DModel"
_VARIANTS = ("Lens", "Lens-Base", "Lens-Turbo")
# The released configuration. Sampling computes its own shift from the number of tokens and steps.
_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "shift_terminal": None,
}


def save_transformer(
    model: LensTransformer,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Save as diffusers does: ``config.json`` and one safetensors file, or numbered shards with an index.

    The folder appears when it is complete. It may exist if it is empty or holds an earlier save of this kind, which
    is then replaced.

    Args:
        model: the transformer, with its own parameters only (merge adapters before).
        folder: where to; made with its parents.
        dtype: of the stored tensors; None keeps each parameter's.
        max_shard_bytes: largest size of a shard's tensors, unless one tensor alone is larger.

    Raises:
        CheckpointError: if the folder holds anything else.
        ValueError: if an argument is wrong.

    Example:
        >>> import tempfile
        >>> from lensmini.nn import LensConfig
        >>> config = LensConfig(num_layers=1, num_attention_heads=1, enc_hidden_dim=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_transformer(LensTransformer(config), folder)
        ...     sorted(os.listdir(folder))
        ['config.json', 'diffusion_pytorch_model.safetensors']
    """
    if isinstance(max_shard_bytes, bool) or not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected a whole number of at least 1, got {max_shard_bytes!r}")
    state = _state(model, dtype)
    _replace_folder(
        Path(folder), lambda part: _write_transformer(part, model, state, dtype, max_shard_bytes), _is_saved_transformer
    )


def save_single_file(
    model: LensTransformer,
    path: str | os.PathLike[str],
    *,
    prefix: str = "model.diffusion_model.",
    dtype: torch.dtype | None = None,
) -> None:
    """Save as one prefixed safetensors file, the form in which ComfyUI and others pass models on.

    The configuration is kept in the file's metadata under ``config``. An existing file is replaced when the new one
    is complete.

    Args:
        model: as in :func:`save_transformer`.
        path: ends in ``.safetensors``; its folder is made if it is missing.
        prefix: put before every name; one that :func:`lensmini.checkpoints.load_transformer` knows.
        dtype: of the stored tensors; None keeps each parameter's.

    Raises:
        ValueError: if an argument is wrong.

    Example:
        >>> import tempfile
        >>> from lensmini.nn import LensConfig
        >>> config = LensConfig(num_layers=1, num_attention_heads=1, enc_hidden_dim=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_single_file(LensTransformer(config), Path(folder, "lens.safetensors"))
        ...     os.listdir(folder)
        ['lens.safetensors']
    """
    target = Path(path).resolve()
    if target.suffix != ".safetensors" or target.is_dir():
        raise ValueError(f"path: expected a file name that ends in .safetensors, got {path}")
    if prefix not in PREFIXES:
        raise ValueError(f"prefix: expected one of {PREFIXES}, got {prefix!r}")
    state = _state(model, dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    metadata = {"config": json.dumps({"_class_name": _CLASS, **model.config.to_dict()})}
    try:
        _write_tensors(part, {prefix + name: value for name, value in state.items()}, dtype, metadata)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    _sync(target.parent)


def export_diffusers(
    folder: str | os.PathLike[str],
    *,
    transformer: LensTransformer,
    vae: Any = None,
    text_encoder: Any = None,
    tokenizer: Any = None,
    scheduler_config: Mapping[str, Any] | None = None,
    variant: str = "Lens",
    dtype: torch.dtype | None = None,
) -> None:
    """Save a whole pipeline as diffusers lays it out, with ``model_index.json`` and a folder per component.

    Components that are not given are left out of both. The folder appears when it is complete, and replaces nothing
    but an earlier export of the same components, or of fewer, with nothing else in it.

    Args:
        folder: where to; made with its parents.
        transformer: as in :func:`save_transformer`.
        vae: an :class:`lensmini.nn.Autoencoder` or a model of diffusers.
        text_encoder: a :class:`lensmini.nn.TextEncoder` or a model of transformers.
        tokenizer: a tokenizer of transformers; the text encoder's own unless given.
        scheduler_config: settings that differ from the released scheduler's.
        variant: ``Lens``, ``Lens-Base`` or ``Lens-Turbo``, kept as ``lens_variant``: it decides steps and guidance.
        dtype: of the transformer's stored tensors; the other components keep theirs.

    Raises:
        CheckpointError: if the folder holds anything else.
        ValueError: if an argument is wrong.

    Example:
        >>> import tempfile
        >>> from lensmini.nn import LensConfig
        >>> config = LensConfig(num_layers=1, num_attention_heads=1, enc_hidden_dim=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_diffusers(folder, transformer=LensTransformer(config), variant="Lens-Turbo")
        ...     sorted(os.listdir(folder))
        ['model_index.json', 'scheduler', 'transformer']
    """
    if variant not in _VARIANTS:
        raise ValueError(f"variant: expected one of {_VARIANTS}, got {variant!r}")
    if tokenizer is None:
        tokenizer = getattr(text_encoder, "tokenizer", None)
    saved = {
        "vae": getattr(vae, "vae", vae),
        "text_encoder": text_encoder
        if hasattr(text_encoder, "save_pretrained")
        else getattr(text_encoder, "model", None),
        "tokenizer": tokenizer,
    }
    for name, given in (("vae", vae), ("text_encoder", text_encoder), ("tokenizer", tokenizer)):
        if given is not None and not hasattr(saved[name], "save_pretrained"):
            raise ValueError(f"{name}: expected something that has save_pretrained, got {type(given).__name__}")
    scheduler = {**_SCHEDULER, **(scheduler_config or {})}
    scheduler_text = _json_text("scheduler_config", scheduler)
    state = _state(transformer, dtype)
    index: dict[str, Any] = {"_class_name": "LensPipeline", **_diffusers_version(), "lens_variant": variant}
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    for name, component in saved.items():
        if component is not None:
            index[name] = ["diffusers" if name == "vae" else "transformers", type(component).__name__]
    index["transformer"] = ["diffusers", _CLASS]

    def write(part: Path) -> None:
        for name in ("transformer", "scheduler"):
            (part / name).mkdir()
        _write_transformer(part / "transformer", transformer, state, dtype, 5 * 10**9)
        _write_text(part / "scheduler" / "scheduler_config.json", scheduler_text)
        for name, component in saved.items():
            if component is not None:
                options: dict[str, Any] = {} if name == "tokenizer" else {"safe_serialization": True}
                if name == "text_encoder" and _is_transformers_model(component):
                    # Otherwise transformers gives unpacked MXFP4 weights the names of packed ones, which nothing can read.
                    options["save_original_format"] = False
                component.save_pretrained(str(part / name), **options)
        _write_text(part / "model_index.json", _json_text("model_index.json", index))

    def may_replace(old: Path) -> bool:
        kept = {path.name for path in old.iterdir() if path.is_dir()} - {*index}
        return _is_exported_pipeline(old) and not kept

    _replace_folder(Path(folder), write, may_replace)


def _is_transformers_model(component: Any) -> bool:
    return any(kind.__module__ == "transformers.modeling_utils" for kind in type(component).__mro__)


def _state(model: LensTransformer, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The parameters, if they are exactly those of the configuration and can be stored."""
    if not isinstance(model, LensTransformer):
        raise ValueError(f"model: expected a LensTransformer, got {type(model).__name__}")
    if dtype not in (None, torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: expected floating point of 16, 32 or 64 bits, got {dtype}")
    state = {name: value.detach() for name, value in model.state_dict().items()}
    with torch.device("meta"):
        expected = {name: value.shape for name, value in LensTransformer(model.config).state_dict().items()}
    wrong = [name for name in {**expected, **state} if name not in state or state[name].shape != expected.get(name)]
    if wrong:
        raise ValueError(f"model: expected the tensors of its configuration, got other {list_names(wrong)}")
    if any(value.is_meta for value in state.values()):
        raise ValueError("model: expected values, got parameters on the meta device")
    return state


def _write_transformer(
    folder: Path, model: LensTransformer, state: Mapping[str, Tensor], dtype: torch.dtype | None, max_shard_bytes: int
) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    total = filled = 0
    for name, value in state.items():
        size = value.numel() * (dtype or value.dtype).itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = value
        filled, total = filled + size, total + size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"{WEIGHTS_NAME}{suffix}.safetensors"
        _write_tensors(folder / file, shard, dtype, {})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_text(folder / (WEIGHTS_NAME + INDEX_SUFFIX), _json_text("index", index))
    _write_text(folder / "config.json", _json_text("config", {"_class_name": _CLASS, **model.config.to_dict()}))


def _write_tensors(
    path: Path, state: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> None:
    stored = {name: value.to(dtype=dtype or value.dtype, device="cpu").contiguous() for name, value in state.items()}
    save_file(stored, path, metadata={"format": "pt", **metadata})
    _sync(path)


def _json_text(name: str, value: Any) -> str:
    try:
        return json.dumps(value, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected what JSON can hold, got {error}") from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _diffusers_version() -> dict[str, str]:
    try:
        return {"_diffusers_version": importlib.metadata.version("diffusers")}
    except importlib.metadata.PackageNotFoundError:
        return {}


def _replace_folder(folder: Path, write: Callable[[Path], None], is_earlier: Callable[[Path], bool]) -> None:
    """Write a folder beside its place and then put it there, so that half a save is never taken for a whole one."""
    folder = folder.resolve()
    exists = folder.exists()
    if exists and not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder or nothing, found a file")
    if exists and any(folder.iterdir()) and not is_earlier(folder):
        names = list_names(sorted(os.listdir(folder)))
        raise CheckpointError(f"{folder}: expected an empty folder or an earlier save of this kind, found {names}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part, old = (folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{kind}") for kind in ("part", "old"))
    try:
        part.mkdir()
        write(part)
        for path in part.rglob("*"):
            _sync(path)
        _sync(part)
        if exists:
            folder.rename(old)
        try:
            part.rename(folder)
        except BaseException:
            if exists:
                old.rename(folder)
            raise
        _sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def _only(folder: Path, patterns: Iterable[str]) -> bool:
    return all(any(fnmatch(path.name, pattern) for pattern in patterns) for path in folder.iterdir())


def _is_saved_transformer(folder: Path) -> bool:
    weights = (f"{WEIGHTS_NAME}*.safetensors", WEIGHTS_NAME + INDEX_SUFFIX)
    return _only(folder, ("config.json", *weights)) and _class_name(folder / "config.json") == _CLASS


def _is_exported_pipeline(folder: Path) -> bool:
    names = ("model_index.json", "transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    if not _only(folder, names) or _class_name(folder / "model_index.json") != "LensPipeline":
        return False
    # Only our exports have it: a download, or files that somebody put beside the weights, are not ours to remove.
    files = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
    parts = [path for path in folder.iterdir() if path.is_dir()]
    return "lens_variant" in read_json(folder / "model_index.json") and all(
        _only(part, files[:2] if part.name in ("transformer", "vae", "text_encoder", "scheduler") else files)
        for part in parts
    )


def _class_name(path: Path) -> Any:
    try:
        return read_json(path).get("_class_name")
    except CheckpointError:
        return None


def _sync(path: Path) -> None:
    """Make what was written there last through a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
