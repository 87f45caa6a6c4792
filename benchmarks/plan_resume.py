"""Samples that an interrupted run gets wrong, after one, two and three resumes and from 8 to 4 to 16 ranks.

``python -m benchmarks.plan_resume`` (about a minute, most of it the peers' own processes).

24 steps of 16 micro-batches (64 images, or as many as a rule's batches hold), the same global batch at any number of
ranks: fewer ranks accumulate more. A sample is wrong if the uninterrupted run on 8 ranks shows it in a step and the
interrupted one does not show it in that step; for ours alone it must also be in the same micro-batch at the same place.
Nobody is charged for the order inside a step otherwise. After the first interruption come 19 steps (1,216 images), 17 (1,088)
where the number of ranks changes.

* Ours: ``BucketBatchSampler`` in torch's ``DataLoader``, one for each rank, in this process, with 0 workers and with 2
  that fetch 2 and 4 batches ahead each; at every interruption the loader is dropped with what it has fetched, and
  all that the next run is told is the number of the step.
* Peers that really run: torch's ``DistributedSampler``; mosaicml-streaming and webdataset from an environment of their
  own (``make peers``; without it the row says so).
* Published rules, simulated: :mod:`benchmarks.published_rules`.

Skipping what a rank has seen is right with ``DistributedSampler`` if what is skipped is recomputed for the new number of
ranks (steps times accumulated batches); the two rows show it with and without.

The claim: 0 for ours, everywhere.
"""

import argparse
import json
import subprocess
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from benchmarks.peers_scenarios import SCENARIOS, Run, count_wrong
from benchmarks.published_rules import (
    Integers,
    bagel_resume,
    nemo_resume,
    open_sora_resume,
    pixart_resume,
    token_budget,
)
from benchmarks.timing import report
from lensmini.data.buckets import LENS_BUCKETS
from lensmini.data.plan import BatchPlan
from lensmini.data.sampler import BucketBatchSampler

__all__ = ["Numbers", "distributed_sampler_run", "main", "our_run", "peer_rows", "published_runs"]

NUM_SLOTS, IMAGES = 16, 4
# Square, tall and wide canvases of the three bases; the odd sizes end epochs and batches at different places.
CHOSEN, SIZES = (4, 0, 13, 9, 17, 22, 18, 26), (2311, 1850, 1790, 1537, 1279, 1801, 768, 1464)
PEERS = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"


class Numbers(Dataset[int]):
    """Each sample is its own number."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def bucket_tokens() -> Integers:
    """Image tokens of the chosen buckets."""
    return np.array([LENS_BUCKETS[index].tokens() for index in CHOSEN], np.int64)


def our_run(mode: str, num_workers: int, prefetch: int | None) -> Run:
    """The plan behind one ``DataLoader`` for each rank; the state is the next step and nothing else."""

    def run(state: Any, num_steps: int, num_ranks: int) -> tuple[list[list[tuple[int, int, int]]], Any]:
        # A restarted process makes its plan anew.
        plan = BatchPlan(SIZES, bucket_tokens(), num_slots=NUM_SLOTS, images_per_slot=IMAGES, seed=0, mode=mode)  # pyright: ignore[reportArgumentType]
        start, micro_steps = state or 0, plan.micro_steps(num_ranks)
        steps: list[list[tuple[int, int, int]]] = [[] for _ in range(num_steps)]
        for rank in range(num_ranks):
            loader = DataLoader(
                Numbers(sum(SIZES)),
                batch_sampler=BucketBatchSampler(plan, rank, num_ranks, start),
                num_workers=num_workers,
                prefetch_factor=prefetch,
                collate_fn=list,
            )
            batches = iter(loader)  # without end: workers have fetched further when it is dropped
            for index in range(num_steps * micro_steps):
                slot = index % micro_steps * num_ranks + rank
                places = ((slot, place, sample) for place, sample in enumerate(next(batches)))
                steps[index // micro_steps] += places
            del batches
        return steps, start + num_steps

    return run


def distributed_sampler_run(resume: str, num_samples: int = sum(SIZES)) -> Run:
    """torch's ``DistributedSampler`` and ``DataLoader``; it has no state beyond ``set_epoch``.

    Args:
        resume: ``"epoch"`` starts the epoch again; ``"batches"`` skips as many batches as a rank had taken, which is what
            a saved batch counter says; ``"steps"`` skips the steps times the batches that a rank now accumulates.
        num_samples: of the data set.
    """

    def run(state: Any, num_steps: int, num_ranks: int) -> tuple[list[list[int]], Any]:
        saved = {"batches": 0, "steps": 0} if state is None else state
        micro_steps = NUM_SLOTS // num_ranks
        skip = {"epoch": 0, "batches": saved["batches"], "steps": saved["steps"] * micro_steps}[resume]
        steps: list[list[int]] = [[] for _ in range(num_steps)]
        for rank in range(num_ranks):
            data = Numbers(num_samples)
            sampler = DistributedSampler(data, num_ranks, rank, shuffle=True, seed=0)
            sampler.set_epoch(0)
            loader = DataLoader(data, batch_size=IMAGES, sampler=sampler, collate_fn=list)
            for index, batch in enumerate(islice(loader, skip, skip + num_steps * micro_steps)):
                steps[index // micro_steps] += batch
        return steps, {"batches": skip + num_steps * micro_steps, "steps": saved["steps"] + num_steps}

    return run


def published_runs() -> dict[str, Run]:
    """The published rules on the same samples."""
    buckets = np.repeat(np.arange(len(SIZES)), SIZES)
    image = bucket_tokens()[buckets]
    text = np.clip(np.random.default_rng(0).lognormal(np.log(150), 0.4, len(image)), 8, 400).astype(np.int64)
    tokens = image + text
    sizes = token_budget(bucket_tokens(), IMAGES * float(tokens.mean()))
    target = (IMAGES - 0.5) * float(tokens.mean())
    return {
        "PixArt, kohya: no state": pixart_resume(buckets, images=IMAGES, num_slots=NUM_SLOTS),
        "NeMo Automodel: batches since the resume": nemo_resume(buckets, images=IMAGES, num_slots=NUM_SLOTS),
        "Open-Sora: step x ranks, true step": open_sora_resume(buckets, images_of_bucket=sizes, num_slots=NUM_SLOTS),
        "Open-Sora: step x ranks, the loader's count, 2 x 2 ahead": open_sora_resume(
            buckets, images_of_bucket=sizes, num_slots=NUM_SLOTS, fetched_ahead=4
        ),
        "BAGEL: reader places, no buffer, no random state": bagel_resume(
            tokens, buckets % 2, target=target, cap=1.125 * target, num_slots=NUM_SLOTS
        ),
    }


def peer_rows(python: Path) -> dict[str, dict[str, int] | str]:
    """Wrong samples of the packages in the peers' environment, or why there are none."""
    if not python.exists():
        return {"mosaicml-streaming": "not installed: make peers", "webdataset": "not installed: make peers"}
    command = [str(python), "-W", "ignore", "-m", "benchmarks.peers_streaming"]
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=300)
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, json.JSONDecodeError, IndexError) as error:
        return {"mosaicml-streaming, webdataset": f"did not run: {type(error).__name__}"}


def count_all(runs: Mapping[str, Run]) -> dict[str, dict[str, int]]:
    """Wrong samples of each run in each scenario."""
    rows = {}
    for name, run in runs.items():
        expected, _ = run(None, SCENARIOS[0].num_steps, SCENARIOS[0].segments[0][1])
        rows[name] = {scenario.name: count_wrong(run, scenario, expected) for scenario in SCENARIOS}
    return rows


def main(python: Path = PEERS, *, workers: bool = True) -> None:
    """Count for every contestant and print the result line."""
    torch.set_num_threads(1)
    ours = {f"ours, {mode}, 0 workers": our_run(mode, 0, None) for mode in ("packed", "bucket", "same_bucket")}
    if workers:
        ours |= {f"ours, packed, 2 workers, prefetch {ahead}": our_run("packed", 2, ahead) for ahead in (2, 4)}
    torch_runs = {
        "torch DistributedSampler: start of the epoch": distributed_sampler_run("epoch"),
        "torch DistributedSampler: skip the batches taken": distributed_sampler_run("batches"),
        "torch DistributedSampler: skip steps x accumulation": distributed_sampler_run("steps"),
    }
    our_counts = count_all(ours)
    rows: dict[str, dict[str, int] | str] = {**our_counts, **count_all(torch_runs), **peer_rows(python)}
    rows |= {f"rule of {name}": row for name, row in count_all(published_runs()).items()}

    width = max(map(len, rows))
    print(
        f"{'wrong samples, of 64 a step for 24 steps':{width}s}", *(f"{scenario.name:>18s}" for scenario in SCENARIOS)
    )
    for name, row in rows.items():
        cells = [f"  {row}"] if isinstance(row, str) else [f"{row[scenario.name]:18d}" for scenario in SCENARIOS]
        print(f"{name:{width}s}", *cells)
    wrong = sum(sum(row.values()) for row in our_counts.values())
    segments = {scenario.name: scenario.segments for scenario in SCENARIOS}
    details = {"steps_and_ranks": segments, "images_of_a_step": NUM_SLOTS * IMAGES, "wrong_samples": rows}
    report("plan_resume", ratio=wrong, goal=0, better="lower", holds=wrong == 0, details=details)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Samples that an interrupted run gets wrong, ours and peers")
    parser.add_argument("--peers", type=Path, default=PEERS, help="Python of the peers' environment (make peers)")
    parser.add_argument("--no-workers", action="store_true", help="leave out the rows with worker processes")
    arguments = parser.parse_args()
    main(arguments.peers, workers=not arguments.no_workers)
