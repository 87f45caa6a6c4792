"""LoRA adapters on disk: the keys of diffusers, peft, ComfyUI and kohya, read strictly into one form.

Axes: r rank, i and o input and output width of a linear layer.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lensmini.checkpoints.files import CheckpointError, parse_json, read_header, read_json, replace_file
from lensmini.nn.config import LensConfig
from lensmini.nn.transformer import LensTransformer
from lensmini.shapes import check_shape

__all__ = ["LoRA", "LoRALayer", "load_lora", "save_lora"]

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_")
HALVES = {"lora_A": "down", "lora_down": "down", "lora.down": "down", "lora_B": "up", "lora_up": "up", "lora.up": "up"}
KEY = re.compile(
    r"(?P<module>.+?)\.(?:(?P<half>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.(?P<adapter>\w+))?\.weight"
    r"|(?P<alpha>alpha))"
)
OTHER_METHODS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "lora_mid": "a convolution",
    "lora_embedding": "an embedding",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "lora_B.bias": "a bias",
}
PLAIN_INIT = ("gaussian", "orthogonal", "eva")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ALPHA_DTYPES = (*DTYPES, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MAX_NAMED = 8


class LoRALayer(NamedTuple):
    """The low-rank update of one linear layer, ``alpha / r * up @ down``."""

    down: Tensor
    """``[r, i]``: A in peft."""
    up: Tensor
    """``[o, r]``: B in peft."""
    alpha: float
    """The update's scale times r."""


@dataclass(frozen=True, slots=True, eq=False)
class LoRA:
    """An adapter: low-rank updates of linear layers, by their module path in :class:`LensTransformer`.

    ``W x`` becomes ``W x + alpha / r * B A x`` (arXiv 2106.09685, section 4.1). A rank-stabilised adapter, whose scale
    is ``alpha / sqrt(r)`` (arXiv 2312.03732), is held with ``alpha * sqrt(r)``: the same function in the one form.

    Args:
        layers: for each path a :class:`LoRALayer`, or a tuple (down ``[r, i]``, up ``[o, r]``, alpha).

    Raises:
        ValueError: if there is no layer, a shape or rank does not fit, a dtype is not floating, or a value is not finite.

    Example:
        >>> lora = LoRA({"img_in": (torch.ones(2, 16), torch.ones(32, 2), 4.0)})
        >>> lora.layers["img_in"].up.shape, lora.scaling("img_in")
        (torch.Size([32, 2]), 2.0)
    """

    layers: Mapping[str, LoRALayer]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers: expected at least one low-rank update, got none")
        object.__setattr__(self, "layers", {path: LoRALayer(*layer) for path, layer in self.layers.items()})
        for path, (down, up, alpha) in self.layers.items():
            sizes = check_shape(f"{path}: down", down, "r i")
            check_shape(f"{path}: up", up, "o r", r=sizes["r"])
            if not sizes["r"] or not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise ValueError(f"{path}: expected a rank of at least 1 and a finite alpha, got {sizes['r']}, {alpha}")
            for name, half in {"down": down, "up": up}.items():
                if half.dtype not in DTYPES:
                    raise ValueError(
                        f"{path}: expected {name} in float16, bfloat16, float32 or float64, got {half.dtype}"
                    )
                if not bool(half.isfinite().all()):
                    raise ValueError(f"{path}: expected finite numbers in {name}, got others")

    def scaling(self, path: str) -> float:
        """``alpha / r`` of one layer."""
        layer = self.layers[path]
        return layer.alpha / len(layer.down)


def load_lora(path: str | Path) -> LoRA:
    """Read an adapter from a safetensors file, or from a folder that peft or diffusers wrote.

    Keys may be diffusers' (``transformer.PATH.lora_A.weight``), peft's (``base_model.model.PATH...``), ComfyUI's
    (``diffusion_model.PATH...``), bare, or kohya's (``lora_unet_`` and the path with underscores, ``lora_down`` and
    ``lora_up``), with an adapter's name inserted (``lora_A.default.weight``) or not. Alpha is the ``.alpha`` tensor
    beside a layer, else what peft's ``adapter_config.json`` or diffusers' metadata say, else r. Patterns there are
    module names, not regular expressions.

    Args:
        path: a ``.safetensors`` file, or a folder with ``adapter_model.safetensors`` and ``adapter_config.json`` (peft)
            or ``pytorch_lora_weights.safetensors`` (diffusers).

    Returns:
        The adapter on the CPU, in the stored dtypes.

    Raises:
        CheckpointError: naming the file and all that is wrong with it: no safetensors, unknown modules, missing halves,
            ranks that disagree, DoRA, convolutions, or settings that are more than a low-rank update.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_lora(LoRA({"img_in": (torch.ones(2, 16), torch.ones(32, 2), 4.0)}), f"{folder}/a.safetensors")
        ...     load_lora(f"{folder}/a.safetensors").layers["img_in"].alpha
        4.0
    """
    file, settings = Path(path), None
    if file.is_dir():
        names = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
        found = [file / name for name in names if (file / name).is_file()]
        if len(found) != 1:
            raise CheckpointError(
                f"{file}: expected a folder with one of {', '.join(names)}, found {len(found)} of them"
            )
        if found[0].name == names[0]:
            settings = read_json(file / "adapter_config.json")
        file = found[0]
    tensors, metadata = _read_tensors(file)
    if settings is None and "lora_adapter_metadata" in metadata:
        text = metadata["lora_adapter_metadata"]
        packed = parse_json(text, f"{file}: lora_adapter_metadata")
        settings = {key.removeprefix("transformer."): value for key, value in packed.items()}
    try:
        return _assemble(tensors, settings or {})
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def save_lora(lora: LoRA, path: str | Path, *, form: Literal["diffusers", "peft"] = "diffusers") -> None:
    """Write an adapter so that diffusers or peft read it, alphas included.

    Args:
        lora: the adapter.
        path: for diffusers a ``.safetensors`` file, or a folder for ``pytorch_lora_weights.safetensors``; for peft a
            folder, which gets ``adapter_model.safetensors`` and ``adapter_config.json``. Files are replaced whole.
        form: whose keys.

    Raises:
        ValueError: for an unknown form, or a file name where a folder is meant.

    Example:
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_lora(LoRA({"img_in": (torch.ones(2, 16), torch.ones(32, 2), 4.0)}), folder, form="peft")
        ...     sorted(os.listdir(folder))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    from safetensors.torch import save_file

    path = Path(path)
    ranks = {name: len(layer.down) for name, layer in lora.layers.items()}
    alphas = {name: layer.alpha for name, layer in lora.layers.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    settings: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(lora.layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }
    is_file = path.suffix == ".safetensors"
    if form == "diffusers":
        prefix, file = "transformer.", path if is_file else path / "pytorch_lora_weights.safetensors"
        packed = {f"transformer.{key}": value for key, value in settings.items()}
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(packed, indent=2, sort_keys=True)}
    elif form == "peft":
        if is_file:
            raise ValueError(f"path: expected a folder for form='peft', got {path}")
        prefix, file, metadata = "base_model.model.", path / "adapter_model.safetensors", {"format": "pt"}
    else:
        raise ValueError(f"form: expected 'diffusers' or 'peft', got {form!r}")
    tensors: dict[str, Tensor] = {}
    for name, (down, up, _) in lora.layers.items():
        # Clones, because two layers may share one tensor and safetensors refuses that.
        tensors[f"{prefix}{name}.lora_A.weight"] = down.detach().cpu().contiguous().clone()
        tensors[f"{prefix}{name}.lora_B.weight"] = up.detach().cpu().contiguous().clone()
    file.parent.mkdir(parents=True, exist_ok=True)
    if form == "peft":
        plain = {"task_type": None, "base_model_name_or_path": None, "fan_in_fan_out": False, "inference_mode": True}
        text = json.dumps({"peft_type": "LORA", **plain, **settings}, indent=2, sort_keys=True)
        replace_file(file.parent / "adapter_config.json", lambda target: target.write_text(text, encoding="utf-8"))
    replace_file(file, lambda target: save_file(tensors, target, metadata=metadata))


def _assemble(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> LoRA:
    parts, problems, adapters = {}, [], set()
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        other = next((kind for word, kind in OTHER_METHODS.items() if word in key), None)
        module = _module_path(match["module"]) if match else None
        if other or tensor.ndim > 2:
            problems.append(f"{key} belongs to {other or 'a convolution'}")
        elif not match or module is None:
            problems.append(f"{key} names no linear layer of a LensTransformer")
        else:
            part = "alpha" if match["alpha"] else HALVES[match["half"]]
            if part in parts.setdefault(module, {}):
                problems.append(f"{key} is a second {part} of {module}")
            parts[module][part] = tensor
            adapters |= {match["adapter"]} - {None}
    if len(adapters) > 1:
        problems.append(f"there are {len(adapters)} adapters: {', '.join(sorted(adapters))}")
    for module, part in parts.items():
        problems += [f"{module} has no {half}" for half in ("down", "up") if half not in part]
        if "alpha" in part and (part["alpha"].numel() != 1 or part["alpha"].dtype not in ALPHA_DTYPES):
            problems.append(f"{module} has an alpha that is not one number")
    problems += _setting_problems(settings)
    ranks = {name: len(part["down"]) for name, part in parts.items() if "down" in part and part["down"].ndim}
    if not problems:
        expected = {name: _setting(settings, "r", "rank_pattern", name) for name in parts}
        wrong = {name: rank for name, rank in ranks.items() if expected[name] not in (None, rank)}
        problems += [f"{name} has rank {rank}, its settings say {expected[name]}" for name, rank in wrong.items()]
    if problems:
        more = f" and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        raise ValueError(f"expected a LoRA of linear layers, but {'; '.join(problems[:MAX_NAMED])}{more}")
    layers = {}
    for name, part in parts.items():
        alpha = float(part["alpha"]) if "alpha" in part else _setting(settings, "lora_alpha", "alpha_pattern", name)
        alpha = ranks[name] if alpha is None else alpha
        layers[name] = LoRALayer(
            part["down"], part["up"], alpha * math.sqrt(ranks[name]) if settings.get("use_rslora") else float(alpha)
        )
    return LoRA(layers)


@cache
def _linear_names() -> tuple[dict[str, str], frozenset[str]]:
    """All linear layers of a one-block model: from underscored to dotted names, and the dotted ones."""
    with torch.device("meta"):
        model = LensTransformer(LensConfig(num_layers=1))
    dotted = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {name.replace(".", "_"): name for name in dotted}, frozenset(dotted)


def _module_path(name: str) -> str | None:
    underscored, dotted = _linear_names()
    kohya = next((prefix for prefix in KOHYA_PREFIXES if name.startswith(prefix)), None)
    if kohya is None:
        while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
            name = name.removeprefix(prefix)
        block = re.fullmatch(r"transformer_blocks\.(0|[1-9]\d{0,3})\.(.+)", name, re.ASCII)
        return name if (f"transformer_blocks.0.{block[2]}" if block else name) in dotted else None
    name = name.removeprefix(kohya)
    block = re.fullmatch(r"transformer_blocks_(0|[1-9]\d{0,3})_(.+)", name, re.ASCII)
    path = underscored.get(f"transformer_blocks_0_{block[2]}" if block else name)
    return path.replace(".0.", f".{block[1]}.", 1) if path and block else path


def _setting_problems(settings: Mapping[str, Any]) -> list[str]:
    problems = []
    if str(settings.get("peft_type") or "LORA").upper() != "LORA":
        problems.append(f"its settings have peft_type={settings['peft_type']!r}")
    for name in ("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "modules_to_save", "layer_replication"):
        if settings.get(name):
            problems.append(f"its settings have {name}={settings[name]!r}")
    if settings.get("bias") not in (None, "none"):
        problems.append(f"its settings have bias={settings['bias']!r}")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start not in PLAIN_INIT:
        problems.append(f"its settings have init_lora_weights={start!r}, which changes the base weights")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings.get(name) or {}, dict):
            problems.append(f"its {name} is not an object")
            continue
        for pattern in settings.get(name) or {}:
            if not re.fullmatch(r"\^?[\w.\\]+\$?", pattern, re.ASCII):
                problems.append(f"its {name} has the pattern {pattern!r}, not a module name")
    numbers = [settings.get("r"), settings.get("lora_alpha")]
    numbers += [
        n for key in ("rank_pattern", "alpha_pattern") if isinstance(p := settings.get(key), dict) for n in p.values()
    ]
    if any(n is not None and (isinstance(n, bool) or not isinstance(n, int | float)) for n in numbers):
        problems.append("its ranks and alphas are not all numbers")
    return problems


def _setting(settings: Mapping[str, Any], name: str, patterns: str, module: str) -> float | None:
    """A layer's setting as peft finds it: the first pattern that is the end of its path, else the common one."""
    for pattern, value in (settings.get(patterns) or {}).items():
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\", "")
        for prefix in PREFIXES:
            plain = plain.removeprefix(prefix)
        if module == plain or (not pattern.startswith("^") and module.endswith("." + plain)):
            return value
    return settings.get(name)


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file}: expected a .safetensors file; no other kind is read")
    metadata = read_header(file).metadata
    try:
        with safe_open(file, framework="pt") as reader:
            # Clones, so that the file may change or go while the adapter is in use.
            return {key: reader.get_tensor(key).clone() for key in reader.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, AttributeError) as error:
        raise CheckpointError(f"{file}: expected tensors of a known dtype, found {error}") from error
