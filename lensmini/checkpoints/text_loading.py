"""Load the language model behind the text features: only what they need, packed or unpacked, and offline too.

Axes: k head width.
"""

import copy
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lensmini.checkpoints.files import CheckpointError, list_names, read_json
from lensmini.checkpoints.text_config import check_raw, check_size
from lensmini.checkpoints.text_folders import TEXT_FILES, fetch_files, find_model_folder
from lensmini.nn.text_encoder import TextEncoder

__all__ = ["load_text_encoder", "packed_obstacle"]

Quantization = Literal["auto", "packed", "dequantize"]
KERNELS = "kernels-community/gpt-oss-triton-kernels"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_text_encoder(
    path_or_repo: str | Path,
    *,
    tokenizer: Any = None,
    subfolder: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    quantization: Quantization = "auto",
    layers: Sequence[int] = (5, 11, 17, 23),
    max_length: int = 512,
    date: str = "2026-05-23",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> TextEncoder:
    """Load a causal language model of transformers (GPT-OSS-20B for Lens) as a frozen :class:`TextEncoder`.

    Only safetensors are read and no code of the checkpoint is run. Layers behind the last one wanted, and the output
    head, are not loaded. MXFP4 experts stay packed (13 GB in place of 42 GB for GPT-OSS-20B) where transformers can
    compute with them: a GPU of compute capability 7.5, Triton, ``accelerate``, and the ``kernels`` package with its
    kernels from the Hub or its cache.

    Args:
        path_or_repo: folder with ``config.json`` and weights, pipeline folder (its ``text_encoder`` is used), or Hub
            repository. An existing folder wins over a repository of that name.
        tokenizer: a tokenizer, or a folder or repository with one; by default the folder's own, else the ``tokenizer``
            folder beside it. False for none: then only :meth:`TextEncoder.encode_tokens` works.
        subfolder: folder inside ``path_or_repo``, ``"text_encoder"`` in a pipeline.
        dtype: of weights and features; packed experts stay 4-bit.
        device: where to put the model, directly if ``accelerate`` is installed.
        quantization: for MXFP4 checkpoints. ``"auto"`` keeps them packed where that works and otherwise unpacks with
            a warning that says why; ``"packed"`` insists; ``"dequantize"`` always unpacks.
        layers: as :class:`TextEncoder`.
        max_length: as :class:`TextEncoder`.
        date: as :class:`TextEncoder`.
        revision: branch, tag or commit of the repository.
        cache_dir: Hub cache to use.
        local_files_only: never ask the network; ``HF_HUB_OFFLINE=1`` does the same for the whole process.

    Returns:
        The encoder, frozen, in evaluation mode. Deleting it frees the model's memory.

    Raises:
        CheckpointError: naming the checkpoint and what is wrong: nothing there, no safetensors, weights that are
            missing, unexpected or mis-shaped, another quantisation, no tokenizer, position scaling that got lost, or,
            with ``"packed"``, what is missing for it.
        ValueError: if ``layers`` are not distinct layers of the model, or another argument is wrong.

    Example:
        >>> import tempfile, transformers
        >>> sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        >>> config = transformers.LlamaConfig(num_hidden_layers=3, **sizes)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     transformers.LlamaForCausalLM(config).save_pretrained(folder)
        ...     encoder = load_text_encoder(folder, tokenizer=False, layers=(0, 1))
        >>> len(encoder.model.layers), encoder.layers
        (2, (0, 1))
    """
    from transformers import AutoConfig

    if quantization not in get_args(Quantization):
        raise ValueError(f"quantization: expected one of {', '.join(get_args(Quantization))}, got {quantization!r}")
    device = torch.device(device)
    hub: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": local_files_only}
    name = "/".join(filter(None, [str(path_or_repo), subfolder]))
    folder = find_model_folder(path_or_repo, subfolder, {**hub, "revision": revision})
    raw = read_json(folder / "config.json")
    check_raw(raw, name, layers)
    with _one_error(name, "a configuration that transformers knows"):
        config = AutoConfig.from_pretrained(folder, **LOCAL)
    num_layers = _text_config(config).num_hidden_layers
    if not layers or len(set(layers)) != len(layers) or any(not 0 <= layer < num_layers for layer in layers):
        raise ValueError(f"layers: expected distinct layers in 0..{num_layers - 1}, got {tuple(layers)}")
    if tokenizer is None or isinstance(tokenizer, str | Path):
        tokenizer = _load_tokenizer(folder, tokenizer, name, hub)
    packed = _choose_packed(raw.get("quantization_config"), quantization, device, local_files_only, name)
    trimmed = _trim(config, max(layers) + 1)
    with _one_error(name, "a configuration that transformers can build"):
        check_size(folder, trimmed, name)
    model = None
    if packed:
        try:
            model = _load_model(folder, trimmed, dtype, device, num_layers, name, dequantize=False)
        except Exception as error:
            cause = str(error).strip().partition("\n")[0]
            if quantization == "packed":
                raise CheckpointError(f"{name}: expected to keep MXFP4 packed, but {cause}") from error
            _warn_unpacked(name, cause)
    if model is None:
        mxfp4 = raw.get("quantization_config") is not None
        model = _load_model(folder, trimmed, dtype, device, num_layers, name, dequantize=True if mxfp4 else None)
    encoder = TextEncoder(model, tokenizer or None, layers=layers, max_length=max_length, date=date)
    _check_positions(model, raw, name)
    return encoder


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True)


def _trim(config: Any, num_layers: int) -> Any:
    """The same configuration with the first ``num_layers`` layers only."""
    config = copy.deepcopy(config)
    text = _text_config(config)
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers and "layer" in key:
            setattr(text, key, value[:num_layers])
    text.num_hidden_layers = num_layers
    return config


def _load_tokenizer(folder: Path, tokenizer: str | Path | None, name: str, hub: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    places = [folder, Path(os.path.abspath(folder)).parent / "tokenizer"]
    if tokenizer is not None:
        given = Path(tokenizer).expanduser()
        places = [given if given.is_dir() else fetch_files(tokenizer, TEXT_FILES, hub, ignore=["*/*"])]
    found = [place for place in places if any((place / file).exists() for file in TOKENIZER_FILES)]
    if not found:
        looked = " or ".join(map(str, places))
        raise CheckpointError(
            f"{name}: expected a tokenizer, found none of {', '.join(TOKENIZER_FILES)} in {looked}; "
            "pass tokenizer=, or False to do without"
        )
    with _one_error(str(found[0]), "a tokenizer that transformers know"):
        return AutoTokenizer.from_pretrained(found[0], **LOCAL)


def _choose_packed(config: Any, quantization: Quantization, device: torch.device, offline: bool, name: str) -> bool:
    method = config.get("quant_method") if isinstance(config, dict) else config
    if method not in (None, "mxfp4"):
        raise CheckpointError(f"{name}: expected no quantisation or mxfp4, found {method!r}")
    if method is None or quantization == "dequantize":
        if quantization == "packed":
            raise CheckpointError(f"{name}: expected MXFP4 weights to keep packed, found none that are quantised")
        return False
    missing = packed_obstacle(device, offline=offline)
    if missing and quantization == "packed":
        raise CheckpointError(f"{name}: expected to keep MXFP4 packed, but {missing}")
    if missing:
        _warn_unpacked(name, missing)
    return missing is None


def packed_obstacle(device: torch.device, *, offline: bool = False) -> str | None:
    """Why transformers cannot compute with packed MXFP4 here, or None if nothing is known to be missing.

    Args:
        device: where the model would be.
        offline: never ask the network for the kernels.

    Example:
        >>> packed_obstacle(torch.device("cpu"))
        'the device is cpu, and it takes a GPU'
    """
    from huggingface_hub import constants, snapshot_download
    from transformers.utils.import_utils import is_accelerate_available, is_kernels_available, is_triton_available

    if device.type not in ("cuda", "xpu"):
        return f"the device is {device}, and it takes a GPU"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is available"
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (7, 5):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and it takes 7.5"
    if not is_triton_available("3.4.0" if device.type == "cuda" else "3.5.0"):
        return "Triton 3.4 (3.5 on XPU) is not installed: pip install -U triton"
    if not is_accelerate_available():
        return "accelerate is not installed: pip install accelerate"
    if not is_kernels_available():
        return "no kernels package of a version that transformers accept is installed: pip install kernels"
    if offline or constants.HF_HUB_OFFLINE:
        try:
            snapshot_download(KERNELS, local_files_only=True)
        except Exception:
            return f"offline, and {KERNELS} is not in the Hub cache"
    return None


def _warn_unpacked(name: str, cause: str) -> None:
    warnings.warn(
        f"{name}: MXFP4 experts are unpacked, which takes about four times their memory: {cause}", stacklevel=4
    )


def _load_model(
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    full: int,
    name: str,
    *,
    dequantize: bool | None,
) -> Any:
    from transformers import AutoModel
    from transformers.utils.import_utils import is_accelerate_available
    from transformers.utils.quantization_config import Mxfp4Config

    options: dict[str, Any] = {
        **LOCAL,
        "dtype": dtype,
        "use_safetensors": True,
        "output_loading_info": True,
        "config": copy.deepcopy(config),
    }
    if dequantize is not None:
        options["quantization_config"] = Mxfp4Config(dequantize=dequantize)
    if is_accelerate_available() and device.type != "cpu":
        options["device_map"] = {"": device}
    with _one_error(name, "weights that fit the configuration"), _quiet_report():
        model, report = AutoModel.from_pretrained(folder, **options)
    kept = _text_config(config).num_hidden_layers
    dropped = tuple(f"layers.{index}." for index in range(kept, full))
    unexpected = [key for key in report["unexpected_keys"] if not _is_dropped(key, dropped)]
    problems = {"missing": report["missing_keys"], "mis-shaped": report["mismatched_keys"], "unexpected": unexpected}
    texts = [f"{kind} {list_names(sorted(map(str, keys)))}" for kind, keys in problems.items() if keys]
    if texts:
        raise CheckpointError(f"{name}: expected weights that fit {type(model).__name__}, found {'; '.join(texts)}")
    if dequantize is False and model.hf_quantizer.quantization_config.dequantize:
        raise CheckpointError(f"{name}: expected to keep MXFP4 packed, but transformers unpacked it on {device}")
    return model.to(device)


def _is_dropped(key: str, dropped: tuple[str, ...]) -> bool:
    return key.startswith("lm_head.") or any(f".{key}".find(f".{layer}") >= 0 for layer in dropped)


@contextmanager
def _one_error(name: str, expected: str) -> Iterator[None]:
    """Whatever goes wrong in other packages becomes one sentence."""
    try:
        yield
    except (CheckpointError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:600] or type(error).__name__
        raise CheckpointError(f"{name}: expected {expected}, but {text}") from error


@contextmanager
def _quiet_report() -> Iterator[None]:
    """Without the table of keys that were left out on purpose; what matters in it is raised instead."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _check_positions(model: Any, raw: Mapping[str, Any], name: str) -> None:
    """That the position scaling of the checkpoint is on; transformers 5 renamed the key, and old code ignores it."""
    text = raw.get("text_config", raw)
    scaling = text.get("rope_parameters") or text.get("rope_scaling")
    if isinstance(scaling, dict):
        kind = scaling.get("rope_type", scaling.get("type"))
    else:
        kind = "yarn" if text.get("model_type") == "gpt_oss" else None
    if kind != "yarn":
        return
    tables = [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]
    config = _text_config(model.config)
    parameters = config.rope_parameters
    for table in tables:
        frequencies = table.inv_freq.double().cpu()
        theta = float(parameters.get("rope_theta", 10000.0))
        exponents = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
        plain = torch.allclose(frequencies, theta**-exponents, rtol=1e-4)
        if parameters.get("rope_type") != kind or (float(parameters.get("factor", 1.0)) > 1.0 and plain):
            raise CheckpointError(f"{name}: expected {kind} position scaling to be on, found plain rotary positions")
    if not tables:
        raise CheckpointError(
            f"{name}: expected {kind} position scaling, found no rotary table in {type(model).__name__}"
        )
