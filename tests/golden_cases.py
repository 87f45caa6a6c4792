"""Read the golden cases: tensors and configuration of one case by name (their README explains every key)."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of NAME.safetensors (none if the case is json only) and the content of NAME.json, fresh each time."""
    tensors, text = _read(name)
    return {key: tensor.clone() for key, tensor in tensors.items()}, json.loads(text)


@cache
def _read(name: str) -> tuple[dict[str, Tensor], str]:
    path = GOLDEN / f"{name}.safetensors"
    return load_file(path) if path.exists() else {}, path.with_suffix(".json").read_text()
