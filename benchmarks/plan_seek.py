"""Time to the first batch of a run that starts anywhere in the data.

``python -m benchmarks.plan_seek`` (about a minute; ``make peers`` once for the rows of mosaicml-streaming and webdataset).

100 million samples in the paper's 27 buckets, 24, 10 or 6 images a slot, 128 slots, one rank of 128. From nothing but the
numbers of samples, at 0, 10, 50, 90 and 99 % of the first epoch and half through the third, in turns, a fresh plan every time:

- plan and step: construct ``BatchPlan``, then ``step(k)``;
- step alone: ``step(k)`` of a plan that exists;
- plan and batch: construct ``BatchPlan`` and ``BucketBatchSampler``, and take the rank's first batch.

The claim is less than 5 ms for the last one at 90 %, on the slower of two mixes (as many samples in every bucket, or the web
mix), and constant: of the places' medians the largest at most 1.25 times the smallest.

The peers get fewer samples, and their times for 100 million are EXTRAPOLATED, in proportion to the samples: a rough guide, and
too little for torch (:mod:`benchmarks.plan_assign` times all of them). ``DistributedSampler`` permutes the epoch and keeps
no place. The rule of NeMo AutoModel's sampler is ours by its API reference (bucket after bucket, each shuffled, batches made
lazily, those before the place made and thrown away). mosaicml-streaming and webdataset run in their own environment, on data
sets of integers on the local disk (:mod:`benchmarks.plan_seek_peers`); they read the first sample as well, the others only
say which it is.
"""

import argparse
import itertools
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from benchmarks.plan_assign import IMAGES_PER_SLOT, SLOTS, Numbers, free_bytes, mixes, paper_plan, steps_of_epoch
from benchmarks.timing import interleaved, report
from lensmini.data.sampler import BucketBatchSampler

PLACES = {"0 %": 0.0, "10 %": 0.1, "50 %": 0.5, "90 %": 0.9, "99 %": 0.99, "third epoch": 2.5}
GOAL_MS, CONSTANT = 5.0, 1.25
WAYS = ("plan and step", "step alone", "plan and batch")
Row = dict[str, float]


def measure_plan(sizes: NDArray[np.int64], *, rounds: int) -> dict[str, Row]:
    """Median milliseconds of each way at each place."""
    existing = paper_plan(sizes)
    steps = {place: int(part * steps_of_epoch(existing)) for place, part in PLACES.items()}

    def plan_and_batch(step: int) -> list[int]:
        return next(iter(BucketBatchSampler(paper_plan(sizes), 0, SLOTS, step)))

    calls = (lambda step: paper_plan(sizes).step(step), existing.step, plan_and_batch)
    contestants: dict[str, Callable[[], object]] = {
        f"{way}/{place}": partial(call, step)
        for way, call in zip(WAYS, calls, strict=True)
        for place, step in steps.items()
    }
    seconds = interleaved(contestants, rounds=rounds)
    return {way: {place: 1e3 * seconds[f"{way}/{place}"] for place in PLACES} for way in WAYS}


def distributed_batch(num_samples: int, place: float) -> list[int]:
    """The next six indices of a rank at a place of torch's sampler: it makes its list, then what came before is skipped."""
    sampler = DistributedSampler(Numbers(num_samples), num_replicas=SLOTS, rank=0, shuffle=True, seed=0)
    skipped = int(place * num_samples / SLOTS)
    return list(itertools.islice(iter(sampler), skipped, skipped + 6))


def nemo_batches(
    buckets: Sequence[Sequence[int]], images: Sequence[int], *, seed: int, rank: int
) -> Iterator[list[int]]:
    """The rule of NeMo AutoModel's bucket sampler by its API reference, for one rank.

    Buckets in a shuffled order, all of one before the next; inside, samples shuffled by the seed and shared among the ranks;
    batches are made when asked for, and an incomplete one is dropped.
    """
    generator = torch.Generator().manual_seed(seed)
    for bucket in torch.randperm(len(buckets), generator=generator).tolist():
        members = buckets[bucket]
        shuffled = [members[index] for index in torch.randperm(len(members), generator=generator).tolist()]
        mine = shuffled[rank : len(shuffled) // SLOTS * SLOTS : SLOTS]
        for start in range(0, len(mine) - images[bucket] + 1, images[bucket]):
            yield mine[start : start + images[bucket]]


def nemo_batch(buckets: Sequence[Sequence[int]], place: float) -> list[int]:
    """The batch at a place, by making and dropping those before it."""
    ranks = [len(members) // SLOTS // images for members, images in zip(buckets, IMAGES_PER_SLOT, strict=True)]
    batches = nemo_batches(buckets, IMAGES_PER_SLOT, seed=0, rank=0)
    return next(itertools.islice(batches, int(place * sum(ranks)), None), [])


def measure_peers(num_samples: int, nemo_samples: int, *, rounds: int) -> dict[str, Row]:
    """Median milliseconds of torch's sampler and of NeMo's rule at some places."""
    starts = np.cumsum([0, *mixes(nemo_samples)["web"]]).tolist()
    buckets = [range(start, stop) for start, stop in itertools.pairwise(starts)]
    sampled = {place: PLACES[place] for place in ("0 %", "50 %", "90 %")}
    contestants: dict[str, Callable[[], object]] = {
        "torch/90 %": partial(distributed_batch, num_samples, 0.9),
        **{f"nemo/{place}": partial(nemo_batch, buckets, part) for place, part in sampled.items()},
    }
    seconds = interleaved(contestants, rounds=rounds, warmup=0)
    rows = {
        f"torch DistributedSampler, {num_samples / 1e6:g} million": {"90 %": 1e3 * seconds["torch/90 %"]},
        f"rule of NeMo, {nemo_samples / 1e6:g} million": {place: 1e3 * seconds[f"nemo/{place}"] for place in sampled},
    }
    return rows


def measure_installed(python: Path, *, samples: int, tar_samples: int) -> tuple[dict[str, Row], dict[str, str]]:
    """Rows of the peers in their own environment, with the samples each had; or why there are none."""
    if not python.exists():
        return {}, {"mosaicml-streaming": "not installed: make peers", "webdataset": "not installed: make peers"}
    with tempfile.TemporaryDirectory() as folder:
        module = "benchmarks.plan_seek_peers"
        sizes = [f"--samples={samples}", f"--tar-samples={tar_samples}"]
        try:
            done = subprocess.run(
                [python.absolute(), "-m", module, folder, *sizes],
                capture_output=True, text=True, timeout=60, check=True, cwd=Path(__file__).parents[1],
            )  # fmt: skip
        except (subprocess.SubprocessError, OSError) as error:
            return {}, {"mosaicml-streaming": f"failed: {error}", "webdataset": f"failed: {error}"}
    rows, missing = {}, {}
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        if "failed" in found:
            missing[name] = f"failed: {found['failed']}"
            continue
        title = f"{name} {found['version']}, {found['samples'] / 1e6:g} million"
        rows[title] = {f"{100 * float(place):g} %": 1e3 * value for place, value in found["seconds"].items()}
    return rows, missing


def extrapolated(rows: dict[str, Row], num_samples: int) -> Row:
    """Milliseconds at 90 % for another number of samples, in proportion; the name of a row ends with its own, in millions."""
    return {title: row["90 %"] * num_samples / 1e6 / float(title.split()[-2]) for title, row in rows.items()}


def show(rows: dict[str, Row], far: Row) -> None:
    """Print the table, in milliseconds."""
    print(f"{'milliseconds':46s}" + "".join(f"{place:>12s}" for place in PLACES) + f"{'extrapolated':>14s}")
    for title, row in rows.items():
        cells = "".join(f"{row[place]:12.3f}" if place in row else f"{'':12s}" for place in PLACES)
        print(f"{title:46s}{cells}" + (f"{far[title]:14.0f}" if title in far else ""), flush=True)


def rounded(row: Row) -> Row:
    """Four significant digits."""
    return {place: float(f"{value:.4g}") for place, value in row.items()}


def main(
    num_samples: int = 100_000_000, rounds: int = 41, *, peer_samples: int = 20_000_000, python: Path | None = None
) -> None:
    """Print the table and the result line."""
    ours = {
        f"{way}, {mix}": row
        for mix, sizes in mixes(num_samples).items()
        for way, row in measure_plan(sizes, rounds=rounds).items()
    }
    while peer_samples * 61 * 1.5 > free_bytes():  # what torch's list takes
        peer_samples //= 2
    peers = measure_peers(peer_samples, max(1, peer_samples // 5), rounds=3)
    installed, missing = measure_installed(
        python or Path(".venv-peers/bin/python"),
        samples=max(1000, peer_samples // 10),
        tar_samples=min(peer_samples, 40_000),
    )
    peers |= installed
    far = extrapolated(peers, num_samples)
    show({**ours, **peers}, far)
    for name, reason in missing.items():
        print(f"{name:46s} {reason}")

    claimed = max((title for title in ours if title.startswith(WAYS[2])), key=lambda title: ours[title]["90 %"])
    spread = {title: max(row.values()) / min(row.values()) for title, row in ours.items()}
    slowest = ours[claimed]["90 %"]
    print(f"claimed: {claimed}, {slowest:.2f} ms at 90 %; over places, largest over smallest: {rounded(spread)}")
    details = {
        "samples": num_samples,
        "rounds": rounds,
        "claimed": claimed,
        "milliseconds": {title: rounded(row) for title, row in {**ours, **peers}.items()},
        "largest_over_smallest": rounded(spread),
        "constant_goal": CONSTANT,
        "peers_extrapolated_ms_at_90": rounded(far),
        "peers_over_ours_extrapolated": rounded({title: value / slowest for title, value in far.items()}),
        "missing": missing,
    }
    holds = slowest < GOAL_MS and max(spread[title] for title in ours if title.startswith(WAYS[2])) <= CONSTANT
    report("plan_seek", ratio=slowest, goal=GOAL_MS, better="lower", holds=holds, details=details)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Milliseconds to the first batch of a run that starts anywhere")
    parser.add_argument("--samples", type=int, default=100_000_000, help="samples of the plan")
    parser.add_argument("--rounds", type=int, default=41, help="timed calls at each place")
    parser.add_argument(
        "--peer-samples", type=int, default=20_000_000, help="samples of torch's sampler; others get a part of it"
    )
    parser.add_argument("--peer-python", type=Path, default=Path(".venv-peers/bin/python"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    main(arguments.samples, arguments.rounds, peer_samples=arguments.peer_samples, python=arguments.peer_python)
