"""The first stage of `experiments.prepare_data`: what becomes of every picture of a unit, before captions."""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from experiments.prepare_config import ModelsConfig, PrepareConfig
from lensmini.checkpoints.files import replace_file
from lensmini.data import BadPicture, Dropped, Unit, encode_picture, open_source, read_picture
from lensmini.data.captions import shrink
from lensmini.data.filters import (
    ModelFilter,
    judge,
    load_aesthetic,
    load_embedder,
    load_nsfw,
    load_watermark,
    pixel_scores,
)
from lensmini.data.pictures import Picture
from lensmini.data.source_samples import RawSample
from lensmini.data.sources import Source
from lensmini.data.text_pictures import TextSource

__all__ = [
    "embedding_file",
    "open_input",
    "part_file",
    "read_rows",
    "read_unit",
    "run_unit",
    "score_names",
    "stored_picture",
    "write_rows",
]

_THUMB = 96
_THUMBS_A_CAUSE = 2
_MOST_BYTES = 2**28
_KEPT_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def open_input(config: PrepareConfig) -> Source:
    """What the pictures come from.

    Raises:
        ValueError: if there are no texts to draw.
    """
    if not config.text.num:
        return open_source(config.path)
    texts = [line.strip() for line in config.path.read_text(encoding="utf-8").split("\n") if line.strip()]
    fonts = [str(font) for font in config.text.fonts] or None
    size = {"height": config.text.height, "width": config.text.width}
    return TextSource(texts, config.text.num, seed=config.seed, fonts=fonts, **size)


def part_file(out: Path, stage: str, unit: int) -> Path:
    """Where the rows of a unit are."""
    return out / stage / f"{unit:06d}.jsonl"


def embedding_file(out: Path, unit: int) -> Path:
    """Where the embeddings of a unit's kept pictures are."""
    return out / "parts" / f"{unit:06d}.safetensors"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines, all or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def score_names(config: PrepareConfig) -> list[str]:
    """Scores that every kept picture has."""
    models = {"nsfw": config.models.nsfw, "aesthetic": config.models.aesthetic, "watermark": config.models.watermark}
    return [*(name for name, model in models.items() if model is not None), "clarity", "entropy", "luminance"]


def run_unit(config: PrepareConfig, index: int) -> int:
    """Read, score and judge one unit and write its rows, unless that is done; returns the unit's number.

    A row for every sample: ``key`` and ``fate`` ("kept" or the cause), size, scores, the hash of the pixels, and
    the caption that was given. The first pictures of every fate carry a thumbnail.
    """
    out = config.run.out
    path = part_file(out, "parts", index)
    if path.exists():
        return index
    unit = _units(config)[index]
    rows: list[dict[str, Any]] = []
    embeddings: list[Tensor] = []
    waiting: list[tuple[dict[str, Any], Tensor]] = []
    thumbs = Counter[str]()

    def flush() -> None:
        if waiting:
            embeddings.extend(_judge(config, waiting))
            for row, image in waiting:
                thumbs[row["fate"]] += 1
                if thumbs[row["fate"]] <= _THUMBS_A_CAUSE:
                    small = encode_picture(shrink(image, _THUMB), "jpeg", quality=80)
                    row["thumb"] = base64.b64encode(small).decode()
            waiting.clear()

    for sample in open_input(config).read(unit):
        if isinstance(sample, Dropped):
            rows.append({"key": sample.key, "fate": sample.cause, "detail": sample.detail[:200]})
            continue
        row: dict[str, Any] = {"key": sample.key, "caption": sample.caption, "caption_problem": sample.caption_problem}
        rows.append(row)
        try:
            picture = read_picture(sample.picture)
        except BadPicture as error:
            row |= {"fate": f"picture: {error.cause}", "detail": str(error)[:200]}
            continue
        height, width = picture.image.shape[1:]
        row |= {"height": height, "width": width, "format": picture.format, "notes": sorted(picture.notes)}
        row["pixels"] = hashlib.sha256(f"{height} ".encode() + picture.image.numpy().tobytes()).hexdigest()[:32]
        waiting.append((row, picture.image))
        if len(waiting) == config.models.batch_size or sum(image.numel() for _, image in waiting) > _MOST_BYTES:
            flush()
    flush()
    path.parent.mkdir(parents=True, exist_ok=True)
    if config.models.embedder is not None:
        stacked = torch.stack(embeddings) if embeddings else torch.zeros(0, 0)
        replace_file(embedding_file(out, index), lambda part: part.write_bytes(save({"embeddings": stacked})))
    write_rows(path, rows)
    return index


def read_unit(config: PrepareConfig, index: int) -> Iterator[RawSample]:
    """The samples of a unit again, as the source has them."""
    for sample in open_input(config).read(_units(config)[index]):
        if isinstance(sample, RawSample):
            yield sample


def load_embeddings(config: PrepareConfig, index: int) -> Tensor:
    """``[n, d]`` of the kept pictures of a unit."""
    return load_file(embedding_file(config.run.out, index))["embeddings"]


def stored_picture(data: bytes, picture: Picture) -> tuple[str, bytes]:
    """Suffix and bytes that are stored: the file as it is where every reader sees the same, else a PNG of what ours saw."""
    if picture.format in _KEPT_SUFFIXES and not picture.notes:
        return _KEPT_SUFFIXES[picture.format], data
    return "png", encode_picture(picture.image, "png")


def _judge(config: PrepareConfig, waiting: list[tuple[dict[str, Any], Tensor]]) -> list[Tensor]:
    """Fill in scores and fates; returns the embeddings of those that are kept."""
    images = [image for _, image in waiting]
    columns = pixel_scores(images)
    for index, (row, _) in enumerate(waiting):
        row["scores"] = {name: values[index].item() for name, values in columns.items()}
        row["fate"] = judge(row["scores"], config.thresholds) or "kept"
    filters = _filters(config.models)
    for name in ("nsfw", "aesthetic", "watermark"):
        # A model looks only at what is still kept: it is what costs.
        left = [index for index, (row, _) in enumerate(waiting) if row["fate"] == "kept"]
        if name in filters and left:
            for index, score in zip(left, filters[name]([images[index] for index in left]).tolist(), strict=True):
                row = waiting[index][0]
                row["scores"][name] = score
                row["fate"] = judge(row["scores"], config.thresholds) or "kept"
    left = [index for index, (row, _) in enumerate(waiting) if row["fate"] == "kept"]
    if "embedder" not in filters or not left:
        return []
    embeddings = []
    for index, embedding in zip(left, filters["embedder"]([images[index] for index in left]), strict=True):
        if bool(embedding.isfinite().all()):
            embeddings.append(embedding)
        else:
            waiting[index][0]["fate"] = "not a number"
    return embeddings


@lru_cache(maxsize=1)
def _filters(models: ModelsConfig) -> dict[str, ModelFilter]:
    options = {name: getattr(models, name) for name in ("device", "batch_size", "local_files_only")}
    filters: dict[str, ModelFilter] = {}
    if models.nsfw is not None:
        filters["nsfw"] = load_nsfw(models.nsfw, **options)
    if models.aesthetic is not None and models.aesthetic_head is not None:
        filters["aesthetic"] = load_aesthetic(models.aesthetic, head=models.aesthetic_head, **options)
    if models.watermark is not None:
        filters["watermark"] = load_watermark(models.watermark, **options)
    if models.embedder is not None:
        filters["embedder"] = load_embedder(models.embedder, **options)
    return filters


@lru_cache(maxsize=1)
def _units(config: PrepareConfig) -> list[Unit]:
    return open_input(config).units()
