"""Where pre-training's samples come from: scenes drawn from a seed, or a folder of captioned pictures."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from experiments.bank import FeatureBank, random_stream, save_bank
from experiments.miniature.world import Miniature
from experiments.runs import cached_stage, progress, write_json
from lensmini.data import (
    MINIATURE_CANVASES,
    Bucket,
    Scene,
    assign_buckets,
    describe_scene,
    make_buckets,
    render_scene,
    resize_and_crop,
    sample_scene,
)
from lensmini.data.collate import Weighting
from lensmini.data.plan import Mode
from lensmini.data.scene_captions import Wording
from lensmini.nn import from_uint8

__all__ = ["FolderConfig", "FolderError", "SceneConfig", "find_pictures", "folder_banks", "scene_banks"]

_HELD_OUT = 2**40
"""Numbers of held-out scenes start here; training scenes never get so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneConfig:
    """Rendered scenes with captions, encoded once."""

    num_captions: int = 4000
    """Scenes with their captions."""
    pictures_per_caption: int = 4
    """Pictures of each scene: other places within the cells, other canvases."""
    canvases: tuple[tuple[int, int], ...] = MINIATURE_CANVASES
    """Pixel sizes (height, width), drawn equally often."""
    density: str = "dense"
    """Captions: "dense", "brief" or "mixed" (half and half)."""
    wording: Wording = "synonyms"
    """How captions and the prompts of scores vary: "plain", "synonyms" or "varied" (other sentence forms too)."""
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
    num_held_out: int = 60
    """Scenes of the validation loss."""
    seed: int = 0
    """Seed of scenes and captions."""

    def __post_init__(self) -> None:
        _check(self.batch_size, self.num_slots, self.text_dropout, self.mode, self.weighting)
        if self.density not in ("dense", "brief", "mixed"):
            raise ValueError(f'density: expected "dense", "brief" or "mixed", got {self.density!r}')


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderConfig:
    """A folder of pictures: ``name.png``, ``.jpg`` or ``.jpeg``, each beside its caption ``name.txt``."""

    path: Path = Path("pictures")
    """The folder; sub-folders are read too."""
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

    def __post_init__(self) -> None:
        _check(self.batch_size, self.num_slots, self.text_dropout, self.mode, self.weighting)
        if self.min_samples < 2 or not 0 <= self.held_out_share <= 0.5:
            raise ValueError(
                "min_samples, held_out_share: expected at least 2 and a share in [0, 0.5], "
                f"got {self.min_samples} and {self.held_out_share}"
            )
        self.buckets_for(4)

    def buckets_for(self, multiple: int) -> tuple[Bucket, ...]:
        """The canvases, with sides that are multiples of an autoencoder's factor (4 in the miniature)."""
        # Few sides are multiples, where pictures are small: the areas have to differ.
        return make_buckets(self.side, ratios=self.ratios, multiple=multiple, tolerance=0.13)


def _check(batch_size: int, num_slots: int, text_dropout: float, mode: str, weighting: str) -> None:
    if batch_size < 1 or num_slots < 1 or batch_size % num_slots:
        raise ValueError(f"batch_size: expected a multiple of num_slots = {num_slots}, got {batch_size}")
    if mode not in get_args(Mode) or weighting not in get_args(Weighting):
        raise ValueError(
            f"mode, weighting: expected one of {get_args(Mode)} and one of {get_args(Weighting)}, got {mode!r}, {weighting!r}"
        )
    if not 0 <= text_dropout <= 1:
        raise ValueError(f"text_dropout: expected a share in [0, 1], got {text_dropout}")


def scene_banks(
    config: SceneConfig, world: Miniature, out: Path, *, quiet: bool = False
) -> tuple[FeatureBank, FeatureBank]:
    """The bank of training scenes and the held-out one, encoded on first use and cached beside the run."""
    key = {
        **{
            name: getattr(config, name)
            for name in ("num_captions", "pictures_per_caption", "canvases", "density", "wording")
        }
    }
    key |= {"seed": config.seed, "num_held_out": config.num_held_out, "world": world.key, "version": 2}

    def make(directory: Path) -> None:
        for name, start, num in (("train", 0, config.num_captions), ("held_out", _HELD_OUT, config.num_held_out)):
            (directory / name).mkdir()
            _make_scenes(directory / name, config, world, start + config.seed * 2**42, num, quiet=quiet)

    path, _ = cached_stage(out.parent, "scene-bank", key, make, quiet=quiet)
    return FeatureBank.load(path / "train"), FeatureBank.load(path / "held_out")


def _make_scenes(directory: Path, config: SceneConfig, world: Miniature, start: int, num: int, *, quiet: bool) -> None:
    captions, waiting = [], []
    for number in range(num):
        key = start + number
        scene = sample_scene(generator=key)
        density = ("dense", "brief")[number % 2] if config.density == "mixed" else config.density
        caption = describe_scene(scene, density=density, wording=config.wording, generator=key)  # pyright: ignore
        captions.append(caption)
        for view in range(config.pictures_per_caption):
            height, width = config.canvases[(number + view) % len(config.canvases)]
            waiting.append((number, render_scene(_moved(scene, key, view), height, width)))
    texts = _encode_texts(captions, world, quiet=quiet)
    save_bank(directory, texts, _encode_pictures(waiting, world, quiet=quiet), captions)


def _moved(scene: Scene, key: int, view: int) -> Scene:
    """The scene with its objects elsewhere within their cells; view 0 is the scene itself."""
    if view == 0:
        return scene
    places = torch.rand(len(scene.objects), 2, generator=random_stream(key, view)).mul(2).sub(1).tolist()
    objects = (replace(thing, jitter=tuple(place)) for thing, place in zip(scene.objects, places, strict=True))
    return replace(scene, objects=tuple(objects))


def _encode_texts(captions: Sequence[str], world: Miniature, *, quiet: bool) -> list[Tensor]:
    order = sorted(range(len(captions)), key=lambda index: len(captions[index].split()))
    texts: dict[int, Tensor] = {}
    with progress(len(captions), 0, "encode captions", rank=int(quiet)) as bar:
        for first in range(0, len(order), 64):
            chosen = order[first : first + 64]
            features, mask = world.encoder([captions[index] for index in chosen])
            stacked = torch.stack(features, dim=2)
            texts |= {index: row[keep] for index, row, keep in zip(chosen, stacked, mask, strict=True)}
            bar.update(len(chosen))
    return [texts[index] for index in range(len(captions))]


@torch.no_grad()
def _encode_pictures(
    waiting: Sequence[tuple[int, Tensor]], world: Miniature, *, quiet: bool
) -> list[tuple[int, Tensor]]:
    order = sorted(range(len(waiting)), key=lambda index: tuple(waiting[index][1].shape))
    latents: dict[int, Tensor] = {}
    with progress(len(waiting), 0, "encode pictures", rank=int(quiet)) as bar:
        for chosen in _equal_chunks(order, waiting, 64):
            images = from_uint8(torch.stack([waiting[index][1] for index in chosen]))
            latents |= dict(zip(chosen, world.autoencoder.encode(images), strict=True))
            bar.update(len(chosen))
    return [(caption, latents[index]) for index, (caption, _) in enumerate(waiting)]


def _equal_chunks(order: Sequence[int], waiting: Sequence[tuple[int, Tensor]], size: int) -> Iterable[list[int]]:
    chunk: list[int] = []
    for index in order:
        if chunk and (len(chunk) == size or waiting[index][1].shape != waiting[chunk[0]][1].shape):
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk


class FolderError(ValueError):
    """A folder that cannot be trained on; the message is for whoever chose it."""


def find_pictures(config: FolderConfig) -> list[Path]:
    """The folder's picture files: a look at the names, which is worth having before anything is trained.

    Raises:
        FolderError: if the folder is missing or has fewer than ``min_samples`` pictures with a caption file.
    """
    if not config.path.is_dir():
        raise FolderError(f"data.path: expected a folder of pictures with captions, got {config.path}")
    files = sorted(p for p in config.path.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    bare = sum(not file.with_suffix(".txt").exists() for file in files)
    _require(config, len(files) - bare, Counter({"no caption file": bare}))
    return files


def _require(config: FolderConfig, kept: int, causes: Counter[str], hint: str = "") -> None:
    if kept < config.min_samples:
        counted = ", ".join(f"{number} x {cause}" for cause, number in (+causes).most_common()) or "no picture found"
        raise FolderError(
            f"data.path: expected at least {config.min_samples} captioned pictures in {config.path}, "
            f"got {kept} ({counted}){hint}"
        )


def folder_banks(
    config: FolderConfig, world: Miniature, out: Path, *, quiet: bool = False
) -> tuple[FeatureBank, FeatureBank]:
    """The banks of a folder's pictures; what could not be used is listed by cause in ``OUT/folder.json``.

    Raises:
        FolderError: if the folder is missing or has fewer than ``min_samples`` usable pictures; the message counts
            causes.
    """
    files = find_pictures(config)
    stamp = [(p.relative_to(config.path).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    stamp += [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(config.path.rglob("*.txt"))]
    key = {"files": stamp, "side": config.side, "ratios": config.ratios, "world": world.key}
    key |= {"min_samples": config.min_samples, "held_out_share": config.held_out_share, "version": 4}

    def make(directory: Path) -> None:
        buckets = config.buckets_for(world.autoencoder.downsample)
        captions, pictures, dropped = _read_folder(files, buckets, quiet=quiet)
        causes = Counter(cause for _, cause in dropped)
        report = {"read": len(files), "kept": len(captions), "dropped": causes, "files": dropped}
        # Beside the run too: the directory goes if there is too little to train on.
        for place in (directory, out):
            write_json(place / "folder.json", report)
        _require(config, len(captions), causes, f"; {out / 'folder.json'} lists the files")
        texts = _encode_texts(captions, world, quiet=quiet)
        latents = _encode_pictures(list(enumerate(pictures)), world, quiet=quiet)
        num_held_out = max(1, round(config.held_out_share * len(captions)))
        order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()
        for name, part in (("held_out", order[:num_held_out]), ("train", order[num_held_out:])):
            (directory / name).mkdir()
            pairs = [(number, latents[index][1]) for number, index in enumerate(part)]
            save_bank(directory / name, [texts[index] for index in part], pairs, [captions[index] for index in part])

    path, _ = cached_stage(out.parent, "folder-bank", key, make, quiet=quiet)
    if not quiet:
        for name, source in (("folder.json", path / "folder.json"), ("captions.txt", path / "train" / "captions.txt")):
            (out / name).write_text(source.read_text())
    return FeatureBank.load(path / "train"), FeatureBank.load(path / "held_out")


def _read_folder(
    files: Sequence[Path], buckets: Sequence[Bucket], *, quiet: bool
) -> tuple[list[str], list[Tensor], list[tuple[str, str]]]:
    """Captions and pictures, cropped to their buckets, of the usable files, and (file, cause) of the others."""
    captions, images, dropped = [], [], []
    with progress(len(files), 0, "read pictures", rank=int(quiet)) as bar:
        for file in files:
            bar.update()
            try:
                # A byte order mark is no part of the caption.
                caption = " ".join(file.with_suffix(".txt").read_text(encoding="utf-8-sig").split())
            except FileNotFoundError:
                dropped.append((file.as_posix(), "no caption file"))
                continue
            except (OSError, UnicodeDecodeError):
                dropped.append((file.as_posix(), "unreadable caption"))
                continue
            if not caption:
                dropped.append((file.as_posix(), "empty caption"))
                continue
            try:
                image = _read_picture(file)
            except Exception as error:  # decoders raise whatever a broken file makes them stumble over
                dropped.append((file.as_posix(), f"unreadable picture ({type(error).__name__})"))
                continue
            (index,) = assign_buckets([image.shape[1]], [image.shape[2]], buckets, small="upscale")
            captions.append(caption)
            images.append(resize_and_crop(image, buckets[index]))
    return captions, images, dropped


def _read_picture(file: Path) -> Tensor:
    """``[3, h, w]`` uint8 as a person sees it: upright, over white where it is transparent."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):
        # 16 bits of grey, which PIL would cut off at 255.
        grey = (np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8)
        image = Image.fromarray(grey)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
