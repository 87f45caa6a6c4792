"""How many samples a second get their place: images to buckets, and samples to steps.

``python -m benchmarks.plan_assign`` (about a minute; 5 GB for a moment, for the peer's order of 100 million).

Three tables, all in million samples a second, on one thread:

a. Images to buckets: ``assign_buckets`` on sizes of the web mix of :mod:`benchmarks.plan_build`, against one call per image of
   the documented rules of kohya, NovelAI, PixArt and Sana, and NeMo (:mod:`benchmarks.size_rules`, ours by their documents),
   and against plain numpy with one table of aspects.
b. The order in mode "bucket": ``BatchPlan.assign`` in blocks of steps all over the first epoch, against torch's
   ``DistributedSampler``, which permutes the whole epoch before it gives its first index, and against lists filled in order
   and emitted when full (the PixArt rule, with buckets known and with ratios looked up), which do not pay for a shuffle.
c. The same in mode "packed", balanced by FLOPs with a text length for every sample: slots are dealt one sample at a time.

The claim is 20 million samples a second for blocks of 256 steps in mode "bucket": 100 million samples, the paper's 27 buckets
and 24, 10 or 6 images a slot, 128 slots, and of two mixes the slower: as many samples in every bucket, or the web mix. The
floor is ``permute`` called once for as many positions, without which no sample has a place.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler

from benchmarks.plan_build import ASPECTS, SHARES, PeakMemory
from benchmarks.size_rules import Rule, kohya_rule, nemo_rule, novelai_rule, pixart_rule, sdxl_sizes
from benchmarks.timing import interleaved, report
from lensmini.data.buckets import LENS_BUCKETS, assign_buckets
from lensmini.data.permute import permute
from lensmini.data.plan import BatchPlan
from lensmini.nn import LensConfig

IMAGES_PER_SLOT = [24] * 9 + [10] * 9 + [6] * 9
SLOTS = 128
GOAL = 20.0


def plain_numpy(heights: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Nearest log aspect of one table by bisection: a line of numpy, without bases or the check for small images."""
    aspects = np.sort(np.log([bucket.aspect for bucket in LENS_BUCKETS[18:]]))
    return np.searchsorted((aspects[1:] + aspects[:-1]) / 2, np.log(widths / heights))


def fill_lists(order: Sequence[int], bucket_of: Callable[[int], int], images: Sequence[int]) -> Iterator[list[int]]:
    """The PixArt rule for batches: samples in order into the list of their bucket, which is emitted when full."""
    lists: list[list[int]] = [[] for _ in images]
    for sample in order:
        bucket = bucket_of(sample)
        lists[bucket].append(sample)
        if len(lists[bucket]) == images[bucket]:
            yield lists[bucket]
            lists[bucket] = []


def web_sizes(num_samples: int, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Heights and widths of the assumed web mix."""
    rng = np.random.default_rng(seed)
    area = np.exp(rng.normal(np.log(1.5e6), 0.8, num_samples))
    aspect = rng.choice(ASPECTS, num_samples, p=SHARES) * np.exp(rng.normal(0, 0.03, num_samples))
    heights, widths = np.sqrt(area / aspect), np.sqrt(area * aspect)
    return np.clip(heights, 16, 20_000).astype(np.int64), np.clip(widths, 16, 20_000).astype(np.int64)


def paper_plan(sizes: NDArray[np.int64], *, seed: int = 0) -> BatchPlan:
    """The published run: 27 buckets, 24, 10 or 6 images a slot, 128 slots."""
    tokens = [bucket.tokens() for bucket in LENS_BUCKETS]
    return BatchPlan(sizes, tokens, num_slots=SLOTS, images_per_slot=IMAGES_PER_SLOT, seed=seed)


def mixes(num_samples: int) -> dict[str, NDArray[np.int64]]:
    """Samples of each of the 27 buckets: as many in each, and as in the web mix."""
    heights, widths = web_sizes(200_000)
    found = assign_buckets(heights, widths, LENS_BUCKETS, small="drop")
    shares = np.bincount(found[found >= 0], minlength=len(LENS_BUCKETS)) / (found >= 0).sum()
    even = np.full(len(LENS_BUCKETS), num_samples // len(LENS_BUCKETS))
    return {"even": even, "web": np.ceil(shares * num_samples).astype(np.int64)}


def steps_of_epoch(plan: BatchPlan) -> int:
    """Steps in which about every sample comes once."""
    return max(1, int(plan.sizes.sum() / plan.report(16).images))


class Walk:
    """Asks for blocks of steps all over the first epoch, and remembers how many samples it got."""

    def __init__(self, plan: BatchPlan, block: int) -> None:
        self.plan, self.block, self.calls, self.samples = plan, block, 0, 0
        self.span = max(1, steps_of_epoch(plan) - block)

    def __call__(self) -> None:
        # The golden section spreads any number of calls evenly.
        start = int(self.calls * 0.6180339887 % 1 * self.span)
        samples, _ = self.plan.assign(start, start + self.block)
        self.calls, self.samples = self.calls + 1, self.samples + len(samples)

    @property
    def mean(self) -> float:
        return self.samples / self.calls


class Numbers(Dataset[int]):
    """A data set of which only the length matters."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> int:
        return index


def distributed_order(num_samples: int) -> None:
    """One rank's whole list from torch's sampler: it has ordered all samples when the first comes."""
    sampler = DistributedSampler(Numbers(num_samples), num_replicas=SLOTS, rank=0, shuffle=True, seed=0)
    next(iter(sampler))


def free_bytes() -> int:
    """Memory that can be had without swapping."""
    with open("/proc/meminfo") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))


def rates(contestants: dict[str, tuple[Callable[[], object], float]], *, rounds: int) -> dict[str, float]:
    """Million samples a second of each contestant, given what to call and how many samples a call has."""
    seconds = interleaved({name: call for name, (call, _) in contestants.items()}, rounds=rounds, warmup=1)
    return {name: contestants[name][1] / seconds[name] / 1e6 for name in contestants}


def show(title: str, cells: dict[str, float], ours: str) -> dict[str, float]:
    """Print a table; returns how many times faster ours is than each of the others."""
    print(f"\n{title:62s} {'million/s':>10s} {'ours over it':>13s}")
    over = {name: cells[ours] / rate for name, rate in cells.items() if name != ours}
    for name, rate in cells.items():
        print(f"  {name:60s} {rate:10.3f}" + (f" {over[name]:13.2f}" if name in over else ""), flush=True)
    return over


def measure_buckets(num_images: int, *, rounds: int) -> dict[str, float]:
    """Table a."""
    heights, widths = web_sizes(num_images)
    few = min(num_images, 30_000)
    pairs = list(zip(widths[:few].tolist(), heights[:few].tolist(), strict=True))
    rules = {
        "rule of kohya, by its documentation": kohya_rule(),
        "rule of NovelAI, by its documentation": novelai_rule(),
        "rule of PixArt and Sana, by their papers": pixart_rule(),
        "rule of NeMo, by its documentation": nemo_rule(),
    }

    def each(rule: Rule) -> Callable[[], object]:
        return lambda: [rule(width, height) for width, height in pairs]

    contestants: dict[str, tuple[Callable[[], object], float]] = {
        "assign_buckets": (lambda: assign_buckets(heights, widths, LENS_BUCKETS, small="drop"), num_images),
        "numpy, one table of nine aspects": (lambda: plain_numpy(heights, widths), num_images),
        **{name: (each(rule), few) for name, rule in rules.items()},
    }
    return rates(contestants, rounds=rounds)


def measure_order(plan: BatchPlan, mix: str, *, rounds: int, blocks: Sequence[int]) -> dict[str, float]:
    """The plan's part of table b or c; a call is warmed up once and asks for another part of the epoch every time."""
    walks = {f"plan, {mix}, blocks of {block}": Walk(plan, block) for block in blocks}
    seconds = interleaved(walks, rounds=rounds, warmup=1)
    return {name: walk.mean / seconds[name] / 1e6 for name, walk in walks.items()}


def measure_peers(num_samples: int, block_samples: int, *, rounds: int) -> dict[str, float]:
    """The peers' part of table b, and the floor."""
    some = min(num_samples, 10_000_000)
    heights, widths = web_sizes(min(num_samples, 100_000), seed=1)
    found = assign_buckets(heights, widths, LENS_BUCKETS, small="upscale").tolist()
    pairs, order, rule = list(zip(widths.tolist(), heights.tolist(), strict=True)), range(len(found)), pixart_rule()
    numbers = {size: index for index, size in enumerate(sdxl_sizes())}

    def looked_up(sample: int) -> int:
        return numbers[rule(*pairs[sample])]

    few = range(min(len(found), 30_000))
    positions = np.arange(min(block_samples, num_samples))
    contestants: dict[str, tuple[Callable[[], object], float]] = {
        "floor: permute of one bucket, a block of 256": (lambda: permute(positions, num_samples, 7), len(positions)),
        f"torch DistributedSampler, {some / 1e6:g} million": (lambda: distributed_order(some), some),
        "lists filled in order, bucket known": (
            lambda: sum(map(len, fill_lists(order, found.__getitem__, IMAGES_PER_SLOT))),
            len(order),
        ),
        "lists filled in order, ratio looked up (PixArt rule)": (
            lambda: sum(map(len, fill_lists(few, looked_up, [16] * len(numbers)))),
            len(few),
        ),
    }
    return rates(contestants, rounds=rounds)


def measure_whole(num_samples: int) -> dict[str, object]:
    """Torch's sampler over all samples, once, if there is memory for it: about 61 bytes a sample."""
    if num_samples * 61 * 1.5 > free_bytes():
        return {"skipped": f"needs about {num_samples * 61 / 1e9:.1f} GB, {free_bytes() / 1e9:.1f} GB are free"}
    with PeakMemory() as memory:
        start = time.perf_counter()
        distributed_order(num_samples)
        seconds = time.perf_counter() - start
    rate = num_samples / seconds / 1e6
    return {"million_per_second": round(rate, 3), "seconds": round(seconds, 2), "peak_bytes": memory.growth}


def packed_plan(sizes: NDArray[np.int64]) -> BatchPlan:
    """Eight images a slot on average, balanced by the FLOPs of the released model, a text length for every sample."""
    rng = np.random.default_rng(2)
    drawn = np.clip(rng.lognormal(np.log(150), 0.4, 1_000_003), 8, 400).astype(np.uint16)
    tokens = [bucket.tokens() for bucket in LENS_BUCKETS]
    return BatchPlan(
        sizes,
        tokens,
        num_slots=SLOTS,
        images_per_slot=8,
        seed=0,
        mode="packed",
        text_tokens=400,
        text_lengths=np.resize(drawn, int(sizes.sum())),
        model=LensConfig(),
    )


def rounded(cells: dict[str, float]) -> dict[str, float]:
    """Four significant digits."""
    return {name: float(f"{value:.4g}") for name, value in cells.items()}


def main(num_samples: int = 100_000_000, rounds: int = 7) -> None:
    """Print the three tables and the result line."""
    buckets = measure_buckets(min(num_samples, 2_000_000), rounds=rounds)
    over_buckets = show("a. images to buckets", buckets, "assign_buckets")

    sizes = mixes(num_samples)
    plans = {mix: paper_plan(counts) for mix, counts in sizes.items()}
    order: dict[str, float] = {}
    for mix, plan in plans.items():
        order |= measure_order(plan, mix, rounds=3 * rounds, blocks=(1, 16, 256, 1024))
    block_samples = int(256 * plans["web"].report(16).images)
    claimed = min((f"plan, {mix}, blocks of 256" for mix in plans), key=order.__getitem__)
    order |= measure_peers(num_samples, block_samples, rounds=rounds)
    over_order = show('b. the order, mode "bucket"', order, claimed)
    whole = measure_whole(num_samples)
    print(f"  torch DistributedSampler, all {num_samples / 1e6:g} million, once: {whole}")

    packed: dict[str, float] = {}
    for mix, counts in sizes.items():
        packed |= measure_order(packed_plan(counts), mix, rounds=rounds, blocks=(1, 16, 64))
    names = {name.replace("plan", "packed"): rate for name, rate in packed.items()}
    show('c. the order, mode "packed" with FLOPs', {claimed: order[claimed], **names}, claimed)

    details = {
        "samples": num_samples,
        "rounds": rounds,
        "claimed": claimed,
        "buckets": rounded(buckets),
        "assign_buckets_over": rounded(over_buckets),
        "order": rounded(order),
        "claimed_over": rounded(over_order),
        "distributed_sampler_whole": whole,
        "packed": rounded(names),
    }
    ratio = order[claimed]
    report("plan_assign", ratio=ratio, goal=GOAL, better="higher", holds=ratio >= GOAL, details=details)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Million samples a second that get their bucket and their place")
    parser.add_argument("--samples", type=int, default=100_000_000, help="samples of the plan")
    parser.add_argument(
        "--rounds", type=int, default=7, help="timed calls of each contestant; three times that for the plan"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    main(arguments.samples, arguments.rounds)
