"""Text features of prompts on disk, so that a prompt is encoded once and later runs need no language model.

Axes: l text tokens of a prompt, k text layers, e width of the language model.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lensmini.checkpoints.files import CheckpointError, parse_json, replace_file
from lensmini.nn.text_encoder import TextEncoder
from lensmini.shapes import check_shape

__all__ = ["PromptCache", "encoder_fingerprint"]

PROBES = ("", "A red cube left of 2 blue circles, 0.5 m apart; \u00e9\u4e2d\U0001f600")
SAMPLES = 64
# Where a configuration came from and how much of the model is there, but not what the features are.
NOT_IDENTITY = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
NOT_IDENTITY += ("num_hidden_layers", "quantization_config", "tie_word_embeddings", "_attn_implementation")


class PromptCache:
    """A folder with one safetensors file per prompt: ``[l, k, e]`` features exactly as the encoder gave them.

    A file's name is the SHA-256 of the encoder's fingerprint and the prompt, so features of several encoders can share
    a folder and never mix. Files appear whole or not at all, also with several processes. What a damaged file held is
    a miss with a warning, and is written anew.

    Args:
        folder: is made when the first features are written.
        fingerprint: :func:`encoder_fingerprint` of the encoder whose features are meant. By default that of the first
            encoder seen by :meth:`encode`; until then, the one that the folder has features of.

    Raises:
        ValueError: if ``fingerprint`` is not 64 hexadecimal digits.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = PromptCache(folder, fingerprint="0" * 64)
        ...     cache.put("a red cube", torch.zeros(7, 4, 8))
        ...     cache.get("a red cube").shape, cache.get("a blue cube")
        (torch.Size([7, 4, 8]), None)
    """

    def __init__(self, folder: str | Path, *, fingerprint: str | None = None) -> None:
        if fingerprint is not None and (len(fingerprint) != 64 or set(fingerprint) - set("0123456789abcdef")):
            raise ValueError(f"fingerprint: expected 64 hexadecimal digits, got {fingerprint!r}")
        self.folder = Path(folder)
        self.fingerprint = fingerprint

    def path(self, prompt: str) -> Path:
        """The file of one prompt, there or not.

        Raises:
            ValueError: if the encoder is unknown: none was seen, and the folder has features of none or of several.
        """
        fingerprint = self.fingerprint or self._only_fingerprint()
        text = f"{fingerprint}\n".encode() + prompt.encode("utf-8", "surrogatepass")
        return self.folder / f"{hashlib.sha256(text).hexdigest()}.safetensors"

    def get(self, prompt: str) -> Tensor | None:
        """The features ``[l, k, e]`` of a prompt on the CPU, or None if they are not there or damaged (a warning).

        Raises:
            ValueError: as :meth:`path`, if the folder has features of several encoders.
        """
        from safetensors.torch import load

        if self.fingerprint is None and not self._fingerprints():
            return None
        path = self.path(prompt)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            # From the bytes at hand: the file may be another one by now.
            header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], "header")
            features = load(data)["features"]
            check_shape("features", features, "l k e")
            if header["__metadata__"]["sha256"] != _digest(features):
                raise CheckpointError("another checksum than was written")
        except Exception as error:
            warnings.warn(f"{path}: expected cached features, found a damaged file, left out: {error}", stacklevel=2)
            return None
        return features

    def put(self, prompt: str, features: Tensor) -> None:
        """Write the features of a prompt in one step; they replace what was there.

        Args:
            prompt: the text.
            features: ``[l, k, e]`` floating point, valid tokens only.

        Raises:
            ValueError: if the shape or dtype is wrong, or as :meth:`path`.
        """
        from safetensors.torch import save

        check_shape("features", features, "l k e")
        if not features.is_floating_point():
            raise ValueError(f"features: expected floating point, got {features.dtype}")
        path = self.path(prompt)
        # A clone, because safetensors would write all of a larger tensor of which this is a view.
        values = features.detach().cpu().contiguous().clone()
        self.folder.mkdir(parents=True, exist_ok=True)
        data = save({"features": values}, {"format": "pt", "sha256": _digest(values)})
        replace_file(path, lambda part: part.write_bytes(data))
        marker = self.folder / f"encoder-{self.fingerprint or self._only_fingerprint()}"
        if not marker.exists():
            replace_file(marker, lambda part: part.write_bytes(b""))

    def encode(self, encoder: TextEncoder | None, prompts: Sequence[str], *, batch_size: int = 16) -> list[Tensor]:
        """Features of prompts, of which only those that are not there are encoded, each once.

        Args:
            encoder: may be None if all are there.
            prompts: b texts, at least one.
            batch_size: prompts per call of the encoder.

        Returns:
            For each prompt ``[l_i, k, e]`` on the CPU, in order, the same whether from the encoder or from the disk.

        Raises:
            ValueError: naming the prompts that are not there if there is no encoder, if the encoder is another one than
                this cache is for, or if ``prompts`` is no sequence of strings or ``batch_size`` not positive.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts: expected a non-empty sequence of strings, got {prompts!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if encoder is not None:
            fingerprint = encoder_fingerprint(encoder)
            if self.fingerprint not in (None, fingerprint):
                raise ValueError(
                    f"encoder: expected the one with fingerprint {self.fingerprint[:12]}..., got {fingerprint[:12]}...; "
                    "another encoder takes another PromptCache"
                )
            self.fingerprint = fingerprint
        found = {prompt: self.get(prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, features in found.items() if features is None]
        if missing and encoder is None:
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise ValueError(f"encoder: expected one for prompts that are not cached, {missing[:8]}{more}, got None")
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            layers, mask = encoder(batch)  # pyright: ignore[reportOptionalCall]
            for index, prompt in enumerate(batch):
                valid = mask[index]
                features = torch.stack([layer[index][valid] for layer in layers], dim=1).cpu()
                self.put(prompt, features)
                found[prompt] = features
        return [features for prompt in prompts if (features := found[prompt]) is not None]

    def _fingerprints(self) -> list[str]:
        return sorted(file.name.removeprefix("encoder-") for file in self.folder.glob("encoder-" + "?" * 64))

    def _only_fingerprint(self) -> str:
        known = self._fingerprints()
        if len(known) != 1:
            raise ValueError(
                f"fingerprint: expected one to tell encoders apart, or a folder with features of one encoder, got None "
                f"and {len(known)} encoders in {self.folder}"
            )
        return known[0]


@torch.no_grad()
def encoder_fingerprint(encoder: TextEncoder) -> str:
    """What identifies an encoder's features: model, weights, layers, limits, template and date, as 64 hex digits.

    It reads the configuration, 64 numbers of every parameter that the features depend on, and the rendering and
    tokens of two probe prompts, which takes well under a second. It is the same in every process, for every device, and
    whether unused layers are loaded or not. A change of a weight that is not among those read goes unseen.

    Args:
        encoder: with a tokenizer or without.

    Returns:
        A SHA-256.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_attention_heads=2)
        >>> config.num_hidden_layers = 2
        >>> model = LlamaModel(config)
        >>> first, again = (encoder_fingerprint(TextEncoder(model, layers=(1,))) for _ in range(2))
        >>> len(first), first == again, first == encoder_fingerprint(TextEncoder(model, layers=(0,)))
        (64, True, False)
    """
    decoder = next(m for m in encoder.modules() if hasattr(m, "embed_tokens") and hasattr(m, "layers"))
    depth = max(encoder.layers) + 1
    settings: dict[str, Any] = {
        "config": _identity(encoder.model.config.to_dict() if hasattr(encoder.model, "config") else {}, depth),
        "layers": encoder.layers,
        "max_length": encoder.max_length,
        "parameters": [],
    }
    if encoder.tokenizer is not None:
        texts = [encoder.render(probe) for probe in PROBES]
        rows = encoder.tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)["input_ids"]
        settings["prompts"] = [texts, rows, encoder.num_prefix_tokens, len(encoder.tokenizer)]
    hashed, samples = hashlib.sha256(), []
    for name, value in decoder.named_parameters():
        place = name.split(".")
        if place[0] == "norm" or (place[0] == "layers" and int(place[1]) >= depth):
            continue
        settings["parameters"].append([name, list(value.shape), str(value.dtype)])
        flat = value.detach().reshape(-1)
        samples.append(flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].double())
    hashed.update(json.dumps(settings, sort_keys=True, default=str).encode())
    hashed.update(torch.cat([sample.cpu() for sample in samples]).numpy().tobytes())
    return hashed.hexdigest()


def _identity(config: dict[str, Any], depth: int) -> dict[str, Any]:
    num_layers = config.get("num_hidden_layers")
    kept = {key: value for key, value in config.items() if key not in NOT_IDENTITY and not key.startswith("id2label")}
    for key, value in kept.items():
        if isinstance(value, dict):
            kept[key] = _identity(value, depth)
        elif isinstance(value, list) and len(value) == num_layers and "layer" in key:
            kept[key] = value[:depth]
    return kept


def _digest(features: Tensor) -> str:
    return hashlib.sha256(features.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
