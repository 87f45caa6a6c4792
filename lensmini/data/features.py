"""Encoded samples: computed when they are needed, or written once and read in slices, with the same values.

Axes: n samples of a shard, c latent channels, h and w latent height and width, T text tokens of all n, k text layers,
e text width.

A shard is one safetensors file of samples of one latent shape: ``numbers [n]``, ``latents [n, c, h, w]``,
``text [T, k, e]``, ``text_starts [n + 1]`` and, in eight bits, ``text_scales``.
"""

import hashlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lensmini.data.collate import Sample
from lensmini.data.fp8 import dequantise_features, quantise_features, relative_error
from lensmini.data.shard_files import file_sha256
from lensmini.shapes import check_shape

__all__ = ["FeatureStore", "Features", "OnlineFeatures", "Precision", "round_sample", "write_features"]

Precision = Literal["bf16", "fp32", "fp8"]
"""How features are stored: all in bfloat16, all in float32, or text in eight bits and latents in bfloat16."""
HEADER = "features.json"
INDEX = "index.safetensors"
Encode = Callable[[Sequence[int]], Sequence[Sample]]


class Features(Protocol):
    """Whatever gives samples for sample numbers."""

    def read(self, numbers: Sequence[int]) -> list[Sample]:
        """The samples, in the order of the numbers."""
        ...


class OnlineFeatures:
    """Samples that are encoded when they are asked for, rounded as if they had been stored.

    Args:
        encode: gives the samples of numbers.
        precision: as of :func:`write_features`.

    Example:
        >>> encode = lambda numbers: [Sample(n, torch.full((1, 2, 2), n / 3), torch.zeros(3, 2, 4)) for n in numbers]
        >>> OnlineFeatures(encode).read([5])[0].latents[0, 0, 0]
        tensor(1.6641)
    """

    def __init__(self, encode: Encode, *, precision: Precision = "bf16") -> None:
        self.encode, self.precision = encode, _check_precision(precision)

    def read(self, numbers: Sequence[int]) -> list[Sample]:
        """As :class:`Features`."""
        return [round_sample(sample, self.precision) for sample in _encode(self.encode, numbers)]


def round_sample(sample: Sample, precision: Precision) -> Sample:
    """What storing and reading leaves of a sample, in float32.

    Args:
        sample: latents ``[c, h, w]`` and text ``[l, k, e]``.
        precision: of the store.

    Returns:
        The sample.

    Example:
        >>> round_sample(Sample(0, torch.full((1, 1, 1), 1 / 3), torch.zeros(1, 1, 1)), "bf16").latents
        tensor([[[0.3340]]])
    """
    if precision == "fp32":
        return Sample(sample.number, sample.latents.float(), sample.text_tokens.float())
    latents = sample.latents.to(torch.bfloat16).float()
    if precision == "fp8":
        return Sample(sample.number, latents, dequantise_features(*quantise_features(sample.text_tokens)))
    return Sample(sample.number, latents, sample.text_tokens.to(torch.bfloat16).float())


class _Header(NamedTuple):
    precision: Precision
    made_by: dict[str, str]
    shards: list[dict[str, Any]]


def write_features(
    groups: Iterable[Sequence[int]],
    encode: Encode,
    out: str | os.PathLike[str],
    *,
    precision: Precision = "bf16",
    num_per_shard: int = 2048,
    batch_size: int = 64,
    made_by: Mapping[str, str] | None = None,
) -> int:
    """Encode samples once and write them as shards; done again, only what is missing is encoded.

    A shard appears whole or not at all, its bytes depend on nothing but its samples, and ``features.json``, which
    makes a folder readable, comes last: after any interruption the end is that of an uninterrupted run.

    Args:
        groups: numbers of samples of one latent shape each, for example bucket by bucket.
        encode: gives the samples of numbers; it may get any of a group together.
        out: the folder.
        precision: "bf16", "fp32" or "fp8"; the error of eight bits is measured and written down, layer by layer.
        num_per_shard: samples of a shard.
        batch_size: samples that ``encode`` gets at once.
        made_by: what decides the features beside the samples: hashes of encoder, autoencoder, template.

    Returns:
        Shards that were written just now.

    Raises:
        ValueError: if ``out`` holds features of another kind, a number comes twice, or ``encode`` gives other samples,
            shapes that differ in a group, or values that are not finite; naming the sample.

    Example:
        >>> import tempfile
        >>> encode = lambda numbers: [Sample(n, torch.full((1, 2, 2), float(n)), torch.zeros(3, 2, 4)) for n in numbers]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_features([range(4)], encode, folder, num_per_shard=3)
        ...     FeatureStore(folder).read([2])[0].latents.mean()
        2
        tensor(2.)
    """
    _check_precision(precision)
    if num_per_shard < 1 or batch_size < 1:
        raise ValueError(f"num_per_shard, batch_size: expected positive, got {num_per_shard} and {batch_size}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"precision": precision, "made_by": dict(made_by or {}), "num_per_shard": num_per_shard}
    groups = [[int(number) for number in group] for group in groups]
    numbers = [number for group in groups for number in group]
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"groups: expected every number once, got {len(numbers) - len(set(numbers))} of them again")
    wanted["numbers"] = hashlib.sha256(json.dumps(groups).encode()).hexdigest()
    plan = folder / "plan.json"
    if plan.exists() and json.loads(plan.read_text()) != wanted:
        raise ValueError(f"out: {folder} holds features of other samples, models or precision")
    _replace(plan, lambda part: part.write_text(json.dumps(wanted, indent=1)))
    shards: list[dict[str, Any]] = []
    places: list[tuple[int, int, int]] = []
    written = 0
    for index, group in enumerate(groups):
        for first in range(0, len(group), num_per_shard):
            chosen = group[first : first + num_per_shard]
            path = folder / f"features-{index:05d}-{first // num_per_shard:06d}.safetensors"
            if not path.exists():
                samples = []
                for start in range(0, len(chosen), batch_size):
                    samples += _encode(encode, chosen[start : start + batch_size])
                tensors, metadata = _stack(samples, precision)
                _replace(path, lambda part, t=tensors, m=metadata: save_file(t, part, m))
                written += 1
            with safe_open(path, framework="pt") as file:
                errors = json.loads((file.metadata() or {}).get("relative_error", "null"))
            places += [(number, len(shards), row) for row, number in enumerate(chosen)]
            shards.append(
                {"name": path.name, "sha256": file_sha256(path), "num": len(chosen), "relative_error": errors}
            )
    table = torch.tensor(sorted(places), dtype=torch.int64).reshape(-1, 3)
    _replace(folder / INDEX, lambda part: save_file({"places": table}, part))
    header = json.dumps({"precision": precision, "made_by": wanted["made_by"], "shards": shards}, indent=1)
    _replace(folder / HEADER, lambda part: part.write_text(header))
    for left in folder.glob(".*.new"):  # a writer was killed between two renames
        shutil.rmtree(left)
    return written


class FeatureStore:
    """Features that :func:`write_features` wrote, read in slices of memory-mapped files.

    Args:
        folder: with ``features.json``.
        made_by: what must have made them; entries that differ are an error.
        max_open: shards that are kept open.

    Raises:
        ValueError: if the folder is not finished, or something else made it.

    Example:
        >>> FeatureStore("no/such/folder")
        Traceback (most recent call last):
        ValueError: folder: expected finished features in no/such/folder, ...
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, made_by: Mapping[str, str] | None = None, max_open: int = 64
    ) -> None:
        self.folder, self.max_open = Path(folder).absolute(), max_open
        try:
            self._header = _Header(**json.loads((self.folder / HEADER).read_text()))
            self._places = load_file(self.folder / INDEX)["places"]
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise ValueError(f"folder: expected finished features in {folder}, but {error}") from error
        for name, value in (made_by or {}).items():
            if self._header.made_by.get(name) != value:
                raise ValueError(
                    f"made_by: expected {name} {value!r}, {folder} was made by {self._header.made_by.get(name)!r}"
                )
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self._places)

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore, (str(self.folder),)

    @property
    def numbers(self) -> list[int]:
        """Of the samples, in order."""
        return self._places[:, 0].tolist()

    @property
    def precision(self) -> Precision:
        """How they are stored."""
        return self._header.precision

    @property
    def relative_errors(self) -> list[list[float]]:
        """Of eight bits, for each shard and layer; empty otherwise."""
        return [shard["relative_error"] for shard in self._header.shards if shard["relative_error"]]

    def read(self, numbers: Sequence[int]) -> list[Sample]:
        """The samples of numbers, in their order, in float32.

        Args:
            numbers: of samples.

        Raises:
            ValueError: naming numbers that are not there, or a shard that is damaged.
        """
        wanted = torch.as_tensor(list(numbers), dtype=torch.int64)
        rows = torch.searchsorted(self._places[:, 0].contiguous(), wanted).clamp_max(max(0, len(self) - 1))
        found = self._places[rows] if len(self) else wanted.new_zeros(len(wanted), 3)
        missing = wanted[(found[:, 0] != wanted) if len(self) else torch.ones_like(wanted, dtype=torch.bool)].tolist()
        if missing:
            raise ValueError(f"numbers: expected samples of {self.folder}, got {missing[:8]} ({len(missing)})")
        return [self._read(*place) for place in found.tolist()]

    def verify(self) -> list[str]:
        """Names of shards that have changed since they were written."""
        shards = self._header.shards
        paths = [(shard, self.folder / shard["name"]) for shard in shards]
        return [s["name"] for s, path in paths if not path.is_file() or file_sha256(path) != s["sha256"]]

    def _read(self, number: int, shard: int, row: int) -> Sample:
        name = self._header.shards[shard]["name"]
        try:
            file, starts = self._file(shard)
            first, last = int(starts[row]), int(starts[row + 1])
            latents = file.get_slice("latents")[row : row + 1][0]
            text = file.get_slice("text")[first:last]
            if self.precision == "fp8":
                text = dequantise_features(text, file.get_slice("text_scales")[first:last])
            if int(file.get_slice("numbers")[row : row + 1][0]) != number:
                raise ValueError("its numbers are others")
        except (OSError, SafetensorError, ValueError, IndexError, RuntimeError) as error:
            raise ValueError(f"folder: shard {self.folder / name} is damaged: {error}") from error
        return Sample(number, latents.float(), text.float())

    def _file(self, shard: int) -> tuple[Any, Tensor]:
        if self._process != os.getpid():
            self._open, self._process = OrderedDict(), os.getpid()
        if shard not in self._open:
            file: Any = safe_open(self.folder / self._header.shards[shard]["name"], framework="pt")
            self._open[shard] = (file.__enter__(), file.get_tensor("text_starts"))
            while len(self._open) > self.max_open:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]


def _check_precision(precision: str) -> Any:
    if precision not in get_args(Precision):
        raise ValueError(f"precision: expected one of {get_args(Precision)}, got {precision!r}")
    return precision


def _encode(encode: Encode, numbers: Sequence[int]) -> list[Sample]:
    samples = list(encode(numbers))
    found = [sample.number for sample in samples]
    if found != list(numbers):
        raise ValueError(f"encode: expected samples {list(numbers)[:8]}, got {found[:8]}")
    return samples


def _stack(samples: Sequence[Sample], precision: Precision) -> tuple[dict[str, Tensor], dict[str, str]]:
    shape = samples[0].latents.shape
    for sample in samples:
        check_shape(f"latents of sample {sample.number}", sample.latents, "c h w")
        check_shape(f"text of sample {sample.number}", sample.text_tokens, "l k e")
        if sample.latents.shape != shape or sample.text_tokens.shape[1:] != samples[0].text_tokens.shape[1:]:
            raise ValueError(f"groups: expected equal shapes in a group, sample {sample.number} has another")
        if not bool(sample.latents.isfinite().all() & sample.text_tokens.isfinite().all()):
            raise ValueError(f"encode: expected finite values, sample {sample.number} has NaN or infinity")
    kind = torch.float32 if precision == "fp32" else torch.bfloat16
    text = torch.cat([sample.text_tokens for sample in samples]).cpu()
    lengths = torch.tensor([0, *(len(sample.text_tokens) for sample in samples)])
    tensors = {
        "numbers": torch.tensor([sample.number for sample in samples]),
        "latents": torch.stack([sample.latents for sample in samples]).to("cpu", kind),
        "text_starts": lengths.cumsum(0),
    }
    metadata = {"format": "pt"}
    if precision == "fp8":
        tensors["text"], tensors["text_scales"] = quantise_features(text)
        errors = relative_error(text, dequantise_features(tensors["text"], tensors["text_scales"]))
        # One entry only: safetensors write several in any order, and equal features have to be equal bytes.
        metadata = {"relative_error": json.dumps([round(error, 6) for error in errors.tolist()])}
    else:
        tensors["text"] = text.to(kind)
    return tensors, metadata


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    # safetensors write to a file of their own beside the target: a folder takes that along, if both are killed.
    part = path.with_name(f".{path.name}.new")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    write(part / path.name)
    with (part / path.name).open("rb") as file:
        os.fsync(file.fileno())
    (part / path.name).replace(path)
    shutil.rmtree(part)
