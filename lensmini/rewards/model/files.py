"""A learned reward on disk: weights in safetensors, sizes and the features' name in JSON.

No axes: tensors by name.
"""

import hashlib
import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lensmini.rewards.model.features import FrozenFeatures
from lensmini.rewards.model.head import RewardModelConfig
from lensmini.rewards.model.predictor import RubricRewardModel

__all__ = ["load_reward_model", "save_reward_model"]

WEIGHTS, DESCRIPTION = "reward_model.safetensors", "reward_model.json"
FORMAT, MAX_JSON_BYTES = 1, 2**16


def save_reward_model(model: RubricRewardModel, directory: str | Path) -> None:
    """Write a head, its calibration, sizes, and what features it belongs to; the features themselves stay out.

    The description is written last and holds the weights' hash, so that half a save is not mistaken for one.

    Args:
        model: to be saved.
        directory: is made if it is missing.

    Example:
        >>> from lensmini.rewards.model import FrozenFeatures
        >>> features = FrozenFeatures(image=torch.clone, text=None, identity="pixels")
        >>> model = RubricRewardModel(features, RewardModelConfig(image_dim=3, text_dim=4, width=8))
        >>> folder = getfixture("tmp_path")
        >>> save_reward_model(model, folder)
        >>> load_reward_model(folder, features).revision == model.revision
        True
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    described = {
        "format": FORMAT,
        "config": asdict(model.config),
        "features": model.features.identity,
        "calibration": model.calibration.tolist(),
        "revision": model.revision,
    }
    (directory / DESCRIPTION).unlink(missing_ok=True)
    save_file(tensors, directory / f"{WEIGHTS}.new")
    os.replace(directory / f"{WEIGHTS}.new", directory / WEIGHTS)
    described["sha256"] = hashlib.sha256((directory / WEIGHTS).read_bytes()).hexdigest()
    (directory / f"{DESCRIPTION}.new").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    os.replace(directory / f"{DESCRIPTION}.new", directory / DESCRIPTION)


def load_reward_model(
    directory: str | Path, features: FrozenFeatures, *, device: torch.device | str = "cpu"
) -> RubricRewardModel:
    """Read what :func:`save_reward_model` wrote, and refuse anything else.

    Args:
        directory: of the two files.
        features: those of the training, by their identity.
        device: of the head.

    Returns:
        The model in evaluation mode, its answers bit-equal to those that were saved.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the features are others, or the files are broken, of another format or hold numbers that are not
            finite.

    Example:
        >>> load_reward_model(getfixture("tmp_path"), None)
        Traceback (most recent call last):
        ...
        FileNotFoundError: ...
    """
    directory = Path(directory)
    with (directory / DESCRIPTION).open("rb") as stream:
        text = stream.read(MAX_JSON_BYTES + 1)
    found = _read_description(directory / DESCRIPTION, text)
    if found["features"] != features.identity:
        raise ValueError(
            f"features: expected those that the reward was trained on, {found['features']!r}, got {features.identity!r}"
        )
    content = (directory / WEIGHTS).read_bytes()
    if hashlib.sha256(content).hexdigest() != found["sha256"]:
        raise ValueError(f"{directory / WEIGHTS}: expected the weights that the description names, got others")
    try:
        config = RewardModelConfig(**found["config"])
        tensors = load_file(directory / WEIGHTS)
    except (TypeError, SafetensorError) as error:
        raise ValueError(f"{directory}: expected a saved reward model, got {error}") from None
    model = RubricRewardModel(features, config)
    own = model.state_dict()
    misfits = sorted({*own} ^ {*tensors} | {n for n in {*own} & {*tensors} if own[n].shape != tensors[n].shape})
    misfits += sorted(
        name for name, value in tensors.items() if not value.is_floating_point() or not bool(value.isfinite().all())
    )
    if misfits:
        raise ValueError(
            f"{directory / WEIGHTS}: expected finite weights of the description's sizes, not so: {misfits[:8]}"
        )
    model.to(tensors["calibration"].dtype).load_state_dict(tensors)
    return model.to(device).eval()


def _read_description(path: Path, text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text) if len(text) <= MAX_JSON_BYTES else None
    except (ValueError, RecursionError):
        found = None
    names = {field.name for field in fields(RewardModelConfig)}
    config = found.get("config") if isinstance(found, dict) else None
    if (
        not isinstance(found, dict)
        or found.get("format") != FORMAT
        or not isinstance(config, dict)
        or {*config} != names
        or not all(type(value) is (bool if name == "use_prompt" else int) for name, value in config.items())
        or not all(isinstance(found.get(name), str) for name in ("features", "sha256"))
    ):
        raise ValueError(f"{path}: expected the description of a reward model of format {FORMAT}, got something else")
    return found
