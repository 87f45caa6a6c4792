"""Samples of pre-training from shards of pictures (``experiments.prepare_data``), encoded by frozen models of any size."""

import fcntl
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from experiments.bank import Batch, FeatureBank
from experiments.miniature.world import Miniature
from experiments.pretrain_data import check_order
from lensmini.checkpoints import load_text_encoder
from lensmini.data import BatchPlan, Bucket, Sample, SampleIndex, ShardReader, read_picture, resize_and_crop
from lensmini.data.collate import Weighting
from lensmini.data.features import Features, FeatureStore, OnlineFeatures, Precision, write_features
from lensmini.data.plan import Mode
from lensmini.data.rolling import RollingFeatures
from lensmini.nn import LensConfig, from_uint8, load_autoencoder

__all__ = ["ShardBank", "ShardsConfig", "load_encoders"]

_PARTS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardsConfig:
    """Pictures in buckets with captions, as ``experiments.prepare_data`` writes them; both encoders frozen."""

    path: Path = Path("shards")
    """Folder of the shards: tars by bucket, shards.json and manifest.parquet."""
    held_out: Path | None = None
    """Another such folder, for the validation loss; none measures none."""
    buckets: tuple[Bucket, ...] = (Bucket(512, 512),)
    """Resolutions; pictures go to the nearest."""
    images_per_rank: tuple[int, ...] = (24,)
    """Images of a micro-batch: one number for all, or one for each base resolution (512, 768 and 1024), ascending."""
    num_ranks: int = 128
    """Micro-batches of a step, one on each of as many GPUs; fewer GPUs accumulate. The paper used 128 A100 of 80 GB."""
    mode: Mode = "bucket"
    """How micro-batches are filled: "bucket" (the paper: one bucket per rank and step), "packed" or "same_bucket"."""
    weighting: Weighting = "per_image"
    """What counts the same in the loss of a step; the paper does not state it."""
    text_dropout: float = 0.1
    """Share of samples whose text is masked as a whole; the paper does not state it."""
    mean_text_tokens: int = 150
    """Text tokens per caption that the cost estimate assumes: about 109 words."""
    text_encoder: str = "openai/gpt-oss-20b"
    """Language model, a folder or repository that transformers reads."""
    max_length: int = 512
    """Most tokens of a caption, template included."""
    autoencoder: str = "black-forest-labs/FLUX.2-dev"
    """Autoencoder, a folder or repository that diffusers reads."""
    encoder_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of both."""
    features: Literal["online", "rolling", "precomputed"] = "online"
    """When samples are encoded: when needed; for the next ``rolling_steps``, then thrown away; or once, into shards."""
    rolling_steps: int = 100
    """Steps that are encoded at a time with "rolling"."""
    precision: Precision = "bf16"
    """Of what is kept, with the last two: "bf16", "fp32" or "fp8"."""

    def __post_init__(self) -> None:
        check_order(self.num_slots, self.num_slots, self.text_dropout, self.mode, self.weighting)
        if not self.buckets or min(self.images_per_rank, default=0) < 1:
            raise ValueError("buckets, images_per_rank: expected at least one of each, and positive numbers")
        if len(self.images_per_rank) not in (1, len(self.bases)):
            raise ValueError(
                f"images_per_rank: expected one number or {len(self.bases)}, got {len(self.images_per_rank)}"
            )
        if self.mode == "packed" and len(self.images_per_rank) > 1:
            raise ValueError("images_per_rank: expected one number, the mean, in packed slots")
        if self.precision not in get_args(Precision) or self.rolling_steps < 1 or self.max_length < 1:
            raise ValueError("precision, rolling_steps, max_length: expected a known one and positive numbers")

    @property
    def num_slots(self) -> int:
        """Micro-batches of a step."""
        return self.num_ranks

    def base_of(self, bucket: Bucket) -> int:
        """The base resolution of a bucket: the multiple of 256 whose square is nearest."""
        return round((bucket.height * bucket.width) ** 0.5 / 256) * 256

    @property
    def bases(self) -> list[int]:
        """Base resolutions, ascending."""
        return sorted({self.base_of(bucket) for bucket in self.buckets})


def load_encoders(config: ShardsConfig, model: LensConfig, device: torch.device) -> Miniature:
    """The frozen text encoder and autoencoder that a run names, in the form of the miniature's."""
    dtype = getattr(torch, config.encoder_dtype)
    encoder = load_text_encoder(
        config.text_encoder,
        dtype=dtype,
        device=device,
        layers=model.selected_layer_index,
        max_length=config.max_length,
    )
    subfolder = None if Path(config.autoencoder, "config.json").exists() else "vae"
    autoencoder = load_autoencoder(config.autoencoder, dtype=dtype, device=device, subfolder=subfolder)
    key = f"{config.text_encoder} {list(model.selected_layer_index)} {config.max_length} {config.autoencoder}"
    return Miniature(encoder, autoencoder, key, {})


class ShardBank:
    """Samples of shards, numbered as their index sorts them: bucket by bucket.

    Args:
        shards: folder of the shards.
        config: of the data.
        world: both encoders.
        out: directory of the run, where the index and kept features go.
        device: of the encoders.

    Raises:
        ValueError: if the folder is not complete.
    """

    def __init__(self, shards: Path, config: ShardsConfig, world: Miniature, out: Path, device: torch.device) -> None:
        self.config, self.world, self.device, self.out = config, world, device, out
        self.reader = ShardReader(shards)
        folder = out / f"index-{shards.resolve().name}"
        out.mkdir(parents=True, exist_ok=True)
        with (out / ".index.lock").open("w") as lock:
            # One process of a machine builds it; on a disk without locks run once with one process first.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                SampleIndex.build(shards / "manifest.parquet", folder, config.buckets, small="upscale")
        self.index = SampleIndex(folder)
        if tuple(self.index.buckets) != tuple(config.buckets):
            raise ValueError(f"{folder}: expected an index of {len(config.buckets)} buckets, got one of others")
        self.spent = {"text_encoder": 0.0, "autoencoder": 0.0}
        self._source: list[Features] = []

    def plan(self, *, seed: int, model: LensConfig) -> BatchPlan:
        """The order of samples: one bucket a slot with its base's images, and each base in as many slots."""
        config, factor = self.config, self.world.autoencoder.downsample
        tokens = [(bucket.height // factor) * (bucket.width // factor) for bucket in config.buckets]
        options: dict[str, Any] = {"images_per_slot": config.images_per_rank[0]}
        if len(config.images_per_rank) > 1:
            base = [config.bases.index(config.base_of(bucket)) for bucket in config.buckets]
            options = {
                "images_per_slot": [config.images_per_rank[index] for index in base],
                "sources": base,
                "weights": config.images_per_rank,
            }
        lengths = self.index.columns["text_tokens"]
        return BatchPlan(
            np.diff(self.index.bucket_starts),
            tokens,
            num_slots=config.num_slots,
            seed=seed,
            mode=config.mode,
            text_tokens=int(lengths.max()),
            text_lengths=lengths,
            model=model,
            **options,
        )

    def order_id(self, plan: BatchPlan) -> str:
        """What a checkpoint keeps of the order: the plan's fingerprint and that of the samples."""
        return f"{plan.fingerprint()}-{self.index.fingerprint[:16]}"

    def prepare(self, plan: BatchPlan, step: int, rank: int, world_size: int) -> None:
        """Make the samples of a step readable: encode everything, its window, or nothing yet."""
        config = self.config
        if not self._source:
            if config.features == "online":
                self._source.append(OnlineFeatures(self._encode, precision=config.precision))
            elif config.features == "precomputed":
                self._source.append(_Parts(self, rank, world_size))
            else:

                def numbers_of(step: int) -> list[int]:
                    planned = plan.step(step)
                    slots = range(rank, plan.num_slots, world_size)
                    return [number for slot in slots for number in planned.slot(slot).tolist()]

                folder = self.out / "rolling" / f"{rank}-of-{world_size}"
                options: dict[str, Any] = {"steps": config.rolling_steps, "precision": config.precision}
                self._source.append(RollingFeatures(numbers_of, self._encode, folder, **options))
        if isinstance(self._source[0], RollingFeatures):
            self._source[0].prepare(step)

    def collate(self, pictures: Sequence[int], **options: Any) -> Batch:
        """As :meth:`FeatureBank.collate`."""
        return FeatureBank.collate(self, pictures, **options)  # pyright: ignore[reportArgumentType]

    def samples_of(self, pictures: Sequence[int]) -> list[Sample]:
        """Latents ``[c, h, w]`` float32 and text features of samples."""
        found = self._source[0].read(pictures) if self._source else self._encode(pictures)
        return [Sample(n, latents.float(), text.to(torch.bfloat16)) for n, latents, text in found]

    def by_grid(self) -> dict[tuple[int, int], list[int]]:
        """All samples by latent height and width."""
        factor, starts = self.world.autoencoder.downsample, self.index.bucket_starts.tolist()
        return {
            (bucket.height // factor, bucket.width // factor): list(range(first, end))
            for bucket, first, end in zip(self.config.buckets, starts, starts[1:], strict=False)
            if end > first
        }

    def captions(self, pictures: Sequence[int]) -> list[str]:
        """Captions of samples."""
        return [self._members(number)["txt"].decode() for number in pictures]

    def take_spent(self) -> dict[str, float]:
        """Seconds of both encoders since the last call."""
        spent, self.spent = self.spent, dict.fromkeys(self.spent, 0.0)
        return spent

    def _members(self, number: int) -> dict[str, bytes]:
        (row,) = self.index.lookup([number])["row"].tolist()
        return self.reader[row].members

    @torch.no_grad()
    def _encode(self, numbers: Sequence[int]) -> list[Sample]:
        """Read, crop and encode; those of one shape together."""
        numbers = [int(number) for number in numbers]
        buckets = self.index.bucket_of(numbers).tolist()
        captions, images = [], defaultdict(list)
        for position, (number, bucket) in enumerate(zip(numbers, buckets, strict=True)):
            members = self._members(number)
            captions.append(members["txt"].decode())
            (suffix,) = members.keys() - {"txt", "json"}
            images[bucket].append(
                (position, resize_and_crop(read_picture(members[suffix]).image, self.config.buckets[bucket]))
            )
        started, latents = time.perf_counter(), {}
        for same in images.values():
            pixels = from_uint8(torch.stack([image for _, image in same]).to(self.device))
            encoded = self.world.autoencoder.encode(pixels)
            latents |= {position: row for (position, _), row in zip(same, encoded, strict=True)}
        between = time.perf_counter()
        texts = self._texts(captions)
        self.spent["autoencoder"] += between - started
        self.spent["text_encoder"] += time.perf_counter() - between
        return [Sample(n, latents[at].float().cpu(), texts[at].float().cpu()) for at, n in enumerate(numbers)]

    def _texts(self, captions: Sequence[str]) -> list[Tensor]:
        features, mask = self.world.encoder(list(captions))
        stacked = torch.stack(features, dim=2)
        return [row[keep] for row, keep in zip(stacked, mask, strict=True)]


class _Parts:
    """Features of all samples in a fixed number of folders, written by whichever ranks there are."""

    def __init__(self, bank: ShardBank, rank: int, world_size: int) -> None:
        self.folder = bank.out / f"features-{bank.config.precision}"
        self.stores: dict[int, FeatureStore] = {}
        groups = list(bank.by_grid().values())
        made_by = {"samples": bank.index.fingerprint, "encoders": bank.world.key}
        for part in range(rank, _PARTS, world_size):
            mine = [members[part::_PARTS] for members in groups]
            if any(mine):
                write_features(
                    [members for members in mine if members],
                    bank._encode,  # noqa: SLF001
                    self._path(part),
                    precision=bank.config.precision,
                    made_by=made_by,
                )
        self.part_of = {number: place % _PARTS for members in groups for place, number in enumerate(members)}

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:02d}"

    def read(self, numbers: Sequence[int]) -> list[Sample]:
        """Samples of numbers; waits for a part that another rank is writing."""
        found = []
        for number in map(int, numbers):
            part = self.part_of[number]
            while part not in self.stores:
                if (self._path(part) / "features.json").exists():
                    self.stores[part] = FeatureStore(self._path(part))
                else:
                    time.sleep(1)
            found += self.stores[part].read([number])
        return found
