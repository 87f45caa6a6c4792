"""Samples of pre-training that are rendered scenes, and how captions and pictures are encoded."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from experiments.bank import FeatureBank, random_stream, save_bank
from experiments.miniature.world import Miniature
from experiments.runs import cached_stage, progress
from lensmini.data import (
    MINIATURE_CANVASES,
    Scene,
    describe_scene,
    render_scene,
    sample_scene,
)
from lensmini.data.collate import Weighting
from lensmini.data.plan import Mode
from lensmini.data.scene_captions import Wording
from lensmini.nn import from_uint8

__all__ = ["SceneConfig", "check_order", "encode_pictures", "encode_texts", "scene_banks"]

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
        check_order(self.batch_size, self.num_slots, self.text_dropout, self.mode, self.weighting)
        if self.density not in ("dense", "brief", "mixed"):
            raise ValueError(f'density: expected "dense", "brief" or "mixed", got {self.density!r}')


def check_order(batch_size: int, num_slots: int, text_dropout: float, mode: str, weighting: str) -> None:
    """Refuse settings of a step that do not go together."""
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
    texts = encode_texts(captions, world, quiet=quiet)
    save_bank(directory, texts, encode_pictures(waiting, world, quiet=quiet), captions)


def _moved(scene: Scene, key: int, view: int) -> Scene:
    """The scene with its objects elsewhere within their cells; view 0 is the scene itself."""
    if view == 0:
        return scene
    places = torch.rand(len(scene.objects), 2, generator=random_stream(key, view)).mul(2).sub(1).tolist()
    objects = (replace(thing, jitter=tuple(place)) for thing, place in zip(scene.objects, places, strict=True))
    return replace(scene, objects=tuple(objects))


def encode_texts(captions: Sequence[str], world: Miniature, *, quiet: bool) -> list[Tensor]:
    """Features ``[l, k, e]`` of each caption, encoded in batches of similar length."""
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
def encode_pictures(
    waiting: Sequence[tuple[int, Tensor]], world: Miniature, *, quiet: bool
) -> list[tuple[int, Tensor]]:
    """(number of the caption, latents ``[c, h, w]``) of each uint8 picture, encoded in batches of one shape."""
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
