"""A bank of encoded samples: ragged text features, and one or more encoded pictures for each caption.

Axes: m pictures, n captions, T text tokens of all captions, k text layers, e text width, N tokens of all pictures, c channels.

Text and pictures are encoded once and then drawn from a memory-mapped file, where pictures are sorted by grid. A step is a
pure function of (seed, step): a :class:`BatchPlan` says which pictures, and through their numbers follow their noise, time
and text dropout.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from lensmini.data import BatchPlan, Sample, collate_samples
from lensmini.data.plan import Mode
from lensmini.nn import LensConfig
from lensmini.packed import Layout

__all__ = ["Batch", "FeatureBank", "random_stream", "save_bank"]


class Batch(NamedTuple):
    """Samples of one slot of a step, packed, with their own random numbers."""

    image_tokens: Tensor
    """``[N, c]`` float32 clean latents."""
    text_tokens: Tensor
    """``[M, k, e]``; samples whose text was dropped have none."""
    layout: Layout
    noise: Tensor
    """``[N, c]`` float32."""
    normal: Tensor
    """``[b]`` standard normal numbers from which the times are made."""
    pictures: tuple[int, ...]
    """Numbers of the pictures in the bank."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        if device.type == "cpu":
            return self
        moved = [part.to(device, non_blocking=True) for part in (self.image_tokens, self.text_tokens)]
        random = [part.to(device, non_blocking=True) for part in (self.noise, self.normal)]
        return Batch(moved[0], moved[1], self.layout.to(device), random[0], random[1], self.pictures)


def random_stream(*key: int) -> torch.Generator:
    """A generator that depends on all numbers of the key and on nothing else."""
    state = 0x9E3779B97F4A7C15
    for number in key:
        state = (state ^ (number & (2**64 - 1))) * 0xBF58476D1CE4E5B9 % 2**64
        state ^= state >> 29
        state = state * 0x94D049BB133111EB % 2**64
        state ^= state >> 32
    return torch.Generator().manual_seed(state)


def save_bank(
    directory: Path, texts: Sequence[Tensor], pictures: Sequence[tuple[int, Tensor]], captions: Sequence[str]
) -> None:
    """Write a bank; pictures are sorted by grid and keep their order otherwise.

    Args:
        directory: where to.
        texts: for each caption ``[l_i, k, e]``.
        pictures: for each picture the number of its caption and its latent ``[c, h_i, w_i]``.
        captions: the words, kept beside for people.
    """
    pictures = sorted(pictures, key=lambda picture: tuple(picture[1].shape[1:]))
    grids = [(latent.shape[1], latent.shape[2]) for _, latent in pictures]
    tensors = {
        "text": torch.cat(list(texts)).to(torch.bfloat16),
        "text_lengths": torch.tensor([len(text) for text in texts]),
        "latents": torch.cat([latent.flatten(1).T for _, latent in pictures]).to(torch.float16),
        "grids": torch.tensor(grids),
        "caption_of": torch.tensor([caption for caption, _ in pictures]),
    }
    file = directory / "bank.safetensors"
    save_file(tensors, file)
    with file.open("rb") as stream:
        (directory / "sha256.txt").write_text(hashlib.file_digest(stream, "sha256").hexdigest() + "\n")
    (directory / "captions.txt").write_text("\n".join(caption.replace("\n", " ") for caption in captions) + "\n")


@dataclass(frozen=True, eq=False)
class FeatureBank:
    """Encoded samples that batches are drawn from."""

    text: Tensor
    text_starts: Tensor
    latents: Tensor
    latent_starts: Tensor
    grids: Tensor
    caption_of: Tensor
    digest: str = ""
    """Hash of the file, made when it was written."""

    @classmethod
    def load(cls, directory: Path) -> "FeatureBank":
        """Map a bank written by :func:`save_bank` into memory."""
        tensors = load_file(Path(directory) / "bank.safetensors")
        digest = (Path(directory) / "sha256.txt").read_text().strip()
        starts = [
            torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
            for lengths in (tensors["text_lengths"], tensors["grids"].prod(1))
        ]
        latents, grids = tensors["latents"], tensors["grids"]
        return cls(tensors["text"], starts[0], latents, starts[1], grids, tensors["caption_of"], digest)

    @property
    def num_pictures(self) -> int:
        """Pictures m."""
        return len(self.caption_of)

    def prepare(self, plan: BatchPlan, step: int, rank: int, world_size: int) -> None:
        """Make the samples of a step readable: nothing to do, where all are stored."""

    def samples_of(self, pictures: Sequence[int]) -> list[Sample]:
        """Latents ``[c, h, w]`` float32 and text features of pictures."""
        samples = []
        for picture in pictures:
            tokens = self.latents[self.latent_starts[picture] : self.latent_starts[picture + 1]].float()
            latents = rearrange(tokens, "(h w) c -> c h w", h=int(self.grids[picture, 0]))
            samples.append(Sample(picture, latents, self.text_of(picture)))
        return samples

    def text_of(self, picture: int) -> Tensor:
        """``[l, k, e]`` text features of a picture's caption."""
        caption = int(self.caption_of[picture])
        return self.text[self.text_starts[caption] : self.text_starts[caption + 1]]

    @property
    def text_lengths(self) -> Tensor:
        """``[m]`` text tokens of each picture's caption."""
        return self.text_starts.diff()[self.caption_of]

    def plan(
        self, *, batch_size: int, num_slots: int, mode: Mode = "packed", seed: int = 0, model: LensConfig | None = None
    ) -> BatchPlan:
        """The order of pictures: grids are the buckets, and a plan's sample numbers are pictures of the bank.

        Args:
            batch_size: images of a step.
            num_slots: micro-batches of a step.
            mode: how they are filled (:class:`BatchPlan`).
            seed: of the order.
            model: sizes that FLOPs are counted for.

        Raises:
            ValueError: if ``num_slots`` does not divide ``batch_size``.
        """
        if num_slots < 1 or batch_size % num_slots:
            raise ValueError(f"batch_size: expected a multiple of num_slots = {num_slots}, got {batch_size}")
        grids, sizes = torch.unique_consecutive(self.grids, dim=0, return_counts=True)
        lengths = self.text_lengths.numpy()
        return BatchPlan(
            sizes.numpy(),
            grids.prod(1).numpy(),
            num_slots=num_slots,
            seed=seed,
            mode=mode,
            images_per_slot=batch_size // num_slots,
            text_tokens=int(lengths.max()),
            text_lengths=lengths,
            model=model,
        )

    def order_id(self, plan: BatchPlan) -> str:
        """What a checkpoint keeps of the order of samples: the plan's fingerprint and that of the samples themselves."""
        return f"{plan.fingerprint()}-{self.digest[:16]}"

    def by_grid(self) -> dict[tuple[int, int], list[int]]:
        """Pictures by latent height and width."""
        found: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, (height, width) in enumerate(self.grids.tolist()):
            found[height, width].append(index)
        return dict(found)

    def collate(
        self,
        pictures: Sequence[int],
        *,
        seed: int,
        step: int,
        text_dropout: float,
        repeats: Sequence[int] | None = None,
    ) -> Batch:
        """Pack pictures with noise, times and text dropout that depend on (seed, step, picture) alone.

        Args:
            pictures: numbers of the pictures.
            seed: of the run.
            step: of the run.
            text_dropout: share of texts to leave out.
            repeats: how often each picture came before in the step (``PlannedStep.repeats``); never by default.
        """
        rows, found = [], self.samples_of(pictures)
        for sample, repeat in zip(found, [0] * len(pictures) if repeats is None else repeats, strict=True):
            picture, latents, text = sample
            stream = random_stream(seed, step, picture, repeat)
            normal, keep = torch.randn((), generator=stream), torch.rand((), generator=stream) >= text_dropout
            noise = torch.randn(latents[0].numel(), len(latents), generator=stream)
            rows.append((Sample(picture, latents, text if keep else text[:0]), noise, normal))
        # Equal neighbours run as one on a CPU. Dropped texts come last within a grid, so that they stay together.
        rows.sort(key=lambda row: (tuple(row[0].latents.shape), len(row[0].text_tokens)), reverse=True)
        samples, noises, normals = zip(*rows, strict=True)
        packed = collate_samples(samples)
        return Batch(
            packed.image_tokens,
            packed.text_tokens,
            packed.layout,
            torch.cat(noises),
            torch.stack(normals),
            tuple(packed.samples.tolist()),
        )
