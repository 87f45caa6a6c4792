"""What a run would do on 8 to 1,024 GPUs, before any is rented: balance, padding, memory, tokens and days.

Reproduces the setting of arXiv 2605.21573, section 3.2 (24, 10 and 6 images a rank by resolution, 128 ranks), and puts
beside it slots of mixed shapes and one bucket per step. On a laptop, in seconds; no GPU, no pictures.

    python -m experiments.plan_report stage2                              the paper's 27 mixed resolutions
    python -m experiments.plan_report stage1                              the paper's 512x512 stage
    python -m experiments.plan_report packed                              stage 2 in packed slots under a cap of tokens
    python -m experiments.plan_report mixes                               four mixes of resolutions side by side
    python -m experiments.plan_report manifest --data.path samples.parquet        your own data
    python -m experiments.plan_report stage2 --cluster.memory-gb 141 --cluster.peak-tflops 989    on H200

Balance, padding, images and tokens are measured from the real plan, slot by slot (the order that training would see);
memory is counted from them by ``lensmini.cost``; seconds and days are a model with an assumed utilisation. Writes
``plan_report.json`` and ``plan_report.png`` into ``--run.out``.
"""

import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.plan_report_plot import plot_rows, print_report
from experiments.plan_report_rows import (
    ClusterConfig,
    PlanConfig,
    Source,
    TextLengths,
    report_rows,
)
from experiments.runs import provenance, write_json
from lensmini.data import LENS_1440_BUCKETS, Bucket, SampleIndex, make_buckets
from lensmini.data.manifest import Manifest
from lensmini.nn import LensConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """A size distribution in place of data; the paper states none, so all shares here are assumptions."""

    mixes: tuple[str, ...] = ("512+768+1024",)
    """Base resolutions that one run mixes, joined by "+"; several mixes are compared."""
    num_samples: int = 800_000_000
    """Samples in all."""
    base_shares: tuple[float, ...] = ()
    """Share of the samples that each base holds, in the order of the mix; empty: equal shares."""
    aspect_shares: tuple[float, ...] = (0.02, 0.07, 0.12, 0.13, 0.25, 0.17, 0.12, 0.10, 0.02)
    """Share of each aspect from 1:2 to 2:1 (9:16, 2:3, 3:4, 1:1, 4:3, 3:2, 16:9 between), in every base."""
    text_mean: float = 150.0
    """Mean text tokens of a caption: lognormal, before the cap."""
    text_spread: float = 0.5
    """Standard deviation of the logarithm of the text length."""
    text_cap: int = 415
    """Most text tokens: the released pipeline's 512 less the 97 of its template, which the model never sees."""

    def __post_init__(self) -> None:
        limits = {"num_samples": (1, 2**53), "text_cap": (1, 65_535), "text_mean": (1, 65_535), "text_spread": (0, 10)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"data.{name}: expected {least} to {most:,}, got {getattr(self, name)}")
        for name, count in (("base_shares", None), ("aspect_shares", 9)):
            shares = getattr(self, name)
            if (count and len(shares) != count) or (shares and (min(shares) < 0 or not 0 < sum(shares) < np.inf)):
                raise ValueError(f"data.{name}: expected {count or 'some'} shares, not negative, got {list(shares)}")
        if not self.mixes or len(set(self.mixes)) < len(self.mixes):
            raise ValueError(f"data.mixes: expected different mixes, got {list(self.mixes)}")
        for mix in self.mixes:
            if self.base_shares and len(parse_mix(mix)) != len(self.base_shares):
                raise ValueError(f"data.base_shares: expected one for each base of {mix}, got {list(self.base_shares)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestConfig:
    """Your own data: a Parquet table with the columns height, width and text_tokens."""

    path: tuple[Path, ...] = ()
    """Parquet files, a folder of them, or the folder of an index that was built before."""
    index: Path | None = None
    """Where to keep the index of these files, or where it was kept before; a temporary folder by default."""
    mix: str = "512+768+1024"
    """Base resolutions of the buckets, joined by "+"; an index has its own buckets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthConfig:
    """How long the run is and where the report goes."""

    out: Path = Path("runs/plan_report")
    """Folder for plan_report.json and plan_report.png."""
    steps: int = 400_000
    """Steps of the first mix and mode with plan.num_slots slots; all rows are priced for as many images."""
    images: int | None = None
    """Images of the whole run, instead of steps."""

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.images is not None and self.images < 1):
            raise ValueError(f"run: expected steps and images of at least 1, got {self.steps} and {self.images}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """One report."""

    data: SyntheticConfig | ManifestConfig = field(default_factory=SyntheticConfig)
    """The samples."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """How samples become slots and steps."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The machines."""
    model: LensConfig = field(default_factory=LensConfig)
    """The transformer."""
    run: LengthConfig = field(default_factory=LengthConfig)
    """Length and output."""


def stage2() -> ReportConfig:
    """The paper's mixed-resolution stage: 27 buckets, 24, 10 and 6 images a slot, each base in as many slots."""
    # A rank draws its bucket whatever the batch, so images are as 24 to 10 to 6 (bases equally often: not in the paper).
    plan = PlanConfig(images_per_slot=(24, 10, 6), weights=(24, 10, 6))
    return ReportConfig(plan=plan, run=LengthConfig(out=Path("runs/plan_report/stage2")))


def stage1() -> ReportConfig:
    """The paper's low-resolution stage: 512x512 only, 24 images a slot."""
    data = SyntheticConfig(mixes=("512",), aspect_shares=(0, 0, 0, 0, 1, 0, 0, 0, 0))
    plan = PlanConfig(images_per_slot=(24,))
    return ReportConfig(data=data, plan=plan, run=LengthConfig(out=Path("runs/plan_report/stage1")))


def packed() -> ReportConfig:
    """Stage 2 in packed slots under a cap: the paper's 24.6K image tokens and 24 captions; its own way beside it."""
    base = stage2()
    plan = replace(base.plan, modes=("bucket", "packed"), max_tokens=28_672)
    return replace(base, plan=plan, run=replace(base.run, out=Path("runs/plan_report/packed")))


def mixes() -> ReportConfig:
    """Four mixes of resolutions, from one base to four, with equally many images of each base."""
    data = SyntheticConfig(mixes=("1024", "512+1024", "256+512+1024", "512+768+1024+1440"))
    cluster = ClusterConfig(ranks=(8, 16, 32, 64, 128))
    run = LengthConfig(out=Path("runs/plan_report/mixes"), images=1_000_000_000)
    return ReportConfig(data=data, plan=PlanConfig(), cluster=cluster, run=run)


def manifest() -> ReportConfig:
    """Your own data, every sample once an epoch: --data.path FILE.parquet."""
    return ReportConfig(data=ManifestConfig(), run=LengthConfig(out=Path("runs/plan_report/manifest")))


PRESETS: tuple[Callable[[], ReportConfig], ...] = (stage2, stage1, packed, mixes, manifest)


def parse_mix(mix: str) -> list[int]:
    """The bases of ``"512+1024"``, in that order."""
    words = mix.split("+")
    if not all(word.strip().isdigit() and int(word) for word in words) or len(set(map(int, words))) != len(words):
        raise ValueError(f'mix: expected different base resolutions joined by "+", got {mix!r}')
    return [int(word) for word in words]


def buckets_of(base: int) -> tuple[Bucket, ...]:
    """The nine canvases of a base: the paper's for 512, 768 and 1024, the released pipeline's for 1440."""
    return LENS_1440_BUCKETS if base == 1440 else make_buckets(base, multiple=32 if base >= 512 else 16)


def synthetic_source(data: SyntheticConfig, mix: str, seed: int) -> Source:
    """One mix of a synthetic distribution: sizes by shares, captions by hashing the sample's number."""
    bases = parse_mix(mix)
    shares = np.outer(data.base_shares or [1.0] * len(bases), data.aspect_shares).reshape(-1)
    # Rounding the sums, not the parts, keeps the total exact.
    edges = np.round(np.cumsum(shares) / shares.sum() * data.num_samples).astype(np.int64)
    text = TextLengths(data.num_samples, mean=data.text_mean, spread=data.text_spread, cap=data.text_cap, seed=seed)
    return Source(
        name=mix,
        sizes=np.diff(edges, prepend=0),
        tokens=np.array([bucket.tokens() for base in bases for bucket in buckets_of(base)]),
        bases=tuple(bases),
        labels=np.repeat(np.arange(len(bases)), 9),
        text_lengths=text,
        text_cap=data.text_cap,
    )


def base_of(bucket: Bucket, bases: Sequence[int]) -> int:
    """Place of the base whose square is nearest in area; at most half as much again is near.

    Example:
        >>> base_of(Bucket(544, 1088), [512, 768, 1024])
        1
    """
    ratios = [bucket.height * bucket.width / base**2 for base in bases]
    place = min(range(len(bases)), key=lambda place: abs(math.log(ratios[place])))
    if not 1 / 1.5 <= ratios[place] <= 1.5:
        raise ValueError(
            f"data.mix: expected a base near each bucket of the index in area, got {bucket.height}x{bucket.width} "
            f"among the buckets and the bases {list(bases)}"
        )
    return place


def kept_index(data: ManifestConfig) -> SampleIndex | None:
    """The index that was built before, if there is one; an index of other files is refused."""
    indices = [path for path in data.path if (path / "index.json").exists()]
    if indices:
        if len(data.path) > 1 or data.index not in (None, *indices):
            raise ValueError(f"data.path: expected the index {indices[0]} alone, got other paths or data.index as well")
        return SampleIndex(indices[0])
    if data.index is None or not (data.index / "index.json").exists():
        return None
    index, given = SampleIndex(data.index), Manifest.inspect(data.path)
    names = [file.name for file in given.files]
    for was, now in zip_longest(index.files, zip(names, given.rows, strict=True)):
        if was != now:
            had, has = (f"{file[0]} of {file[1]:,} rows" if file else "no more files" for file in (was, now))
            raise ValueError(f"data.index: {data.index} was built from {had} where data.path has {has}; name another")
    return index


@contextmanager
def manifest_source(data: ManifestConfig) -> Iterator[Source]:
    """The samples of a manifest, through an index that is opened, kept or temporary."""
    if not data.path:
        raise ValueError("data.path: expected Parquet files, a folder of them or an index, got none")
    missing = [str(path) for path in data.path if not path.exists()]
    if missing:
        raise FileNotFoundError(f"data.path: {', '.join(missing)}: no such file or folder")
    bases = parse_mix(data.mix)
    with tempfile.TemporaryDirectory(prefix="plan_report-") as scratch:
        index, came = kept_index(data), "from"
        if index is None:
            buckets = [bucket for base in bases for bucket in buckets_of(base)]
            folder, came = data.index or Path(scratch) / "index", "made in"
            index = SampleIndex.build(data.path, folder, buckets, small="drop", invalid="drop")
        left_out = ", ".join(f"{count:,} {cause}" for cause, count in index.left_out.items()) or "nothing"
        text = index.columns["text_tokens"]
        yield Source(
            name=", ".join(path.name for path in data.path),
            sizes=np.diff(index.bucket_starts),
            tokens=np.array([bucket.tokens() for bucket in index.buckets]),
            bases=tuple(bases),
            labels=np.array([base_of(bucket, bases) for bucket in index.buckets]),
            text_lengths=text,
            text_cap=int(text.max()),
            note=f"{len(index):,} samples, left out {left_out}; index {came} {index.folder}",
        )


def check_ranks(cluster: ClusterConfig, num_slots: int) -> None:
    """Refuse rank counts that would leave some ranks idle or part of the training state without a home.

    Example:
        >>> check_ranks(ClusterConfig(ranks=(48,)), 128)
        Traceback (most recent call last):
        ValueError: cluster.ranks: expected divisors of plan.num_slots = 128, or more ranks than slots, got 48
    """
    for ranks in cluster.ranks:
        if ranks < num_slots and num_slots % ranks:
            raise ValueError(
                f"cluster.ranks: expected divisors of plan.num_slots = {num_slots}, or more ranks than slots, got {ranks}"
            )
        if ranks % cluster.shard_over:
            raise ValueError(
                f"cluster.ranks: expected multiples of cluster.shard_over = {cluster.shard_over}, got {ranks}"
            )


def make_report(config: ReportConfig) -> dict[str, Any]:
    """Measure all mixes, modes and rank counts: ``rows``, and ``notes`` for the reader."""
    check_ranks(config.cluster, config.plan.num_slots)
    rows, notes, steps, images = [], [], config.run.steps, config.run.images
    if isinstance(config.data, ManifestConfig):
        with manifest_source(config.data) as source:
            rows += report_rows(source, config.plan, config.cluster, config.model, steps=steps, images=images)
            notes.append(source.note)
    else:
        for mix in config.data.mixes:
            source = synthetic_source(config.data, mix, config.plan.seed)
            rows += report_rows(source, config.plan, config.cluster, config.model, steps=steps, images=images)
            images = rows[0]["images_of_run"]
    for (mix, mode), group in groupby(rows, key=lambda row: (row["mix"], row["mode"])):
        epochs = ", ".join(f"{base}: {value:.2f}" for base, value in next(group)["epochs"].items())
        notes.append(f"epochs of the run by base, {mix} {mode}: {epochs}")
    return {"rows": rows, "notes": [*notes, *_legend(config, rows)]}


def _legend(config: ReportConfig, rows: Sequence[dict[str, Any]]) -> list[str]:
    cluster, first = config.cluster, rows[0]
    share = f"{100 * first['encoder_share']:.0f} % of the work in the first row"
    encoders = f"online ({share})" if cluster.encoders_online else "precomputed"
    words = {
        "bound": "of the fullest slot that can be (all captions the longest; under a cap, all tokens of the worst shape)",
        "measured": 'where ">" stands, of the fullest slot in the steps measured, which a longer run may exceed',
    }
    fullest = ", or, ".join(words[kind] for kind in sorted({row["memory_is"] for row in rows}))
    slowed = sorted({row["ranks"] for row in rows if row["communication_seconds"] > row["compute_seconds"]})
    return [
        f"measured from the plan over {config.plan.steps} steps: images, tokens, balance (useful FLOPs / ranks x slowest, "
        "ranks wait after every micro-step), worst step, padding if a slot were padded to its longest, fullest slot",
        f"counted: GB = {first['fixed_gb']:.1f} fixed (float32 weights, gradients, moments and average"
        f"{', encoder weights' if cluster.encoders_online else ''}, over {cluster.shard_over} ranks; "
        f"{cluster.reserve_gb:g} in reserve) + activations, recomputing nothing / norms and products / blocks, {fullest}; "
        f"the least that fits into {cluster.memory_gb:g} GB is chosen",
        f"modelled: seconds of the slowest rank at {100 * cluster.mfu:.0f} % of {cluster.peak_tflops:g} TFLOP/s, a fourth "
        f"forward where blocks are recomputed, encoders {encoders}, or of the communication if that takes longer; MFU "
        "counts the transformer's useful FLOPs only",
        f"days and GPU hours are for {first['images_of_run']:,.0f} images in every row; more ranks than "
        f"{config.plan.num_slots} slots means more slots, so a larger step",
        *([f"communication takes longer than computing on {slowed} ranks"] if slowed else []),
    ]


def main(config: ReportConfig) -> dict[str, Any]:
    """Measure, print, write and plot."""
    start = time.perf_counter()
    report = make_report(config)
    print_report(report)
    config.run.out.mkdir(parents=True, exist_ok=True)
    write_json(config.run.out / "plan_report.json", {"config": config, **report, "provenance": provenance()})
    plot_rows(report["rows"], config.run.out / "plan_report.png", memory_gb=config.cluster.memory_gb)
    print(f"{config.run.out}/plan_report.json and .png, {time.perf_counter() - start:.1f} s", flush=True)
    return report


def cli(arguments: Sequence[str] | None = None) -> None:
    """Read a preset and its overrides from the command line; what a person can mend ends in one line."""
    presets = {make.__name__: (make.__doc__ or "", make()) for make in PRESETS}
    try:
        main(tyro.extras.overridable_config_cli(presets, args=arguments, prog="python -m experiments.plan_report"))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"plan_report: {error}") from None


if __name__ == "__main__":
    cli(sys.argv[1:])
