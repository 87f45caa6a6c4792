"""A bank of encoded samples: ragged text features, and one or more encoded pictures for each caption.

Axes: m pictures, n captions, T text tokens of all captions, k text layers, e text width, N tokens of all pictures, c channels.

Text and pictures are encoded once and then drawn from a memory-mapped file. A batch is a pure function of (seed, step):
which pictures, their order, and through their numbers their noise, time and text dropout. Pictures of one grid and one text
length are drawn in small groups, because the CPU runs equal neighbours as one.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lensmini.packed import Layout

__all__ = ["Batch", "FeatureBank", "random_stream", "save_bank"]


class Batch(NamedTuple):
    """Samples of one process and step, packed, with their own random numbers."""

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
    """Write a bank.

    Args:
        directory: where to.
        texts: for each caption ``[l_i, k, e]``.
        pictures: for each picture the number of its caption and its latent ``[c, h_i, w_i]``.
        captions: the words, kept beside for people.
    """
    grids = [(latent.shape[1], latent.shape[2]) for _, latent in pictures]
    tensors = {
        "text": torch.cat(list(texts)).to(torch.bfloat16),
        "text_lengths": torch.tensor([len(text) for text in texts]),
        "latents": torch.cat([latent.flatten(1).T for _, latent in pictures]).to(torch.float16),
        "grids": torch.tensor(grids),
        "caption_of": torch.tensor([caption for caption, _ in pictures]),
    }
    save_file(tensors, directory / "bank.safetensors")
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

    @classmethod
    def load(cls, directory: Path) -> "FeatureBank":
        """Map a bank written by :func:`save_bank` into memory."""
        tensors = load_file(Path(directory) / "bank.safetensors")
        starts = [
            torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
            for lengths in (tensors["text_lengths"], tensors["grids"].prod(1))
        ]
        return cls(tensors["text"], starts[0], tensors["latents"], starts[1], tensors["grids"], tensors["caption_of"])

    @property
    def num_pictures(self) -> int:
        """Pictures m."""
        return len(self.caption_of)

    def text_of(self, picture: int) -> Tensor:
        """``[l, k, e]`` text features of a picture's caption."""
        caption = int(self.caption_of[picture])
        return self.text[self.text_starts[caption] : self.text_starts[caption + 1]]

    def groups(self) -> dict[tuple[int, int, int], list[int]]:
        """Pictures by latent height, latent width and text length."""
        lengths = self.text_starts.diff()[self.caption_of]
        found: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        for index, ((height, width), length) in enumerate(zip(self.grids.tolist(), lengths.tolist(), strict=True)):
            found[height, width, length].append(index)
        return dict(found)

    def draw(
        self,
        groups: dict[tuple[int, int, int], list[int]],
        *,
        seed: int,
        step: int,
        batch_size: int,
        group_size: int,
        rank: int,
        world_size: int,
    ) -> list[tuple[int, int]]:
        """Pictures of one step for one process, as (slot in the global batch, picture).

        Each group starts with a picture drawn uniformly from the whole bank and is filled up with others of the same
        shape, or for a shape of fewer than ``group_size`` pictures with others of any such rare shape, so that every
        picture is equally likely. The global batch does not depend on ``world_size``.
        """
        rare = [picture for members in groups.values() if len(members) < group_size for picture in members]
        pools = {
            picture: members if len(members) >= group_size else rare
            for members in groups.values()
            for picture in members
        }
        chosen = []
        for number in range(rank, batch_size // group_size, world_size):
            stream = random_stream(seed, step, number)
            first = int(torch.randint(self.num_pictures, (), generator=stream))
            pool = pools[first]
            picks = torch.randperm(len(pool), generator=stream)[: group_size - 1].tolist()
            while len(picks) < group_size - 1:
                picks.append(int(torch.randint(len(pool), (), generator=stream)))
            pictures = [first, *(pool[pick] for pick in picks)]
            chosen += [(number * group_size + offset, picture) for offset, picture in enumerate(pictures)]
        return chosen

    def collate(self, slots: Sequence[tuple[int, int]], *, seed: int, step: int, text_dropout: float) -> Batch:
        """Pack pictures with noise, times and text dropout that depend on (seed, step, slot) alone."""
        rows = []
        for slot, picture in slots:
            stream = random_stream(seed, step, slot, 1)
            normal, keep = torch.randn((), generator=stream), torch.rand((), generator=stream) >= text_dropout
            latent = self.latents[self.latent_starts[picture] : self.latent_starts[picture + 1]].float()
            noise = torch.randn(latent.shape, generator=stream)
            text = self.text_of(picture)
            rows.append((latent, text if keep else text[:0], noise, normal, picture))
        # Dropped texts last within a shape, so that equal neighbours stay together.
        rows.sort(key=lambda row: (tuple(self.grids[row[4]].tolist()), len(row[1])), reverse=True)
        latents, texts, noises, normals, pictures = zip(*rows, strict=True)
        grids = self.grids[list(pictures)]
        layout = Layout.build(grids, text_lengths=[len(text) for text in texts])
        return Batch(torch.cat(latents), torch.cat(texts), layout, torch.cat(noises), torch.stack(normals), pictures)
