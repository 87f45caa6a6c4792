"""A bank whose samples are encoded once into shards, for the next steps only, or when they are needed.

Axes: m pictures, l text tokens, k text layers, e text width, c channels, h and w latent height and width.

Pictures lie beside as uint8, captions as text. Samples are encoded one at a time, so that no batch shows in the values, and
rounded as they would be stored: all three give the same.
"""

import fcntl
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.bank import FeatureBank
from experiments.miniature.world import Miniature
from experiments.pretrain_data import encode_pictures, encode_texts
from lensmini.data import BatchPlan, Sample
from lensmini.data.features import Features, FeatureStore, OnlineFeatures, Precision, write_features
from lensmini.data.rolling import RollingFeatures

__all__ = ["FeatureSource", "LazyBank", "save_pictures"]

FeatureSource = Literal["bank", "precomputed", "rolling", "online"]


def save_pictures(directory: Path, pictures: Sequence[Tensor], captions: Sequence[str], world: Miniature) -> None:
    """Write what a :class:`LazyBank` reads: pictures sorted by size, captions, and how many tokens those have.

    Args:
        directory: where to.
        pictures: uint8 ``[3, H, W]``, of sizes that the autoencoder takes.
        captions: one for each.
        world: counts tokens and knows the autoencoder's factor.
    """
    order = sorted(range(len(pictures)), key=lambda index: tuple(pictures[index].shape[1:]))
    factor = world.autoencoder.downsample
    grids = [[side // factor for side in pictures[index].shape[1:]] for index in order]
    texts = [captions[index] for index in order]
    masks = world.encoder.tokenize(texts).attention_mask.sum(1)
    # The template's beginning is no part of the features.
    prefix = int(masks[0]) - len(encode_texts(texts[:1], world, quiet=True)[0])
    tensors = {
        "pixels": torch.cat([pictures[index].flatten() for index in order]),
        "grids": torch.tensor(grids),
        "text_lengths": masks - prefix,
    }
    path = directory / "pictures.safetensors"
    save_file(tensors, path)
    (directory / "captions.json").write_text(json.dumps(texts))
    (directory / "captions.txt").write_text("\n".join(text.replace("\n", " ") for text in texts) + "\n")
    digest = hashlib.sha256(path.read_bytes() + (directory / "captions.json").read_bytes()).hexdigest()
    (directory / "sha256.txt").write_text(digest + "\n")


@dataclass(frozen=True, eq=False)
class LazyBank(FeatureBank):
    """As :class:`FeatureBank`, with samples from an encoder in place of a file."""

    pixels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.uint8))
    captions: tuple[str, ...] = ()
    world: Miniature | None = None
    kind: FeatureSource = "online"
    folder: Path = Path()
    steps: int = 100
    precision: Precision = "bf16"
    source: list[Features] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        directory: Path,
        world: Miniature,
        kind: FeatureSource,
        folder: Path,
        *,
        steps: int = 100,
        precision: Precision = "bf16",
    ) -> "LazyBank":
        """What :func:`save_pictures` wrote.

        Args:
            directory: of the pictures.
            world: encodes.
            kind: "precomputed", "rolling" or "online".
            folder: where features are kept: of all processes, for "precomputed"; of this run, for "rolling".
            steps: of a window.
            precision: of what is kept.
        """
        tensors = load_file(directory / "pictures.safetensors")
        grids, lengths = tensors["grids"], tensors["text_lengths"]
        zero = torch.zeros(1, dtype=torch.int64)
        return cls(
            text=torch.zeros(0),
            text_starts=torch.cat([zero, lengths.cumsum(0)]),
            latents=torch.zeros(0),
            latent_starts=torch.cat([zero, grids.prod(1).cumsum(0)]),
            grids=grids,
            caption_of=torch.arange(len(grids)),
            digest=(directory / "sha256.txt").read_text().strip(),
            pixels=tensors["pixels"],
            captions=tuple(json.loads((directory / "captions.json").read_text())),
            world=world,
            kind=kind,
            folder=folder,
            steps=steps,
            precision=precision,
        )

    def prepare(self, plan: BatchPlan, step: int, rank: int, world_size: int) -> None:
        """Encode what the step needs: everything that is missing, its window, or nothing yet."""
        if not self.source:
            if self.kind == "online":
                self.source.append(OnlineFeatures(self._encode, precision=self.precision))
            elif self.kind == "precomputed":
                self.source.append(self._store())
            else:

                def numbers_of(step: int) -> list[int]:
                    planned = plan.step(step)
                    slots = range(rank, plan.num_slots, world_size)
                    return [number for slot in slots for number in planned.slot(slot).tolist()]

                folder = self.folder / f"{rank}-of-{world_size}"
                options = {"steps": self.steps, "precision": self.precision}
                self.source.append(RollingFeatures(numbers_of, self._encode, folder, **options))
        (source,) = self.source
        if isinstance(source, RollingFeatures):
            source.prepare(step)

    def samples_of(self, pictures: Sequence[int]) -> list[Sample]:
        """The samples of pictures of the step that was prepared."""
        (source,) = self.source
        # Half precision as in a bank: the model sees the same dtypes.
        return [Sample(n, latents, text.to(torch.bfloat16)) for n, latents, text in source.read(pictures)]

    def _store(self) -> FeatureStore:
        """Shards of every grid, written by one process while the others wait; a kill loses one shard."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            groups = [members for _, members in sorted(self.by_grid().items())]
            write_features(
                groups, self._encode, self.folder, precision=self.precision, made_by={"samples": self.digest}
            )
        return FeatureStore(self.folder)

    def _encode(self, numbers: Sequence[int]) -> list[Sample]:
        assert self.world is not None
        samples = []
        factor = self.world.autoencoder.downsample
        for number in map(int, numbers):
            height, width = (factor * side for side in self.grids[number].tolist())
            first = 3 * factor**2 * int(self.latent_starts[number])
            pixels = self.pixels[first : first + 3 * height * width].reshape(3, height, width)
            [(_, latents)] = encode_pictures([(0, pixels)], self.world, quiet=True)
            (text,) = encode_texts([self.captions[number]], self.world, quiet=True)
            samples.append(Sample(number, latents.float(), text.float()))
        return samples
