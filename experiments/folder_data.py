"""Samples of pre-training that are somebody's pictures with captions, from a folder, tars or a list of files."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from experiments.bank import FeatureBank, save_bank
from experiments.lazy_bank import FeatureSource, LazyBank, save_pictures
from experiments.miniature.world import Miniature
from experiments.pretrain_data import check_order, encode_pictures, encode_texts
from experiments.runs import cached_stage, progress, write_json
from lensmini.data import (
    BadPicture,
    Bucket,
    Dropped,
    FolderSource,
    ListSource,
    TarSource,
    assign_buckets,
    make_buckets,
    open_source,
    read_picture,
    resize_and_crop,
)
from lensmini.data.collate import Weighting
from lensmini.data.features import Precision
from lensmini.data.plan import Mode

__all__ = ["FolderConfig", "FolderError", "check_folder", "folder_banks"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderConfig:
    """Captioned pictures: a folder, a tar or a folder of tars, or a list of files.

    Captions stand in ``name.txt``, in ``name.json`` or in a folder's ``metadata.jsonl``.
    """

    path: Path = Path("pictures")
    """The folder, whose sub-folders are read too, tar or list."""
    side: int = 32
    """Square root of the area that pictures are resized to, in pixels."""
    ratios: tuple[tuple[int, int], ...] = ((1, 2), (2, 3), (1, 1), (3, 2), (2, 1))
    """Width to height of the buckets; a picture goes to the nearest and is cropped to it."""
    min_samples: int = 8
    """Fewer good pictures than this are an error."""
    batch_size: int = 24
    """Samples of one step over all processes."""
    num_slots: int = 2
    """Micro-batches of one step; processes share them evenly."""
    mode: Mode = "packed"
    """How they are filled: "packed", shapes mixed so that all take equally long; "bucket", one shape in each (the paper);
    "same_bucket", one shape in a step."""
    weighting: Weighting = "per_image"
    """What counts the same in the loss of a step: every image ("per_image") or every image token ("per_token"); the paper
    does not state it."""
    text_dropout: float = 0.1
    """Share of samples whose text is masked as a whole; the paper does not state it."""
    held_out_share: float = 0.05
    """Share of pictures kept for the validation loss, at least one."""
    features: FeatureSource = "bank"
    """When samples are encoded: "bank", all at once into one file, for small sets; "precomputed", once, into shards by bucket;
    "rolling", for the next steps, then thrown away; "online", when they are needed. The last three give the same batches."""
    precision: Precision = "bf16"
    """Of what is encoded, with the last three: "bf16", "fp32", or "fp8", text in eight bits."""
    rolling_steps: int = 100
    """Steps that are encoded at a time with "rolling"."""

    def __post_init__(self) -> None:
        check_order(self.batch_size, self.num_slots, self.text_dropout, self.mode, self.weighting)
        if self.min_samples < 2 or not 0 <= self.held_out_share <= 0.5:
            raise ValueError(
                "min_samples, held_out_share: expected at least 2 and a share in [0, 0.5], "
                f"got {self.min_samples} and {self.held_out_share}"
            )
        known = self.features in get_args(FeatureSource) and self.precision in get_args(Precision)
        if not known or self.rolling_steps < 1:
            raise ValueError(
                f"features, precision, rolling_steps: expected one of {get_args(FeatureSource)}, one of "
                f"{get_args(Precision)} and a positive integer, got {self.features!r}, {self.precision!r} and "
                f"{self.rolling_steps}"
            )
        self.buckets_for(4)

    def buckets_for(self, multiple: int) -> tuple[Bucket, ...]:
        """The canvases, with sides that are multiples of an autoencoder's factor (4 in the miniature)."""
        # Few sides are multiples, where pictures are small: the areas have to differ.
        return make_buckets(self.side, ratios=self.ratios, multiple=multiple, tolerance=0.13)


class FolderError(ValueError):
    """Pictures that cannot be trained on; the message is for whoever chose them."""


def check_folder(config: FolderConfig) -> None:
    """Read until there are enough usable samples, which is worth knowing before anything is trained.

    Raises:
        FolderError: if ``path`` is missing or has fewer than ``min_samples`` usable pictures with captions; the message
            counts causes.
    """
    kept, causes = 0, Counter[str]()
    for _, found in _samples(_open(config)):
        kept += not isinstance(found, str)
        if isinstance(found, str):
            causes[found] += 1
        if kept >= config.min_samples:
            return
    _require(config, kept, causes)


def folder_banks(
    config: FolderConfig, world: Miniature, out: Path, *, quiet: bool = False
) -> tuple[FeatureBank, FeatureBank]:
    """The banks of the pictures; what could not be used is listed by cause in ``OUT/folder.json``.

    Raises:
        FolderError: if ``path`` is missing or has fewer than ``min_samples`` usable pictures; the message counts
            causes.
    """
    source = _open(config)
    key = {"source": source.fingerprint(), "side": config.side, "ratios": config.ratios, "world": world.key}
    key |= {"min_samples": config.min_samples, "held_out_share": config.held_out_share, "version": 5}
    stored = config.features == "bank"
    key |= {} if stored else {"pictures": True}

    def make(directory: Path) -> None:
        buckets = config.buckets_for(world.autoencoder.downsample)
        captions, pictures, dropped = _read(source, buckets, quiet=quiet)
        causes = Counter(cause for _, cause in dropped)
        report = {"read": len(captions) + len(dropped), "kept": len(captions), "dropped": causes, "files": dropped}
        # Beside the run too: the directory goes if there is too little to train on.
        for place in (directory, out):
            write_json(place / "folder.json", report)
        _require(config, len(captions), causes, f"; {out / 'folder.json'} lists the files")
        num_held_out = max(1, round(config.held_out_share * len(captions)))
        order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()
        for name, part in (("held_out", order[:num_held_out]), ("train", order[num_held_out:])):
            (directory / name).mkdir()
            words, images = [captions[index] for index in part], [pictures[index] for index in part]
            if name == "train" and not stored:
                save_pictures(directory / name, images, words, world)
                continue
            texts = encode_texts(words, world, quiet=quiet)
            save_bank(directory / name, texts, encode_pictures(list(enumerate(images)), world, quiet=quiet), words)

    path, _ = cached_stage(out.parent, "folder-bank", key, make, quiet=quiet)
    if not quiet:
        for name, kept in (("folder.json", path / "folder.json"), ("captions.txt", path / "train" / "captions.txt")):
            (out / name).write_text(kept.read_text())
    held_out = FeatureBank.load(path / "held_out")
    if stored:
        return FeatureBank.load(path / "train"), held_out
    shared = path.with_name(f"{path.name}-features-{config.precision}")
    folder = shared if config.features == "precomputed" else out / "rolling"
    options = {"steps": config.rolling_steps, "precision": config.precision}
    return LazyBank.open(path / "train", world, config.features, folder, **options), held_out


def _open(config: FolderConfig) -> FolderSource | TarSource | ListSource:
    try:
        return open_source(config.path)
    except (OSError, ValueError):
        raise FolderError(
            f"data.path: expected a folder of pictures with captions, a tar or a list of files, got {config.path}"
        ) from None


def _samples(source: FolderSource | TarSource | ListSource) -> Iterator[tuple[str, tuple[str, Tensor] | str]]:
    """(key, (caption, uint8 picture ``[3, h, w]``)) of what can be used, (key, cause) of the rest."""
    for unit in source.units():
        for sample in source.read(unit):
            if isinstance(sample, Dropped):
                yield sample.key, sample.cause
                continue
            try:
                image = read_picture(sample.picture).image
            except BadPicture as error:
                yield sample.key, f"picture: {error.cause}"
                continue
            if sample.caption is None:
                yield sample.key, f"caption: {sample.caption_problem or 'none'}"
            else:
                yield sample.key, (sample.caption, image)


def _read(
    source: FolderSource | TarSource | ListSource, buckets: Sequence[Bucket], *, quiet: bool
) -> tuple[list[str], list[Tensor], list[tuple[str, str]]]:
    """Captions and pictures, cropped to their buckets, of the usable samples, and (key, cause) of the others."""
    captions, images, dropped = [], [], []
    with progress(None, 0, "read pictures", rank=int(quiet)) as bar:
        for key, found in _samples(source):
            bar.update()
            if isinstance(found, str):
                dropped.append((key, found))
                continue
            caption, image = found
            (index,) = assign_buckets([image.shape[1]], [image.shape[2]], buckets, small="upscale")
            captions.append(caption)
            images.append(resize_and_crop(image, buckets[index]))
    return captions, images, dropped


def _require(config: FolderConfig, kept: int, causes: Counter[str], hint: str = "") -> None:
    if kept < config.min_samples:
        counted = ", ".join(f"{number} x {cause}" for cause, number in causes.most_common()) or "no picture found"
        raise FolderError(
            f"data.path: expected at least {config.min_samples} captioned pictures in {config.path}, "
            f"got {kept} ({counted}){hint}"
        )
